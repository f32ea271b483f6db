"""What one of a run's workers does: the phases one after another, from the newest checkpoint.

Every worker trains; the first one also writes. What happens between workers goes through the
functions of `kpmask.train.Worker`, and what they tell whoever started them through `Line`, so that
nothing here knows of Ray.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from kpmask import checkpoint as weights_file
from kpmask.config import TrainJob
from kpmask.data.frame_cache import FrameCache
from kpmask.data.loader import BatchLoader
from kpmask.data.pairs import PairSampler
from kpmask.device import Precision, keep_freed_memory, training_precision
from kpmask.errors import ConfigError, RunFailed, StorageError
from kpmask.model_config import Part
from kpmask.models.base import Batch
from kpmask.perceptual import PerceptualFeatures, load_perceptual
from kpmask.records import Progress, RunManifest, StepMetrics
from kpmask.train import (
    PhasePlan,
    StepResult,
    System,
    Trainer,
    Worker,
    derived_seed,
    fit,
    initial_system,
    load_weights,
    plan_phases,
    shares_statistics,
)
from kpmask.train_pictures import batch_strip, png_bytes, sample_batch, sample_strip
from kpmask.validation import Validation
from tasks import checkpoints, train_folder
from tasks.checkpoints import TrainingCheckpoint
from tasks.manifest import write_json
from tasks.outbox import Outbox
from tasks.storage import local_copy
from tasks.train_folder import RunFolder, TrainingData
from tasks.train_log import RunLog

log = logging.getLogger(__name__)

POST_EVERY_S = 0.5


@dataclass(frozen=True)
class Line:
    """How a worker talks to whoever started it.

    Attributes:
        post: takes the first worker's progress; true asks all workers to stop.
        report: takes numbers from every worker, from all of them equally often.
    """

    post: Callable[[Progress], bool]
    report: Callable[[dict[str, Any]], None] = lambda numbers: None


def samplers(job: TrainJob, data: TrainingData, worker: Worker) -> list[PairSampler]:
    """Each phase's pairs for this worker.

    Raises:
        DatasetError: no clips, or an epoch that does not fill one batch.
    """
    return [
        PairSampler(
            data.train,
            num_repeats=job.num_repeats,
            batch_size=phase.batch_size,
            seed=derived_seed(job.seed, index, 2),
            rank=worker.rank,
            world_size=worker.count,
        )
        for index, phase in enumerate(job.phases)
    ]


def run_worker(job: TrainJob, worker: Worker, line: Line) -> bool:
    """Train all phases; whether the run is finished (else it was asked to stop).

    Raises:
        DatasetError, ConfigError, CheckpointError, StorageError: before the first step.
        RunFailed: the loss is not finite any more.
    """
    keep_freed_memory()
    data = train_folder.open_data(job)
    folder = RunFolder.of(job, data.dataset_id)
    features = load_perceptual(job.perceptual, job.perceptual_weights)
    run = _Run(job, data, folder, worker, line, features)
    if worker.rank == 0:
        log.info("perceptual features: %s; convolutions in %s", job.perceptual, run.precision)
        if worker.count > 1 and not shares_statistics(worker):
            log.info("batch norm's statistics stay each worker's own: torch shares them on GPUs")
    with contextlib.closing(run.log):
        return run.phases()


class _Run:
    """A worker's way through a run."""

    def __init__(
        self,
        job: TrainJob,
        data: TrainingData,
        folder: RunFolder,
        worker: Worker,
        line: Line,
        features: PerceptualFeatures | None,
    ) -> None:
        self.job, self.data, self.folder = job, data, folder
        self.worker, self.line, self.features = worker, line, features
        self.precision: Precision = training_precision(job, worker.device)
        self.read = FrameCache(data.dataset.read)
        self.outbox = Outbox()
        self.pairs = samplers(job, data, worker)
        self.plans = plan_phases(job, pairs_per_epoch=self.pairs[0].pairs_per_epoch)
        self.log = RunLog(folder, job, self.plans)
        self.validation: Validation | None = None
        if worker.rank == 0 and data.test:
            self.validation = Validation(self.read, data.test, device=worker.device)

    def phases(self) -> bool:
        """Every phase in turn, then the result."""
        found = checkpoints.newest(self.folder.store)
        self._check_same(found)
        if found is not None and self.worker.rank == 0:
            self.log.restore(found)
        before: Mapping[str, Tensor] | None = None
        system: System | None = None
        for plan, sampler in zip(self.plans, self.pairs, strict=True):
            if found is not None and plan.index < found.phase_index:
                continue
            start = found if found is not None and found.phase_index == plan.index else None
            phase = _PhaseRun(self, plan, sampler, start, before)
            if not phase.train():
                return False
            system = phase.trainer.result
            before = system.state_dict()
        assert system is not None
        if self.worker.rank == 0:
            result = system
            self.outbox.send("the result", lambda: self._publish(result))
            self.outbox.drain()
        return True

    def _check_same(self, found: TrainingCheckpoint | None) -> None:
        """Workers on other machines must see the same storage, or they would train apart."""
        place = [-1.0, -1.0] if found is None else [float(found.phase_index), float(found.step)]
        mean = self.worker.mean(torch.tensor(place, dtype=torch.float64)).tolist()
        if mean != place:
            raise ConfigError(
                "the workers find different checkpoints there",
                subject=self.job.out,
                hint="use storage that all machines share",
            )

    def info(self) -> dict[str, Any]:
        """How the weights came to be, for those who get the file alone."""
        return {
            "run_id": self.folder.run_id,
            "settings_digest": self.folder.settings_digest,
            "dataset_id": self.data.dataset_id,
            "phases": [
                {"name": p.phase.name, "system": p.phase.model.system, "steps": p.num_steps}
                for p in self.plans
            ],
            "perceptual": self.job.perceptual,
            "precision": self.precision,
            "seed": self.job.seed,
            "image_size_px": self.plans[-1].phase.model.image_size_px,
        }

    def publish_weights(self, key: str, system: System) -> str:
        """Store a weights file; its SHA-256."""
        with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
            path = Path(folder) / "weights.safetensors"
            sha256 = weights_file.save(path, system, self.info())
            self.folder.store.put_file(key, path)
        return sha256

    def _publish(self, system: System) -> None:
        """The result; its manifest last."""
        sha256 = self.publish_weights(train_folder.WEIGHTS, system)
        manifest = RunManifest(
            uri=self.folder.store.uri,
            run_id=self.folder.run_id,
            settings_digest=self.folder.settings_digest,
            dataset_id=self.data.dataset_id,
            system=self.plans[-1].phase.model.system,
            perceptual=self.job.perceptual,
            num_steps=sum(plan.num_steps for plan in self.plans),
            final_loss=self.log.metrics[-1].loss,
            weights_sha256=sha256,
            precision=self.precision,
        )
        self.log.write(manifest)
        write_json(self.folder.store, train_folder.MANIFEST, manifest)


class _PhaseRun:
    """One phase of a run: its trainer, and what happens around the steps."""

    def __init__(
        self,
        run: _Run,
        plan: PhasePlan,
        sampler: PairSampler,
        start: TrainingCheckpoint | None,
        before: Mapping[str, Tensor] | None,
    ) -> None:
        self.run, self.plan, self.sampler = run, plan, sampler
        self.first = run.worker.rank == 0
        self.system = initial_system(plan, seed=run.job.seed, before=self._before(before))
        if start is not None:
            load_weights(self.system, start.weights, subject=f"checkpoint of {start.phase}")
        self.trainer = Trainer(
            plan,
            self.system,
            features=run.features,
            seed=run.job.seed,
            worker=run.worker,
            precision=run.precision,
            compile_losses=run.job.compile,
        )
        if start is not None:
            self.trainer.load_state_dict(start.trainer)
            self._check_precision(start)
        self.saved_step = -1 if start is None else start.step
        self.shown = self._shown()
        self.started_s = self.posted_s = self.logged_s = time.monotonic()
        self.started_step = self.logged_step = self.trainer.step_number

    def _check_precision(self, start: TrainingCheckpoint) -> None:
        was, now = start.trainer.get("precision", self.run.precision), self.run.precision
        if was != now and self.first:
            log.warning("convolutions were computed in %s so far, and are in %s now", was, now)

    def _before(self, before: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        """The weights that the phase starts from: a file's detector, else the phase before."""
        if self.plan.phase.detector_weights is None:
            return before
        path = local_copy(self.plan.phase.detector_weights)
        config: Part = getattr(self.plan.phase.model, "detector")  # noqa: B009 - not every model's
        return weights_file.load_detector(path, config=config)

    def _shown(self) -> Batch | None:
        if not self.first:
            return None
        batch = sample_batch(self.run.read, self.run.data.shown)
        device = self.run.worker.device
        return Batch(batch.source_BCHW.to(device), batch.driving_BCHW.to(device))

    def train(self) -> bool:
        """The steps that are left; whether the phase is finished."""
        plan, trainer = self.plan, self.trainer
        loader = BatchLoader(
            self.run.read,
            self.sampler,
            self.run.job.augmentation,
            device=self.run.worker.device,
        )
        if self.first and trainer.step_number == 0:
            self._write_samples()
        with contextlib.closing(loader.batches(trainer.step_number, plan.num_steps)) as batches:
            done = fit(trainer, batches, after_step=self._after_step, on_failure=self._keep_batch)
        self._save()
        if done and self.first and plan is not self.run.plans[-1]:
            key = f"{train_folder.PHASES}/{plan.phase.name}.safetensors"
            self.run.outbox.send(key, lambda: self.run.publish_weights(key, trainer.result))
        self.run.outbox.drain()
        return done

    def _after_step(self, result: StepResult) -> bool:
        """Log, show, score, save; whether to stop."""
        job, done = self.run.job, self.trainer.step_number
        last = done == self.plan.num_steps
        if self.first and (done % job.log_every_steps == 0 or last):
            self._log(result)
        if self.first and (done % job.sample_every_steps == 0 or last):
            self._write_samples()
        every = job.validate_every_steps or job.checkpoint_every_steps
        if self.first and (done % every == 0 or last):
            self._validate()
        if done % job.checkpoint_every_steps == 0 and not last:
            self._save()
        self.run.outbox.poll()
        return self._asked_to_stop(result, last=last)

    def _log(self, result: StepResult) -> None:
        now_s, done = time.monotonic(), self.trainer.step_number
        pairs = (done - self.logged_step) * self.plan.phase.batch_size
        rate = pairs / max(now_s - self.logged_s, 1e-9)
        self.logged_s, self.logged_step = now_s, done
        metrics = StepMetrics(
            phase=self.plan.phase.name,
            step=done,
            epoch=self.sampler.epoch(done),
            learning_rate=result.learning_rate,
            loss=result.loss,
            term_names=tuple(result.terms),
            term_values=tuple(result.terms.values()),
            samples_per_s=rate,
        )
        self.run.log.add_step(metrics)

    def _write_samples(self) -> None:
        assert self.shown is not None
        name = f"{self.plan.phase.name}-step-{self.trainer.step_number:06d}.png"
        strip = png_bytes(sample_strip(self.trainer.result, self.shown))
        key = f"{train_folder.SAMPLES}/{name}"
        self.run.outbox.send(key, lambda: self.run.folder.store.put(key, strip))

    def _validate(self) -> None:
        if self.run.validation is not None:
            scores = self.run.validation.scores(
                self.trainer.result, phase=self.plan.phase.name, step=self.trainer.step_number
            )
            self.run.log.add_scores(scores)

    def _save(self) -> None:
        """A checkpoint of this step, unless there is one; all workers report."""
        done = self.trainer.step_number
        if done == self.saved_step:
            return
        self.saved_step = done
        if self.first:
            self.run.outbox.send("the checkpoint", self._write_checkpoint)
        self.run.line.report({"phase": self.plan.phase.name, "step": done})

    def _write_checkpoint(self) -> None:
        """A checkpoint of now, which is later than it was due if the store was gone."""
        # The metrics first: of a checkpoint that exists, the metrics exist as well.
        self.run.log.write()
        checkpoint = TrainingCheckpoint(
            phase_index=self.plan.index,
            phase=self.plan.phase.name,
            step=self.trainer.step_number,
            weights=self.system.state_dict(),
            trainer={**self.trainer.state_dict(), "precision": self.run.precision},
        )
        checkpoints.publish(self.run.folder.store, checkpoint)

    def _asked_to_stop(self, result: StepResult, *, last: bool) -> bool:
        """Tell how far it is, and learn whether to stop; the workers agree on it."""
        stop = 0.0
        now_s = time.monotonic()
        if self.first and (last or now_s - self.posted_s >= POST_EVERY_S):
            self.posted_s = now_s
            stop = float(self.run.line.post(self._progress(result, now_s)))
        return bool(self.run.worker.mean(torch.tensor([stop])).item() > 0)

    def _progress(self, result: StepResult, now_s: float) -> Progress:
        done, plans = self.trainer.step_number, self.run.plans
        steps_per_s = (done - self.started_step) / max(now_s - self.started_s, 1e-9)
        total = sum(plan.num_steps for plan in plans)
        before = self.plan.steps_before + done
        message = (
            f"{self.plan.phase.name} {done}/{self.plan.num_steps}, loss {result.loss:.3f}, "
            f"{steps_per_s * self.plan.phase.batch_size:.1f} samples/s, "
            f"{_duration((total - before) / steps_per_s)} left"
        )
        return Progress(stage="train", done=before, total=total, message=message)

    def _keep_batch(self, batch: Batch, error: RunFailed) -> RunFailed:
        """Keep the batch on which the loss was not finite; the error that says where."""
        tensors = {"source_BCHW": batch.source_BCHW, "driving_BCHW": batch.driving_BCHW}
        name = f"{self.plan.phase.name}-step-{self.trainer.step_number:06d}"
        key = f"{train_folder.FAILED}/{name}-worker-{self.run.worker.rank}"
        data = safetensors.torch.save({n: t.cpu().contiguous() for n, t in tensors.items()})
        try:
            self.run.folder.store.put(f"{key}.safetensors", data)
            self.run.folder.store.put(f"{key}.png", png_bytes(batch_strip(batch)))
        except StorageError as gone:
            log.error("the batch of the failed step could not be kept: %s", gone)
            return error
        if self.first:
            # So that the page shows where the run stopped; a restore cuts the tables back.
            self.run.outbox.send("the page", self.run.log.write)
        return RunFailed(
            f"{error.cause}; its batch is kept in {key}.safetensors and .png",
            subject=error.subject,
            code=error.code,
            hint=error.hint,
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

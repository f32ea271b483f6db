"""What one of a run's workers does: the phases one after another, from the newest checkpoint.

Every worker trains; the first one also writes. What happens between workers goes through the
functions of `kpmask.train.Worker`, and what they tell whoever started them through `Line`, so that
nothing here knows of Ray.
"""

from __future__ import annotations

import io
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kpmask import checkpoint as weights_file
from kpmask.config import TrainJob
from kpmask.data.loader import BatchLoader
from kpmask.data.pairs import PairSampler
from kpmask.device import Precision, training_precision
from kpmask.errors import ConfigError
from kpmask.model_config import Part
from kpmask.models.base import Batch
from kpmask.perceptual import PerceptualFeatures, load_perceptual
from kpmask.records import Progress, RunManifest, StepMetrics
from kpmask.report import loss_curve_svg
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
)
from kpmask.train_pictures import png_bytes, sample_batch, sample_strip
from tasks import checkpoints, train_folder
from tasks.checkpoints import TrainingCheckpoint
from tasks.manifest import read_table_if_any, write_json, write_table
from tasks.storage import local_copy
from tasks.train_folder import RunFolder, TrainingData

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
    data = train_folder.open_data(job)
    folder = RunFolder.of(job, data.dataset_id)
    features = load_perceptual(job.perceptual, job.perceptual_weights)
    if worker.rank == 0:
        precision = training_precision(job, worker.device)
        log.info("perceptual features: %s; convolutions in %s", job.perceptual, precision)
    return _Run(job, data, folder, worker, line, features).phases()


@dataclass
class _Run:
    """A worker's way through a run."""

    job: TrainJob
    data: TrainingData
    folder: RunFolder
    worker: Worker
    line: Line
    features: PerceptualFeatures | None
    metrics: list[StepMetrics] = field(default_factory=list)

    @property
    def precision(self) -> Precision:
        return training_precision(self.job, self.worker.device)

    def phases(self) -> bool:
        """Every phase in turn, then the result."""
        pairs = samplers(self.job, self.data, self.worker)
        self.plans = plan_phases(self.job, pairs_per_epoch=pairs[0].pairs_per_epoch)
        found = checkpoints.newest(self.folder.store)
        self._check_same(found)
        self._restore_metrics(found)
        before: Mapping[str, Tensor] | None = None
        system: System | None = None
        for plan, sampler in zip(self.plans, pairs, strict=True):
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
            self._publish(system)
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

    def _restore_metrics(self, found: TrainingCheckpoint | None) -> None:
        """Take up the metrics as of the checkpoint; what came after it will come again."""
        if found is None or self.worker.rank != 0:
            return
        order = {plan.phase.name: plan.index for plan in self.plans}
        rows = read_table_if_any(self.folder.store, train_folder.METRICS, StepMetrics) or []
        limit = (found.phase_index, found.step)
        self.metrics = [m for m in rows if (order[m.phase], m.step) <= limit]

    def write_report(self, manifest: RunManifest | None = None) -> None:
        """Metrics, their curve and the page, all as of now."""
        store = self.folder.store
        write_table(
            store,
            train_folder.METRICS,
            self.metrics,
            StepMetrics,
            metadata={"settings_digest": self.folder.settings_digest},
        )
        curve = loss_curve_svg(self.metrics)
        page = train_folder.page(store, manifest, self.metrics, curve_svg=curve)
        store.put(train_folder.CURVE, curve.encode())
        store.put(train_folder.PAGE, page.encode())

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
            final_loss=self.metrics[-1].loss,
            weights_sha256=sha256,
            precision=self.precision,
        )
        self.write_report(manifest)
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
        )
        if start is not None:
            self.trainer.load_state_dict(start.trainer)
        self.saved_step = -1 if start is None else start.step
        self.shown = self._shown()
        self.started_s = self.posted_s = self.logged_s = time.monotonic()
        self.started_step = self.logged_step = self.trainer.step_number

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
        batch = sample_batch(self.run.data.dataset.read, self.run.data.shown)
        device = self.run.worker.device
        return Batch(batch.source_BCHW.to(device), batch.driving_BCHW.to(device))

    def train(self) -> bool:
        """The steps that are left; whether the phase is finished."""
        job, plan, trainer = self.run.job, self.plan, self.trainer
        loader = BatchLoader(
            self.run.data.dataset.read,
            self.sampler,
            job.augmentation,
            device=self.run.worker.device,
        )
        batches = loader.batches(trainer.step_number, plan.num_steps)
        if self.first and trainer.step_number == 0:
            self._write_samples()
        done = fit(trainer, batches, after_step=self._after_step, on_failure=self._keep_batch)
        self._save()
        if done and self.first and plan is not self.run.plans[-1]:
            key = f"{train_folder.PHASES}/{plan.phase.name}.safetensors"
            self.run.publish_weights(key, trainer.result)
        return done

    def _after_step(self, result: StepResult) -> bool:
        """Log, show, save; whether to stop."""
        job, done = self.run.job, self.trainer.step_number
        last = done == self.plan.num_steps
        if self.first and (done % job.log_every_steps == 0 or last):
            self._log(result)
        if self.first and (done % job.sample_every_steps == 0 or last):
            self._write_samples()
        if done % job.checkpoint_every_steps == 0 and not last:
            self._save()
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
        self.run.metrics.append(metrics)

    def _write_samples(self) -> None:
        assert self.shown is not None
        name = f"{self.plan.phase.name}-step-{self.trainer.step_number:06d}.png"
        strip = png_bytes(sample_strip(self.trainer.result, self.shown))
        self.run.folder.store.put(f"{train_folder.SAMPLES}/{name}", strip)

    def _save(self) -> None:
        """A checkpoint of this step, unless there is one; all workers report."""
        done = self.trainer.step_number
        if done == self.saved_step:
            return
        self.saved_step = done
        if self.first:
            # The metrics first: of a checkpoint that exists, the metrics exist as well.
            self.run.write_report()
            checkpoint = TrainingCheckpoint(
                phase_index=self.plan.index,
                phase=self.plan.phase.name,
                step=done,
                weights=self.system.state_dict(),
                trainer=self.trainer.state_dict(),
            )
            checkpoints.publish(self.run.folder.store, checkpoint)
        self.run.line.report({"phase": self.plan.phase.name, "step": done})

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

    def _keep_batch(self, batch: Batch) -> None:
        """The batch on which the loss was not finite, for whoever wants to know why."""
        buffer = io.BytesIO()
        tensors = {"source_BCHW": batch.source_BCHW, "driving_BCHW": batch.driving_BCHW}
        torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, buffer)
        name = f"{self.plan.phase.name}-step-{self.trainer.step_number:06d}"
        key = f"failed/{name}-worker-{self.run.worker.rank}.pt"
        self.run.folder.store.put(key, buffer.getvalue())
        log.error("the batch of the failed step is kept in %s", key)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""A dataset -> a trained model: the training job on Ray Train.

- Ray Train starts the workers, joins them (gloo on CPUs, NCCL on GPUs) and starts them again when
  one dies; fewer of them, if the job allows it and no more can be had. What they have done is in
  our own storage, so a restart, a rerun of the command and a run on another machine all go on in
  the same way: from the newest checkpoint there.
- The driver waits in `fit` on a thread of its own, passes progress on, and turns Ctrl-C into a
  request to stop, upon which the workers leave a checkpoint.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor, nn

from kpmask.config import TrainJob
from kpmask.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    KpmaskError,
    RunFailed,
)
from kpmask.perceptual import load_perceptual
from kpmask.records import Progress, RunManifest
from kpmask.train import Worker, plan_phases
from tasks import train_folder
from tasks.channel import Channel
from tasks.cluster import environment, ray_session
from tasks.train_folder import RunFolder
from tasks.train_log import require_tensorboard
from tasks.train_worker import Line, run_worker, samplers

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]

POLL_S = 0.5
STOP_PATIENCE_S = 60.0  # for the step that runs and a checkpoint
LOSS_PATIENCE_S = 30.0  # for a lost worker's place to come back
# How often Ray Train looks at its workers. With its own 2 s it takes that long to hear that they
# have ended or died, and each waits for as long at every checkpoint but the first: what a worker
# reports is kept until the next look, and there is room for one report.
LOOK_VARIABLE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
LOOK_S = 0.25


def train(job: TrainJob, *, on_progress: OnProgress | None = None) -> RunManifest:
    """Train the job's phases with Ray Train and return the finished run's manifest.

    A finished run returns at once; an interrupted one goes on from its newest checkpoint.

    Raises:
        ConfigError: `out` holds a run with other settings; or Ray has too few CPUs or GPUs.
        DatasetError: the dataset cannot be trained on.
        CheckpointError: weights that the job names cannot be had or do not fit.
        RunFailed: the loss is not finite any more, or the workers died too often.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint left behind.
    """
    job = train_folder.placed(job)
    folder, finished = _prepared(job)
    if finished is not None:
        return finished
    looks = {LOOK_VARIABLE: os.environ.get(LOOK_VARIABLE, str(LOOK_S))}
    with environment(looks), ray_session():
        _fit(job, on_progress or _ignore)
    return _manifest(folder)


def train_here(job: TrainJob, *, on_progress: OnProgress | None = None) -> RunManifest:
    """`train` with one worker in this process, without Ray; results are the same.

    Raises:
        KpmaskError: as `train`.
    """
    if job.num_workers != 1:
        raise ConfigError("one process is one worker", subject="num_workers")
    folder, finished = _prepared(job)
    if finished is not None:
        return finished
    device = "cuda" if job.use_gpu else "cpu"
    run_worker(job, Worker(device=device), Line(post=_never_stop(on_progress or _ignore)))
    return _manifest(folder)


def plan(job: TrainJob) -> list[str]:
    """What `train` would do, a line a phase; nothing is written.

    Raises:
        DatasetError: the dataset cannot be trained on.
    """
    data = train_folder.open_data(job)
    pairs = samplers(job, data, Worker())[0]
    plans = plan_phases(job, pairs_per_epoch=pairs.pairs_per_epoch)
    return [
        f"phase {p.phase.name} ({p.phase.model.system}): {p.num_steps} steps of "
        f"{p.phase.batch_size} pairs from {pairs.num_identities} identities"
        for p in plans
    ]


def _ignore(progress: Progress) -> None:
    """For callers who do not want to know."""


def _never_stop(on_progress: OnProgress) -> Callable[[Progress], bool]:
    def post(progress: Progress) -> bool:
        on_progress(progress)
        return False

    return post


def _prepared(job: TrainJob) -> tuple[RunFolder, RunManifest | None]:
    """The run's folder, checked and claimed, and its manifest if there is nothing to do.

    All that can be wrong with the job is found here, before any worker starts.
    """
    data = train_folder.open_data(job)
    samplers(job, data, Worker())
    folder = RunFolder.of(job, data.dataset_id)
    finished = folder.finished() if job.resume else None
    if finished is not None:
        log.info("run %s is finished already", folder.run_id)
        return folder, finished
    load_perceptual(job.perceptual, job.perceptual_weights)
    if job.tensorboard:
        require_tensorboard()
    folder.claim(job)
    log.info("run %s: perceptual features are %s", folder.run_id, job.perceptual)
    return folder, None


def _manifest(folder: RunFolder) -> RunManifest:
    manifest = folder.finished()
    if manifest is None:
        raise RunFailed("the workers ended without a result", code="training_failed")
    return manifest


# --- the driver ------------------------------------------------------------------------------


def _fit(job: TrainJob, on_progress: OnProgress) -> None:
    """Run the workers to the end, starting them again as often as the job allows.

    The same number of workers is Ray Train's to start again. With `min_workers` it is ours: Ray's
    own elasticity would also take numbers that no batch divides by, and would stop a training
    that goes well as soon as there is room for more workers.
    """
    channel = Channel.open()
    threads, count, restarts = _threads_per_worker(job), job.num_workers, 0
    try:
        while True:
            error = _attempt(_trainer(job, channel, count, threads), channel, on_progress)
            if error is None:
                return
            lost_worker = not isinstance(error, ray.train.ControllerError)  # else none was had
            if job.min_workers is None or (lost_worker and restarts == job.max_restarts):
                raise RunFailed(
                    f"the workers failed: {_last_line(error)}", code="training_failed"
                ) from error
            restarts += lost_worker
            count = _count_to_be_had(job, threads)
            log.warning(
                "workers were lost: going on from the newest checkpoint with %d of %d (%s)",
                count,
                job.num_workers,
                _last_line(error),
            )
    finally:
        channel.close()


def _attempt(trainer: TorchTrainer, channel: Channel, on_progress: OnProgress) -> Exception | None:
    """Run the workers once, passing their progress on; what went wrong with Ray.

    Raises:
        KpmaskError: what a worker found wrong with the job.
    """
    waiting = _Waiting(trainer)
    waiting.start()
    try:
        _follow(waiting, channel, on_progress)
    except KeyboardInterrupt:
        log.warning("stopping: the workers finish their step and leave a checkpoint")
        channel.stop()
        waiting.ended.wait(STOP_PATIENCE_S)
        raise
    _, error = channel.read()
    if error is not None:
        raise error
    return waiting.error


def _count_to_be_had(job: TrainJob, threads: int) -> int:
    """How many workers to go on with: all of them if they can be had soon, else the most.

    Every phase's batch must divide by it. Waits for as long as there are fewer than `min_workers`.
    """
    least = job.min_workers or job.num_workers
    allowed = [n for n in range(least, job.num_workers + 1) if _shares_batches(job, n)]
    end_s = time.monotonic() + LOSS_PATIENCE_S
    while True:
        there = _resources()
        possible = int(there.get("CPU", 0) // threads)
        if job.use_gpu:
            possible = min(possible, int(there.get("GPU", 0)))
        fitting = [n for n in allowed if n <= possible]
        if fitting and (fitting[-1] == job.num_workers or time.monotonic() > end_s):
            return fitting[-1]
        time.sleep(POLL_S)


def _shares_batches(job: TrainJob, count: int) -> bool:
    return all(phase.batch_size % (count * phase.accumulate) == 0 for phase in job.phases)


def _resources() -> dict[str, float]:
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return there


def _follow(waiting: _Waiting, channel: Channel, on_progress: OnProgress) -> None:
    shown: Progress | None = None
    while True:
        ended = waiting.ended.wait(POLL_S)
        progress, _ = channel.read()
        if progress is not None and progress != shown:
            on_progress(progress)
            shown = progress
        if ended:
            return


class _Waiting(threading.Thread):
    """Waits in `fit`, so that the main thread can hear of progress and of Ctrl-C.

    `ended` is waited for in place of the thread: in Python 3.11 a `join` that Ctrl-C interrupts
    takes the thread for finished.
    """

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True, name="ray-train")
        self._trainer = trainer
        self.ended = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            self.error = error
        finally:
            self.ended.set()


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _trainer(job: TrainJob, channel: Channel, count: int, threads: int) -> TorchTrainer:
    resources: dict[str, float] = {"CPU": float(threads)}
    if job.use_gpu:
        resources["GPU"] = 1.0
    failures = FailureConfig(max_failures=job.max_restarts)
    if job.min_workers is not None:  # ours to start again
        failures = FailureConfig(  # mypy sees the class of Ray's first version
            max_failures=0,
            controller_failure_limit=0,  # type: ignore[call-arg]
            max_preemption_failures=0,
        )
    return TorchTrainer(
        _worker_main,
        train_loop_config={
            "job": job.model_dump_json(),
            "threads": threads,
            "channel": channel,
        },
        scaling_config=ScalingConfig(
            num_workers=count, use_gpu=job.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # Ray keeps notes of its own; ours are in the run's folder, so these may go.
            storage_path=tempfile.mkdtemp(prefix="kpmask-ray-train-"),
            failure_config=failures,
        ),
    )


def _threads_per_worker(job: TrainJob) -> int:
    """Threads, and CPUs asked of Ray, for each worker.

    Raises:
        ConfigError: Ray has too little, and would wait for ever.
    """
    there = _resources()
    threads = job.threads_per_worker or max(1, int(there.get("CPU", 0) / job.num_workers))
    wanted = {"CPU": threads * job.num_workers, "GPU": job.num_workers * job.use_gpu}
    for name, count in wanted.items():
        if there.get(name, 0) < count:
            raise ConfigError(
                f"{job.num_workers} workers need {count} {name}s, and Ray has "
                f"{there.get(name, 0):g}",
                subject="num_workers",
                hint="lower num_workers or threads_per_worker, or set use_gpu = false",
            )
    return threads


# --- a worker, in its own process ------------------------------------------------------------


def _worker_main(config: dict[str, Any]) -> None:
    """What Ray Train calls in each worker."""
    channel: Channel = config["channel"]
    job = TrainJob.model_validate_json(config["job"])
    torch.set_num_threads(config["threads"])
    line = Line(post=channel.post, report=ray.train.report)
    try:
        run_worker(job, _ray_worker(job), line)
    except (RunFailed, ConfigError, DatasetError, CheckpointError) as error:
        # It would be the same again: end without a restart, and let the driver raise it.
        channel.fail(error)
    except KpmaskError as error:
        log.warning("worker failed: %s", error)
        raise


def _ray_worker(job: TrainJob) -> Worker:
    context = ray.train.get_context()
    device = str(ray.train.torch.get_device()) if job.use_gpu else "cpu"
    count = context.get_world_size()
    if count == 1:
        return Worker(device=device)
    return Worker(
        rank=context.get_world_rank(),
        count=count,
        device=device,
        wrap=_shared,
        mean=functools.partial(_mean_over_workers, device=device, count=count),
    )


def _shared(module: nn.Module) -> nn.Module:
    # A loss that begins in a later epoch leaves its network without a gradient until then.
    wrapped: nn.Module = ray.train.torch.prepare_model(
        module, parallel_strategy_kwargs={"find_unused_parameters": True}
    )
    return wrapped


def _mean_over_workers(values: Tensor, *, device: str, count: int) -> Tensor:
    # NCCL knows no tensors on the CPU, and no mean is known to gloo.
    summed = values.to(device)
    summed = summed.clone() if summed is values else summed
    torch.distributed.all_reduce(summed)
    return (summed / count).to(values.device)

"""What a comparison will do: its runs and their budgets, checked before anything is trained.

`compare.json` keeps it: what all systems share, the clips held out, and every system's steps. The
rest of the comparison reads it from there, so that each step may be done by another process.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from kpmask.animate import choose_device
from kpmask.compare import planned_lengths, steps_within, with_budget
from kpmask.config import ComparedSystem, CompareJob, TrainJob, validated
from kpmask.errors import ConfigError, DatasetError
from kpmask.evaluate import metric_info
from kpmask.losses import PerceptualLoss
from kpmask.metrics import build_metrics
from kpmask.models import build_system
from kpmask.perceptual import load_perceptual
from kpmask.records import ClipRecord, MetricInfo, Progress, StepMetrics, digest
from kpmask.score_settings import spread_pairs
from kpmask.train import Worker
from tasks import train_folder
from tasks.dataset import open_dataset
from tasks.manifest import read_json, read_table, write_json
from tasks.storage import ObjectStore, absolute, open_store
from tasks.train import train_here
from tasks.train_folder import TrainingData
from tasks.train_worker import samplers

OnProgress = Callable[[Progress], None]

COMPARE: Final = "compare.json"
# What runs need not have in common; scores of other metrics or pairs are made anew.
_OF_SCORES: Final = frozenset({"metrics", "cross_pairs", "cross_frames"})
_NOT_SHARED: Final = _OF_SCORES | {"data", "out", "systems", "seeds", "baseline", "device"}
CALIBRATION_STEPS: Final = 10
WARM_UP_STEPS: Final = 3
NEVER: Final = 10**9  # steps


@dataclass(frozen=True)
class PlannedRun:
    """A training run of the comparison."""

    name: str
    system: str
    seed: int
    job: TrainJob


@dataclass(frozen=True)
class Opened:
    """A comparison that is under way, as its `compare.json` has it.

    `scores_digest` is of all that shapes a run's scores, but for its weights.
    """

    job: CompareJob
    store: ObjectStore
    data: TrainingData
    settings_digest: str
    scores_digest: str
    metrics: tuple[MetricInfo, ...]
    runs: tuple[PlannedRun, ...]

    def run(self, name: str) -> PlannedRun:
        return next(run for run in self.runs if run.name == name)


def _ignore(progress: Progress) -> None:
    """For callers who do not want to know."""


# --- what will be done -----------------------------------------------------------------------


def plan(job: CompareJob) -> list[str]:
    """What `compare` would do, a line each; nothing is written, and no speed is measured.

    Raises:
        KpmaskError: as `prepare`.
    """
    job = _placed(job)
    data = _checked(job)
    clips = scored_clips(job, data)
    where = "held out of training by identity" if _is_held_out(job) else "of its test split"
    lines = [f"{len(data.train)} train clips, {len(clips)} to score on ({where})"]
    for system in job.systems:
        planned = _train_job(job, system, seed=job.seeds[0], name=system.name)
        pairs = _pairs_per_epoch(planned, data)
        if job.steps is not None:
            planned = with_budget(planned, job.steps, pairs_per_epoch=pairs)
        lengths = planned_lengths(planned, pairs_per_epoch=pairs)
        phases = zip(planned.phases, lengths, strict=True)
        text = ", ".join(f"{phase.name} {length}" for phase, length in phases)
        unit = "parts" if job.minutes is not None else "steps"
        lines.append(f"{system.name}: {text} {unit}, {len(job.seeds)} seeds")
    return [*lines, f"budget: {budget_text(job)}"]


def prepare(job: CompareJob, *, on_progress: OnProgress | None = None) -> tuple[str, ...]:
    """Check everything, measure speeds where the budget is in minutes, and write `compare.json`.

    Returns:
        The names of the runs, in their order.

    Raises:
        ConfigError: settings that do not go together, or `out` holds another comparison.
        DatasetError: the dataset cannot be trained on, or has nothing to score on.
        CheckpointError: the perceptual features cannot be had.
    """
    job = _placed(job)
    data = _checked(job)
    store = open_store(job.out)
    shared = _shared(job, data)
    old = read_json(store, COMPARE) if store.exists(COMPARE) else {}
    _check_same(old, job, shared)
    steps = _budgets(job, data, old.get("systems", {}), on_progress or _ignore)
    document = {
        "job": job.model_dump(mode="json"),
        "shared": shared,
        "systems": {**old.get("systems", {}), **steps},
        "held_out": _is_held_out(job),
        "test_clips": [clip.name for clip in scored_clips(job, data)],
        "test_identities": sorted({c.identity for c in data.dataset.partition("test")}),
    }
    write_json(store, COMPARE, document)
    return tuple(run.name for run in open_comparison(job).runs)


def open_comparison(job: CompareJob) -> Opened:
    """The comparison that `prepare` left."""
    job = _placed(job)
    store = open_store(job.out)
    document = read_json(store, COMPARE)
    first = _train_job(job, job.systems[0], seed=job.seeds[0], name="")
    data = train_folder.open_data(first)
    runs = []
    for seed in job.seeds:
        for system in job.systems:
            name = run_name(system.name, seed)
            run = _train_job(job, system, seed=seed, name=name)
            steps = document["systems"][system.name]["steps"]
            pairs = _pairs_per_epoch(run, data)
            if steps != sum(planned_lengths(run, pairs_per_epoch=pairs)):
                run = with_budget(run, steps, pairs_per_epoch=pairs)
            runs.append(PlannedRun(name, system.name, seed, run))
    metrics = tuple(map(metric_info, build_metrics(job.metrics)))
    scored_by = {
        "settings": digest(document["shared"]),
        "metrics": [dataclasses.asdict(metric) for metric in metrics],
        "cross_frames": job.cross_frames,
        "pairs": [
            [clip.clip_id for clip in pair]
            for pair in spread_pairs(scored_clips(job, data), job.cross_pairs)
        ],
    }
    return Opened(
        job=job,
        store=store,
        data=data,
        settings_digest=digest(document["shared"]),
        scores_digest=digest(scored_by),
        metrics=metrics,
        runs=tuple(runs),
    )


def _placed(job: CompareJob) -> CompareJob:
    return job.model_copy(update={"data": absolute(job.data), "out": absolute(job.out)})


def device_of(job: CompareJob) -> str:
    return str(choose_device(job.device))


def run_name(system: str, seed: int) -> str:
    """What a run is called, and its folder below `runs/`."""
    return system if seed == 0 else f"{system}-seed{seed}"


def _train_job(job: CompareJob, system: ComparedSystem, *, seed: int, name: str) -> TrainJob:
    """A system's training, with the phases' own lengths."""
    update = {} if job.batch_size is None else {"batch_size": job.batch_size}
    phases = [phase.model_copy(update=update) for phase in system.phases]
    values = {
        **job.train.model_dump(mode="json"),
        "data": job.data,
        "out": f"{job.out}/runs/{name}",
        "phases": [phase.model_dump(mode="json") for phase in phases],
        "seed": seed,
        "use_gpu": device_of(job) == "cuda",
        "holdout_fraction": job.holdout_fraction,
    }
    return validated(TrainJob, values)


def _pairs_per_epoch(job: TrainJob, data: TrainingData) -> int:
    return samplers(job, data, Worker())[0].pairs_per_epoch


def _checked(job: CompareJob) -> TrainingData:
    """The dataset, once all that can be wrong with the job has been looked at."""
    build_metrics(job.metrics)  # whose weights may be missing
    features = load_perceptual(job.train.perceptual, job.train.perceptual_weights)
    for system in job.systems:
        run = _train_job(job, system, seed=job.seeds[0], name=system.name)
        data = train_folder.open_data(run)
        pairs = _pairs_per_epoch(run, data)
        if job.steps is not None:
            with_budget(run, job.steps, pairs_per_epoch=pairs)
        for phase in run.phases:
            with torch.device("meta"):  # no memory, no time
                built = build_system(phase.model)
            loss = None if features is None else PerceptualLoss(features, phase.losses.scales)
            built.set_losses(phase.losses, loss)
    if not scored_clips(job, data):
        raise DatasetError(
            "it has no test clips, and one identity only: nothing can be held out",
            subject=job.data,
            code="dataset_too_small",
        )
    return data


def scored_clips(job: CompareJob, data: TrainingData) -> Sequence[ClipRecord]:
    return data.dataset.partition("test")[: job.max_clips]


def _is_held_out(job: CompareJob) -> bool:
    """Whether the test clips are taken from training, for want of others."""
    return not open_dataset(job.data).partition("test")


def budget_text(job: CompareJob) -> str:
    if job.steps is not None:
        return f"{job.steps} steps a system"
    if job.minutes is not None:
        return f"{job.minutes:g} minutes of training a system"
    return "each system's own length"


def _shared(job: CompareJob, data: TrainingData) -> dict[str, Any]:
    """All that makes the rows of the table comparable, as JSON values."""
    values = job.model_dump(mode="json", exclude=set(_NOT_SHARED))
    for name in train_folder.NO_SETTINGS | {"seed"}:
        values["train"].pop(name, None)
    return {"dataset_id": data.dataset_id, **values}


def _check_same(old: Mapping[str, Any], job: CompareJob, shared: Mapping[str, Any]) -> None:
    """Refuse to mix two comparisons; another system, seed or baseline may join.

    Raises:
        ConfigError: naming what differs.
    """
    if not old:
        return
    names = [system.name for system in job.systems]
    before = {n: s["phases_digest"] for n, s in old["systems"].items() if n in names}
    now = {s.name: _phases_digest(s) for s in job.systems if s.name in before}
    mine = {"settings": {**shared, "systems": now}}
    theirs = {"settings": {**old["shared"], "systems": before}}
    if mine != theirs:
        raise ConfigError(
            f"another comparison is here: {train_folder.differences(theirs, mine['settings'])}",
            subject=job.out,
            hint="give another --out",
        )


def _phases_digest(system: ComparedSystem) -> str:
    return digest([phase.model_dump(mode="json") for phase in system.phases])


# --- budget ----------------------------------------------------------------------------------


def _budgets(
    job: CompareJob, data: TrainingData, old: Mapping[str, Any], on_progress: OnProgress
) -> dict[str, Any]:
    """Every system's steps; speeds that were measured before are kept."""
    found = {}
    for number, system in enumerate(job.systems):
        if job.minutes is not None:
            on_progress(Progress("measure speeds", number, len(job.systems), system.name))
        if system.name in old:
            found[system.name] = old[system.name]
            continue
        run = _train_job(job, system, seed=job.seeds[0], name=system.name)
        found[system.name] = {
            "phases_digest": _phases_digest(system),
            **_budget(job, run, pairs_per_epoch=_pairs_per_epoch(run, data)),
        }
    if job.minutes is not None:
        on_progress(Progress("measure speeds", len(job.systems), len(job.systems)))
    return found


def _budget(job: CompareJob, run: TrainJob, *, pairs_per_epoch: int) -> dict[str, Any]:
    lengths = planned_lengths(run, pairs_per_epoch=pairs_per_epoch)
    if job.minutes is None:
        return {"steps": job.steps or sum(lengths), "seconds_per_step": None}
    speeds = seconds_per_step(run)
    steps = steps_within(job.minutes, lengths=lengths, seconds_per_step=speeds)
    return {"steps": steps, "seconds_per_step": speeds}


def seconds_per_step(job: TrainJob) -> list[float]:
    """How long a step of each phase takes here: a few real ones, whose results are thrown away."""
    phases = [phase.model_copy(update={"max_steps": CALIBRATION_STEPS}) for phase in job.phases]
    with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
        short = job.model_copy(
            update={
                "out": folder,
                "phases": tuple(phases),
                "log_every_steps": 1,
                "sample_every_steps": NEVER,
                "checkpoint_every_steps": NEVER,
            }
        )
        train_here(short)
        rows = read_table(open_store(folder), train_folder.METRICS, StepMetrics)
    return [
        statistics.median(
            phase.batch_size / row.samples_per_s
            for row in rows
            if row.phase == phase.name and row.step > WARM_UP_STEPS
        )
        for phase in phases
    ]

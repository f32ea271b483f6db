"""Systems trained and scored side by side: budgets, runs, scores, and the table of all.

compare.json            what all systems share, the clips held out, every system's steps; first
runs/<system>           a training run each (`-seed<n>` for seeds other than 0)
scores/<run>/           its scores, and the frames that strips show of it
scores.parquet          ComparedScore, all runs together
comparison.json         Comparison: the table
curves.svg  strip*.png  strip*.mp4  index.html

- Every run is an ordinary one, trained in this process: a finished one is passed over, an
  interrupted one goes on. Runs are trained in turn, since two at once would share what the budget
  in minutes is counted on.
- All functions but `compare` take the job and the name of a run, and read the rest from
  `compare.json`; so each may be run by another process.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kpmask.animate import choose_device
from kpmask.compare import (
    CROSS_METRICS,
    comparison_rows,
    cross_pairs,
    planned_lengths,
    steps_within,
    training_seconds,
    with_budget,
)
from kpmask.compare_pictures import StripRow, moving_strip, still_strip
from kpmask.config import ComparedSystem, CompareJob, TrainJob, validated
from kpmask.data.shards import Shard, ShardWriter
from kpmask.device import gpu_names
from kpmask.errors import ConfigError, DatasetError
from kpmask.evaluate import metric_info
from kpmask.losses import PerceptualLoss
from kpmask.media import images
from kpmask.media.encode import encode
from kpmask.metrics import build_metrics
from kpmask.models import build_system
from kpmask.perceptual import load_perceptual
from kpmask.records import (
    ClipRecord,
    ComparedRun,
    ComparedScore,
    Comparison,
    Progress,
    RunManifest,
    StepMetrics,
    ValidationScore,
    digest,
)
from kpmask.report import Curve, Strip, comparison_curves_svg, comparison_page
from kpmask.train import Worker
from tasks import train_folder
from tasks.compare_scores import Scoring, SystemScores, pair_id, score_system
from tasks.dataset import open_dataset
from tasks.manifest import (
    read_json,
    read_table,
    read_table_if_any,
    read_table_metadata,
    write_json,
    write_table,
)
from tasks.storage import ObjectStore, absolute, open_store
from tasks.train import train_here
from tasks.train_folder import TrainingData
from tasks.train_worker import samplers

OnProgress = Callable[[Progress], None]
Frames = NDArray[np.uint8]  # THWC RGB

COMPARE: Final = "compare.json"
COMPARISON: Final = "comparison.json"
SCORES: Final = "scores.parquet"
PICTURES: Final = "pictures.arrow"
CURVES: Final = "curves.svg"
PAGE: Final = "index.html"
STRIPS: Final = {"strip": "Reconstruction", "strip-cross": "Another identity's motion"}

# What the table's rows need not have in common.
_NOT_SHARED: Final = frozenset({"data", "out", "systems", "seeds", "baseline", "device"})
CALIBRATION_STEPS: Final = 10
WARM_UP_STEPS: Final = 3
NEVER: Final = 10**9  # steps
VALIDATED: Final = "l1_moving"  # the steadiest score; what curves show where runs have it


@dataclass(frozen=True)
class PlannedRun:
    """A training run of the comparison."""

    name: str
    system: str
    seed: int
    job: TrainJob


@dataclass(frozen=True)
class Opened:
    """A comparison that is under way, as its `compare.json` has it."""

    job: CompareJob
    store: ObjectStore
    data: TrainingData
    settings_digest: str
    runs: tuple[PlannedRun, ...]

    def run(self, name: str) -> PlannedRun:
        return next(run for run in self.runs if run.name == name)


def compare(job: CompareJob, *, on_progress: OnProgress | None = None) -> Comparison:
    """Train and score every system and seed, and publish the table.

    Finished runs are passed over; an interrupted one goes on.

    Raises:
        KpmaskError: as `prepare`, `train_run`, `score_run` and `publish`.
    """
    on_progress = on_progress or _ignore
    for name in prepare(job, on_progress=on_progress):
        train_run(job, name, on_progress=on_progress)
        score_run(job, name, on_progress=on_progress)
        comparison = publish(job)
    return comparison


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
    clips = _test_clips(job, data)
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
    return [*lines, f"budget: {_budget_text(job)}"]


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
        "test_clips": [clip.name for clip in _test_clips(job, data)],
        "test_identities": sorted({clip.identity for clip in _test_clips(job, data)}),
    }
    write_json(store, COMPARE, document)
    return tuple(run.name for run in _opened(job).runs)


def _opened(job: CompareJob) -> Opened:
    """The comparison that `prepare` left."""
    job = _placed(job)
    store = open_store(job.out)
    document = read_json(store, COMPARE)
    first = _train_job(job, job.systems[0], seed=job.seeds[0], name="")
    data = train_folder.open_data(first)
    runs = []
    for seed in job.seeds:
        for system in job.systems:
            name = system.name if seed == 0 else f"{system.name}-seed{seed}"
            run = _train_job(job, system, seed=seed, name=name)
            steps = document["systems"][system.name]["steps"]
            pairs = _pairs_per_epoch(run, data)
            if steps != sum(planned_lengths(run, pairs_per_epoch=pairs)):
                run = with_budget(run, steps, pairs_per_epoch=pairs)
            runs.append(PlannedRun(name, system.name, seed, run))
    return Opened(job, store, data, digest(document["shared"]), tuple(runs))


def _placed(job: CompareJob) -> CompareJob:
    return job.model_copy(update={"data": absolute(job.data), "out": absolute(job.out)})


def _device(job: CompareJob) -> str:
    return str(choose_device(job.device))


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
        "use_gpu": _device(job) == "cuda",
        "holdout_fraction": job.holdout_fraction,
    }
    return validated(TrainJob, values)


def _pairs_per_epoch(job: TrainJob, data: TrainingData) -> int:
    return samplers(job, data, Worker())[0].pairs_per_epoch


def _checked(job: CompareJob) -> TrainingData:
    """The dataset, once all that can be wrong with the job has been looked at."""
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
    if not _test_clips(job, data):
        raise DatasetError(
            "it has no test clips, and one identity only: nothing can be held out",
            subject=job.data,
            code="dataset_too_small",
        )
    return data


def _test_clips(job: CompareJob, data: TrainingData) -> Sequence[ClipRecord]:
    return data.dataset.partition("test")[: job.max_clips]


def _is_held_out(job: CompareJob) -> bool:
    """Whether the test clips are taken from training, for want of others."""
    return not open_dataset(job.data).partition("test")


def _budget_text(job: CompareJob) -> str:
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


# --- one run ---------------------------------------------------------------------------------


def train_run(job: CompareJob, name: str, *, on_progress: OnProgress | None = None) -> RunManifest:
    """Train one run of the comparison, or go on with it.

    Raises:
        KpmaskError: as `tasks.train.train`.
    """
    run = _opened(job).run(name)
    report = on_progress or _ignore

    def renamed(progress: Progress) -> None:
        report(dataclasses.replace(progress, stage=f"train {name}"))

    return train_here(run.job, on_progress=renamed)


def score_run(job: CompareJob, name: str, *, on_progress: OnProgress | None = None) -> None:
    """Score a trained run on the held-out clips, unless that is done.

    Raises:
        KpmaskError: as `score_system`.
    """
    opened = _opened(job)
    run = opened.run(name)
    report = on_progress or _ignore
    runs = open_store(run.job.out)
    manifest = RunManifest(**read_json(runs, train_folder.MANIFEST))
    metadata = {"settings_digest": opened.settings_digest, "weights": manifest.weights_sha256}
    store = opened.store.child(f"scores/{name}")
    if store.exists(SCORES) and metadata.items() <= read_table_metadata(store, SCORES).items():
        return
    found = score_system(
        runs.local(train_folder.WEIGHTS),
        _scoring(opened),
        system=run.system,
        seed=run.seed,
        on_done=lambda done, total: report(Progress(f"score {name}", done, total)),
    )
    _put_pictures(store, found)
    write_json(store, "model.json", {"num_parameters": found.num_parameters})
    write_table(store, SCORES, found.scores, ComparedScore, metadata=metadata)


def _scoring(opened: Opened) -> Scoring:
    job = opened.job
    clips = _test_clips(job, opened.data)
    return Scoring(
        dataset=opened.data.dataset,
        clips=clips,
        pairs=cross_pairs(clips, job.cross_pairs),
        metrics=job.metrics,
        cross_frames=job.cross_frames,
        device=_device(job),
    )


def _put_pictures(store: ObjectStore, found: SystemScores) -> None:
    with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
        path = Path(folder) / PICTURES
        with ShardWriter(path) as shard:
            for name, frames_THWC in found.pictures.items():
                shard.add(name, 1.0, [images.encode_png(frame) for frame in frames_THWC])
        store.put_file(PICTURES, path)


# --- the table -------------------------------------------------------------------------------


def publish(job: CompareJob) -> Comparison:
    """Write table, curves, strips and page of the runs that are scored so far.

    Raises:
        StorageError: a store denies, lacks space or does not answer.
    """
    opened = _opened(job)
    scored = [run for run in opened.runs if opened.store.exists(f"scores/{run.name}/{SCORES}")]
    scores = _all_scores(opened, scored)
    comparison = _comparison(opened, scored, scores)
    store = opened.store
    write_table(
        store,
        SCORES,
        scores,
        ComparedScore,
        metadata={"settings_digest": opened.settings_digest},
    )
    curves = comparison_curves_svg([_curve(run) for run in scored])
    store.put(CURVES, curves.encode())
    _put_strips(opened, [run for run in scored if run.seed == opened.job.seeds[0]])
    write_json(store, COMPARISON, comparison)
    store.put(PAGE, page(store, comparison).encode())
    return comparison


def page(store: ObjectStore, comparison: Comparison) -> str:
    """The page of a comparison; it refers to the strips beside it."""
    curves = store.get(CURVES).decode()
    strips = [
        Strip(title, f"{name}.png", f"{name}.mp4")
        for name, title in STRIPS.items()
        if store.exists(f"{name}.png")
    ]
    return comparison_page(
        title="Comparison", comparison=comparison, curves_svg=curves, strips=strips
    )


def _all_scores(opened: Opened, runs: Sequence[PlannedRun]) -> list[ComparedScore]:
    """Rows that no system made, each once, then those of the systems, in the job's order."""
    order = {system.name: place for place, system in enumerate(opened.job.systems)}
    references: dict[tuple[str, ...], ComparedScore] = {}
    own: list[ComparedScore] = []
    for run in sorted(runs, key=lambda run: order[run.system]):
        for row in read_table(opened.store, f"scores/{run.name}/{SCORES}", ComparedScore):
            if row.method == "model":
                own.append(row)
            else:
                key = (row.protocol, row.method, row.clip_id, row.metric)
                references.setdefault(key, row)
    return [*references.values(), *own]


def _comparison(
    opened: Opened, runs: Sequence[PlannedRun], scores: Sequence[ComparedScore]
) -> Comparison:
    job = opened.job
    metrics = (*map(metric_info, build_metrics(job.metrics)), *CROSS_METRICS)
    document = read_json(opened.store, COMPARE)
    manifests = [_manifest(run) for run in runs]
    return Comparison(
        uri=opened.store.uri,
        settings_digest=opened.settings_digest,
        dataset_id=opened.data.dataset_id,
        budget=_budget_text(job),
        batch_size=opened.runs[0].job.phases[0].batch_size,
        perceptual=job.train.perceptual,
        device=_device_text(job),
        precision=", ".join(dict.fromkeys(manifest.precision for manifest in manifests)),
        baseline=job.baseline,
        num_train_clips=len(opened.data.train),
        test_clips=tuple(document["test_clips"]),
        held_out=document["held_out"],
        num_runs_left=len(opened.runs) - len(runs),
        metrics=metrics,
        runs=tuple(_compared_run(opened, run) for run in runs),
        rows=comparison_rows(
            scores,
            baseline=job.baseline,
            higher_is_better={info.name: info.higher_is_better for info in metrics},
        ),
    )


def _manifest(run: PlannedRun) -> RunManifest:
    return RunManifest(**read_json(open_store(run.job.out), train_folder.MANIFEST))


def _metrics(run: PlannedRun) -> list[StepMetrics]:
    return read_table(open_store(run.job.out), train_folder.METRICS, StepMetrics)


def _compared_run(opened: Opened, run: PlannedRun) -> ComparedRun:
    manifest = _manifest(run)
    batch_sizes = {phase.name: phase.batch_size for phase in run.job.phases}
    model = read_json(opened.store, f"scores/{run.name}/model.json")
    return ComparedRun(
        system=run.system,
        seed=run.seed,
        uri=manifest.uri,
        steps=manifest.num_steps,
        seconds=training_seconds(_metrics(run), batch_sizes),
        num_parameters=model["num_parameters"],
        weights_sha256=manifest.weights_sha256,
    )


def _device_text(job: CompareJob) -> str:
    if _device(job) == "cuda":
        return gpu_names()[0]
    return f"CPU, {torch.get_num_threads()} threads"


# --- pictures --------------------------------------------------------------------------------


def _curve(run: PlannedRun) -> Curve:
    """A run's course; steps count on from phase to phase."""
    metrics = _metrics(run)
    store = open_store(run.job.out)
    rows = read_table_if_any(store, train_folder.VALIDATION, ValidationScore) or []
    lengths = {row.phase: row.step for row in metrics}
    starts = dict(zip(lengths, itertools.accumulate(lengths.values(), initial=0), strict=False))
    validation = [
        (starts[row.phase] + row.step, row.value) for row in rows if row.metric == VALIDATED
    ]
    return Curve(label=run.name, metrics=metrics, validation=validation)


def _put_strips(opened: Opened, runs: Sequence[PlannedRun]) -> None:
    """Still and moving strips: what is to be drawn, then what each system drew."""
    scoring = _scoring(opened)
    read = scoring.dataset.read
    clips, pairs = scoring.shown_clips(), scoring.shown_pairs()
    columns = {
        "strip": (
            [clip.clip_id for clip in clips],
            [read(clip, [0]) for clip in clips],
            [scoring.dataset.read(clip) for clip in clips],
        ),
        "strip-cross": (
            [pair_id(pair) for pair in pairs],
            [read(source, [0]) for source, _ in pairs],
            [scoring.driving_frames(driving) for _, driving in pairs],
        ),
    }
    for name, (ids, sources, drivings) in columns.items():
        if ids:
            drawn = [StripRow(run.system, _pictures(opened, run, ids)) for run in runs]
            rows = [StripRow("source", sources), StripRow("driving", drivings), *drawn]
            _put_strip(opened.store, name, rows, fps=clips[0].fps)


def _pictures(opened: Opened, run: PlannedRun, ids: Sequence[str]) -> list[Frames]:
    shard = Shard(opened.store.local(f"scores/{run.name}/{PICTURES}"))
    rows = {shard.clip_info(row)[0]: row for row in range(shard.num_clips)}
    return [shard.read(rows[name]) for name in ids]


def _put_strip(store: ObjectStore, name: str, rows: Sequence[StripRow], *, fps: float) -> None:
    store.put(f"{name}.png", images.encode_png(still_strip(rows)))
    with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
        path = Path(folder) / "strip.mp4"
        encode(path, moving_strip(rows), fps=fps)
        store.put_file(f"{name}.mp4", path)

"""Systems trained and scored side by side, and the table of all.

compare.json            what will be done (`tasks.compare_plan`); first
runs/<system>           a training run each (`-seed<n>` for seeds other than 0)
scores/<run>/           its scores, and the frames that strips show of it
scores.parquet          ComparedScore, all runs together
comparison.json         Comparison: the table
curves.svg  strip*.png  strip*.mp4  index.html

- Every run is an ordinary one, trained in this process: a finished one is passed over, an
  interrupted one goes on. Runs are trained in turn, since two at once would share what the budget
  in minutes is counted on.
- All functions but `compare` do one step, so that each may be run by another process.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from kpmask.compare import CROSS_METRICS, comparison_rows, training_seconds
from kpmask.compare_pictures import StripRow, moving_strip, still_strip
from kpmask.config import CompareJob
from kpmask.data.shards import Shard, ShardWriter
from kpmask.device import gpu_names
from kpmask.media import images
from kpmask.media.encode import encode
from kpmask.model_config import Ablation
from kpmask.records import (
    ComparedRun,
    ComparedScore,
    Comparison,
    Progress,
    RunManifest,
    StepMetrics,
    ValidationScore,
)
from kpmask.report import Curve, Strip, comparison_curves_svg, comparison_page
from kpmask.report.comparison import ablation_label
from kpmask.score_settings import spread_pairs
from tasks import train_folder
from tasks.compare_plan import (
    COMPARE,
    Opened,
    PlannedRun,
    budget_text,
    device_of,
    open_comparison,
    prepare,
    run_name,
    scored_clips,
)
from tasks.compare_scores import Pair, Scoring, SystemScores, picture_id, score_system
from tasks.manifest import (
    read_json,
    read_table,
    read_table_if_any,
    read_table_metadata,
    write_json,
    write_table,
)
from tasks.storage import ObjectStore, open_store
from tasks.train import train_here

OnProgress = Callable[[Progress], None]
Frames = NDArray[np.uint8]  # THWC RGB

COMPARISON: Final = "comparison.json"
SCORES: Final = "scores.parquet"
PICTURES: Final = "pictures.arrow"
CURVES: Final = "curves.svg"
PAGE: Final = "index.html"
STRIPS: Final = {"strip": "Reconstruction", "strip-cross": "Another identity's motion"}
ABLATIONS: Final = "strip-ablations-"  # and the system
VALIDATED: Final = "l1_moving"  # the steadiest score; what curves show where runs have it


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


# --- one run ---------------------------------------------------------------------------------


def train_run(job: CompareJob, name: str, *, on_progress: OnProgress | None = None) -> RunManifest:
    """Train one run of the comparison, or go on with it.

    Raises:
        KpmaskError: as `tasks.train.train`.
    """
    run = open_comparison(job).run(name)
    report = on_progress or _ignore

    def renamed(progress: Progress) -> None:
        report(dataclasses.replace(progress, stage=f"train {name}"))

    return train_here(run.job, on_progress=renamed)


def score_run(job: CompareJob, name: str, *, on_progress: OnProgress | None = None) -> None:
    """Score a trained run on the held-out clips, unless that is done.

    Raises:
        KpmaskError: as `score_system`.
    """
    opened = open_comparison(job)
    run = opened.run(name)
    report = on_progress or _ignore
    runs = open_store(run.job.out)
    manifest = RunManifest(**read_json(runs, train_folder.MANIFEST))
    metadata = {"scores_digest": opened.scores_digest, "weights": manifest.weights_sha256}
    store = opened.store.child(f"scores/{name}")
    if _is_scored(store, metadata):
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


def _is_scored(store: ObjectStore, metadata: Mapping[str, str]) -> bool:
    """Whether scores are here that were made with just these settings."""
    if not store.exists(SCORES):
        return False
    return metadata.items() <= read_table_metadata(store, SCORES).items()


def _scoring(opened: Opened) -> Scoring:
    job = opened.job
    clips = scored_clips(job, opened.data)
    return Scoring(
        dataset=opened.data.dataset,
        clips=clips,
        pairs=spread_pairs(clips, job.cross_pairs),
        metrics=job.metrics,
        cross_frames=job.cross_frames,
        device=device_of(job),
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
    opened = open_comparison(job)
    metadata = {"scores_digest": opened.scores_digest}
    scored = [
        run for run in opened.runs if _is_scored(opened.store.child(f"scores/{run.name}"), metadata)
    ]
    scores = _all_scores(opened, scored)
    comparison = _comparison(opened, scored, scores)
    store = opened.store
    write_table(
        store,
        SCORES,
        scores,
        ComparedScore,
        metadata=metadata,
    )
    curves = comparison_curves_svg(_curves(store, comparison))
    store.put(CURVES, curves.encode())
    _put_strips(opened, [run for run in scored if run.seed == opened.job.seeds[0]])
    write_json(store, COMPARISON, comparison)
    store.put(PAGE, page(store, comparison).encode())
    return comparison


def page(store: ObjectStore, comparison: Comparison, *, home: str | None = None) -> str:
    """The page of a comparison; it refers to the strips beside it."""
    titles = {
        **STRIPS,
        **{f"{ABLATIONS}{run.system}": f"Ablations of {run.system}" for run in comparison.runs},
    }
    strips = [
        Strip(title, f"{name}.png", f"{name}.mp4")
        for name, title in titles.items()
        if store.exists(f"{name}.png")
    ]
    return comparison_page(
        title="Comparison",
        comparison=comparison,
        curves=_curves(store, comparison),
        strips=strips,
        home=home,
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
    metrics = (*opened.metrics, *CROSS_METRICS)
    document = read_json(opened.store, COMPARE)
    manifests = [_manifest(run) for run in runs]
    return Comparison(
        uri=opened.store.uri,
        settings_digest=opened.settings_digest,
        dataset_id=opened.data.dataset_id,
        budget=budget_text(job),
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
    if device_of(job) == "cuda":
        return gpu_names()[0]
    count = torch.get_num_threads()
    return f"CPU, {count} thread{'' if count == 1 else 's'}"


# --- pictures --------------------------------------------------------------------------------


def _curves(store: ObjectStore, comparison: Comparison) -> list[Curve]:
    """The courses of the scored runs, as far as their folders are still there."""
    names = [run_name(run.system, run.seed) for run in comparison.runs]
    return [_curve(store.child(f"runs/{name}"), name) for name in names]


def _curve(run: ObjectStore, name: str) -> Curve:
    """A run's course; steps count on from phase to phase."""
    metrics = read_table_if_any(run, train_folder.METRICS, StepMetrics) or []
    rows = read_table_if_any(run, train_folder.VALIDATION, ValidationScore) or []
    lengths = {row.phase: row.step for row in metrics}
    starts = dict(zip(lengths, itertools.accumulate(lengths.values(), initial=0), strict=False))
    validation = [
        (starts[row.phase] + row.step, row.value) for row in rows if row.metric == VALIDATED
    ]
    return Curve(label=name, metrics=metrics, validation=validation)


def _put_strips(opened: Opened, runs: Sequence[PlannedRun]) -> None:
    """Still and moving strips: what is to be drawn, then what each system drew."""
    scoring = _scoring(opened)
    read = scoring.dataset.read
    clips, pairs = scoring.shown_clips(), scoring.shown_pairs()
    given = [
        StripRow("source", [read(clip, [0]) for clip in clips]),
        StripRow("driving", [read(clip) for clip in clips]),
    ]
    ids = [clip.clip_id for clip in clips]
    drawn = [StripRow(run.system, _pictures(opened, run, ids)) for run in runs]
    _put_strip(opened.store, "strip", [*given, *drawn], fps=clips[0].fps)
    if not pairs:
        return
    given = [
        StripRow("source", [read(source, [0]) for source, _ in pairs]),
        StripRow("driving", [scoring.driving_frames(driving) for _, driving in pairs]),
    ]
    ids = [picture_id(pair) for pair in pairs]
    drawn = [StripRow(run.system, _pictures(opened, run, ids)) for run in runs]
    _put_strip(opened.store, "strip-cross", [*given, *drawn], fps=clips[0].fps)
    for run in runs:
        ablated = _ablated(opened, run, pairs)
        if ablated:
            name = f"{ABLATIONS}{run.system}"
            _put_strip(opened.store, name, [*given, *ablated], fps=clips[0].fps)


def _ablated(opened: Opened, run: PlannedRun, pairs: Sequence[Pair]) -> list[StripRow]:
    """A row for each ablation of a system, where it has any."""
    drawn = _drawn_ids(opened, run)
    rows = []
    for variant in get_args(Ablation):
        ids = [picture_id(pair, variant) for pair in pairs]
        if drawn.issuperset(ids):
            rows.append(StripRow(ablation_label(variant), _pictures(opened, run, ids)))
    return rows


def _drawn_ids(opened: Opened, run: PlannedRun) -> set[str]:
    shard = Shard(opened.store.local(f"scores/{run.name}/{PICTURES}"))
    return {shard.clip_info(row)[0] for row in range(shard.num_clips)}


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

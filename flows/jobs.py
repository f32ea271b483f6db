"""What the command line calls: each function runs one job here and shows its progress.

The flows are imported inside, after the environment is set: Prefect reads its settings when it is
imported, and a command that needs no flow should not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flows import console
from flows.importing import many_imports
from flows.server import start_ahead
from kpmask import config
from kpmask.model_config import Part
from kpmask.records import (
    CatalogManifest,
    Comparison,
    DatasetChanges,
    DatasetManifest,
    EncodedVideo,
    RunManifest,
    as_dict,
)

if TYPE_CHECKING:
    from kpmask.records import ComparedValue, ScoreTable
    from kpmask.report.comparison import Table, TableRow

J = TypeVar("J", bound=Part)
R = TypeVar("R")

NIGHTLY = "0 3 * * *"


def as_result(record: Any) -> dict[str, Any]:  # noqa: ANN401 - any record
    """A job's result as plain data for --json."""
    return as_dict(record)


def _run(flow: Any, job: Part, *, quiet: bool) -> Any:  # noqa: ANN401 - untyped by Prefect
    from flows import engine

    with console.progress_bars(quiet=quiet) as report:
        return engine.run_flow(flow, job, on_progress=report)


def plan_preprocess(job: config.PreprocessJob) -> list[str]:
    from tasks.preprocess import preprocess

    planned = preprocess(job, dry_run=True)
    return [
        f"{planned.num_train} train and {planned.num_test} test clips asked for",
        f"{planned.num_failures} rows refused",
        f"into {planned.uri}",
    ]


def plan_animate(job: config.AnimateJob) -> list[str]:
    if job.source is not None:
        return [f"{job.source} moved by {job.driving} into {job.out}"]
    from tasks.animate import animate_catalog

    planned = animate_catalog(job, dry_run=True)
    return [f"{planned.num_items} animations, {planned.num_failures} rows refused"]


def plan_train(job: config.TrainJob) -> list[str]:
    from tasks.train import plan

    return plan(job)


def plan_compare(job: config.CompareJob) -> list[str]:
    from tasks.compare_plan import plan

    return plan(job)


def run_preprocess(
    job: config.PreprocessJob, *, quiet: bool
) -> tuple[DatasetManifest, DatasetChanges]:
    start_ahead()  # it comes up during this import
    with many_imports():
        from flows.preprocess import preprocess_flow

    made = _run(preprocess_flow, job, quiet=quiet)
    return made.dataset, made.changes


def run_train(job: config.TrainJob, *, quiet: bool) -> RunManifest:
    start_ahead()  # it comes up during this import
    with many_imports():
        from flows.train import train_flow

    console.say(f"perceptual features: {job.perceptual}")
    manifest: RunManifest = _run(train_flow, job, quiet=quiet)
    return manifest


def run_animate(job: config.AnimateJob, *, quiet: bool) -> CatalogManifest:
    start_ahead()  # it comes up during this import
    with many_imports():
        from flows.animate import animate_flow

    manifest: CatalogManifest = _run(animate_flow, job, quiet=quiet)
    return manifest


def run_animate_pair(job: config.AnimateJob, *, quiet: bool) -> EncodedVideo:
    """One pair, without Prefect and Ray: it starts at once."""
    with many_imports():
        from tasks.animate import animate_pair

    with console.progress_bars(quiet=quiet) as report:
        return animate_pair(job, on_progress=report)


def plan_evaluate(job: config.EvaluateJob) -> list[str]:
    from tasks.evaluate import plan

    return plan(job)


def run_evaluate(job: config.EvaluateJob, *, quiet: bool) -> ScoreTable:
    start_ahead()  # it comes up during this import
    with many_imports():
        from flows.evaluate import evaluate_flow

    scores: ScoreTable = _run(evaluate_flow, job, quiet=quiet)
    return scores


def run_compare(job: config.CompareJob, *, quiet: bool) -> Comparison:
    start_ahead()  # it comes up during this import
    with many_imports():
        from flows.compare import compare_flow

    console.say(f"perceptual features: {job.train.perceptual}")
    comparison: Comparison = _run(compare_flow, job, quiet=quiet)
    return comparison


def comparison_lines(comparison: Comparison) -> list[str]:
    """The tables as the papers print them, and the margins over the baseline."""
    from kpmask.report.comparison import comparison_tables

    lines = []
    for table in comparison_tables(comparison):
        lines += [table.title, _table_text(table, _mean), ""]
        if table.name == "reconstruction":
            title = f"Better than {comparison.baseline} by, percent [95 % interval over clips]"
            lines += [title, _table_text(table, _margin), ""]
    clips = "held out by identity" if comparison.held_out else "of the test split"
    return [
        *lines,
        f"{comparison.budget}, batches of {comparison.batch_size}, on {comparison.device}",
        f"scored on {len(comparison.test_clips)} clips {clips}; mean ± spread over clips",
        f"trained against: {comparison.perceptual}",
        f"page: {comparison.uri}/index.html",
    ]


def _table_text(table: Table, cell_text: Callable[[ComparedValue | None], str]) -> str:
    costs = table.name == "reconstruction" and cell_text is _mean
    names = [f"{m.name} {'(up)' if m.higher_is_better else '(down)'}" for m in table.metrics]
    columns = ["", *names, *(("steps", "seconds", "s/step") if costs else ())]
    rows = [
        [row.label, *(cell_text(cell.value) for cell in row.cells), *(_cost(row) if costs else ())]
        for row in table.rows
    ]
    return console.table(columns, rows)


def _mean(value: ComparedValue | None) -> str:
    return "-" if value is None else f"{value.mean:.4f} ± {value.std:.4f}"


def _margin(value: ComparedValue | None) -> str:
    if value is None or value.margin_percent is None:
        return "-"
    return f"{value.margin_percent:+.1f} [{value.margin_low:+.1f}, {value.margin_high:+.1f}]"


def _cost(row: TableRow) -> tuple[str, str, str]:
    if row.run is None:
        return "-", "-", "-"
    return str(row.run.steps), f"{row.run.seconds:.0f}", f"{row.run.seconds_per_step:.3f}"


def run_demo(out: Path, *, preset: str, quiet: bool) -> Path:
    start_ahead()
    with many_imports():
        from flows.demo import run_demo as run

    with console.progress_bars(quiet=quiet) as report:
        return run(out.resolve(), preset=preset, on_progress=report)


def draw_videos(
    out: Path, *, num_videos: int | None, seed: int | None, varied: bool, quiet: bool
) -> Path:
    """Drawn videos, their table and a catalog alone; returns the table's path.

    Where nothing is asked for they are the demonstration's.
    """
    from tasks.demo import NUM_VIDEOS, SEED, draw_inputs

    with console.progress_bars(quiet=quiet) as report:
        return draw_inputs(
            out.resolve(),
            num_videos=NUM_VIDEOS if num_videos is None else num_videos,
            seed=SEED if seed is None else seed,
            varied=varied,
            on_progress=report,
        ).metadata


def rebuild_page(uri: str) -> str:
    with many_imports():
        from tasks.report import rebuild_page as rebuild

    return rebuild(uri)


def deploy(
    *,
    cron: str | None,
    every_s: float | None,
    timezone: str,
    pool: str,
    job_file: str | None,
    overrides: Sequence[str],
    serve: bool,
) -> list[str]:
    """Register every job; `job_file` says what the scheduled preprocessing does.

    Without a job file nothing is scheduled: a schedule needs a job that is whole. With neither
    `cron` nor `every_s` it is every night.
    """
    from flows import deploy as deployments

    tables: dict[str, Any] = {} if job_file is None else config.load_preset(job_file)
    if "preprocess" in tables:
        if cron is None and every_s is None:
            cron = NIGHTLY
        tables["preprocess"] = config.resolve_job(
            config.PreprocessJob, job_file=job_file, overrides=overrides
        )
    if serve:
        due = cron or ("when asked" if every_s is None else f"every {every_s:g} s")
        console.say(f"serving; preprocessing is due: {due}; Ctrl-C ends")
        deployments.serve(tables, cron=cron, every_s=every_s, timezone=timezone)
        return []
    made = deployments.register(tables, cron=cron, every_s=every_s, timezone=timezone, pool=pool)
    rows = [[found.name, found.pool, found.when or "when asked", found.url] for found in made]
    start = f"start a worker with: prefect worker start --pool {pool}"
    return [console.table(["deployment", "pool", "schedule", "page"], rows), "", start]

"""A dataset -> several systems trained on it with one budget, and their table."""

from __future__ import annotations

from prefect import flow

from flows import artifacts, engine
from kpmask.config import CompareJob
from kpmask.records import Comparison, RunManifest
from kpmask.report.comparison import comparison_tables
from tasks import compare, compare_plan


@engine.stage("prepare-comparison", timeout_s=engine.DAY_S)
def prepare_stage(job: CompareJob) -> tuple[str, ...]:
    return compare_plan.prepare(job, on_progress=engine.StageProgress())


@engine.stage("train-system", timeout_s=30 * engine.DAY_S)
def train_stage(job: CompareJob, name: str) -> RunManifest:
    return compare.train_run(job, name, on_progress=engine.StageProgress())


@engine.stage("score-system", timeout_s=7 * engine.DAY_S)
def score_stage(job: CompareJob, name: str) -> None:
    compare.score_run(job, name, on_progress=engine.StageProgress())


@engine.stage("publish-comparison", timeout_s=engine.DAY_S)
def publish_stage(job: CompareJob) -> Comparison:
    return compare.publish(job)


def publish_comparison(comparison: Comparison) -> None:
    (first, *_) = comparison_tables(comparison)
    values = {
        f"{row.label}, {cell.value.metric}": f"{cell.value.mean:.4f}"
        for row in first.rows
        for cell in row.cells
        if cell.value is not None
    }
    artifacts.publish(
        "compare",
        comparison.uri,
        {
            **values,
            "budget": comparison.budget,
            "test clips": len(comparison.test_clips),
            "perceptual features": comparison.perceptual,
            "device": comparison.device,
            "dataset": comparison.dataset_id,
            "settings": comparison.settings_digest,
        },
        files=("index.html", "scores.parquet", "comparison.json", "strip.png"),
    )


@flow(
    name="compare",
    description="Train several systems with the same budget and score them side by side.",
    flow_run_name="compare {job.out}",
    persist_result=False,
)
def compare_flow(job: CompareJob) -> Comparison:
    # The table after every run: a comparison takes hours, and each row is worth seeing.
    for name in prepare_stage(job):
        train_stage(job, name)
        score_stage(job, name)
        comparison = publish_stage(job)
    publish_comparison(comparison)
    return engine.finished(comparison)

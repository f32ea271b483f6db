"""A checkpoint and a test split, two folders of videos, or a finished catalog -> scores."""

from __future__ import annotations

from prefect import flow

from flows import artifacts, engine
from kpmask.config import EvaluateJob
from kpmask.records import ScoreTable
from tasks.evaluate import evaluate


@engine.stage("evaluate", timeout_s=7 * engine.DAY_S)
def evaluate_stage(job: EvaluateJob) -> ScoreTable:
    return evaluate(job, on_progress=engine.StageProgress())


def publish_scores(scores: ScoreTable) -> None:
    means = {f"{s.metric} ({s.method})": f"{s.mean:.4f}" for s in scores.summaries}
    of_sets = {f"{s.metric} ({s.method})": f"{s.value:.4f}" for s in scores.sets}
    motion = f", {scores.motion}" if scores.setting == "cross" else ""
    artifacts.publish(
        "evaluate",
        scores.uri,
        {
            **means,
            **of_sets,
            "setting": f"{scores.setting}{motion}",
            "videos": scores.num_videos,
            "failures": scores.num_failures,
            "weights": scores.weights_sha256,
            "perceptual features": scores.perceptual,
            "dataset": scores.dataset_id,
            "settings": scores.settings_digest,
        },
        files=("index.html", "scores.parquet", "frames.parquet", "summary.json"),
    )


@flow(
    name="evaluate",
    description="Score a checkpoint on a test split, a folder against another, or a catalog.",
    flow_run_name="evaluate {job.out}",
    persist_result=False,
)
def evaluate_flow(job: EvaluateJob) -> ScoreTable:
    scores = evaluate_stage(job)
    publish_scores(scores)
    return engine.finished(scores)

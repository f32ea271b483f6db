"""A checkpoint and a test split, or two folders of videos -> scores."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import artifacts, engine
from kpmask.config import EvaluateJob
from tasks.evaluate import evaluate


@task(
    name="evaluate",
    retries=engine.STAGE_RETRIES,
    retry_delay_seconds=engine.STAGE_RETRY_DELAYS_S,
    retry_condition_fn=engine.worth_retrying,
    timeout_seconds=7 * engine.DAY_S,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def evaluate_stage(job: EvaluateJob) -> Any:  # noqa: ANN401
    return evaluate(job, on_progress=engine.StageProgress())


def publish_scores(job: EvaluateJob, scores: Any) -> None:  # noqa: ANN401
    artifacts.publish("evaluate", job.out, {}, files=("index.html", "scores.parquet"))


@flow(
    name="evaluate",
    description="Score a checkpoint on a test split, or one folder of videos against another.",
    flow_run_name="evaluate {job.out}",
    persist_result=False,
)
def evaluate_flow(job: EvaluateJob) -> Any:  # noqa: ANN401
    scores = evaluate_stage(job)
    publish_scores(job, scores)
    return engine.finished(scores)

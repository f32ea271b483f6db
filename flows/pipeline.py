"""All four jobs in a row, each on what the one before has made."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from flows import engine
from flows.animate import animate_stage, publish_catalog
from flows.evaluate import evaluate_stage, publish_scores
from flows.preprocess import preprocess_stage, publish_dataset
from flows.train import publish_run, train_stage
from kpmask.config import AnimateJob, EvaluateJob, PreprocessJob, TrainJob
from kpmask.model_config import Part
from kpmask.records import CatalogManifest, DatasetManifest, RunManifest, ScoreTable

WEIGHTS = "weights.safetensors"


class PipelineJob(Part):
    """The four jobs of a chain.

    The chain sets what each job takes from the one before: the data of `train` and `evaluate`,
    and the checkpoint of `animate` and `evaluate`. What they say themselves is a placeholder.
    """

    preprocess: PreprocessJob
    train: TrainJob
    animate: AnimateJob
    evaluate: EvaluateJob


@dataclass(frozen=True)
class PipelineResult:
    dataset: DatasetManifest
    run: RunManifest
    catalog: CatalogManifest
    scores: ScoreTable


@flow(
    name="pipeline",
    description="Preprocess, train, animate and evaluate in a row.",
    flow_run_name="pipeline {job.preprocess.out}",
    persist_result=False,
)
def pipeline_flow(job: PipelineJob) -> PipelineResult:
    # Stages, not flows within a flow: a task needs no server to start, so the chain goes on
    # when the server is lost between two of them.
    made = preprocess_stage(job.preprocess)
    publish_dataset(made)
    dataset = made.dataset

    run = train_stage(job.train.model_copy(update={"data": dataset.uri}))
    publish_run(run)
    weights = f"{run.uri.rstrip('/')}/{WEIGHTS}"

    catalog = animate_stage(job.animate.model_copy(update={"checkpoint": weights}))
    publish_catalog(catalog)

    scored = job.evaluate.model_copy(update={"checkpoint": weights, "data": dataset.uri})
    scores = evaluate_stage(scored)
    publish_scores(scores)

    return engine.finished(PipelineResult(dataset, run, catalog, scores))

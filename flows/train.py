"""A dataset -> a trained model."""

from __future__ import annotations

from prefect import flow

from flows import artifacts, engine
from kpmask.config import TrainJob
from kpmask.records import RunManifest
from tasks.train import train


@engine.stage("train", timeout_s=30 * engine.DAY_S)
def train_stage(job: TrainJob) -> RunManifest:
    return train(job, on_progress=engine.StageProgress())


def publish_run(run: RunManifest) -> None:
    artifacts.publish(
        "train",
        run.uri,
        {
            "system": run.system,
            "perceptual features": run.perceptual,
            "steps": run.num_steps,
            "final loss": f"{run.final_loss:.4f}",
            "weights": run.weights_sha256,
            "dataset": run.dataset_id,
            "run": run.run_id,
            "settings": run.settings_digest,
        },
        files=("index.html", "metrics.parquet", "manifest.json", "weights.safetensors"),
    )


@flow(
    name="train",
    description="Train a model on a dataset.",
    flow_run_name="train {job.out}",
    persist_result=False,
)
def train_flow(job: TrainJob) -> RunManifest:
    run = train_stage(job)
    publish_run(run)
    return engine.finished(run)

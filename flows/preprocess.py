"""Raw videos -> a dataset of clips."""

from __future__ import annotations

from prefect import flow

from flows import artifacts, engine
from kpmask.config import PreprocessJob
from kpmask.records import DatasetManifest
from tasks.preprocess import preprocess


@engine.stage("preprocess", timeout_s=7 * engine.DAY_S)
def preprocess_stage(job: PreprocessJob) -> DatasetManifest:
    return preprocess(job, on_progress=engine.StageProgress())


def publish_dataset(dataset: DatasetManifest) -> None:
    artifacts.publish(
        "preprocess",
        dataset.uri,
        {
            "training clips": dataset.num_train,
            "test clips": dataset.num_test,
            "frames": dataset.num_frames,
            "failures": dataset.num_failures,
            "dataset": dataset.dataset_id,
            "settings": dataset.settings_digest,
        },
        files=("index.html", "manifest.parquet", "failures.parquet", "stats.json"),
    )


@flow(
    name="preprocess",
    description="Cut raw videos into a dataset of clips.",
    flow_run_name="preprocess {job.out}",
    persist_result=False,
)
def preprocess_flow(job: PreprocessJob) -> DatasetManifest:
    dataset = preprocess_stage(job)
    publish_dataset(dataset)
    return engine.finished(dataset)

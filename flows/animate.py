"""A catalog of images and driving videos -> animations."""

from __future__ import annotations

from prefect import flow

from flows import artifacts, engine
from kpmask.config import AnimateJob
from kpmask.records import CatalogManifest
from tasks.animate import animate_catalog


@engine.stage("animate", timeout_s=7 * engine.DAY_S)
def animate_stage(job: AnimateJob) -> CatalogManifest:
    return animate_catalog(job, on_progress=engine.StageProgress())


def publish_catalog(catalog: CatalogManifest) -> None:
    artifacts.publish(
        "animate",
        catalog.uri,
        {
            "animations": catalog.num_items,
            "frames": catalog.num_frames,
            "failures": catalog.num_failures,
            "weights": catalog.weights_sha256,
            "settings": catalog.settings_digest,
        },
        files=("index.html", "manifest.parquet", "failures.parquet", "summary.json"),
    )


@flow(
    name="animate",
    description="Animate a catalog of images by driving videos.",
    flow_run_name="animate {job.out}",
    persist_result=False,
)
def animate_flow(job: AnimateJob) -> CatalogManifest:
    catalog = animate_stage(job)
    publish_catalog(catalog)
    return engine.finished(catalog)

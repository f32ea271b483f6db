"""The demonstration: videos that the package draws, animated by the weights that it carries.

Then a short training of one's own on the same videos, scored beside those weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prefect import flow

from flows import engine
from flows.animate import animate_stage, publish_catalog
from flows.evaluate import evaluate_stage, publish_scores
from flows.pipeline import WEIGHTS
from flows.preprocess import preprocess_stage, publish_dataset
from flows.train import publish_run, train_stage
from kpmask import bundled, config
from kpmask.config import AnimateJob, EvaluateJob, PreprocessJob, TrainJob
from kpmask.errors import ConfigError
from kpmask.model_config import Part
from kpmask.records import CatalogManifest, DatasetManifest, Progress, RunManifest, ScoreTable
from tasks.demo import (
    ANIMATIONS,
    DATASET,
    EVALUATION,
    NUM_VIDEOS,
    OWN_EVALUATION,
    RUN,
    VIDEOS,
    DemoInputs,
    draw_inputs,
    publish_page,
)

DEMO_WEIGHTS = "demo"
J = TypeVar("J", bound=Part)


class DemoJob(Part):
    """The jobs of the demonstration. `evaluate` is of the bundled weights, `evaluate_own` of what
    `train` makes; both and `train` use the dataset of `preprocess`.
    """

    preprocess: PreprocessJob
    animate: AnimateJob
    evaluate: EvaluateJob
    train: TrainJob
    evaluate_own: EvaluateJob


@dataclass(frozen=True)
class DemoResult:
    dataset: DatasetManifest
    catalog: CatalogManifest
    scores: ScoreTable
    run: RunManifest
    own_scores: ScoreTable


@flow(
    name="demo",
    description="Animate drawn people with the bundled weights; train, and compare.",
    flow_run_name="demo {job.preprocess.out}",
    persist_result=False,
)
def demo_flow(job: DemoJob) -> DemoResult:
    made = preprocess_stage(job.preprocess)
    publish_dataset(made)
    # What the bundled weights make comes first, so that it is there to be looked at.
    catalog = animate_stage(job.animate)
    publish_catalog(catalog)
    scores = evaluate_stage(job.evaluate)
    publish_scores(scores)
    run = train_stage(job.train)
    publish_run(run)
    own_scores = evaluate_stage(job.evaluate_own)
    publish_scores(own_scores)
    return engine.finished(DemoResult(made.dataset, catalog, scores, run, own_scores))


def demo_job(out: Path, inputs: DemoInputs, *, preset: str) -> DemoJob:
    """The jobs of a demonstration in `out`.

    Raises:
        CheckpointError: the bundled weights are not there, or not those that were released.
        ConfigError: the preset's clips have another size than the bundled weights draw.
    """

    def job(job_type: type[J], part: str, flags: Mapping[str, Any]) -> J:
        given = {"out": str(out / part), **flags}
        return config.resolve_job(job_type, preset=preset, flags=given)

    data = str(out / DATASET)
    resolved = DemoJob(
        preprocess=job(
            PreprocessJob,
            DATASET,
            {
                "metadata": str(inputs.metadata),
                "raw": str(inputs.raw),
                "download": {"enabled": False},
            },
        ),
        animate=job(
            AnimateJob, ANIMATIONS, {"checkpoint": DEMO_WEIGHTS, "catalog": str(inputs.catalog)}
        ),
        evaluate=job(EvaluateJob, EVALUATION, {"checkpoint": DEMO_WEIGHTS, "data": data}),
        train=job(TrainJob, RUN, {"data": data}),
        evaluate_own=job(
            EvaluateJob, OWN_EVALUATION, {"checkpoint": str(out / RUN / WEIGHTS), "data": data}
        ),
    )
    _check_size(resolved)
    return resolved


def _check_size(job: DemoJob) -> None:
    bundled.locate(DEMO_WEIGHTS)
    drawn_px = bundled.entries()[DEMO_WEIGHTS].image_size_px
    if job.preprocess.clips.size_px != drawn_px:
        raise ConfigError(
            f"its clips have {job.preprocess.clips.size_px} px, and the bundled weights draw "
            f"{drawn_px} px",
            subject="preset",
        )


def run_demo(
    out: Path,
    *,
    preset: str,
    num_videos: int = NUM_VIDEOS,
    on_progress: Callable[[Progress], None],
) -> Path:
    """Draw videos, run the demonstration on them, and write the front page.

    Returns:
        The page's path.

    Raises:
        KpmaskError: as `demo_job` and the jobs do.
    """
    started_s = time.monotonic()
    job = demo_job(out, DemoInputs.of(out / VIDEOS), preset=preset)
    draw_inputs(out / VIDEOS, num_videos=num_videos, on_progress=on_progress)
    result = engine.run_flow(demo_flow, job, on_progress=on_progress)
    return publish_page(
        out,
        dataset=result.dataset,
        run=result.run,
        catalog=result.catalog,
        scores=result.scores,
        own_scores=result.own_scores,
        seconds={"from start to page": time.monotonic() - started_s},
    )

"""The demonstration: videos that the package draws, and the four jobs on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from flows import engine
from flows.pipeline import PipelineJob, pipeline_flow
from kpmask import config
from kpmask.records import Progress
from tasks.demo import DemoInputs, draw_inputs, publish_page


def demo_job(out: Path, inputs: DemoInputs, *, preset: str) -> PipelineJob:
    """The four jobs of the demonstration; what one takes from the one before, the chain sets."""
    data, run = str(out / "dataset"), str(out / "run")
    return PipelineJob(
        preprocess=config.resolve_job(
            config.PreprocessJob,
            preset=preset,
            flags={
                "metadata": str(inputs.metadata),
                "raw": str(inputs.raw),
                "out": data,
                "download": {"enabled": False},
            },
        ),
        train=config.resolve_job(config.TrainJob, preset=preset, flags={"data": data, "out": run}),
        animate=config.resolve_job(
            config.AnimateJob,
            preset=preset,
            flags={
                "checkpoint": run,
                "catalog": str(inputs.catalog),
                "out": str(out / "animations"),
            },
        ),
        evaluate=config.resolve_job(
            config.EvaluateJob,
            preset=preset,
            flags={"checkpoint": run, "data": data, "out": str(out / "evaluation")},
        ),
    )


def run_demo(out: Path, *, preset: str, on_progress: Callable[[Progress], None]) -> Path:
    """Draw videos, run the chained flow on them, and write the front page.

    Returns:
        The page's path.
    """
    started_s = time.monotonic()
    inputs = draw_inputs(out / "videos", on_progress=on_progress)
    job = demo_job(out, inputs, preset=preset)
    result = engine.run_flow(pipeline_flow, job, on_progress=on_progress)
    return publish_page(
        out,
        dataset=result.dataset,
        run=result.run,
        catalog=result.catalog,
        scores=result.scores,
        seconds={"from start to page": time.monotonic() - started_s},
    )

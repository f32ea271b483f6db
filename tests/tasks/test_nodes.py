"""Preprocessing on a Ray cluster of several nodes, of which one is lost half way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from kpmask.config import PreprocessJob, validated
from kpmask.media.encode import encode
from tasks.storage import open_store
from tests.support.ray_nodes import kill_node, ray_nodes

NUM_VIDEOS = 24
RUN = """
import sys
from kpmask.config import PreprocessJob
from tasks.preprocess import preprocess
print(preprocess(PreprocessJob.model_validate_json(sys.argv[1])).dataset_id)
"""


def started(job: PreprocessJob, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, job.model_dump_json()],
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (96, 96, 3), dtype=np.uint8) for _ in range(48)]
    encode(folder / "000.mp4", frames, fps=Fraction(24))
    for number in range(1, NUM_VIDEOS):
        shutil.copy(folder / "000.mp4", folder / f"{number:03d}.mp4")
    return folder


@pytest.mark.slow
def test_lost_node_loses_no_clip(videos: Path, tmp_path: Path, s3: str) -> None:
    """Two nodes cut into a bucket; one is killed with all its processes; the other finishes."""

    def job(out: str) -> PreprocessJob:
        clips = {"size_px": 64, "min_frames": 8}
        return validated(PreprocessJob, {"out": out, "videos": str(videos), "clips": clips})

    ray_folder = Path(tempfile.mkdtemp(prefix="kpr", dir="/tmp"))
    try:
        with ray_nodes(ray_folder) as nodes:
            lost = nodes.add(num_cpus=1)
            nodes.wait_for(2)  # two that start at once may not find the head in time
            nodes.add(num_cpus=1)
            nodes.wait_for(3)
            environment = nodes.environment | {"RAY_ADDRESS": nodes.address}
            process = started(job(f"{s3}/lost"), environment)
            store = open_store(f"{s3}/lost")
            deadline = time.monotonic() + 120
            while len(list(store.list(".work/"))) < 8:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.1)
            kill_node(lost)
            out, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    alone = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    undisturbed, _ = started(job(f"{s3}/whole"), alone).communicate(timeout=240)
    assert out == undisturbed
    whole, disturbed = (
        open_store(f"{s3}/{name}").get("manifest.parquet") for name in ("whole", "lost")
    )
    assert whole == disturbed
    assert not [info.key for info in store.list() if "tmp" in info.key or ".work" in info.key]

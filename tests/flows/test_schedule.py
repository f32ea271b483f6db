"""A dataset on a schedule: it grows by itself, one run at a time, whatever ends one of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import engine
from flows.preprocess import preprocess_flow
from kpmask.config import PreprocessJob, resolve_job
from kpmask.data.dataset import CHANGES, MANIFEST
from kpmask.media.encode import encode
from kpmask.records import DatasetChanges
from tasks.lease import lease
from tasks.manifest import read_json
from tasks.preprocess import LEASE
from tasks.storage import open_store
from tests.support.prefect_server import (
    artifacts_of,
    deployments,
    log_of,
    post,
    runs_of,
    wait_for,
)

JOB = """
[preprocess]
videos = "{0}/videos"
out = "{0}/data"
clips.size_px = 32
storage.clips_per_shard = 1
cluster.num_workers = 1
"""
EVERY_S = 10


def film(seed: int) -> list[np.ndarray]:
    """A square that moves over a background of its own."""
    rng = np.random.default_rng(seed)
    colour, back = rng.integers(64, 255, 3), rng.integers(0, 64, 3)
    frames = []
    for t in range(24):
        frame = np.full((64, 96, 3), back, np.uint8)
        frame[16:48, t : t + 32] = colour
        frames.append(frame)
    return frames


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("films")
    paths = [folder / f"{name}.mp4" for name in ("anna", "ben", "carl", "dora")]
    for seed, path in enumerate(paths):
        encode(path, film(seed), fps=Fraction(24))
    return paths


@pytest.fixture
def root(films: list[Path], tmp_path: Path) -> Path:
    """Two videos and what is none, and a job for them."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "notes.mp4").write_text("no video")
    put_in(tmp_path, films[:2])
    (tmp_path / "job.toml").write_text(JOB.format(tmp_path))
    return tmp_path


def put_in(root: Path, films: list[Path]) -> None:
    """Whole, as a program should that copies into a watched folder."""
    for film_path in films:
        shutil.copy(film_path, root / "half")
        (root / "half").rename(root / "videos" / film_path.name)


def changes_at(root: Path) -> DatasetChanges | None:
    if not (root / "data" / MANIFEST).is_file():
        return None
    return DatasetChanges(**read_json(open_store(str(root / "data")), CHANGES))


def files_at(root: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Which files there are: a file that is written again is another one."""
    found = {str(p.relative_to(root)): p.stat() for p in (root / "data").glob(pattern)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def test_each_run_adds_what_is_new(root: Path, films: list[Path], ray_cluster: None) -> None:
    """The flow in this process, without a schedule: what it returns and leaves alone."""
    job = resolve_job(PreprocessJob, job_file=str(root / "job.toml"))
    first = engine.run_flow(preprocess_flow, job).changes
    assert (first.version, first.clips_added, first.videos_added, first.failures_new) == (
        1,
        2,
        2,
        1,
    )
    shards = files_at(root, "*/shard-*")

    put_in(root, films[2:])
    second = engine.run_flow(preprocess_flow, job)
    assert second.changes == DatasetChanges(
        version=2,
        dataset_id=second.dataset.dataset_id,
        clips_added=2,
        clips_removed=0,
        clips_kept=2,
        videos_added=2,
        videos_removed=0,
        failures_new=0,
        failures_gone=0,
        retried=0,
        waiting=0,
    )
    assert second.sheet is not None
    assert (second.sheet.num_shown, second.sheet.num_new) == (2, 2)
    assert shards.items() < files_at(root, "*/shard-*").items(), "clips that are kept stay"

    everything = files_at(root, "**/*")
    third = engine.run_flow(preprocess_flow, job)
    assert (third.changes.version, third.changes.clips_kept, third.sheet) == (2, 4, None)
    assert third.dataset == second.dataset
    left = files_at(root, "**/*")
    assert {n for n in left if left[n] != everything.get(n) and "." in Path(n).name} == set()


# --- by itself -------------------------------------------------------------------------------


@contextmanager
def served(
    root: Path, api_url: str, *, every_s: float = EVERY_S
) -> Iterator[subprocess.Popen[bytes]]:
    """`kpmask deploy --serve` of the job; ended with SIGTERM."""
    program = str(Path(sys.executable).with_name("kpmask"))
    command = [program, "deploy", "--job", str(root / "job.toml"), "--every", str(every_s)]
    environment = {
        "PREFECT_API_URL": api_url,
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_LOGGING_TO_API_ENABLED": "true",
        "OMP_NUM_THREADS": "1",
    }
    with (root / "log").open("ab") as log:
        serving = subprocess.Popen(
            [*command, "--serve"], env={**os.environ, **environment}, stdout=log, stderr=log
        )
    try:
        yield serving
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.wait(60)


def deployment(api_url: str) -> str:
    found = wait_for(lambda: deployments(api_url, "kpmask").get("preprocess"), timeout_s=90)
    return str(found["id"])


def waiting_run(root: Path, api_url: str) -> tuple[str, dict[str, Any]]:
    """The deployment, and its one run once that waits for the lease which a test holds.

    What it says is waited for first: the server knows the deployment from the tests before.
    """
    wait_for(lambda: "waiting for another run" in (root / "log").read_text(), timeout_s=120)
    id_ = deployment(api_url)
    (run,) = runs_of(api_url, id_, "RUNNING")
    return id_, run


def finished(api_url: str, id_: str) -> list[dict[str, Any]]:
    return runs_of(api_url, id_, "COMPLETED", "FAILED", "CRASHED")


def news_of(api_url: str, runs: list[dict[str, Any]]) -> list[str]:
    """The lines that runs have logged of what they changed."""
    text = "\n".join(log_of(api_url, [run["id"] for run in runs])) if runs else ""
    return re.findall(r"(version \d+: .*)", text)


def wait_for_version(root: Path, version: int) -> DatasetChanges:
    def reached() -> DatasetChanges | None:
        changes = changes_at(root)
        return changes if changes and changes.version >= version else None

    try:
        found: DatasetChanges = wait_for(reached, timeout_s=150)
    except AssertionError:
        raise AssertionError((root / "log").read_text()) from None
    assert found.version == version
    return found


@pytest.mark.slow
def test_a_dataset_grows_by_itself(root: Path, films: list[Path], api_url: str) -> None:
    with served(root, api_url):
        id_ = deployment(api_url)
        first = wait_for_version(root, 1)
        assert (first.videos_added, first.clips_kept) == (2, 0)
        shards = files_at(root, "*/shard-*")
        put_in(root, films[2:])
        second = wait_for_version(root, 2)
        assert (second.videos_added, second.clips_added, second.clips_kept) == (2, 2, 2)
        assert shards.items() < files_at(root, "*/shard-*").items()

        wait_for(lambda: news_of(api_url, finished(api_url, id_)[2:]), timeout_s=120)
        assert changes_at(root) == second
        runs = finished(api_url, id_)
    assert not runs_of(api_url, id_, "PENDING", "RUNNING"), "it ended in order"
    assert "Traceback" not in (root / "log").read_text()
    assert all(run["auto_scheduled"] for run in runs), "nobody asked for one"
    assert {run["state"]["type"] for run in runs} == {"COMPLETED"}

    news = {}
    for run in runs:
        report = str(artifacts_of(api_url, run["id"])["preprocess-report"])
        for line in news_of(api_url, [run]):  # at most one; the last run's may be on its way
            assert line.capitalize() in report
            news.setdefault(line, report)
        assert ("data:image/jpeg;base64," in report) == ("added, 0" in report)
        assert "| not_media | 1 | read | notes | neither a video nor a picture |" in report
    grown = [line for line in news if "added" in line]
    assert grown == [
        "version 1: 2 clips added, 0 removed, 0 kept; videos: 2 added, 0 removed; "
        "failures: 1 new, 0 gone",
        "version 2: 2 clips added, 0 removed, 2 kept; videos: 2 added, 0 removed; "
        "failures: 0 new, 0 gone",
    ]
    assert "version 2: nothing new, nothing gone, 4 clips kept" in news
    assert "2 of 2 new clips:" in news[grown[1]]


@pytest.mark.slow
def test_one_run_at_a_time_and_the_next_after_one_that_was_killed(root: Path, api_url: str) -> None:
    """While somebody else holds the dataset, a run waits: it is the one that is at work."""
    store = open_store(str(root / "data"))
    with served(root, api_url) as serving:
        with lease(store, LEASE, on_wait=print):
            id_, busy = waiting_run(root, api_url)
            asked = post(api_url, f"deployments/{id_}/create_flow_run", {})["id"]
            cancelled = wait_for(
                lambda: [r for r in runs_of(api_url, id_, "CANCELLED") if r["id"] == asked],
                timeout_s=60,
            )
            assert cancelled[0]["state"]["message"] == "Deployment concurrency limit reached."
            assert [run["id"] for run in runs_of(api_url, id_, "RUNNING")] == [busy["id"]]

            (worker,) = children_of(serving.pid, "prefect")
            os.kill(worker, signal.SIGKILL)
            crashed = wait_for(lambda: runs_of(api_url, id_, "CRASHED"), timeout_s=60)
            assert [run["id"] for run in crashed] == [busy["id"]]
        assert wait_for_version(root, 1).clips_added == 2
        wait_for(lambda: runs_of(api_url, id_, "COMPLETED"), timeout_s=60)


@pytest.mark.slow
def test_runs_that_a_killed_process_leaves_behind_hold_no_place(root: Path, api_url: str) -> None:
    store = open_store(str(root / "data"))
    with served(root, api_url) as serving, lease(store, LEASE, on_wait=print):
        id_, busy = waiting_run(root, api_url)
        family = [*children_of(serving.pid, ""), serving.pid]
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        serving.wait()
    assert runs_of(api_url, id_, "RUNNING"), "nobody was left to say otherwise"
    with served(root, api_url):
        wait_for_version(root, 1)
        assert busy["id"] in {run["id"] for run in runs_of(api_url, id_, "CRASHED")}


def children_of(pid: int, word: str) -> list[int]:
    """The processes that a process has started and whose command has a word."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_text()
            except OSError:
                continue  # it ended meanwhile
            if parent == pid and word in command:
                found.append(int(entry.name))
    return found

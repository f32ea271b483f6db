"""Deployments: what is registered with a real Prefect server, and that a served one really runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import deploy
from flows.deploy import FLOWS
from kpmask.config import JOB_TYPES, PreprocessJob, load_preset, validated
from kpmask.errors import ConfigError
from kpmask.media.encode import encode
from tests.support.weed import free_ports

JOB = PreprocessJob(out="s3://b/data", metadata="s3://b/m.csv", raw="s3://b/raw")


@pytest.fixture(scope="module")
def api_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server with its schedulers, which the API of a single run goes without."""
    home = tmp_path_factory.mktemp("prefect")
    (port,) = free_ports(1)
    program = str(Path(sys.executable).with_name("prefect"))
    command = [program, "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            command, env={**os.environ, "PREFECT_HOME": str(home)}, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}/api"
    try:
        wait_for(lambda: server.poll() is not None or answers(url), timeout_s=120)
        assert server.poll() is None, (home / "log").read_text()
        yield url
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def named(api_url: str) -> Iterator[str]:
    """PREFECT_API_URL is set."""
    with temporary_settings(updates={PREFECT_API_URL: api_url}):
        yield api_url


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def wait_for(condition: Callable[[], object], *, timeout_s: float) -> Any:
    until = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.3)
    return found


def post(url: str, path: str, body: object) -> Any:
    def answer() -> httpx.Response | None:
        """None while the server's database is busy, which it says with 503."""
        found = httpx.post(f"{url}/{path}", json=body, timeout=20)
        return None if found.status_code == 503 else found

    found: httpx.Response = wait_for(answer, timeout_s=60)
    found.raise_for_status()
    return found.json()


def deployments(url: str, name: str) -> dict[str, Any]:
    """The server's deployments of a name, by their flow."""
    found = post(url, "deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    flows = {f["id"]: f["name"] for f in post(url, "flows/filter", {})}
    return {flows[d["flow_id"]]: d for d in found}


def test_every_job_is_registered_and_one_is_scheduled(named: str) -> None:
    given = {"preprocess": JOB, "train": load_preset("debug")["train"]}
    made = deploy.register(given, cron="0 3 * * *", timezone="Europe/Berlin", name="first")
    assert {m.name: m.cron for m in made} == {
        f"{flow}/first": "0 3 * * *" if flow == "preprocess" else None for flow in FLOWS
    }

    found = deployments(named, "first")
    assert set(found) == {*JOB_TYPES, "pipeline"}
    for name, deployment in found.items():
        assert deployment["work_pool_name"] == "kpmask"
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["entrypoint"] == f"flows.{name}.{name}_flow"
    (schedule,) = found["preprocess"]["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"] == "0 3 * * *"
    assert schedule["schedule"]["timezone"] == "Europe/Berlin"
    assert validated(PreprocessJob, found["preprocess"]["parameters"]["job"]) == JOB
    assert found["train"]["parameters"]["job"]["phases"]
    pool = httpx.get(f"{named}/work_pools/kpmask").json()
    assert pool["type"] == "process"


def test_registering_again_changes_what_is_there(named: str) -> None:
    (before, *_) = deploy.register({"preprocess": JOB}, cron="0 3 * * *", name="again")
    smaller = JOB.model_copy(update={"out": "s3://b/other"})
    (after, *_) = deploy.register({"preprocess": smaller}, cron=None, name="again")
    assert after.url == before.url, "the same deployment"
    found = deployments(named, "again")
    assert len(found) == len(FLOWS)
    assert found["preprocess"]["schedules"] == []
    assert found["preprocess"]["parameters"]["job"]["out"] == "s3://b/other"


def test_the_server_refuses_a_run_with_wrong_settings(named: str) -> None:
    deploy.register({"preprocess": JOB}, cron=None, name="strict")
    id_ = deployments(named, "strict")["preprocess"]["id"]
    wrong = {"parameters": {"job": {"out": "x", "videos": "v", "clips": {"size_px": "big"}}}}
    answer = httpx.post(f"{named}/deployments/{id_}/create_flow_run", json=wrong)
    assert answer.status_code == 409
    assert "size_px" in answer.text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"jobs": {"preprocess": JOB}, "cron": "every night"}, "not a cron expression"),
        ({"jobs": {"preprocess": JOB}, "cron": "* * * * *", "timezone": "Mars"}, "no timezone"),
        ({"jobs": {}, "cron": "0 3 * * *"}, "needs the whole preprocess job"),
        ({"jobs": {"preprocess": {"out": "x"}}, "cron": "0 3 * * *"}, "needs the whole"),
        ({"jobs": {"cook": {}}, "cron": None}, "no job 'cook'; there are: preprocess, train"),
    ],
)
def test_what_is_wrong_is_said_before_any_server_is_asked(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        deploy.register(**settings)
    with pytest.raises(ConfigError, match=says):
        deploy.serve(**settings)


def test_without_a_server_there_is_nothing_to_register_with() -> None:
    with pytest.raises(ConfigError, match="prefect server start"):
        deploy.register({"preprocess": JOB}, cron=None)


# --- served ----------------------------------------------------------------------------------

SERVE = """
import sys
from flows import deploy
from kpmask.config import PreprocessJob, validated
out, videos = sys.argv[1:]
job = validated(PreprocessJob, {
    "out": out, "videos": videos, "clips": {"size_px": 32}, "cluster": {"num_workers": 1},
})
deploy.serve({"preprocess": job}, cron="* * * * *", name="served")
"""


def write_video(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 255, (20, 64, 64, 3), np.uint8))
    encode(folder / "one.mp4", frames, fps=Fraction(24))


def runs_of(url: str, deployment_id: str, *states: str) -> Any:
    only = {"deployment_id": {"any_": [deployment_id]}, "state": {"type": {"any_": [*states]}}}
    return post(url, "flow_runs/filter", {"flow_runs": only})


@pytest.mark.slow
def test_a_served_deployment_runs_and_its_schedule_ends_with_the_process(
    api_url: str, tmp_path: Path
) -> None:
    """One run is asked for, so that nobody waits for the minute; the schedule's are queued."""
    write_video(tmp_path / "videos")
    out = tmp_path / "data"
    with (tmp_path / "log").open("wb") as log:
        serving = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(out), str(tmp_path / "videos")],
            env={**os.environ, "PREFECT_API_URL": api_url},
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(lambda: deployments(api_url, "served"), timeout_s=60)
        id_ = deployments(api_url, "served")["preprocess"]["id"]
        post(api_url, f"deployments/{id_}/create_flow_run", {})
        done = wait_for(lambda: runs_of(api_url, id_, "COMPLETED", "FAILED"), timeout_s=150)
        assert {r["state"]["type"] for r in done} == {"COMPLETED"}, (tmp_path / "log").read_text()
        assert (out / "manifest.parquet").is_file()
        due = wait_for(
            lambda: [r for r in runs_of(api_url, id_, "SCHEDULED") if r["auto_scheduled"]],
            timeout_s=60,
        )
        starts = sorted(datetime.fromisoformat(r["expected_start_time"]) for r in due)
        assert all((t.second, t.microsecond) == (0, 0) for t in starts)
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.wait(60)
    assert deployments(api_url, "served")["preprocess"]["paused"], "nobody runs what comes due"
    with temporary_settings(updates={PREFECT_API_URL: api_url}):
        deploy.register({"preprocess": JOB}, cron="0 3 * * *", name="served")
    assert not deployments(api_url, "served")["preprocess"]["paused"]

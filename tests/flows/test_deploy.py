"""Deployments: what is registered with a real Prefect server, and that a served one really runs."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
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
from kpmask.errors import ConfigError, RunFailed
from kpmask.media.encode import encode
from tests.support.prefect_server import answer, deployments, post, runs_of, wait_for

JOB = PreprocessJob(out="s3://b/data", metadata="s3://b/m.csv", raw="s3://b/raw")


@pytest.fixture
def named(api_url: str) -> Iterator[str]:
    """PREFECT_API_URL is set."""
    with temporary_settings(updates={PREFECT_API_URL: api_url}):
        yield api_url


def test_every_job_is_registered_and_one_is_scheduled(named: str) -> None:
    given = {"preprocess": JOB, "train": load_preset("debug")["train"]}
    made = deploy.register(given, cron="0 3 * * *", timezone="Europe/Berlin", name="first")
    assert {m.name: m.when for m in made} == {
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


def test_a_schedule_may_be_an_interval(named: str) -> None:
    made = deploy.register({"preprocess": JOB}, cron=None, every_s=90, name="often")
    assert {m.name: m.when for m in made if m.when} == {"preprocess/often": "every 90 s"}
    (schedule,) = deployments(named, "often")["preprocess"]["schedules"]
    assert (schedule["schedule"]["interval"], schedule["active"]) == (90.0, True)


def test_the_server_refuses_a_run_with_wrong_settings(named: str) -> None:
    deploy.register({"preprocess": JOB}, cron=None, name="strict")
    id_ = deployments(named, "strict")["preprocess"]["id"]
    for wrong, says in (
        ({"clips": {"size_px": "big"}}, "'job.clips.size_px'. Failure reason: 'big' is not of"),
        ({"clips": {"size_px": -1}}, "'job.clips.size_px'. Failure reason: -1 is less than"),
        ({"clips": {"size": 64}}, "'job.clips'. Failure reason: Additional properties are not"),
        ({"storage": {"layout": "tar"}}, "'tar' is not one of ['shards', 'folders']"),
    ):
        parameters = {"job": {"out": "x", "videos": "v", **wrong}}
        said = answer(named, f"deployments/{id_}/create_flow_run", {"parameters": parameters})
        assert said.status_code == 409
        assert says in said.json()["detail"]
    said = answer(named, f"deployments/{id_}/create_flow_run", {"parameters": {"job": {}}})
    assert "'out' is a required property" in said.json()["detail"]


def test_the_form_has_titles_defaults_limits_and_words(named: str) -> None:
    deploy.register({"preprocess": JOB}, cron=None, name="form")
    schema = deployments(named, "form")["preprocess"]["parameter_openapi_schema"]
    assert schema["required"] == ["job"]
    assert schema["properties"]["job"]["description"] == "what to do."
    parts = schema["definitions"]
    job = parts["PreprocessJob"]["properties"]
    assert job["out"]["description"] == "folder or s3://bucket/prefix of the dataset"
    assert job["clips"]["$ref"] == "#/definitions/Clips"
    assert parts["Clips"]["description"] == "How a span of a video becomes a clip."
    size = parts["Clips"]["properties"]["size_px"]
    assert (size["title"], size["default"], size["exclusiveMinimum"]) == ("Size Px", 256, 0)
    assert parts["Retry"]["properties"]["backoff_s"]["description"].startswith("after the second")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"jobs": {"preprocess": JOB}, "cron": "every night"}, "not a cron expression"),
        ({"jobs": {"preprocess": JOB}, "cron": "* * * * *", "timezone": "Mars"}, "no timezone"),
        ({"jobs": {}, "cron": "0 3 * * *"}, "needs the whole preprocess job"),
        ({"jobs": {"preprocess": {"out": "x"}}, "cron": "0 3 * * *"}, "needs the whole"),
        ({"jobs": {"preprocess": JOB}, "cron": "0 3 * * *", "every_s": 60.0}, "not both"),
        ({"jobs": {"preprocess": JOB}, "cron": None, "every_s": 0.5}, "0.5 s is not between 5 s"),
        ({"jobs": {"preprocess": JOB}, "cron": None, "every_s": math.nan}, "nan s is not between"),
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


@pytest.mark.parametrize("path", ["tasks.py", "flows/__init__.py"])
def test_a_folder_with_modules_of_our_names_is_refused(
    named: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect would have runs import them, and say that a coroutine was cancelled."""
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="serve from another folder") as raised:
        deploy.serve({"preprocess": JOB}, cron=None)
    assert raised.value.subject == str(tmp_path)


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


def test_one_process_of_a_machine_serves_a_name(named: str) -> None:
    with deploy._served_here_alone("mine"):
        with pytest.raises(RunFailed, match="another process on this machine") as raised:
            deploy.serve({"preprocess": JOB}, cron=None, name="mine")
        assert raised.value.code == "busy"
        with deploy._served_here_alone("other"):
            pass
    with deploy._served_here_alone("mine"):
        pass


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

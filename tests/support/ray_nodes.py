"""A Ray cluster of several nodes, each a process of its own on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

RAY = str(Path(sys.executable).parent / "ray")
START_TIMEOUT_S = 180
WAIT = """
import sys, time
import ray
ray.init(log_to_driver=False, logging_level=40)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.1)
"""


@dataclass
class Nodes:
    """A running cluster: `address` is its head's."""

    address: str
    environment: dict[str, str]
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add(self, *, num_cpus: int) -> subprocess.Popen[bytes]:
        """One more node."""
        options = ["--address", self.address, "--num-cpus", str(num_cpus)]
        process = _started(options, self.environment)
        self.workers.append(process)
        return process

    def wait_for(self, count: int) -> None:
        """Wait until the head knows so many nodes to be alive."""
        subprocess.run(
            [sys.executable, "-c", WAIT, str(count)],
            env=self.environment | {"RAY_ADDRESS": self.address},
            check=True,
            timeout=START_TIMEOUT_S,
        )


@contextmanager
def ray_nodes(folder: Path) -> Iterator[Nodes]:
    """A head without processors to work on, for the duration; nodes are added to it.

    Args:
        folder: for Ray's files; its path has to be short (a socket's is at most 107 bytes).
    """
    port = _free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    options = ["--head", "--port", str(port), "--num-cpus", "0", "--include-dashboard", "false"]
    head = _started([*options, "--temp-dir", str(folder)], environment)
    nodes = Nodes(f"127.0.0.1:{port}", environment)
    try:
        _wait_for_port(port)
        yield nodes
    finally:
        for process in [*nodes.workers, head]:
            kill_node(process)


def kill_node(process: subprocess.Popen[bytes]) -> None:
    """End a node with all its processes, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _started(options: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [RAY, "start", "--block", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the head does not come up"
            time.sleep(0.2)

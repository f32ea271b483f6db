"""infra/ without containers: its files read, and its services run as processes on loopback.

The services run with the very commands, environments and health checks of compose.yaml. Only
names and places are mapped: a service's name to 127.0.0.1, its port to a free one, a path inside
the image to one below a temporary folder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.weed import find_weed, free_ports

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
MARK = "KPMASK_STACK"  # in the environment of every process of a stack
BIN = Path(sys.executable).parent
SERVERS = ("seaweedfs", "prefect", "ray-head")  # services that others call by name


# --- the files -------------------------------------------------------------------------------

_REFERENCE = re.compile(r"\$(?:\$|\{(\w+)(?:(:?[-?])([^}]*))?\})")


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Compose's interpolation: ${X}, ${X:-default}, ${X:?message}, $$."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if name is None:
            return "$"
        if found := variables.get(name):
            return found
        if kind in {":-", "-"}:
            return str(rest)
        raise KeyError(f"{name}: {rest or 'is not set'}")

    return _REFERENCE.sub(value, text)


def load_compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """compose.yaml as Compose sees it: parsed first, then each text interpolated."""

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return interpolated(node, variables) if isinstance(node, str) else node

    tree: dict[str, Any] = walk(yaml.safe_load((INFRA / "compose.yaml").read_text()))
    return tree


def variables_of(text: str) -> dict[str, str | None]:
    """Every variable that a text refers to, with its default; None: it must be set."""
    found: dict[str, str | None] = {}
    for name, kind, rest in _REFERENCE.findall(text):
        if name:
            found[name] = rest if kind in {":-", "-"} else None
    return found


def env_file() -> tuple[set[str], set[str]]:
    """The variables of .env.example: those to fill in, and the optional ones."""
    text = (INFRA / ".env.example").read_text()
    needed = set(re.findall(r"^(\w+)=", text, re.MULTILINE))
    return needed, set(re.findall(r"^#(\w+)=", text, re.MULTILINE))


@dataclass(frozen=True)
class Stage:
    """One FROM of a Dockerfile with the instructions below it."""

    name: str
    parent: str
    steps: tuple[tuple[str, str], ...]

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]


def dockerfile_stages() -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", (INFRA / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    stages: dict[str, Stage] = {}
    for line in lines:
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            stages[name] = Stage(name, parent, ())
        elif stages:
            last = list(stages)[-1]
            old = stages[last]
            stages[last] = Stage(last, old.parent, (*old.steps, (instruction, rest)))
    return stages


def image_environment(target: str) -> dict[str, str]:
    """The ENV of a target and of the stages below it."""
    stages = dockerfile_stages()
    chain = [stages[target]]
    while chain[-1].parent in stages:
        chain.append(stages[chain[-1].parent])
    found: dict[str, str] = {}
    for stage in reversed(chain):
        for text in stage.all("ENV"):
            found.update(word.split("=", 1) for word in shlex.split(text))
    return found


# --- the processes ---------------------------------------------------------------------------


@dataclass
class Stack:
    """The services of compose.yaml as processes. `folder` takes all that they write."""

    folder: Path
    variables: dict[str, str]
    ports: dict[str, int] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    extra: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.compose = load_compose(self.variables)
        # Ray's other ports are drawn from here, and its head must not be in their range.
        free = [port for port in free_ports(64) if port > 20000]
        self.ports = dict(zip(("8333", "4200", "6379", "8080"), free, strict=False))
        others = iter(free[8:])
        inner = ("master", "filer", "volume", "admin")
        weed = [f"-{n}.port{s}={next(others)}" for n in inner for s in ("", ".grpc")]
        weed += [f"-s3.port.grpc={next(others)}", f"-filer.localSocket={self.folder}/filer.sock"]
        self.extra["seaweedfs"] = weed
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        # Ray's sockets lie below it, and a socket's path has at most 107 characters.
        self.short = Path(tempfile.mkdtemp(prefix="kp-"))
        config = self.folder / "etc" / "s3.json"
        config.parent.mkdir(parents=True)
        config.write_text(self.compose["configs"]["s3"]["content"])
        for name in ("objects", "var/state", "var/cache", "var/prefect"):
            (self.folder / name).mkdir(parents=True)

    def mapped(self, text: str) -> str:
        """A text of compose.yaml as it has to be outside of containers."""
        names = "|".join(SERVERS)
        text = re.sub(rf"(?<![\w.-])({names})(?=:\d)|(?<=-ip=)({names})$", "127.0.0.1", text)
        text = text.replace("0.0.0.0", "127.0.0.1")
        for port, free in self.ports.items():
            text = re.sub(rf"(?<![\d.]){port}\b", str(free), text)
        text = text.replace("/etc/seaweedfs", str(self.folder / "etc"))
        text = text.replace("/var/lib/kpmask", str(self.folder / "var"))
        return text.replace("-dir=/data", f"-dir={self.folder / 'objects'}")

    def environment(self, service: str) -> dict[str, str]:
        """What the service's process sees: its own variables and the image's, and no others."""
        own = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "RAY_TMPDIR": str(self.short),
            "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(200 * 2**20),
            "PREFECT_WORKER_WEBSERVER_PORT": str(self.ports["8080"]),
            MARK: f"{self.mark}/{service}",
        }
        given = {
            **image_environment("cpu"),
            **self.compose["services"][service].get("environment", {}),
        }
        return own | {name: self.mapped(str(value)) for name, value in given.items()}

    def command(self, service: str) -> list[str]:
        found = self.compose["services"][service]
        argv = [*found.get("entrypoint", []), *found["command"]]
        argv = [self.mapped(word) for word in argv] + self.extra.get(service, [])
        if argv[0] == "weed":
            argv[0] = str(find_weed())
        elif argv[0].startswith("infra/"):
            argv[0] = str(ROOT / argv[0])
        return argv

    def start(self, service: str) -> None:
        with self.log(service).open("wb") as log:
            self.running[service] = subprocess.Popen(
                self.command(service),
                cwd=ROOT,
                env=self.environment(service),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, service: str, *, timeout_s: float = 150.0) -> None:
        """Until the service's health check passes; without one, until its log says so."""
        until = time.monotonic() + timeout_s
        while not self.healthy(service):
            if self.running[service].poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{service} does not start:\n{self.tail(service)}")
            time.sleep(0.3)

    def healthy(self, service: str) -> bool:
        check = self.compose["services"][service].get("healthcheck")
        if check is None:  # the Ray worker: it ends when it cannot join
            return "Ray runtime started" in self.tail(service)
        assert check["test"][0] == "CMD"
        argv = [self.mapped(word) for word in check["test"][1:]]
        if argv[0] == "wget":
            return _answers(argv[-1])
        if argv[0] == "ray" and "Ray runtime started" not in self.tail(service):
            return False  # the check itself waits long for a head that is not there yet
        argv[0] = str(BIN / argv[0])
        done = subprocess.run(
            argv, env=self.environment(service), capture_output=True, timeout=60, check=False
        )
        return done.returncode == 0

    def run(self, service: str, *, timeout_s: float = 120.0) -> str:
        """Run a one-shot service to its end and return what it printed."""
        done = subprocess.run(
            self.command(service),
            cwd=ROOT,
            env=self.environment(service),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def down(self) -> dict[str, int]:
        """Stop every service as Docker does, the last one first; their exit statuses.

        The main process gets SIGTERM and time; what it leaves behind goes with its container.
        """
        statuses = {}
        for service, process in reversed(self.running.items()):
            process.send_signal(signal.SIGTERM)
            try:
                statuses[service] = process.wait(45)
            except subprocess.TimeoutExpired:
                process.kill()
                statuses[service] = process.wait()
            self._end_container(service)
        self.running.clear()
        return statuses

    def remove(self) -> None:
        shutil.rmtree(self.short, ignore_errors=True)

    def _end_container(self, service: str) -> None:
        until = time.monotonic() + 20
        number = signal.SIGTERM
        while left := self.processes(service):
            for pid in left:
                _send(pid, number)
            time.sleep(0.3)
            if time.monotonic() > until - 15:
                number = signal.SIGKILL
            assert time.monotonic() < until, left

    def processes(self, service: str = "") -> list[int]:
        """The stack's processes that are alive, or those of one service."""
        wanted = f"{MARK}={self.mark}/{service}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    marks = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue  # it ended meanwhile, or is somebody else's
                if any(m == wanted or (not service and m.startswith(wanted)) for m in marks):
                    found.append(int(entry.name))
        return found

    def log(self, service: str) -> Path:
        return self.folder / f"{service}.log"

    def tail(self, service: str) -> str:
        return self.log(service).read_text(errors="replace")[-6000:]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=3) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def prefect_yaml(**changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((INFRA / "prefect.yaml").read_text())
    return tree | changes


def written(path: Path, tree: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
    return path


def flag_values(argv: Sequence[str]) -> dict[str, str]:
    """--name=value and -name=value words as a mapping."""
    pairs = [
        word.lstrip("-").split("=", 1) for word in argv if word.startswith("-") and "=" in word
    ]
    return dict(pairs)

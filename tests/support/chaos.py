"""Catalogs that are run by processes of their own, which are poisoned and killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpmask.config import AnimateJob
from tasks.inputs import content_digest
from tests.support.chaos_hooks import EVENTS, POISON, VARIABLE

ROOT = Path(__file__).parents[2]
POLL_S = 0.02
END_S = 400.0
LOAD = "from tests.support.chaos_hooks import install\n\ninstall()\n"
RUN = """
import logging, sys
from kpmask.config import AnimateJob
from kpmask.errors import KpmaskError
from tasks.animate import animate_catalog
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
try:
    animate_catalog(AnimateJob.model_validate_json(sys.argv[1]))
except KpmaskError as error:
    sys.exit(f"{error.code}: {error}")
"""


@dataclass(frozen=True)
class Event:
    """A line of the account: what a process of a run has done, or is about to do."""

    kind: str
    pid: int
    facts: dict[str, Any]


class Chaos:
    """A folder with the poison and the account of some runs.

    `environment` is for their drivers and for the nodes that they use.
    """

    def __init__(
        self,
        folder: Path,
        *,
        files: Sequence[Path] = (),
        names: Sequence[str] = (),
        pause_s: float = 0.0,
    ) -> None:
        """Args:
        files: whoever decodes one of them crashes.
        names: of animations; whoever draws one of them is killed.
        pause_s: before each animation, so that there is time to do harm.
        """
        self.folder = folder
        (folder / "site").mkdir(parents=True)
        (folder / "tmp").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(LOAD)
        sha256s = [content_digest(path) for path in files]
        poison = {"sha256s": sha256s, "names": list(names), "pause_s": pause_s}
        (folder / POISON).write_text(json.dumps(poison))

    @property
    def environment(self) -> dict[str, str]:
        """What is added to a process's variables."""
        return {
            VARIABLE: str(self.folder),
            "PYTHONPATH": os.pathsep.join([str(self.folder / "site"), str(ROOT)]),
            "TMPDIR": str(self.folder / "tmp"),
            "RAY_TMPDIR": "/tmp",  # sockets have short paths
        }

    def start(self, job: AnimateJob, **variables: str) -> subprocess.Popen[str]:
        """A driver with a run of a catalog."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return subprocess.Popen(
            [sys.executable, "-c", RUN, job.model_dump_json()],
            cwd=self.folder,
            env=environment | self.environment | variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    # --- the account

    def events(self, *kinds: str) -> list[Event]:
        path = self.folder / EVENTS
        if not path.exists():
            return []
        # The last line may be half written.
        lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        found = []
        for line in lines:
            facts = json.loads(line)
            event = Event(facts.pop("kind"), facts.pop("pid"), facts)
            if event.kind in kinds:
                found.append(event)
        return found

    def made(self) -> set[str]:
        """The animations that were finished so far."""
        return {event.facts["item"] for event in self.events("made")}

    def num_made(self) -> Counter[str]:
        """How often each animation was finished."""
        return Counter(event.facts["item"] for event in self.events("made"))

    def num_begun(self) -> Counter[str]:
        """How often it was begun to compute the state of each image and video."""
        return Counter(event.facts["feature"] for event in self.events("begin"))

    def num_stored(self) -> Counter[str]:
        """How often the state of each was stored, whole."""
        return Counter(event.facts["feature"] for event in self.events("stored"))

    def num_interrupted(self) -> Counter[str]:
        """In how many bundles each animation, image or video was that came to no end."""
        done = {event.facts["number"] for event in self.events("done")}
        bundles = [e for e in self.events("bundle") if e.facts["number"] not in done]
        return Counter(item for bundle in bundles for item in bundle.facts["items"])

    def wait_for(self, num_made: int, process: subprocess.Popen[str]) -> None:
        """Wait until so many animations are finished, and the run is not."""
        until = time.monotonic() + END_S
        while len(self.made()) < num_made:
            assert process.poll() is None, ended(process)
            assert time.monotonic() < until
            time.sleep(POLL_S)
        assert process.poll() is None, "it ended before it could be disturbed"

    def kill_worker(self) -> None:
        """Kill a process that has a model and is at work, as the kernel would."""
        until = time.monotonic() + END_S
        while not (busy := self._busy()):
            assert time.monotonic() < until, "no worker is at work"
            time.sleep(POLL_S)
        os.kill(busy[-1], signal.SIGKILL)

    def _busy(self) -> list[int]:
        done = {event.facts["number"] for event in self.events("done")}
        pids = [e.pid for e in self.events("bundle") if e.facts["number"] not in done]
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    def leftovers(self) -> list[str]:
        """What the runs left in the folder for temporary files."""
        return sorted(path.name for path in (self.folder / "tmp").glob("kpmask-*"))


def kill_driver(process: subprocess.Popen[str]) -> None:
    """Kill a driver, which takes its workers with it in a moment; it has not ended by itself."""
    assert process.poll() is None, "it ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a driver's end: its exit status and what it said."""
    _, errors = process.communicate(timeout=END_S)
    return process.returncode, errors

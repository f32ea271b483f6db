"""What a run's processes have taken so far, as /proc tells it."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
DRIVER, MODEL, MEDIA, PREFECT, RAY = ROLES = ("driver", "model", "media", "prefect", "ray")


@dataclass(frozen=True, slots=True)
class Process:
    """A process; `role` is one of `ROLES`, of which ray is what is none of the others."""

    role: str
    title: str
    cpu_s: float
    rss_bytes: int


class Processes:
    """A process and all below it. Those that ended count with what they were last seen to have."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._seen: dict[tuple[int, str], Process] = {}  # by id and start, for ids come again
        self.alive: dict[int, Process] = {}

    def look(self) -> None:
        stats = dict(all_stats())
        alive: dict[int, Process] = {}
        for pid in _below(self._root, {pid: int(stat[1]) for pid, stat in stats.items()}):
            with contextlib.suppress(OSError):  # it ended meanwhile
                start = stats[pid][19]
                known = self._seen.get((pid, start))
                alive[pid] = self._seen[pid, start] = self._process(pid, stats[pid], known)
        self.alive = alive

    def _process(self, pid: int, stat: Sequence[str], known: Process | None) -> Process:
        shown = title(pid)
        cpu_s = (int(stat[11]) + int(stat[12])) / CLOCK_TICKS
        role = _role(pid, shown, is_root=pid == self._root)
        if not shown and known is not None:  # it is ending, and shows no more what it was
            role = known.role
        return Process(role, shown, cpu_s, int(stat[21]) * PAGE_BYTES)

    def cpu_s(self) -> Counter[str]:
        """Processor seconds so far, by role."""
        spent: Counter[str] = Counter()
        for process in self._seen.values():
            spent[process.role] += process.cpu_s
        return spent

    def rss_bytes(self) -> Counter[str]:
        """Resident memory, shared parts and all, of those that are alive, by role."""
        held: Counter[str] = Counter()
        for process in self.alive.values():
            held[process.role] += process.rss_bytes
        return held


@dataclass(frozen=True, slots=True)
class Cost:
    """`by_role` is `cpu_s` by what the processes are."""

    wall_s: float
    cpu_s: float
    by_role: dict[str, float]


class Clock:
    """What was spent since `start`, by this process and those below it."""

    def start(self) -> None:
        self._processes = Processes(os.getpid())
        self._processes.look()
        self._before_s = self._processes.cpu_s()
        self._start_s = time.perf_counter()

    def stop(self) -> Cost:
        """Call it before any of the processes ends."""
        wall_s = time.perf_counter() - self._start_s
        self._processes.look()
        spent_s = self._processes.cpu_s()
        spent_s.subtract(self._before_s)
        return Cost(wall_s, sum(spent_s.values()), dict(spent_s))


def title(pid: int) -> str:
    """The command as the process shows it."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def is_in_call(pid: int) -> bool:
    """Whether an actor of Ray is in a method: its title has the method's name then."""
    return "." in title(pid).partition(" ")[0]


def all_stats() -> Iterator[tuple[int, list[str]]]:
    """The fields of /proc/PID/stat behind the name: state, parent, ..."""
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                text = Path(entry.path, "stat").read_text()
                yield int(entry.name), text.rpartition(")")[2].split()


def _below(root: int, parents: Mapping[int, int]) -> set[int]:
    found = {root} & parents.keys()
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _role(pid: int, shown: str, *, is_root: bool) -> str:
    if is_root:
        return DRIVER
    if shown.startswith("ray::_Host"):  # a worker has torch, a media worker has not
        return MODEL if "libtorch" in Path(f"/proc/{pid}/maps").read_text() else MEDIA
    return PREFECT if "flows.server" in shown else RAY

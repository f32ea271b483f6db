"""Which machine and process this is, and whether another process still lives."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path


def boot_id() -> str:
    """What changes whenever the machine starts anew; empty where the system has no such thing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def machine_id() -> str:
    """This boot of this machine, as seen from within one space of process numbers.

    Containers of one machine share its boot and may share its name, but each counts its own
    processes; so the number of that space is part of it.
    """
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return f"{socket.gethostname()} {boot_id()} {space}"


def started_at(pid: int) -> str:
    """When a process began, in ticks since boot; empty where that cannot be known.

    A number that was given away again belongs to a process with another beginning.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name of the program, in parentheses, may hold anything; the rest is 50 numbers.
    state, *fields = text.rpartition(")")[2].split()
    return "" if state in {"Z", "X"} else fields[18]


def process_lives(pid: int, started: str) -> bool:
    """Whether the process `pid` of this machine that began at `started` has not ended."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's, which lives
    now = started_at(pid)
    return not started or not Path("/proc/self/stat").exists() or now == started


def steady_s() -> float:
    """Seconds on a clock that nobody can set and that goes on while the machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()

"""One animation, or a catalog of it, in a process of its own: what became of it, and its peak.

    python -m tests.support.peak JOB_JSON

A job with a `catalog` runs with workers in this process, which decode and encode by themselves.
Prints the failure's code or "", the number of frames made, and the largest resident size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from kpmask.config import AnimateJob
from kpmask.errors import KpmaskError
from tasks.animate import animate_catalog, animate_pair
from tests.support.catalogs import inline_catalogs

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Peak:
    """What a job came to.

    Attributes:
        code: of the error that ended it; "" where it was done.
        num_frames: that were made.
        peak_bytes: the largest resident size of the process.
    """

    code: str
    num_frames: int
    peak_bytes: int


def peak_of(job: AnimateJob, *, timeout_s: float = 1500.0) -> Peak:
    """Run a job in a process of its own.

    Raises:
        CalledProcessError: it ended with an error that is none of ours.
    """
    argv = [sys.executable, "-m", "tests.support.peak", job.model_dump_json()]
    # One thread: others' stacks and heaps are no part of what a job holds.
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
    )
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _run(job: AnimateJob) -> int:
    if job.catalog is None:
        return animate_pair(job).num_frames
    with pytest.MonkeyPatch.context() as monkeypatch:
        inline_catalogs(monkeypatch)
        return animate_catalog(job).num_frames


def peak_bytes() -> int:
    """By the process itself: what `getrusage` says begins with the size of who started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(job: AnimateJob) -> None:
    code, num_frames = "", 0
    try:
        num_frames = _run(job)
    except KpmaskError as error:
        code = error.code
    peak = Peak(code, num_frames, peak_bytes())
    sys.stdout.write("\n" + json.dumps(asdict(peak)))


if __name__ == "__main__":
    main(AnimateJob.model_validate_json(sys.argv[1]))

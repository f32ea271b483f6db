"""How much memory it takes to score a long video, in a process of its own.

    python -m tests.support.long_video NUM_FRAMES

Prints by how many bytes the process grew after its first frames.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import torch

from kpmask.evaluate import FramePair, scored_video
from kpmask.metrics import build_metrics
from tests.support.peak import ROOT, peak_bytes

SIDE_PX = 64
FIRST_FRAMES = 80
METRICS = ("l1", "l1_moving", "psnr", "temporal_error")


def growth_bytes(num_frames: int) -> int:
    """Of a process that scores so many frames, in chunks of eight."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.long_video", str(num_frames)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    return int(done.stdout)


def main(num_frames: int) -> None:
    random = torch.Generator().manual_seed(0)
    image_CHW = torch.rand(3, SIDE_PX, SIDE_PX, generator=random)
    before: list[int] = []

    def pairs() -> Iterator[FramePair]:
        for start in range(0, num_frames, 8):
            if start == FIRST_FRAMES:
                before.append(peak_bytes())
            true = torch.stack([image_CHW.roll(t % SIDE_PX, 2) for t in range(start, start + 8)])
            yield 0.9 * true, true

    scored_video(pairs(), build_metrics(METRICS), clip_id="c", name="n")
    sys.stdout.write(str(peak_bytes() - before[0]))


if __name__ == "__main__":
    main(int(sys.argv[1]))

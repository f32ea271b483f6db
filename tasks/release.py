"""From a run's weights to a small file that can be shipped, and its entry in the index."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kpmask import bundled, checkpoint
from kpmask.animate import Animator
from kpmask.demo.videos import film, plan_takes
from kpmask.errors import CheckpointError
from kpmask.models.base import AnimationSystem
from tasks import storage
from tasks.manifest import read_json
from tasks.weights import local_weights

SUMMARY: Final = "summary.json"
MAX_DIFFERENCE: Final = 2 / 255
NUM_FRAMES: Final = 4
FRAMES_APART: Final = 10


@dataclass(frozen=True, slots=True)
class Released:
    """A file made for shipping; `difference` is the most that it changes a channel, in [0, 1]."""

    sha256: str
    size_bytes: int
    difference: float


def release(
    src: str,
    out: Path,
    *,
    name: str | None = None,
    command: str = "",
    scores: str | None = None,
    max_bytes: int = checkpoint.MAX_RELEASE_BYTES,
) -> Released:
    """Make a small file of some weights (see `kpmask.checkpoint.release`) and, if named, list it.

    Args:
        src: the weights' name, path or URI. out: the file to write.
        name: what to call it in the index beside `out`; None leaves the index alone.
        command: that made the weights. scores: an evaluation of them, for the index.

    Raises:
        CheckpointError: the weights cannot be read or shipped, or float16 changes what they draw.
        StorageError: something is not there.
    """
    found = {} if scores is None else _means(scores)
    path, part = local_weights(src), out.with_name(f".tmp-{out.name}")
    try:
        small = checkpoint.release(path, part, max_bytes=max_bytes)
        difference = _largest_difference(checkpoint.load(path).system, small.system)
        if not difference <= MAX_DIFFERENCE:
            raise CheckpointError(
                f"float16 changes what it draws by {255 * difference:.2f}/255, more than "
                f"{255 * MAX_DIFFERENCE:g}/255",
                subject=src,
            )
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    described = checkpoint.describe(out)
    if name is not None:
        bundled.enter(out, name, described, command=command, scores=found)
    return Released(described["sha256"], described["size_bytes"], difference)


def _largest_difference(full: AnimationSystem[Any, Any], small: AnimationSystem[Any, Any]) -> float:
    """In any channel of what both draw of a held-out person of the demonstration."""
    take = next(take for take in plan_takes(24, seed=0) if take.partition == "test")
    left, top, right, bottom = take.box_px
    chosen = itertools.islice(film(take), 0, NUM_FRAMES * FRAMES_APART, FRAMES_APART)
    frames = [frame_HWC[top:bottom, left:right] for frame_HWC in chosen]
    drawn = []
    for system in (full, small):
        animator = Animator(system, device="cpu")
        driving = animator.encode_driving(frames)
        drawn.append(animator.render(animator.encode_source(frames[0]), driving))
    return (drawn[0] - drawn[1]).abs().max().item()


def _means(evaluation: str) -> dict[str, float]:
    """An evaluation's means by metric, and the baseline's as `<metric>_copy`."""
    rows = read_json(storage.open_store(evaluation), SUMMARY)["summaries"]
    means = {}
    for row in rows:
        suffix = "" if row["method"] == "model" else f"_{row['method']}"
        means[row["metric"] + suffix] = round(row["mean"], 5)
    return means

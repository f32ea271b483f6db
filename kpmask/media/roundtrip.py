"""Frames after our encoder and a decoder: what is lost of a perfect video by storing it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kpmask.config import MediaLimits
from kpmask.media import decode
from kpmask.media.encode import encode

Frame = NDArray[np.uint8]  # HWC RGB

CRF = 18  # as results are encoded unless a job says otherwise


@contextmanager
def through_codec(
    frames: Iterable[Frame], *, fps: float, crf: int = CRF
) -> Iterator[Iterator[Frame]]:
    """The same frames, in order and of the same size, as H.264 leaves them.

    They are encoded on entry, into a temporary file, and decoded one at a time.

    Args:
        fps: rates below 1 count as 1.

    Raises:
        MediaError: no_frames, or encode_failed. Whatever `frames` raises.
        StorageError: no_space.
    """
    sizes: list[tuple[int, ...]] = []
    with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
        path = Path(folder) / "frames.mp4"
        # A file of few frames a second would have gaps, which end a video.
        encode(path, _noting_size(frames, sizes), fps=max(1.0, fps), crf=crf)
        height_px, width_px = sizes[0][:2]
        # Odd sides were padded by one.
        most_px = max(height_px + 1, width_px + 1, MediaLimits().max_side_px)
        limits = MediaLimits(min_side_px=1, max_side_px=most_px)
        decoded = decode.frames(path, limits)
        yield (frame.rgb_HWC[:height_px, :width_px] for frame in decoded)


def _noting_size(frames: Iterable[Frame], sizes: list[tuple[int, ...]]) -> Iterator[Frame]:
    for frame_HWC in frames:
        if not sizes:
            sizes.append(frame_HWC.shape)
        yield frame_HWC

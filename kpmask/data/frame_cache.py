"""Decoded frames kept in memory, so that a small dataset is decoded once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from kpmask.records import ClipRecord

MAX_BYTES: Final = 2**30  # 87,000 frames of 64 px, or 5,400 of 256 px

# The frames of a clip at these indices, uint8 [T, H, W, C].
ReadFrames = Callable[[ClipRecord, Sequence[int]], np.ndarray]


class FrameCache:
    """A `ReadFrames` that keeps what `read` gave until `max_bytes` are full. Safe for threads.

    Nothing is dropped again: of frames in random order, no one is likelier to come back.
    """

    def __init__(self, read: ReadFrames, *, max_bytes: int = MAX_BYTES) -> None:
        self._read = read
        self._max_bytes = max_bytes
        self._frames: dict[tuple[str, int], np.ndarray] = {}
        self._lock = threading.Lock()
        self.num_bytes = 0

    def __call__(self, clip: ClipRecord, indices: Sequence[int]) -> np.ndarray:
        found = {i: self._frames.get((clip.clip_id, i)) for i in indices}
        missing = [i for i, frame in found.items() if frame is None]
        if missing:
            for i, frame_HWC in zip(missing, self._read(clip, missing), strict=True):
                found[i] = frame_HWC
                self._keep((clip.clip_id, i), frame_HWC)
        return np.stack([frame for i in indices if (frame := found[i]) is not None])

    def _keep(self, key: tuple[str, int], frame_HWC: np.ndarray) -> None:
        with self._lock:
            if key not in self._frames and self.num_bytes + frame_HWC.nbytes <= self._max_bytes:
                self._frames[key] = frame_HWC.copy()  # not a view that keeps its neighbours
                self.num_bytes += frame_HWC.nbytes

"""Batches of frame pairs, read ahead of the training."""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kpmask.config import Augmentation
from kpmask.data.augment import Draw, augment, draw
from kpmask.data.frame_cache import ReadFrames
from kpmask.data.pairs import PairSampler
from kpmask.models.base import Batch

MAX_READERS: Final = 8


@dataclass(frozen=True)
class _RawBatch:
    frames_B2HWC: Tensor  # uint8
    draws: Sequence[Draw]


class BatchLoader:
    """The batches of a phase for one worker.

    Threads read and decode the coming steps' frames while the caller trains on this one's: one
    beside a training on the CPU, which needs the processor itself, and more beside a GPU. They go
    to `device` as bytes and are augmented there.
    """

    def __init__(
        self,
        read: ReadFrames,
        sampler: PairSampler,
        augmentation: Augmentation,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._read = read
        self._sampler = sampler
        self._augmentation = augmentation
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self._num_readers = min(MAX_READERS, os.cpu_count() or 1) if self._on_gpu else 1

    def batches(self, first_step: int, last_step: int) -> Generator[Batch]:
        """The batches of steps [first_step, last_step), in order; close it to stop the threads."""
        readers = ThreadPoolExecutor(self._num_readers, thread_name_prefix="batches")
        steps = iter(range(first_step, last_step))
        coming: collections.deque[Future[_RawBatch]] = collections.deque()
        try:
            while True:
                ahead = self._num_readers + 1 - len(coming)
                for step in itertools.islice(steps, ahead):
                    coming.append(readers.submit(self._raw, step))
                if not coming:
                    return
                yield self._augmented(coming.popleft().result())
        finally:
            readers.shutdown(cancel_futures=True)

    def _raw(self, step: int) -> _RawBatch:
        pairs = self._sampler.batch(step)
        frames = [self._read(p.clip, (p.source_index, p.driving_index)) for p in pairs]
        frames_B2HWC = torch.from_numpy(np.stack(frames))
        return _RawBatch(
            # From pinned memory, the copy to the GPU runs beside its work.
            frames_B2HWC=frames_B2HWC.pin_memory() if self._on_gpu else frames_B2HWC,
            draws=[draw(self._augmentation, p.augment_seed) for p in pairs],
        )

    def _augmented(self, raw: _RawBatch) -> Batch:
        frames_B2CHW = to_float(raw.frames_B2HWC.to(self._device, non_blocking=True))
        batch = Batch(source_BCHW=frames_B2CHW[:, 0], driving_BCHW=frames_B2CHW[:, 1])
        return augment(batch, raw.draws)


def to_float(image_HWC: Tensor) -> Tensor:
    """uint8 [..., H, W, C] as float [..., C, H, W] in [0, 1]."""
    return image_HWC.movedim(-1, -3).to(torch.float32) / 255

"""Batches of frame pairs, read one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kpmask.config import Augmentation
from kpmask.data.augment import Draw, augment, draw
from kpmask.data.pairs import PairSampler
from kpmask.models.base import Batch
from kpmask.records import ClipRecord

# The frames of a clip at these indices, uint8 [T, H, W, C].
ReadFrames = Callable[[ClipRecord, Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class _RawBatch:
    frames_B2HWC: Tensor  # uint8
    draws: Sequence[Draw]


class BatchLoader:
    """The batches of a phase for one worker.

    A thread reads and decodes the next step's frames while the caller trains on this one's. They
    go to `device` as bytes and are augmented there.
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

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps [first_step, last_step), in order."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            coming = None
            for step in range(first_step, last_step):
                current = coming or pool.submit(self._raw, step)
                coming = pool.submit(self._raw, step + 1) if step + 1 < last_step else None
                yield self._augmented(current.result())

    def _raw(self, step: int) -> _RawBatch:
        pairs = self._sampler.batch(step)
        frames = [self._read(p.clip, (p.source_index, p.driving_index)) for p in pairs]
        return _RawBatch(
            frames_B2HWC=torch.from_numpy(np.stack(frames)),
            draws=[draw(self._augmentation, p.augment_seed) for p in pairs],
        )

    def _augmented(self, raw: _RawBatch) -> Batch:
        frames_B2CHW = to_float(raw.frames_B2HWC.to(self._device))
        batch = Batch(source_BCHW=frames_B2CHW[:, 0], driving_BCHW=frames_B2CHW[:, 1])
        return augment(batch, raw.draws)


def to_float(image_HWC: Tensor) -> Tensor:
    """uint8 [..., H, W, C] as float [..., C, H, W] in [0, 1]."""
    return image_HWC.movedim(-1, -3).to(torch.float32) / 255

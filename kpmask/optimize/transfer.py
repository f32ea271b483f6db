"""Frames to a device and back, as uint8: a quarter of what floats are.

On a GPU, copies run beside the computation, out of and into pinned memory, and one batch is begun
before the one before it is waited for. So the GPU never waits, unless the host is the slower one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Frames = NDArray[np.uint8]  # THWC
T = TypeVar("T")


class Transfers(Protocol):
    """How frames come to a device and back.

    `num_ahead` is how many batches are begun before one is waited for.
    """

    num_ahead: int

    def upload(self, frames_THWC: Frames) -> Tensor:
        """The frames as a uint8 tensor on the device; it need not be there yet."""

    def download(self, levels_THWC: Tensor) -> Callable[[], Frames]:
        """Begin to fetch uint8 frames that need not be computed yet; the result waits for them."""


def transfers_of(device: torch.device) -> Transfers:
    """The quickest that the device has."""
    return Pinned(device) if device.type == "cuda" else Direct()


class Direct:
    """A CPU: its memory is ours, and begun is done."""

    num_ahead = 0

    def upload(self, frames_THWC: Frames) -> Tensor:
        return torch.from_numpy(frames_THWC)

    def download(self, levels_THWC: Tensor) -> Callable[[], Frames]:
        return levels_THWC.numpy


class Pinned:
    """A GPU: copies in and out have a stream each, so that none waits for the other's turn.

    Torch's allocator of pinned memory gives a block out again only after the copies that use it.
    """

    num_ahead = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, frames_THWC: Frames) -> Tensor:
        host_THWC = torch.empty(frames_THWC.shape, dtype=torch.uint8, pin_memory=True)
        np.copyto(host_THWC.numpy(), frames_THWC)
        with torch.cuda.stream(self._in):
            levels_THWC = host_THWC.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._in)
        levels_THWC.record_stream(computing)  # or its memory would be given out while it is read
        return levels_THWC

    def download(self, levels_THWC: Tensor) -> Callable[[], Frames]:
        host_THWC = torch.empty(levels_THWC.shape, dtype=torch.uint8, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            host_THWC.copy_(levels_THWC, non_blocking=True)
        levels_THWC.record_stream(self._out)
        there = self._out.record_event()

        def frames() -> Frames:
            there.synchronize()
            return host_THWC.numpy().copy()  # who keeps a frame keeps no pinned memory

        return frames


def in_order(begun: Iterable[Callable[[], T]], *, num_ahead: int) -> Iterator[T]:
    """Results in their order; each is waited for when `num_ahead` more are begun."""
    waiting: deque[Callable[[], T]] = deque()
    for wait in begun:
        waiting.append(wait)
        if len(waiting) > num_ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()

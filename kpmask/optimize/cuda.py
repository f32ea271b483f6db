"""CUDA graphs: all kernels of a function put to the GPU at once.

A batch takes 200 to 300 kernels, whatever its size. The host puts them one by one in microseconds
each, so that a fast GPU would wait for it where batches are small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch

WARM_UP_RUNS: Final = 3  # libraries choose kernels and take memory in the first ones
T = TypeVar("T")


class GraphRecorder:
    """Records CUDA graphs, which share their memory: results of one may not outlast another.

    (`kpmask.optimize.fixed.Recording` copies them at once.)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """The memory of the work's result, and what does the work into it.

        Args:
            work: on tensors of the device that exist already; it waits for nothing.

        Raises:
            RuntimeError: it cannot be recorded, or there is no memory left.
        """
        with torch.cuda.device(self._device):
            beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP_RUNS):
                    work()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = work()
        return result, graph.replay

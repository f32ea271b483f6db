"""Evaluation metrics: one file per family, one protocol.

- A metric scores each frame by itself; averaging is `kpmask.evaluate`'s business.
- Frames are float RGB in [0, 1], as the model drew them. The papers' code scored 8-bit PNGs that
  were truncated instead of rounded, which moves every value by up to half a grey level; nothing is
  quantised here.
- A frame that a metric cannot score (nothing moved in it, no face was found) is NaN and is left
  out of the means, whose `num_frames` says how many were counted.
- Two numbers are comparable only if name, version and weights of their metrics agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kpmask.config import MetricName


class Metric(Protocol):
    """How alike generated and true frames are.

    Attributes:
        name: what its rows are called.
        version: changes whenever the same frames would get another value.
        weights_sha256: the network behind it; None where there is none.
        licence: SPDX identifier of the code and weights behind it.
        higher_is_better: how to read it.
        counts_first: whether frame 0, which is the source itself, is part of the mean.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def weights_sha256(self) -> str | None: ...
    @property
    def licence(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def counts_first(self) -> bool: ...

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        """One value a frame (T), NaN for a frame that cannot be scored.

        Args:
            generated_TCHW, reference_TCHW: float RGB in [0, 1], of the same shape.
            source_CHW: the image that was animated.
        """
        ...


def build_metrics(names: Sequence[MetricName]) -> list[Metric]:
    """The metrics of these names, in their order, each once."""
    from kpmask.metrics.pixel import L1, MovingL1
    from kpmask.metrics.ssim import Ssim

    known: dict[MetricName, Metric] = {
        "l1": L1(),
        "l1_with_first": L1(counts_first=True),
        "l1_moving": MovingL1(),
        "ssim": Ssim(),
    }
    return [known[name] for name in dict.fromkeys(names)]

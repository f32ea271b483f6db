"""Distances of pixels: L1 over whole frames and over the part that moved, and PSNR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmask.metrics.base import PixelMetric

MAX_DB: Final = 100.0


@dataclass(frozen=True)
class L1(PixelMetric):
    """Mean absolute difference over pixels and channels, in [0, 1]; lower is better.

    mean |G - R|, of generated frame G and true frame R. The papers' reconstruction score (Siarohin
    et al. 2019, First Order Motion Model), without frame 0, as the papers' text has it.
    """

    name: ClassVar[str] = "l1"

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        error_TCHW = (generated_TCHW - reference_TCHW).abs()
        return _as_float64(error_TCHW.flatten(1).double().mean(1))


class L1WithFirst(L1):
    """`L1` that counts frame 0, which is the source itself, as the papers' published code does."""

    name: ClassVar[str] = "l1_with_first"
    counts_first: ClassVar[bool] = True


@dataclass(frozen=True)
class MovingL1(PixelMetric):
    """Mean absolute difference over the pixels that moved, in [0, 1]; lower is better.

    mean |G - R| over pixels with max over channels |R - S| > `threshold`, S being the source. Ours:
    most of a frame is background, which a copy of the source gets right, so this is what tells a
    model from no model. Frames in which nothing moved are not scored.
    """

    threshold: float = 0.08
    name: ClassVar[str] = "l1_moving"

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        moved_THW = (reference_TCHW - source_CHW).abs().amax(1) > self.threshold
        error_THW = (generated_TCHW - reference_TCHW).abs().double().mean(1)
        total_T = torch.where(moved_THW, error_THW, 0).sum((1, 2))
        return _as_float64(total_T / moved_THW.sum((1, 2)))  # 0 / 0 is NaN: not scored


@dataclass(frozen=True)
class Psnr(PixelMetric):
    """Peak signal-to-noise ratio in dB, in [0, 100]; higher is better.

    -10 log10(mean (G - R)^2) of each frame, over pixels and all three channels together, for a
    peak of 1, as scikit-image has it with `data_range=1`. Equal frames would be infinite, and with
    them every mean, so it ends at 100 dB. A video's score is the mean of its frames' dB, which is
    not the dB of their mean error.
    """

    name: ClassVar[str] = "psnr"
    higher_is_better: ClassVar[bool] = True

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        error_TCHW = generated_TCHW.double() - reference_TCHW.double()
        mean_T = error_TCHW.square().flatten(1).mean(1)
        return _as_float64(-10 * mean_T.clamp(min=10 ** (-MAX_DB / 10)).log10())


def _as_float64(values_T: Tensor) -> NDArray[np.float64]:
    return values_T.double().cpu().numpy()

"""How frames follow one another: motion that is not the true one, and flicker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmask.metrics.base import PixelMetric


@dataclass(frozen=True)
class TemporalError(PixelMetric):
    """Mean absolute difference of the changes from frame to frame, in [0, 2]; lower is better.

    mean |(G_t - G_t-1) - (R_t - R_t-1)| over pixels and channels: the L1 form of dtSSD (Erofeev et
    al. 2015, Perceptually Motivated Benchmark for Video Matting). An error that stays the same
    from frame to frame does not count.
    """

    name: ClassVar[str] = "temporal_error"
    frames_before: ClassVar[int] = 1

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        error_TCHW = (generated_TCHW.diff(dim=0) - reference_TCHW.diff(dim=0)).abs()
        return after_first(error_TCHW.double().mean((1, 2, 3)))


@dataclass(frozen=True)
class Flicker(PixelMetric):
    """Mean absolute change from frame to frame where the true video stands still, in [0, 1].

    mean |G_t - G_t-1| over the pixels with max over channels |R_t - R_t-1| <= `threshold`; lower is
    better. The temporal flickering of VBench (Huang et al. 2024), which is over still videos, here
    over the still pixels of any. A frozen picture has 0, so read it beside `temporal_error`; a
    true video has its sensor's noise. Frames in which nothing stands still are not scored.
    """

    threshold: float = 0.02
    name: ClassVar[str] = "flicker"
    frames_before: ClassVar[int] = 1

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        still_THW = reference_TCHW.diff(dim=0).abs().amax(1) <= self.threshold
        change_THW = generated_TCHW.diff(dim=0).abs().double().mean(1)
        total_T = torch.where(still_THW, change_THW, 0).sum((1, 2))
        return after_first(total_T / still_THW.sum((1, 2)))  # 0 / 0 is NaN: not scored


def after_first(values_T: Tensor) -> NDArray[np.float64]:
    """The values of frames 1 to T, with NaN before them for frame 0, which has none before it."""
    return np.concatenate([[np.nan], values_T.double().cpu().numpy()])

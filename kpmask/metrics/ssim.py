"""Structural similarity (Wang et al. 2004, Image Quality Assessment).

Over windows, mean of (2 m_a m_b + C1)(2 s_ab + C2) / ((m_a^2 + m_b^2 + C1)(s_a^2 + s_b^2 + C2)), of
means m, variances s^2 and covariance s_ab, with C1 = 0.01^2 and C2 = 0.03^2.

The 11x11 Gaussian of the paper (sigma 1.5), population covariance, data range 1, mean over the
three channels and over the pixels whose window lies inside the frame: what scikit-image computes
with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1`. Its default
7x7 window gives other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmask.metrics.base import PixelMetric

RADIUS_PX = 5
SIGMA_PX = 1.5
C1, C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Ssim(PixelMetric):
    """Mean SSIM of a frame, in [-1, 1]; higher is better, 1 is equal."""

    name: ClassVar[str] = "ssim"
    higher_is_better: ClassVar[bool] = True

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        # On a CPU frame by frame: what is computed of one fits into its caches.
        at_once = 1 if generated_TCHW.device.type == "cpu" else len(generated_TCHW)
        pairs = zip(
            torch.split(generated_TCHW, at_once), torch.split(reference_TCHW, at_once), strict=True
        )
        values_T = torch.cat([ssim(a.double(), b.double()) for a, b in pairs])
        return values_T.cpu().numpy()


def ssim(a_TCHW: Tensor, b_TCHW: Tensor) -> Tensor:
    """The SSIM of each pair of images (T), which have values in [0, 1].

    Raises:
        ValueError: an image is smaller than the window.
    """
    side_px = 2 * RADIUS_PX + 1
    if min(a_TCHW.shape[-2:]) < side_px:
        raise ValueError(f"SSIM needs images of {side_px} px or more, not {tuple(a_TCHW.shape)}")
    mean_a, mean_b = _blur(a_TCHW), _blur(b_TCHW)
    variance_a = _blur(a_TCHW * a_TCHW) - mean_a**2
    variance_b = _blur(b_TCHW * b_TCHW) - mean_b**2
    covariance = _blur(a_TCHW * b_TCHW) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (variance_a + variance_b + C2)
    return (luminance * structure).flatten(1).mean(1)


def _blur(image_TCHW: Tensor) -> Tensor:
    """Gaussian means of all windows that lie inside the image, one axis after the other.

    As sums of shifted images: convolutions of doubles take five times as long on a CPU.
    """
    offsets = np.arange(-RADIUS_PX, RADIUS_PX + 1)
    weights = np.exp(-(offsets**2) / (2 * SIGMA_PX**2))
    first, *others = (weights / weights.sum()).tolist()
    for axis in (-1, -2):
        length = image_TCHW.shape[axis] - 2 * RADIUS_PX
        total_TCHW = image_TCHW.narrow(axis, 0, length) * first
        for start, weight in enumerate(others, start=1):
            total_TCHW.add_(image_TCHW.narrow(axis, start, length), alpha=weight)
        image_TCHW = total_TCHW
    return image_TCHW

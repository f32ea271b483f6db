"""Whether pixels keep their colour along the true motion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Final

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kpmask.metrics.base import PixelMetric
from kpmask.metrics.temporal import after_first

Gray = NDArray[np.uint8]  # HW

MIN_SIDE_PX: Final = 32  # OpenCV refuses images of a few pixels, and crashes on some that it takes


@dataclass(frozen=True)
class WarpingError(PixelMetric):
    """Mean squared change of colour along the true video's motion, in [0, 1]; lower is better.

    mean (G_t(x) - G_t-1(x + f(x)))^2 over channels and visible pixels x, where f leads from true
    frame t back to true frame t-1: Lai et al. 2018, Learning Blind Video Temporal Consistency,
    with OpenCV's DIS flow (Kroeger et al. 2016) in place of a network's. x is visible where x + f
    lies in the frame, and the flow g from t-1 to t leads back: |f + g|^2 <= 0.01 (|f|^2 + |g|^2) +
    0.5 px^2, the check of Sundaram et al. 2010. A true video is above 0 too, for its flow is not
    exact, and frames of one colour have 0: read it beside `ssim`. Frames without a visible pixel
    are not scored.
    """

    name: ClassVar[str] = "warping_error"
    frames_before: ClassVar[int] = 1

    _motion: _LastMotion = field(default_factory=lambda: _LastMotion(), repr=False, compare=False)

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        if len(reference_TCHW) < 2:
            return np.full(len(reference_TCHW), np.nan)
        flow_TCHW, visible_THW = self._motion.of(reference_TCHW)
        error_TCHW = generated_TCHW[1:] - warped(generated_TCHW[:-1], flow_TCHW)
        error_THW = error_TCHW.double().square().mean(1)
        total_T = torch.where(visible_THW, error_THW, 0).sum((1, 2))
        return after_first(total_T / visible_THW.sum((1, 2)))  # 0 / 0 is NaN: not scored


class _LastMotion:
    """The motion of the last true frames seen: each method is scored on the same ones in turn."""

    def __init__(self) -> None:
        self._frames: Tensor | None = None
        self._motion: tuple[Tensor, Tensor] | None = None

    def of(self, frames_TCHW: Tensor) -> tuple[Tensor, Tensor]:
        if self._motion is None or self._frames is not frames_TCHW:
            self._motion, self._frames = motion(frames_TCHW), frames_TCHW
        return self._motion


def motion(frames_TCHW: Tensor) -> tuple[Tensor, Tensor]:
    """How T frames move: flow back in time (T-1, 2, H, W), and which pixels were there before.

    Returns:
        - x and y, in px, of where a pixel of frame t was in frame t-1, less where it is; float32.
        - whether it is visible in both (T-1, H, W).
        Both are where the frames are.
    """
    grays = _grays(frames_TCHW)
    pairs = list(zip(grays[1:], grays[:-1], strict=True))
    backward_TCHW, forward_TCHW = (
        torch.stack([dis_flow(*pair) for pair in way]).to(frames_TCHW.device)
        for way in (pairs, [(before, now) for now, before in pairs])
    )
    returned_TCHW = warped(forward_TCHW, backward_TCHW)
    gap_THW = (backward_TCHW + returned_TCHW).square().sum(1)
    length_THW = (backward_TCHW.square() + returned_TCHW.square()).sum(1)
    return backward_TCHW, _inside(backward_TCHW) & (gap_THW <= 0.01 * length_THW + 0.5)


def dis_flow(first: Gray, second: Gray) -> Tensor:
    """Where the pixels of one image are in the next: (2, H, W), x and y in px, float32."""
    pads = [(0, max(0, MIN_SIDE_PX - side_px)) for side_px in first.shape]
    height_px, width_px = first.shape
    first, second = (np.pad(image, pads, mode="edge") for image in (first, second))
    finder = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow_HWC = finder.calc(first, second, np.empty(0, np.float32))
    flow_HWC = flow_HWC[:height_px, :width_px].astype(np.float32)
    return torch.from_numpy(flow_HWC).permute(2, 0, 1)


def warped(images_TCHW: Tensor, flow_TCHW: Tensor) -> Tensor:
    """The images at x + flow(x), bilinear; beyond the edge, the edge's value."""
    grid_THWC = _targets(flow_TCHW).movedim(1, -1)
    height_px, width_px = images_TCHW.shape[-2:]
    last = torch.tensor([width_px - 1, height_px - 1], device=grid_THWC.device).clamp(min=1)
    return F.grid_sample(
        images_TCHW, 2 * grid_THWC / last - 1, padding_mode="border", align_corners=True
    )


def _targets(flow_TCHW: Tensor) -> Tensor:
    """x + flow(x), x and y in px."""
    height_px, width_px = flow_TCHW.shape[-2:]
    y_HW, x_HW = torch.meshgrid(
        torch.arange(height_px, device=flow_TCHW.device),
        torch.arange(width_px, device=flow_TCHW.device),
        indexing="ij",
    )
    return flow_TCHW + torch.stack([x_HW, y_HW])


def _inside(flow_TCHW: Tensor) -> Tensor:
    """Which pixels' x + flow(x) lie in the image (T, H, W)."""
    x_THW, y_THW = _targets(flow_TCHW).unbind(1)
    height_px, width_px = flow_TCHW.shape[-2:]
    return (x_THW >= 0) & (x_THW <= width_px - 1) & (y_THW >= 0) & (y_THW <= height_px - 1)


def _grays(frames_TCHW: Tensor) -> list[Gray]:
    levels_TCHW = frames_TCHW.clamp(0, 1).mul(255).round().to(torch.uint8)
    images_THWC = np.ascontiguousarray(levels_TCHW.permute(0, 2, 3, 1).cpu().numpy())
    return [
        cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY).astype(np.uint8) for image_HWC in images_THWC
    ]

"""What reduced precision does to the frames of a system, measured on a few."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from kpmask.models.base import AnimationSystem

MIN_PSNR_DB: Final = 45.0
NUM_DRIVING = 2
COARSE_PX = 6  # of the pictures before they are enlarged


@dataclass(frozen=True, slots=True)
class PrecisionCheck:
    """How far frames are from those of the plain float32 system.

    Attributes:
        psnr_db: 10 log10(1 / mean squared difference); infinite where there is none.
        max_error: the largest difference, of values in [0, 1].
    """

    psnr_db: float
    max_error: float

    @property
    def passed(self) -> bool:
        return self.psnr_db >= MIN_PSNR_DB

    def __str__(self) -> str:
        return f"PSNR {self.psnr_db:.1f} dB, largest error {self.max_error:.4f}"


@torch.inference_mode()
def check_precision(
    system: AnimationSystem[Any, Any],
    plain: AnimationSystem[Any, Any],
    *,
    device: torch.device | str = "cpu",
) -> PrecisionCheck:
    """Draw a few frames with both and compare; takes as long as drawing them with either.

    Args:
        system: what `optimized` made. plain: of what. Both on `device`.
    """
    images_BCHW = pictures(1 + NUM_DRIVING, plain.image_size_px).to(device)
    return compared(drawn(system, images_BCHW), drawn(plain, images_BCHW))


def drawn(system: AnimationSystem[Any, Any], images_BCHW: Tensor) -> Tensor:
    """The first image in the poses of the others."""
    driving = system.encode_driving(images_BCHW[1:])
    source = system.encode_source(images_BCHW[:1]).repeat(len(driving))
    image_BCHW: Tensor = system.render(source, driving).image_BCHW
    return image_BCHW


def compared(image_BCHW: Tensor, plain_BCHW: Tensor) -> PrecisionCheck:
    """Differences of all values of all frames; a value that is no number is no likeness."""
    difference_BCHW = image_BCHW.double() - plain_BCHW.double()
    mean = difference_BCHW.square().mean().item()
    psnr_db = math.inf if mean == 0 else 10 * math.log10(1 / mean)
    if math.isnan(psnr_db):
        psnr_db = -math.inf
    return PrecisionCheck(psnr_db, difference_BCHW.abs().max().item())


def pictures(count: int, side_px: int) -> Tensor:
    """Views of one smooth coloured scene with something bright that moves: [B, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    coarse_BCHW = torch.rand(2, 3, COARSE_PX, COARSE_PX, generator=generator)
    scene_BCHW = functional.interpolate(
        coarse_BCHW, size=(side_px, side_px), mode="bicubic", align_corners=False
    ).clamp(0, 1)
    axis_W = torch.linspace(-1, 1, side_px)
    frames = []
    for index in range(count):
        x, y = 0.3 * index - 0.3, 0.2 - 0.2 * index
        distance_HW = ((axis_W - x) / 0.3) ** 2 + ((axis_W[:, None] - y) / 0.6) ** 2
        inside_HW = (4 * (1 - distance_HW)).sigmoid()
        frames.append(scene_BCHW[0].lerp(scene_BCHW[1], inside_HW))
    return torch.stack(frames)

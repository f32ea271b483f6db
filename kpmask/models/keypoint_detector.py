"""FOMM's unsupervised keypoint detector (FOMM, section 3.1): a U-Net, soft-argmax, jacobians.

Its heads are 7x7 convolutions, in every published setting without padding. The maps are then 6
pixels smaller than the U-Net's output and still span [-1, 1], so that keypoint space is stretched
against image space. The networks behind it learn around that, so it stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kpmask.errors import ConfigError
from kpmask.model_config import KeypointDetector as DetectorConfig
from kpmask.models.layers import (
    AntiAlias,
    Hourglass,
    convolved,
    coordinate_grid,
    spatial_mean,
    widened,
)

HEAD_KERNEL_PX = 7


@dataclass(frozen=True)
class Keypoints:
    """What the detector finds.

    Attributes:
        logits_BKHW: the heads' maps before the softmax.
        heatmap_BKHW: their softmax over space, at the detector's temperature; sums to 1.
        points_BK2: the heatmaps' means, (x, y) in [-1, 1].
        jacobian_BK22: the local affine frame at each point, where the detector estimates it.
    """

    logits_BKHW: Tensor
    heatmap_BKHW: Tensor
    points_BK2: Tensor
    jacobian_BK22: Tensor | None


class KeypointDetector(nn.Module):
    """Finds `num_keypoints` points, and their jacobians, in images of any one size."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.predictor = Hourglass(config, in_channels=3)
        features, pad_px = self.predictor.out_channels, config.head_padding
        self.kp = nn.Conv2d(features, config.num_keypoints, HEAD_KERNEL_PX, padding=pad_px)
        self.jacobian: nn.Conv2d | None = None
        if config.estimate_jacobian:
            num_maps = 1 if config.single_jacobian_map else config.num_keypoints
            self.jacobian = nn.Conv2d(features, 4 * num_maps, HEAD_KERNEL_PX, padding=pad_px)
            nn.init.zeros_(self.jacobian.weight)  # the identity everywhere
            self.jacobian.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 1.0] * num_maps))
        self.down = AntiAlias(3, config.scale_factor)

    def map_side_px(self, image_size_px: int) -> int:
        """The side of the maps for a square image.

        Raises:
            ConfigError: there would be no map left.
        """
        side_px = round(image_size_px * self.config.scale_factor)
        side_px += 2 * self.config.head_padding - (HEAD_KERNEL_PX - 1)
        if side_px < 2:
            raise ConfigError(
                f"images of {image_size_px} px at scale {self.config.scale_factor:g} leave maps "
                f"of {side_px} px",
                subject="detector.scale_factor",
                hint="raise scale_factor, or set head_padding = 3",
            )
        return side_px

    def logits(self, image_BCHW: Tensor) -> Tensor:
        """The maps before the softmax alone: all that a heatmap mask needs."""
        return widened(self.kp(self.predictor(self.down(image_BCHW))))

    def heatmap(self, logits_BKHW: Tensor) -> Tensor:
        """Softmax over space at the detector's temperature."""
        flat_BKN = (logits_BKHW / self.config.temperature).flatten(2)
        return flat_BKN.softmax(dim=-1).reshape(logits_BKHW.shape)

    def points(self, heatmap_BKHW: Tensor) -> Tensor:
        """Soft-argmax: each heatmap's mean position, [B, K, 2]."""
        height_px, width_px = heatmap_BKHW.shape[-2:]
        return spatial_mean(heatmap_BKHW, coordinate_grid(height_px, width_px, like=heatmap_BKHW))

    def forward(self, image_BCHW: Tensor) -> Keypoints:
        if self.jacobian is None:
            logits_BKHW, jacobian_BK22 = self.logits(image_BCHW), None
            heatmap_BKHW = self.heatmap(logits_BKHW)
        else:
            features_BCHW = self.predictor(self.down(image_BCHW))
            logits_BKHW, maps_BCHW = map(widened, convolved(features_BCHW, self.kp, self.jacobian))
            heatmap_BKHW = self.heatmap(logits_BKHW)
            jacobian_BK22 = _heatmap_mean(heatmap_BKHW, maps_BCHW)
        return Keypoints(logits_BKHW, heatmap_BKHW, self.points(heatmap_BKHW), jacobian_BK22)


def _heatmap_mean(heatmap_BKHW: Tensor, maps_BCHW: Tensor) -> Tensor:
    """Four maps a keypoint, or four for all: their means under the heatmaps, row by row."""
    num_keypoints = heatmap_BKHW.shape[1]
    # Every heatmap with every map in one matrix product, though only the pairs on the diagonal
    # are wanted: it needs no copy of the maps, which costs more than the products.
    with torch.autocast(heatmap_BKHW.device.type, enabled=False):
        means_BKC = heatmap_BKHW.flatten(2) @ maps_BCHW.flatten(2).transpose(1, 2)
    mean_BKG22 = means_BKC.reshape(len(means_BKC), num_keypoints, -1, 2, 2)
    if mean_BKG22.shape[2] == 1:
        return mean_BKG22[:, :, 0]
    each_K = torch.arange(num_keypoints, device=mean_BKG22.device)
    return mean_BKG22[:, each_K, each_K]

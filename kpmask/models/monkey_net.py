"""Monkey-Net (Siarohin et al., CVPR 2019): zero-order motion from learned keypoints.

- A detector gives each keypoint a place and a 2x2 covariance, its heatmap's mean and spread.
- The dense motion network moves the source by each keypoint's shift, looks which shift explains
  which pixels, and adds a residual to the shifts' mixture: a backward flow.
- The generator is a U-Net. Its encoder sees the source alone, so it runs once per image; all of
  its outputs are warped by the flow, and the decoder also sees where keypoints came and went.

The published networks are 3-D convolutions of one frame's depth over a video, which are these 2-D
ones over its frames. Its leaky ReLUs after the grouped blocks follow a ReLU and change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask.config import Losses
from kpmask.losses import PerceptualLoss
from kpmask.model_config import MonkeyDetector as DetectorConfig
from kpmask.model_config import MonkeyGenerator as GeneratorConfig
from kpmask.model_config import MonkeyMotion as MotionConfig
from kpmask.model_config import MonkeyNetModel
from kpmask.models.base import AnimationSystem, Batch, LossTerms, Prediction, State
from kpmask.models.discriminator import PatchDiscriminator, adversarial_terms
from kpmask.models.layers import (
    AntiAlias,
    DownBlock,
    Hourglass,
    UpBlock,
    bottleneck,
    coordinate_grid,
    inverse,
    resize_map,
    spatial_mean,
    widened,
)
from kpmask.models.motion import relative_points
from kpmask.records import Motion

# Added to every pixel of a heatmap, so that a map of one pixel still has an invertible covariance.
HEATMAP_FLOOR = 1e-7


@dataclass(frozen=True)
class MonkeyDriving(State):
    """Where an object is.

    Attributes:
        points_BK2: keypoints, (x, y) in [-1, 1].
        covariance_BK22: their spreads, symmetric and positive.
    """

    points_BK2: Tensor
    covariance_BK22: Tensor


@dataclass(frozen=True)
class MonkeySource(MonkeyDriving):
    """What is drawn, and where it is.

    Attributes:
        small_BCHW: the source at the dense motion network's size.
        skips_BN: all of the encoder's outputs, flattened one after the other.
    """

    small_BCHW: Tensor
    skips_BN: Tensor


class CovarianceDetector(nn.Module):
    """Finds `num_keypoints` points and their covariances."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.down = AntiAlias(3, config.scale_factor)
        self.predictor = Hourglass(config, in_channels=3)
        self.kp = nn.Conv2d(self.predictor.out_channels, config.num_keypoints, 3, padding=1)

    def heatmap(self, image_BCHW: Tensor) -> Tensor:
        """Softmax over space plus a floor: [B, K, H, W]."""
        logits_BKHW = widened(self.kp(self.predictor(self.down(image_BCHW))))
        flat_BKN = (logits_BKHW / self.temperature).flatten(2)
        return flat_BKN.softmax(dim=-1).reshape(logits_BKHW.shape) + HEATMAP_FLOOR

    def forward(self, image_BCHW: Tensor) -> MonkeyDriving:
        heatmap_BKHW = self.heatmap(image_BCHW)
        grid_HW2 = coordinate_grid(*_size(heatmap_BKHW), like=heatmap_BKHW)
        points_BK2 = spatial_mean(heatmap_BKHW, grid_HW2)
        return MonkeyDriving(points_BK2, _covariance(heatmap_BKHW, grid_HW2, points_BK2))


def _covariance(heatmap_BKHW: Tensor, grid_HW2: Tensor, points_BK2: Tensor) -> Tensor:
    """sum heatmap (z - point)(z - point)^T, [B, K, 2, 2]."""
    # Not E[zz^T] - pp^T: what that leaves of a narrow map is rounding.
    x_BKHW, y_BKHW = (grid_HW2 - points_BK2[:, :, None, None]).unbind(-1)
    products = (x_BKHW * x_BKHW, x_BKHW * y_BKHW, y_BKHW * y_BKHW)
    xx_BK, xy_BK, yy_BK = ((heatmap_BKHW * p).sum(dim=(-2, -1)) for p in products)
    flat_BK4 = torch.stack([xx_BK, xy_BK, xy_BK, yy_BK], dim=-1)
    return flat_BK4.reshape(*points_BK2.shape, 2)


def covariance_maps(pose: MonkeyDriving, *, size_px: tuple[int, int]) -> Tensor:
    """exp(-(z - p)^T C^-1 (z - p) / 2) of each keypoint on a grid of (height, width)."""
    grid_HW2 = coordinate_grid(*size_px, like=pose.points_BK2)
    x_BKHW, y_BKHW = (grid_HW2 - pose.points_BK2[:, :, None, None]).unbind(-1)
    inverse_BK22 = inverse(pose.covariance_BK22)[..., None, None]
    distance_BKHW = (
        inverse_BK22[:, :, 0, 0] * x_BKHW * x_BKHW
        + (inverse_BK22[:, :, 0, 1] + inverse_BK22[:, :, 1, 0]) * x_BKHW * y_BKHW
        + inverse_BK22[:, :, 1, 1] * y_BKHW * y_BKHW
    )
    return torch.exp(-0.5 * distance_BKHW)


def difference_maps(
    source: MonkeyDriving, driving: MonkeyDriving, *, size_px: tuple[int, int], divisor: float
) -> Tensor:
    """Driving minus source Gaussians, over `divisor`: [B, K, H, W]."""
    driving_BKHW = covariance_maps(driving, size_px=size_px)
    return (driving_BKHW - covariance_maps(source, size_px=size_px)) / divisor


class _GroupBlock(nn.Module):
    """1x1 convolution within each of `groups` groups of channels, batch norm, ReLU."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, groups=groups)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x_BCHW)))


class ShiftMotionNetwork(nn.Module):
    """A backward flow from two sets of keypoints and the small source.

    The flow is an offset from every pixel to where it comes from, in the coordinates' unit.
    """

    def __init__(
        self,
        config: MotionConfig,
        *,
        num_keypoints: int,
        heatmap_divisor: float,
        align_corners: bool,
    ) -> None:
        super().__init__()
        self.heatmap_divisor = heatmap_divisor
        self.align_corners = align_corners
        num_motions = num_keypoints + 1  # the background first
        channels = 4 * num_motions
        self.down = AntiAlias(3, config.scale_factor)
        self.group_blocks = nn.Sequential(
            *(_GroupBlock(channels, groups=num_motions) for _ in range(config.num_group_blocks))
        )
        self.hourglass = Hourglass(config, in_channels=channels)
        self.mask = nn.Conv2d(self.hourglass.out_channels, num_motions, 3, padding=1)
        self.residual = nn.Conv2d(self.hourglass.out_channels, 2, 3, padding=1)
        for head in (self.mask, self.residual):
            nn.init.zeros_(head.weight)
        # Most of every pixel stands still at first, and the rest follows all points alike.
        bias = [config.background_bias] + [0.0] * num_keypoints
        self.mask.bias = nn.Parameter(torch.tensor(bias))
        self.residual.bias = nn.Parameter(torch.zeros(2))

    def shifts(self, source: MonkeyDriving, driving: MonkeyDriving) -> Tensor:
        """From the driving keypoints to the source's, after the background's 0: [B, K+1, 2]."""
        return functional.pad(source.points_BK2 - driving.points_BK2, (0, 0, 1, 0))

    def evidence(self, source: MonkeySource, driving: MonkeyDriving) -> Tensor:
        """The network's input: [heatmap, RGB of the source shifted] a motion, [B, 4(K+1), H, W]."""
        size_px = _size(source.small_BCHW)
        shift_BM2 = self.shifts(source, driving)
        grid_HW2 = coordinate_grid(*size_px, like=source.small_BCHW)
        motion_BMHW2 = grid_HW2 + shift_BM2[:, :, None, None]
        warped_NCHW = functional.grid_sample(
            source.small_BCHW.repeat_interleave(shift_BM2.shape[1], dim=0),
            motion_BMHW2.flatten(0, 1),
            align_corners=self.align_corners,
        )
        warped_BMCHW = warped_NCHW.reshape(*shift_BM2.shape[:2], *warped_NCHW.shape[1:])
        heatmap_BKHW = difference_maps(
            source, driving, size_px=size_px, divisor=self.heatmap_divisor
        )
        heatmap_BM1HW = functional.pad(heatmap_BKHW, (0, 0, 0, 0, 1, 0))[:, :, None]
        return torch.cat([heatmap_BM1HW, warped_BMCHW], dim=2).flatten(1, 2)

    def forward(self, source: MonkeySource, driving: MonkeyDriving) -> Tensor:
        """The flow, [B, 2, H, W] at the small source's size."""
        features_BCHW = self.hourglass(self.group_blocks(self.evidence(source, driving)))
        mask_BMHW = widened(self.mask(features_BCHW)).softmax(dim=1)
        shift_BM2 = self.shifts(source, driving)
        mixed_B2HW = (mask_BMHW[:, :, None] * shift_BM2[..., None, None]).sum(dim=1)
        return mixed_B2HW + widened(self.residual(features_BCHW))


class SkipWarpingGenerator(nn.Module):
    """U-Net whose encoder's outputs, the image included, are warped."""

    def __init__(
        self,
        config: GeneratorConfig,
        *,
        image_size_px: int,
        num_keypoints: int,
        heatmap_divisor: float,
        align_corners: bool,
    ) -> None:
        super().__init__()
        self.heatmap_divisor = heatmap_divisor
        self.align_corners = align_corners
        widths = [
            min(config.max_features, config.block_expansion * 2**i)
            for i in range(config.num_blocks + 1)
        ]
        channels = [3, *widths[1:]]
        self.skip_shapes = [
            (width, image_size_px >> i, image_size_px >> i) for i, width in enumerate(channels)
        ]
        self.down_blocks = nn.ModuleList(DownBlock(i, o) for i, o in pairwise(channels))
        # All but the innermost also see the decoder's output so far, as wide as the skip.
        seen = [2 * width for width in widths[1:-1]] + [widths[-1]]
        self.up_blocks = nn.ModuleList(
            UpBlock(i + num_keypoints, o)
            for i, o in reversed(list(zip(seen, widths[:-1], strict=True)))
        )
        final = widths[0] + 3 + num_keypoints
        self.refinement = bottleneck(final, config.num_refinement_blocks)
        self.final = nn.Conv2d(final, 3, 1)

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """All that depends on the source alone: the image and every block's output, flat."""
        skips = [image_BCHW]
        for block in self.down_blocks:
            skips.append(block(skips[-1]))
        return torch.cat([widened(skip_BCHW).flatten(1) for skip_BCHW in skips], dim=1)

    def skips(self, skips_BN: Tensor) -> list[Tensor]:
        """`encode`'s maps again, the image first."""
        counts = [channels * height * width for channels, height, width in self.skip_shapes]
        flat = torch.split_with_sizes(skips_BN, counts, dim=1)
        return [f.reshape(-1, *shape) for f, shape in zip(flat, self.skip_shapes, strict=True)]

    def warp(self, map_BCHW: Tensor, flow_B2HW: Tensor) -> Tensor:
        """A square map moved by the flow, whose size may be another."""
        # The offset is resized, not the place: where nothing moves, nothing moves at any size.
        offset_B2HW = resize_map(flow_B2HW, map_BCHW.shape[-1])
        grid_HW2 = coordinate_grid(*_size(map_BCHW), like=offset_B2HW)
        return functional.grid_sample(
            map_BCHW, grid_HW2 + offset_B2HW.permute(0, 2, 3, 1), align_corners=self.align_corners
        )

    def forward(self, source: MonkeySource, driving: MonkeyDriving, flow_B2HW: Tensor) -> Tensor:
        """The frame, [B, 3, H, W] in [0, 1]."""
        skips = self.skips(source.skips_BN)
        heatmap_BKHW = difference_maps(
            source, driving, size_px=_size(skips[0]), divisor=self.heatmap_divisor
        )
        seen = [
            torch.cat([self.warp(s, flow_B2HW), resize_map(heatmap_BKHW, s.shape[-1])], dim=1)
            for s in skips
        ]
        x_BCHW = seen.pop()
        for block, skip_BCHW in zip(self.up_blocks, reversed(seen), strict=True):
            x_BCHW = torch.cat([block(x_BCHW), skip_BCHW], dim=1)
        return widened(self.final(self.refinement(x_BCHW))).sigmoid()


def _size(x_BCHW: Tensor) -> tuple[int, int]:
    return x_BCHW.shape[-2], x_BCHW.shape[-1]


class MonkeyNetSystem(AnimationSystem[MonkeySource, MonkeyDriving]):
    """Monkey-Net as an animation system; relative motion keeps the driver's covariances."""

    motions: ClassVar[frozenset[Motion]] = frozenset({"absolute", "relative"})
    config: MonkeyNetModel

    def __init__(self, config: MonkeyNetModel) -> None:
        super().__init__()
        self.config = config
        num_keypoints = config.detector.num_keypoints
        self.detector = CovarianceDetector(config.detector)
        self.dense_motion = ShiftMotionNetwork(
            config.motion,
            num_keypoints=num_keypoints,
            heatmap_divisor=config.heatmap_divisor,
            align_corners=config.align_corners,
        )
        self.generator = SkipWarpingGenerator(
            config.generator,
            image_size_px=config.image_size_px,
            num_keypoints=num_keypoints,
            heatmap_divisor=config.heatmap_divisor,
            align_corners=config.align_corners,
        )
        self.discriminator: PatchDiscriminator | None = None
        if config.discriminator is not None:
            self.discriminator = PatchDiscriminator(
                config.discriminator, num_keypoints=num_keypoints
            )
            self.discriminator.map_side_px(config.image_size_px)

    def encode_source(self, source_BCHW: Tensor) -> MonkeySource:
        pose: MonkeyDriving = self.detector(source_BCHW)
        small_BCHW = widened(self.dense_motion.down(source_BCHW))
        skips_BN = self.generator.encode(source_BCHW)
        return MonkeySource(pose.points_BK2, pose.covariance_BK22, small_BCHW, skips_BN)

    def encode_driving(self, driving_BCHW: Tensor) -> MonkeyDriving:
        pose: MonkeyDriving = self.detector(driving_BCHW)
        return pose

    def render(self, source: MonkeySource, driving: MonkeyDriving) -> Prediction:
        flow_B2HW = self.dense_motion(source, driving)
        return Prediction(self.generator(source, driving, flow_B2HW))

    def relative_motion(
        self,
        source: MonkeySource,
        driving: MonkeyDriving,
        initial: MonkeyDriving,
        *,
        adapt_scale: bool,
    ) -> MonkeyDriving:
        points_BK2 = relative_points(
            source.points_BK2, driving.points_BK2, initial.points_BK2, adapt_scale=adapt_scale
        )
        return MonkeyDriving(points_BK2, driving.covariance_BK22)

    def set_losses(self, losses: Losses, perceptual: PerceptualLoss | None) -> None:
        super().set_losses(losses, perceptual)
        if self.discriminator is not None:
            self.discriminator.check_losses(losses)

    def training_losses(self, batch: Batch) -> LossTerms:
        # Two passes, not one of both: batch statistics are those of either alone, as published.
        source = self.encode_source(batch.source_BCHW)
        driving = self.encode_driving(batch.driving_BCHW)
        image_BCHW = self.render(source, driving).image_BCHW
        # The published weights of feature matching begin with that of the pixels: losses.pixel.
        terms = self.objective.image_terms({"": image_BCHW}, batch.driving_BCHW).terms
        if self.discriminator is None:
            return LossTerms(terms)
        judged = adversarial_terms(
            self.discriminator,
            image_BCHW,
            batch.driving_BCHW,
            driving.points_BK2,
            self.objective.losses,
        )
        return LossTerms({**terms, **judged})

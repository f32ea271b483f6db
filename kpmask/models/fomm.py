"""First order motion model (Siarohin et al., 2019): what pretrains the keypoint detector.

- The dense motion network mixes one affine motion per keypoint, plus a still background, into a
  backward flow and an occlusion map.
- The generator encodes the source, warps its features by the flow, hides what was occluded and
  draws the frame. The encoder depends on the source alone, so it runs once per image.
- A discriminator, where the settings have one, judges the frames in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask.config import Losses
from kpmask.losses import PerceptualLoss, RandomWarp, equivariance_jacobian, equivariance_value
from kpmask.model_config import DenseMotion as DenseMotionConfig
from kpmask.model_config import FommGenerator as GeneratorConfig
from kpmask.model_config import FommModel
from kpmask.models.base import AnimationSystem, Batch, LossTerms, Prediction, State
from kpmask.models.discriminator import PatchDiscriminator, adversarial_terms
from kpmask.models.keypoint_detector import KeypointDetector, Keypoints
from kpmask.models.layers import (
    AntiAlias,
    DownBlock,
    Hourglass,
    SameBlock,
    UpBlock,
    bottleneck,
    convolved,
    coordinate_grid,
    gaussian_maps,
    inverse,
    product,
    transform,
    widened,
)
from kpmask.models.motion import relative_jacobian, relative_points
from kpmask.records import Motion


@dataclass(frozen=True)
class FommDriving(State):
    """Where the driving object is.

    Attributes:
        points_BK2: keypoints, (x, y) in [-1, 1].
        jacobian_BK22: their local frames, where the detector estimates them.
    """

    points_BK2: Tensor
    jacobian_BK22: Tensor | None


@dataclass(frozen=True)
class FommSource(State):
    """What is drawn, and where it is.

    Attributes:
        small_BCHW: the source at the dense motion network's size.
        features_BCHW: the generator's encoding of the source.
        points_BK2, jacobian_BK22: as in `FommDriving`.
    """

    small_BCHW: Tensor
    features_BCHW: Tensor
    points_BK2: Tensor
    jacobian_BK22: Tensor | None


class DenseMotionNetwork(nn.Module):
    """A backward flow and an occlusion map from two sets of keypoints and the small source."""

    def __init__(
        self, config: DenseMotionConfig, *, num_keypoints: int, align_corners: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.align_corners = align_corners
        self.hourglass = Hourglass(config, in_channels=(num_keypoints + 1) * 4)
        channels = self.hourglass.out_channels
        self.mask = nn.Conv2d(channels, num_keypoints + 1, 7, padding=3)
        self.occlusion = nn.Conv2d(channels, 1, 7, padding=3) if config.estimate_occlusion else None
        self.down = AntiAlias(3, config.scale_factor)

    def heatmaps(self, source: FommSource, driving: FommDriving) -> Tensor:
        """Driving minus source Gaussians, after an empty map for the background: [B, K+1, H, W]."""
        size_px, variance = _size(source.small_BCHW), self.config.kp_variance
        driving_BKHW = gaussian_maps(driving.points_BK2, size_px=size_px, variance=variance)
        source_BKHW = gaussian_maps(source.points_BK2, size_px=size_px, variance=variance)
        return functional.pad(driving_BKHW - source_BKHW, (0, 0, 0, 0, 1, 0))

    def sparse_motions(self, source: FommSource, driving: FommDriving) -> Tensor:
        """Where a pixel comes from, by the background and each keypoint: [B, K+1, H, W, 2]."""
        grid_HW2 = coordinate_grid(*_size(source.small_BCHW), like=source.small_BCHW)
        offset_BKHW2 = grid_HW2 - driving.points_BK2[:, :, None, None]
        if source.jacobian_BK22 is not None and driving.jacobian_BK22 is not None:
            affine_BK22 = product(source.jacobian_BK22, inverse(driving.jacobian_BK22))
            offset_BKHW2 = transform(affine_BK22[:, :, None, None], offset_BKHW2)
        motion_BKHW2 = offset_BKHW2 + source.points_BK2[:, :, None, None]
        still_B1HW2 = grid_HW2.expand(len(motion_BKHW2), 1, -1, -1, -1)
        return torch.cat([still_B1HW2, motion_BKHW2], dim=1)

    def forward(self, source: FommSource, driving: FommDriving) -> tuple[Tensor, Tensor | None]:
        """The flow [B, H, W, 2], and the occlusion map [B, 1, H, W] in [0, 1] or None."""
        motion_BMHW2 = self.sparse_motions(source, driving)
        batch, num_motions = motion_BMHW2.shape[:2]
        copies_NCHW = source.small_BCHW.repeat_interleave(num_motions, dim=0)
        warped_NCHW = functional.grid_sample(
            copies_NCHW, motion_BMHW2.flatten(0, 1), align_corners=self.align_corners
        )
        warped_BMCHW = warped_NCHW.reshape(batch, num_motions, *warped_NCHW.shape[1:])
        heatmap_BM1HW = self.heatmaps(source, driving)[:, :, None]
        features_BCHW = self.hourglass(
            torch.cat([heatmap_BM1HW, warped_BMCHW], dim=2).flatten(1, 2)
        )
        heads = [self.mask] if self.occlusion is None else [self.mask, self.occlusion]
        logits_BMHW, *hidden = map(widened, convolved(features_BCHW, *heads))
        mask_BMHW = logits_BMHW.softmax(dim=1)
        flow_BHW2 = (mask_BMHW[..., None] * motion_BMHW2).sum(dim=1)
        return flow_BHW2, hidden[0].sigmoid() if hidden else None


class OcclusionAwareGenerator(nn.Module):
    """Encoder, warp, residual blocks, decoder (after Johnson et al., 2016)."""

    def __init__(
        self,
        config: GeneratorConfig,
        *,
        dense_motion: DenseMotionConfig,
        num_keypoints: int,
        align_corners: bool,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.dense_motion_network = DenseMotionNetwork(
            dense_motion, num_keypoints=num_keypoints, align_corners=align_corners
        )
        widths = [
            min(config.max_features, config.block_expansion * 2**i)
            for i in range(config.num_down_blocks + 1)
        ]
        steps = list(pairwise(widths))
        self.first = SameBlock(3, widths[0], kernel_px=7)
        self.down_blocks = nn.ModuleList(DownBlock(i, o) for i, o in steps)
        self.up_blocks = nn.ModuleList(UpBlock(o, i) for i, o in reversed(steps))
        self.bottleneck = bottleneck(widths[-1], config.num_bottleneck_blocks)
        self.final = nn.Conv2d(widths[0], 3, 7, padding=3)

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """All that depends on the source alone."""
        x_BCHW: Tensor = self.first(image_BCHW)
        for block in self.down_blocks:
            x_BCHW = block(x_BCHW)
        return x_BCHW

    def warp(
        self, features_BCHW: Tensor, flow_BHW2: Tensor, occlusion_B1HW: Tensor | None
    ) -> Tensor:
        """The features moved by the flow, and dimmed where they were occluded."""
        size_px = _size(features_BCHW)
        if flow_BHW2.shape[1:3] != size_px:
            flow_BHW2 = _resized(flow_BHW2.permute(0, 3, 1, 2), size_px).permute(0, 2, 3, 1)
        warped_BCHW = functional.grid_sample(
            widened(features_BCHW), flow_BHW2, align_corners=self.align_corners
        )
        if occlusion_B1HW is None:
            return warped_BCHW
        if _size(occlusion_B1HW) != size_px:
            occlusion_B1HW = _resized(occlusion_B1HW, size_px)
        return warped_BCHW * occlusion_B1HW

    def forward(self, source: FommSource, driving: FommDriving) -> Tensor:
        flow_BHW2, occlusion_B1HW = self.dense_motion_network(source, driving)
        x_BCHW = self.bottleneck(self.warp(source.features_BCHW, flow_BHW2, occlusion_B1HW))
        for block in self.up_blocks:
            x_BCHW = block(x_BCHW)
        return widened(self.final(x_BCHW)).sigmoid()


def _size(x_BCHW: Tensor) -> tuple[int, int]:
    return x_BCHW.shape[-2], x_BCHW.shape[-1]


def _resized(x_BCHW: Tensor, size_px: tuple[int, int]) -> Tensor:
    return functional.interpolate(x_BCHW, size=size_px, mode="bilinear", align_corners=False)


class FommSystem(AnimationSystem[FommSource, FommDriving]):
    """FOMM as an animation system: detector, dense motion and generator trained together."""

    motions: ClassVar[frozenset[Motion]] = frozenset({"absolute", "relative"})
    config: FommModel

    def __init__(self, config: FommModel) -> None:
        super().__init__()
        self.config = config
        self.detector = KeypointDetector(config.detector)
        self.detector.map_side_px(config.image_size_px)
        self.generator = OcclusionAwareGenerator(
            config.generator,
            dense_motion=config.dense_motion,
            num_keypoints=config.detector.num_keypoints,
            align_corners=config.align_corners,
        )
        # Last, so that the rest begins with the same weights without it.
        self.discriminator: PatchDiscriminator | None = None
        if config.discriminator is not None:
            self.discriminator = PatchDiscriminator(
                config.discriminator, num_keypoints=config.detector.num_keypoints
            )
            self.discriminator.map_side_px(config.image_size_px)

    def set_losses(self, losses: Losses, perceptual: PerceptualLoss | None) -> None:
        if self.discriminator is not None:
            self.discriminator.check_losses(losses)
        super().set_losses(losses, perceptual)

    def encode_source(self, source_BCHW: Tensor) -> FommSource:
        return self._source(source_BCHW, self.detector(source_BCHW))

    def _source(self, source_BCHW: Tensor, keypoints: Keypoints) -> FommSource:
        small_BCHW = widened(self.generator.dense_motion_network.down(source_BCHW))
        features_BCHW = self.generator.encode(source_BCHW)
        return FommSource(small_BCHW, features_BCHW, keypoints.points_BK2, keypoints.jacobian_BK22)

    def encode_driving(self, driving_BCHW: Tensor) -> FommDriving:
        keypoints: Keypoints = self.detector(driving_BCHW)
        return FommDriving(keypoints.points_BK2, keypoints.jacobian_BK22)

    def render(self, source: FommSource, driving: FommDriving) -> Prediction:
        return Prediction(self.generator(source, driving))

    def relative_motion(
        self,
        source: FommSource,
        driving: FommDriving,
        initial: FommDriving,
        *,
        adapt_scale: bool,
    ) -> FommDriving:
        points_BK2 = relative_points(
            source.points_BK2, driving.points_BK2, initial.points_BK2, adapt_scale=adapt_scale
        )
        now_BK22, before_BK22 = driving.jacobian_BK22, initial.jacobian_BK22
        if source.jacobian_BK22 is None or now_BK22 is None or before_BK22 is None:
            return FommDriving(points_BK2, None)
        return FommDriving(
            points_BK2, relative_jacobian(source.jacobian_BK22, now_BK22, before_BK22)
        )

    def training_losses(self, batch: Batch) -> LossTerms:
        # Two passes, not one of both: batch statistics are those of either alone, as published.
        source = self.encode_source(batch.source_BCHW)
        driving = self.encode_driving(batch.driving_BCHW)
        prediction = self.render(source, driving)
        images = self.objective.image_terms({"": prediction.image_BCHW}, batch.driving_BCHW)
        terms = {**images.terms, **self._equivariance(batch.driving_BCHW, driving)}
        if self.discriminator is not None:
            terms |= adversarial_terms(
                self.discriminator,
                prediction.image_BCHW,
                batch.driving_BCHW,
                driving.points_BK2,
                self.objective.losses,
            )
        return LossTerms(terms)

    def _equivariance(self, driving_BCHW: Tensor, driving: FommDriving) -> dict[str, Tensor]:
        losses = self.objective.losses
        if not losses.equivariance_value and not losses.equivariance_jacobian:
            return {}
        warp = RandomWarp.draw(losses, like=driving_BCHW)
        warped_BCHW = warp.image(driving_BCHW, align_corners=self.config.align_corners)
        warped = self.encode_driving(warped_BCHW)
        terms = {}
        if losses.equivariance_value:
            value = equivariance_value(driving.points_BK2, warped.points_BK2, warp)
            terms["equivariance_value"] = losses.equivariance_value * value
        frame_BK22, warped_BK22 = driving.jacobian_BK22, warped.jacobian_BK22
        if losses.equivariance_jacobian and frame_BK22 is not None and warped_BK22 is not None:
            value = equivariance_jacobian(frame_BK22, warped.points_BK2, warped_BK22, warp)
            terms["equivariance_jacobian"] = losses.equivariance_jacobian * value
        return terms

"""Image animation with a keypoint mask (Toledano et al., paper 002).

- A mask says where the object's parts are. It comes from a frozen keypoint detector: the sum of
  its logit maps (heatmap), Gaussians at its points (circles), or the sum of its softmaxed maps.
- The first stage draws the frame from the small source and the two masks; the second draws it
  again from the source, the masks and the first stage's frame. Each stage learns from its own
  loss alone: the second sees the first one's output detached.
- The published code leaves the detector's batch norm in training mode, so that its statistics
  drift. Frozen means frozen here: no gradient, and always in eval mode.
- `release_detector` lets it learn after all, from the first stage's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask.model_config import Hourglass as HourglassConfig
from kpmask.model_config import KeypointMaskModel
from kpmask.model_config import LowResolution as LowResolutionConfig
from kpmask.models.base import AnimationSystem, Batch, LossTerms, Prediction, State
from kpmask.models.keypoint_detector import KeypointDetector
from kpmask.models.layers import (
    AntiAlias,
    Hourglass,
    SameBlock,
    UpBlock,
    bottleneck,
    gaussian_maps,
    min_max,
    resize_map,
    widened,
)
from kpmask.models.motion import relative_points
from kpmask.records import Motion

LIGHT_SIDE = 5  # uneven light varies over about a fifth of the image


@dataclass(frozen=True)
class KeypointMaskSource(State):
    """What is drawn, and where it is.

    Attributes:
        image_BCHW: the source. small_BCHW: the same at the first stage's size.
        mask_B1HW: its mask at the first stage's size, in [0, 1].
        points_BK2: its keypoints, where the mask is drawn from them.
    """

    image_BCHW: Tensor
    small_BCHW: Tensor
    mask_B1HW: Tensor
    points_BK2: Tensor | None = None


@dataclass(frozen=True)
class KeypointMaskDriving(State):
    """Where the driving object is: a mask, or the points that the mask is drawn from."""

    mask_B1HW: Tensor | None = None
    points_BK2: Tensor | None = None


def recoloured(image_BCHW: Tensor, *, light: float = 0.0) -> Tensor:
    """Each image with its channels in random order, scaled by 0.6 to 1.4 and shifted a little.

    Args:
        light: standard deviation of a smooth random brightness that is added to each channel.
    """
    count, device = len(image_BCHW), image_BCHW.device
    order_BC = torch.rand(count, 3, device=device).argsort(dim=1)
    shuffled_BCHW = image_BCHW[torch.arange(count, device=device)[:, None], order_BC]
    gain_BC11 = 0.6 + 0.8 * torch.rand(count, 3, 1, 1, device=device)
    shift_BC11 = 0.3 * torch.rand(count, 3, 1, 1, device=device) - 0.15
    changed_BCHW = shuffled_BCHW * gain_BC11 + shift_BC11
    if light:
        coarse_BCHW = light * torch.randn(count, 3, LIGHT_SIDE, LIGHT_SIDE, device=device)
        changed_BCHW = changed_BCHW + functional.interpolate(
            coarse_BCHW, size=image_BCHW.shape[-2:], mode="bicubic", align_corners=False
        )
    return changed_BCHW.clamp(0, 1)


class LowResolutionStage(nn.Module):
    """Small source and two masks -> frame of full size.

    Args:
        down: what makes the source small; by default it is antialiased.
        mask_channels: of either mask.
    """

    def __init__(
        self,
        config: LowResolutionConfig,
        *,
        down: nn.Module | None = None,
        mask_channels: int = 1,
    ) -> None:
        super().__init__()
        width, num_up_blocks = config.block_expansion, config.num_up_blocks
        widest = width * 2**num_up_blocks
        self.down = AntiAlias(3, config.scale_factor) if down is None else down
        self.first = SameBlock(3 + 2 * mask_channels, widest, kernel_px=7)
        self.bottleneck = bottleneck(widest, config.num_bottleneck_blocks)
        self.up_blocks = nn.ModuleList(
            UpBlock(width * 2 ** (i + 1), width * 2**i) for i in reversed(range(num_up_blocks))
        )
        self.final = nn.Conv2d(width, 3, 7, padding=3)

    def forward(
        self, small_BCHW: Tensor, source_mask_B1HW: Tensor, driving_mask_B1HW: Tensor
    ) -> Tensor:
        masked_BCHW = torch.cat([small_BCHW, source_mask_B1HW, driving_mask_B1HW], dim=1)
        x_BCHW = self.bottleneck(self.first(masked_BCHW))
        for block in self.up_blocks:
            x_BCHW = block(x_BCHW)
        return widened(self.final(x_BCHW)).sigmoid()


class HighResolutionStage(nn.Module):
    """Source, both masks enlarged, and the first stage's frame -> frame."""

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__()
        self.hourglass = Hourglass(config, in_channels=8)
        self.final = nn.Conv2d(self.hourglass.out_channels, 3, 7, padding=3)

    def forward(
        self,
        image_BCHW: Tensor,
        source_mask_B1HW: Tensor,
        driving_mask_B1HW: Tensor,
        low_BCHW: Tensor,
    ) -> Tensor:
        masks_B2HW = torch.cat([source_mask_B1HW, driving_mask_B1HW], dim=1)
        large_B2HW = functional.interpolate(
            masks_B2HW, size=image_BCHW.shape[-2:], mode="bilinear", align_corners=False
        )
        x_BCHW = torch.cat([image_BCHW, large_B2HW, low_BCHW], dim=1)
        return widened(self.final(self.hourglass(x_BCHW))).sigmoid()


class KeypointMaskSystem(AnimationSystem[KeypointMaskSource, KeypointMaskDriving]):
    """The masks that are made of whole maps: `heatmap` and `softmax`."""

    config: KeypointMaskModel

    def __init__(self, config: KeypointMaskModel) -> None:
        super().__init__()
        self.config = config
        self.detector = KeypointDetector(config.detector)
        self.detector.requires_grad_(False)
        self.detector.eval()
        self.detector_learns = False
        self.low_resolution = LowResolutionStage(config.low_resolution)
        self.high_resolution = HighResolutionStage(config.high_resolution)
        self.map_side_px = self.detector.map_side_px(config.image_size_px)
        self.mask_side_px = round(config.image_size_px * config.low_resolution.scale_factor)

    def train(self, mode: bool = True) -> KeypointMaskSystem:
        super().train(mode)
        if not self.detector_learns:
            self.detector.eval()
        return self

    def release_detector(self) -> None:
        """Let the detector learn with the first stage (paper 003, section 3, on this system)."""
        self.detector_learns = True
        self.detector.predictor.requires_grad_(True)
        self.detector.kp.requires_grad_(True)

    def mask(self, image_BCHW: Tensor) -> Tensor:
        """The images' masks, [B, 1, mask side, mask side] in [0, 1]."""
        maps_BKHW = self.detector.logits(image_BCHW)
        if self.config.mask == "softmax":
            maps_BKHW = self.detector.heatmap(maps_BKHW)
        return self._fitted(maps_BKHW)

    def _fitted(self, maps_BKHW: Tensor) -> Tensor:
        """Sum, stretch to [0, 1], give back the border that the detector's head cut off, resize."""
        mask_B1HW = min_max(maps_BKHW.sum(dim=1, keepdim=True))
        # Without padding the 7x7 head lost 3 pixels on every side.
        border_px = 3 - self.config.detector.head_padding
        return resize_map(functional.pad(mask_B1HW, (border_px,) * 4), self.mask_side_px)

    def encode_source(self, source_BCHW: Tensor) -> KeypointMaskSource:
        small_BCHW = widened(self.low_resolution.down(source_BCHW))
        return KeypointMaskSource(source_BCHW, small_BCHW, self.mask(source_BCHW))

    def encode_driving(self, driving_BCHW: Tensor) -> KeypointMaskDriving:
        return KeypointMaskDriving(mask_B1HW=self.mask(driving_BCHW))

    def driving_mask(self, driving: KeypointMaskDriving) -> Tensor:
        """The mask of a driving state, drawn now where the state carries points."""
        assert driving.mask_B1HW is not None
        return driving.mask_B1HW

    def render(self, source: KeypointMaskSource, driving: KeypointMaskDriving) -> Prediction:
        masks = (source.mask_B1HW, self.driving_mask(driving))
        low_BCHW = self.low_resolution(source.small_BCHW, *masks)
        seen = (mask_B1HW.detach() for mask_B1HW in masks)
        image_BCHW = self.high_resolution(source.image_BCHW, *seen, low_BCHW.detach())
        return Prediction(image_BCHW, low_BCHW, *masks)

    def training_losses(self, batch: Batch) -> LossTerms:
        source = self.encode_source(batch.source_BCHW)
        # A detector that learns must not tell the driver's colours: paper 003 shows its driving
        # input in other colours than the frame that is to be drawn.
        seen_BCHW = batch.driving_BCHW
        if self.detector_learns:
            seen_BCHW = recoloured(seen_BCHW, light=self.objective.losses.driving_light)
        prediction = self.render(source, self.encode_driving(seen_BCHW))
        assert prediction.low_resolution_BCHW is not None
        images = {"_low": prediction.low_resolution_BCHW, "_high": prediction.image_BCHW}
        terms = self.objective.image_terms(images, batch.driving_BCHW).terms
        if self.detector_learns and self.objective.losses.mask_mean:
            assert prediction.source_mask_B1HW is not None
            assert prediction.driving_mask_B1HW is not None
            mean = (prediction.source_mask_B1HW.mean() + prediction.driving_mask_B1HW.mean()) / 2
            terms = {**terms, "mask_mean": self.objective.losses.mask_mean * mean}
        return LossTerms(terms)


class CirclesSystem(KeypointMaskSystem):
    """The mask that is drawn from points, `circles`; so motion can be relative, too."""

    motions: ClassVar[frozenset[Motion]] = frozenset({"absolute", "relative"})

    def points(self, image_BCHW: Tensor) -> Tensor:
        """The images' keypoints, [B, K, 2]."""
        return self.detector.points(self.detector.heatmap(self.detector.logits(image_BCHW)))

    def draw(self, points_BK2: Tensor) -> Tensor:
        """Gaussians at the points, summed: [B, 1, mask side, mask side] in [0, 1]."""
        padded = self.config.circle_grid == "padded"
        side_px = self.map_side_px if padded else self.mask_side_px
        maps_BKHW = gaussian_maps(
            points_BK2, size_px=(side_px, side_px), variance=self.config.circle_variance
        )
        return self._fitted(maps_BKHW) if padded else min_max(maps_BKHW.sum(dim=1, keepdim=True))

    def mask(self, image_BCHW: Tensor) -> Tensor:
        return self.draw(self.points(image_BCHW))

    def encode_source(self, source_BCHW: Tensor) -> KeypointMaskSource:
        points_BK2 = self.points(source_BCHW)
        small_BCHW = widened(self.low_resolution.down(source_BCHW))
        return KeypointMaskSource(source_BCHW, small_BCHW, self.draw(points_BK2), points_BK2)

    def encode_driving(self, driving_BCHW: Tensor) -> KeypointMaskDriving:
        return KeypointMaskDriving(points_BK2=self.points(driving_BCHW))

    def driving_mask(self, driving: KeypointMaskDriving) -> Tensor:
        assert driving.points_BK2 is not None
        return self.draw(driving.points_BK2)

    def relative_motion(
        self,
        source: KeypointMaskSource,
        driving: KeypointMaskDriving,
        initial: KeypointMaskDriving,
        *,
        adapt_scale: bool,
    ) -> KeypointMaskDriving:
        assert source.points_BK2 is not None
        assert driving.points_BK2 is not None
        assert initial.points_BK2 is not None
        points_BK2 = relative_points(
            source.points_BK2, driving.points_BK2, initial.points_BK2, adapt_scale=adapt_scale
        )
        return KeypointMaskDriving(points_BK2=points_BK2)

"""kpmask-plus: what the keypoint-mask paper leaves as future work (002, section 5), and more.

- Every channel of the detector's maps is shown to the generator by itself, or a few learned
  combinations of them, in place of their sum.
- The detector learns with the generator. So that its mask tells poses and not looks, it sees the
  driving frame in other colours than the frame that is to be drawn (after paper 003).
- The second stage does not draw the whole frame. Each pixel is a mixture, with learned weights, of
  a drawn one, the source's own, and one that a learned flow fetches from the source. A still
  background thus stays as sharp as it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask.model_config import Hourglass as HourglassConfig
from kpmask.model_config import KpmaskPlusModel
from kpmask.models.base import AnimationSystem, Batch, LossTerms, Prediction, State
from kpmask.models.keypoint_detector import KeypointDetector
from kpmask.models.keypoint_mask import LowResolutionStage, recoloured
from kpmask.models.layers import Hourglass, coordinate_grid, resize_map, widened


@dataclass(frozen=True)
class PlusSource(State):
    """What is drawn, and where it is.

    Attributes:
        image_BCHW: the source. small_BCHW: the same at the first stage's size.
        mask_BMHW: its mask at the first stage's size, in [0, 1].
    """

    image_BCHW: Tensor
    small_BCHW: Tensor
    mask_BMHW: Tensor


@dataclass(frozen=True)
class PlusDriving(State):
    """Where the driving object is: its mask [B, M, H, W] at the first stage's size."""

    mask_BMHW: Tensor


S = TypeVar("S", PlusSource, PlusDriving)


class MaskCombination(nn.Module):
    """The detector's K maps as M channels in [0, 1]: each by itself, mixed, or summed."""

    def __init__(self, config: KpmaskPlusModel) -> None:
        super().__init__()
        self.kind = config.combination
        num_maps = config.detector.num_keypoints
        self.mix: nn.Conv2d | None = None
        self.out_channels = {"separate": num_maps, "learned": config.num_combined, "sum": 1}[
            config.combination
        ]
        if self.kind == "learned":
            self.mix = nn.Conv2d(num_maps, self.out_channels, 1)

    def forward(self, maps_BKHW: Tensor) -> Tensor:
        if self.mix is not None:
            maps_BKHW = widened(self.mix(maps_BKHW))
        elif self.kind == "sum":
            maps_BKHW = maps_BKHW.sum(dim=1, keepdim=True)
        return maps_BKHW.sigmoid()


class ComposingStage(nn.Module):
    """Source, both masks enlarged, and the drawn frame -> frame.

    The hourglass gives seven or ten maps: a colour, the weights of the parts, and a flow.
    """

    def __init__(self, config: HourglassConfig, *, mask_channels: int, warp: bool) -> None:
        super().__init__()
        self.num_parts = 3 if warp else 2  # drawn, the source's own, and fetched
        self.hourglass = Hourglass(config, in_channels=6 + 2 * mask_channels)
        num_maps = 3 + self.num_parts + (2 if warp else 0)
        self.final = nn.Conv2d(self.hourglass.out_channels, num_maps, 7, padding=3)

    def forward(
        self,
        image_BCHW: Tensor,
        source_mask_BMHW: Tensor,
        driving_mask_BMHW: Tensor,
        drawn_BCHW: Tensor,
    ) -> Tensor:
        masks_BCHW = torch.cat([source_mask_BMHW, driving_mask_BMHW], dim=1)
        large_BCHW = functional.interpolate(
            masks_BCHW, size=image_BCHW.shape[-2:], mode="bilinear", align_corners=False
        )
        seen_BCHW = torch.cat([image_BCHW, large_BCHW, drawn_BCHW], dim=1)
        maps_BCHW = widened(self.final(self.hourglass(seen_BCHW)))
        weight_BPHW = maps_BCHW[:, 3 : 3 + self.num_parts].softmax(dim=1)
        # The drawn frame, corrected: a sum of logits, so that it starts as the first stage's.
        parts = [(maps_BCHW[:, :3] + drawn_BCHW.clamp(1e-3, 1 - 1e-3).logit()).sigmoid()]
        parts.append(image_BCHW)
        if self.num_parts == 3:
            parts.append(fetched(image_BCHW, maps_BCHW[:, -2:]))
        return (weight_BPHW[:, :, None] * torch.stack(parts, dim=1)).sum(dim=1)


def fetched(image_BCHW: Tensor, flow_B2HW: Tensor) -> Tensor:
    """The image where each pixel is taken from `flow` further, in units of half the image."""
    grid_HW2 = coordinate_grid(image_BCHW.shape[-2], image_BCHW.shape[-1], like=flow_B2HW)
    places_BHW2 = grid_HW2 + flow_B2HW.permute(0, 2, 3, 1)
    return functional.grid_sample(
        image_BCHW, places_BHW2, padding_mode="border", align_corners=True
    )


class KpmaskPlusSystem(AnimationSystem[PlusSource, PlusDriving]):
    """Learned masks of several channels, a drawn frame, and a mixture with the source."""

    config: KpmaskPlusModel

    def __init__(self, config: KpmaskPlusModel) -> None:
        super().__init__()
        self.config = config
        self.detector = KeypointDetector(config.detector)
        self.detector.map_side_px(config.image_size_px)
        self.combination = MaskCombination(config)
        channels = self.combination.out_channels
        self.drawing = LowResolutionStage(config.low_resolution, mask_channels=channels)
        self.composing = ComposingStage(
            config.high_resolution, mask_channels=channels, warp=config.warp
        )
        self.mask_side_px = round(config.image_size_px * config.low_resolution.scale_factor)

    def mask(self, image_BCHW: Tensor) -> Tensor:
        """The images' masks, [B, M, mask side, mask side] in [0, 1]."""
        mask_BMHW = self.combination(self.detector.logits(image_BCHW))
        border_px = 3 - self.config.detector.head_padding
        return resize_map(functional.pad(mask_BMHW, (border_px,) * 4), self.mask_side_px)

    def encode_source(self, source_BCHW: Tensor) -> PlusSource:
        small_BCHW = widened(self.drawing.down(source_BCHW))
        return PlusSource(source_BCHW, small_BCHW, self.mask(source_BCHW))

    def encode_driving(self, driving_BCHW: Tensor) -> PlusDriving:
        return PlusDriving(self.mask(driving_BCHW))

    def render(self, source: PlusSource, driving: PlusDriving) -> Prediction:
        masks = (source.mask_BMHW, driving.mask_BMHW)
        drawn_BCHW = self.drawing(source.small_BCHW, *masks)
        image_BCHW = self.composing(source.image_BCHW, *masks, drawn_BCHW)
        shown = (mask_BMHW.amax(dim=1, keepdim=True) for mask_BMHW in masks)
        return Prediction(image_BCHW, drawn_BCHW, *shown)

    def _noisy(self, state: S) -> S:
        """The state with noise on its mask: what little it then tells had better be the pose."""
        noise = self.config.mask_noise * torch.randn_like(state.mask_BMHW)
        return dataclasses.replace(state, mask_BMHW=state.mask_BMHW + noise)

    def training_losses(self, batch: Batch) -> LossTerms:
        light = self.objective.losses.driving_light
        source = self.encode_source(batch.source_BCHW)
        driving = self.encode_driving(recoloured(batch.driving_BCHW, light=light))
        source, driving = self._noisy(source), self._noisy(driving)
        prediction = self.render(source, driving)
        assert prediction.low_resolution_BCHW is not None
        images = {"_drawn": prediction.low_resolution_BCHW, "": prediction.image_BCHW}
        terms = self.objective.image_terms(images, batch.driving_BCHW).terms
        if self.objective.losses.mask_mean:
            mean = (source.mask_BMHW.mean() + driving.mask_BMHW.mean()) / 2
            terms = {**terms, "mask_mean": self.objective.losses.mask_mean * mean}
        return LossTerms(terms)

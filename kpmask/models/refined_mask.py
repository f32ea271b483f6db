"""Image animation with refined masking (paper 003).

- A network m learns the mask, one map, together with what draws the frame from it. P perturbs the
  driver's mask so that it tells less of the driver's shape, and a network r refines it to what the
  source would have in that pose.
- The frame is drawn by the two stages of the keypoint mask's system, which took them over from
  here. This code shrinks the source by plain bilinear sampling.
- In training source and driver are the same, so the stages are shown the driver's own mask. r
  learns on the side to restore that mask after P: from its own loss alone, and only r.
- m learns from the first stage's frame alone. It sees the driver in other colours than those of
  the frame that is to be drawn (A in the paper), so that colour cannot pass through the mask.
- The original's reconstruction scores (its Table 1) are of the driver's own mask, without P and r:
  that is the ablation `no_id`. The others are of what animation does with a driver like the source.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask.config import Augmentation
from kpmask.data.augment import draw, recolour
from kpmask.errors import ConfigError
from kpmask.model_config import Ablation, RefinedMaskModel
from kpmask.model_config import EncoderDecoder as EncoderDecoderConfig
from kpmask.model_config import MaskGenerator as MaskGeneratorConfig
from kpmask.models.base import AnimationSystem, Batch, LossTerms, Prediction, State
from kpmask.models.keypoint_mask import HighResolutionStage, LowResolutionStage
from kpmask.models.layers import AntiAlias, DownBlock, UpBlock, resize_map, widened
from kpmask.models.perturb import RandomPerturbation, check_strips, perturb_for_test

HEAD_KERNEL_PX = 7


@dataclass(frozen=True)
class RefinedMaskSource(State):
    """What is drawn, and where it is.

    Attributes:
        image_BCHW: the source. small_BCHW: the same at the first stage's size.
        mask_B1HW: its mask at the first stage's size, in [0, 1].
    """

    image_BCHW: Tensor
    small_BCHW: Tensor
    mask_B1HW: Tensor


@dataclass(frozen=True)
class RefinedMaskDriving(State):
    """Where the driving object is: its mask at the first stage's size, in [0, 1].

    Before P: what P does costs next to nothing, and so a state serves every ablation.
    """

    mask_B1HW: Tensor


class EncoderDecoder(nn.Module):
    """A U-Net without its skips: `out_channels` is the width of its last block.

    The input's sides must divide by 2**num_blocks.
    """

    def __init__(self, config: EncoderDecoderConfig, *, in_channels: int) -> None:
        super().__init__()
        widths = [
            min(config.max_features, config.block_expansion * 2**i)
            for i in range(config.num_blocks + 1)
        ]
        inner = zip([in_channels, *widths[1:-1]], widths[1:], strict=True)
        outer = zip(widths[:0:-1], widths[-2::-1], strict=True)
        self.encoder = _blocks("down_blocks", [DownBlock(i, o) for i, o in inner])
        self.decoder = _blocks("up_blocks", [UpBlock(i, o) for i, o in outer])
        self.out_channels = widths[0]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(self.encoder(x_BCHW))
        return decoded


def _blocks(name: str, blocks: list[nn.Module]) -> nn.Sequential:
    """One after the other, under the original files' names."""
    return nn.Sequential(OrderedDict([(name, nn.Sequential(*blocks))]))


class Shrink(nn.Module):
    """Bilinear sampling at `scale`, without antialiasing."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.scale == 1:
            return x_BCHW
        return functional.interpolate(
            x_BCHW, scale_factor=self.scale, mode="bilinear", align_corners=False
        )


class MaskGenerator(nn.Module):
    """m: images -> masks [B, 1, H, W] in [0, 1], at the network's scale."""

    def __init__(self, config: MaskGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.predictor = EncoderDecoder(config, in_channels=3)
        self.ref = nn.Conv2d(
            self.predictor.out_channels, 1, HEAD_KERNEL_PX, padding=config.head_padding
        )
        self.down = AntiAlias(3, config.scale_factor)

    def check_size(self, image_size_px: int) -> None:
        """Raises:
        ConfigError: there would be no mask left.
        """
        side_px = round(image_size_px * self.config.scale_factor)
        side_px += 2 * self.config.head_padding - (HEAD_KERNEL_PX - 1)
        if side_px < 1:
            raise ConfigError(
                f"images of {image_size_px} px at scale {self.config.scale_factor:g} leave masks "
                f"of {side_px} px",
                subject="mask.scale_factor",
                hint="raise scale_factor, or set head_padding = 3",
            )

    def forward(self, image_BCHW: Tensor) -> Tensor:
        logits_B1HW = widened(self.ref(self.predictor(self.down(image_BCHW))))
        # Without padding the 7x7 head lost 3 pixels on every side.
        border_px = HEAD_KERNEL_PX // 2 - self.config.head_padding
        mask_B1HW = (logits_B1HW / self.config.temperature).sigmoid()
        return functional.pad(mask_B1HW, (border_px,) * 4)


class RefinementNetwork(nn.Module):
    """r: small source, its mask and the driver's perturbed mask -> the mask to draw from."""

    def __init__(self, config: EncoderDecoderConfig, *, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.predictor = EncoderDecoder(config, in_channels=5)
        self.ref = nn.Conv2d(
            self.predictor.out_channels, 1, HEAD_KERNEL_PX, padding=HEAD_KERNEL_PX // 2
        )

    def forward(
        self, small_BCHW: Tensor, source_mask_B1HW: Tensor, driving_mask_B1HW: Tensor
    ) -> Tensor:
        x_BCHW = torch.cat([small_BCHW, source_mask_B1HW, driving_mask_B1HW], dim=1)
        logits_B1HW = widened(self.ref(self.predictor(x_BCHW)))
        return (logits_B1HW / self.temperature).sigmoid()


class RefinedMaskSystem(AnimationSystem[RefinedMaskSource, RefinedMaskDriving]):
    """A learned mask, perturbed and refined for the source."""

    config: RefinedMaskModel

    def __init__(self, config: RefinedMaskModel) -> None:
        """Raises:
        ConfigError: the images are too small for the mask, or for the perturbation's strips.
        """
        super().__init__()
        self.config = config
        scale = config.low_resolution.scale_factor
        self.mask_side_px = round(config.image_size_px * scale)
        self.mask_generator = MaskGenerator(config.mask)
        self.refinement = RefinementNetwork(
            config.refinement, temperature=config.refinement_temperature
        )
        self.low_resolution = LowResolutionStage(config.low_resolution, down=Shrink(scale))
        self.high_resolution = HighResolutionStage(config.high_resolution)
        self.mask_generator.check_size(config.image_size_px)
        check_strips(config.perturbation, self.mask_side_px)

    def with_ablation(self, ablation: Ablation) -> Self:
        """The same system, its weights shared, with another `config.ablation`."""
        twin = copy.copy(self)
        twin.config = self.config.model_copy(update={"ablation": ablation})
        return twin

    def for_reconstruction(self) -> Self:
        """Without perturbation and refinement (paper 003, Table 1)."""
        return self.with_ablation("no_id")

    def mask(self, image_BCHW: Tensor) -> Tensor:
        """The images' masks, [B, 1, mask side, mask side] in [0, 1]."""
        return resize_map(self.mask_generator(image_BCHW), self.mask_side_px)

    def encode_source(self, source_BCHW: Tensor) -> RefinedMaskSource:
        small_BCHW = widened(self.low_resolution.down(source_BCHW))
        return RefinedMaskSource(source_BCHW, small_BCHW, self.mask(source_BCHW))

    def encode_driving(self, driving_BCHW: Tensor) -> RefinedMaskDriving:
        return RefinedMaskDriving(self.mask(driving_BCHW))

    def refined(self, source: RefinedMaskSource, driving: RefinedMaskDriving) -> Tensor:
        """The mask that animation draws from, less what `config.ablation` leaves out."""
        ablation, mask_B1HW = self.config.ablation, driving.mask_B1HW
        if ablation in {"none", "no_ref"}:
            mask_B1HW = perturb_for_test(mask_B1HW, self.config.perturbation)
        if ablation in {"none", "no_pert"}:
            mask_B1HW = self.refinement(source.small_BCHW, source.mask_B1HW, mask_B1HW)
        return mask_B1HW

    def render(self, source: RefinedMaskSource, driving: RefinedMaskDriving) -> Prediction:
        return self._drawn(source, self.refined(source, driving))

    def _drawn(self, source: RefinedMaskSource, driving_mask_B1HW: Tensor) -> Prediction:
        masks = (source.mask_B1HW, driving_mask_B1HW)
        low_BCHW = self.low_resolution(source.small_BCHW, *masks)
        seen = (mask_B1HW.detach() for mask_B1HW in masks)
        image_BCHW = self.high_resolution(source.image_BCHW, *seen, low_BCHW.detach())
        return Prediction(image_BCHW, low_BCHW, *masks)

    def training_losses(self, batch: Batch) -> LossTerms:
        source = self.encode_source(batch.source_BCHW)
        mask_B1HW = self.mask(self._recoloured(batch.driving_BCHW))
        prediction = self._drawn(source, mask_B1HW)
        assert prediction.low_resolution_BCHW is not None
        images = {"_low": prediction.low_resolution_BCHW, "_high": prediction.image_BCHW}
        losses = self.objective.losses
        terms = dict(self.objective.image_terms(images, batch.driving_BCHW).terms)
        # Before its time r's loss has no weight, and is there all the same: several workers
        # average the gradients of all parameters in every step.
        weight = losses.refinement if batch.epoch >= losses.refinement_from_epoch else 0.0
        terms["refinement"] = weight * self._refinement_loss(source, mask_B1HW)
        if losses.mask_mean:
            mean = (source.mask_B1HW.mean() + mask_B1HW.mean()) / 2
            terms["mask_mean"] = losses.mask_mean * mean
        return LossTerms(terms)

    def _refinement_loss(self, source: RefinedMaskSource, mask_B1HW: Tensor) -> Tensor:
        """How far r is from the driver's mask when it sees that perturbed; of r alone."""
        config, target_B1HW = self.config.perturbation, mask_B1HW.detach()
        drawn = RandomPerturbation.draw(config, like=target_B1HW)
        perturbed_B1HW = drawn.apply(target_B1HW, config)
        refined_B1HW: Tensor = self.refinement(
            source.small_BCHW, source.mask_B1HW.detach(), perturbed_B1HW
        )
        return (refined_B1HW - target_B1HW).abs().mean()

    def _recoloured(self, image_BCHW: Tensor) -> Tensor:
        """Each image in other colours, from torch's global CPU random state."""
        colours = Augmentation(flip=False, **self.config.driving_colours.model_dump())
        seeds = torch.randint(2**62, (len(image_BCHW),)).tolist()
        return recolour(image_BCHW, [draw(colours, seed) for seed in seeds])

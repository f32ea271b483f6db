"""X2Face (Wiles et al., ECCV 2018): an embedded face, warped by what the driving frame says.

- The embedder, a U-Net, warps each source into a common pose, the embedded face, and says how far
  each pixel can be trusted; the embedded face is the sources' mean by that trust.
- The driver, the same without skips, squeezes the driving frame into one vector and unfolds it to
  a flow. The frame is the embedded face sampled by that flow, so it has the source's colours only.

Re-derived from the paper. Where it is silent this is pix2pix (Isola et al., 2017), which its
networks follow: leaky ReLU 0.2 on the way down, ReLU on the way up, no batch norm in the outermost
and the innermost convolutions. The innermost map is one pixel, which a batch of one could not
normalise. Both flows are offsets from the pixel's own place and begin close to 0, so that
training begins with a copy of the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask.model_config import X2FaceModel
from kpmask.models.base import AnimationSystem, Batch, LossTerms, Prediction, State
from kpmask.models.layers import coordinate_grid, widened

LEAK = 0.2
MIN_CONFIDENCE = 0.1
HEAD_STD = 1e-3  # of the fresh weights that flows come from: hundredths of the image


@dataclass(frozen=True)
class X2FaceSource(State):
    """`embedded_BCHW`: the source in the common pose, RGB in [0, 1]."""

    embedded_BCHW: Tensor


@dataclass(frozen=True)
class X2FaceDriving(State):
    """`flow_BHW2`: where in the embedded face each pixel lies, (x, y); [-1, 1] is inside."""

    flow_BHW2: Tensor


class _Down(nn.Module):
    """Leaky ReLU (not of an image), 4x4 convolution of stride 2, batch norm where asked for."""

    def __init__(self, in_channels: int, out_channels: int, *, is_first: bool, norm: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.is_first:
            x_BCHW = functional.leaky_relu(x_BCHW, LEAK)
        y_BCHW: Tensor = self.conv(x_BCHW)
        return y_BCHW if self.norm is None else self.norm(y_BCHW)


class _Up(nn.Module):
    """ReLU, bilinear to twice the size, 3x3 convolution, batch norm where asked for."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        large_BCHW = functional.interpolate(
            functional.relu(x_BCHW), scale_factor=2.0, mode="bilinear", align_corners=False
        )
        y_BCHW: Tensor = self.conv(large_BCHW)
        return y_BCHW if self.norm is None else self.norm(y_BCHW)


class FlowNet(nn.Module):
    """Image -> `out_channels` maps of its size, by way of `widths`, with or without skips."""

    def __init__(self, widths: list[int], *, out_channels: int, skips: bool) -> None:
        super().__init__()
        self.has_skips = skips
        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            _Down(i, o, is_first=n == 0, norm=0 < n < last)
            for n, (i, o) in enumerate(pairwise([3, *widths]))
        )
        # All but the innermost also see the encoder's output of their size.
        seen = [width * (2 if skips and n < last else 1) for n, width in enumerate(widths)]
        self.up_blocks = nn.ModuleList(
            _Up(i, o, norm=True) for i, o in reversed(list(zip(seen[1:], widths, strict=False)))
        )
        self.head = _Up(seen[0], out_channels, norm=False)
        nn.init.normal_(self.head.conv.weight, std=HEAD_STD)
        self.head.conv.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        encoded = [image_BCHW]
        for block in self.down_blocks:
            encoded.append(block(encoded[-1]))
        x_BCHW = encoded[-1]
        for block, skip_BCHW in zip(self.up_blocks, reversed(encoded[1:-1]), strict=True):
            x_BCHW = block(x_BCHW)
            if self.has_skips:
                x_BCHW = torch.cat([x_BCHW, skip_BCHW], dim=1)
        return widened(self.head(x_BCHW))


def _places(offset_B2HW: Tensor) -> Tensor:
    """Each pixel's own place plus tanh of what the network gives, [B, H, W, 2]."""
    grid_HW2 = coordinate_grid(offset_B2HW.shape[-2], offset_B2HW.shape[-1], like=offset_B2HW)
    return grid_HW2 + offset_B2HW.tanh().permute(0, 2, 3, 1)


class Embedder(nn.Module):
    """Sources of one identity -> their embedded face."""

    def __init__(self, widths: list[int], *, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.net = FlowNet(widths, out_channels=3, skips=True)

    def forward(self, sources_BNCHW: Tensor) -> Tensor:
        """[B, N, 3, H, W] of N sources each -> [B, 3, H, W], their mean by confidence."""
        batch, num_sources = sources_BNCHW.shape[:2]
        images_MCHW = sources_BNCHW.flatten(0, 1)
        maps_M3HW = self.net(images_MCHW)
        warped_MCHW = functional.grid_sample(
            images_MCHW, _places(maps_M3HW[:, :2]), align_corners=self.align_corners
        )
        # With one source the confidence cancels out, and is not trained.
        confidence_M1HW = maps_M3HW[:, 2:].exp() + MIN_CONFIDENCE
        confidence_BN1HW = confidence_M1HW.reshape(batch, num_sources, *confidence_M1HW.shape[1:])
        total_BCHW = (confidence_BN1HW * warped_MCHW.reshape(sources_BNCHW.shape)).sum(dim=1)
        embedded_BCHW: Tensor = total_BCHW / confidence_BN1HW.sum(dim=1)
        return embedded_BCHW


class X2FaceSystem(AnimationSystem[X2FaceSource, X2FaceDriving]):
    """X2Face as an animation system: absolute motion only, since its driving vector has no names.

    The published system takes several sources of one identity; this one is given one.
    """

    config: X2FaceModel

    def __init__(self, config: X2FaceModel) -> None:
        super().__init__()
        self.config = config
        num_blocks = config.num_blocks or config.image_size_px.bit_length() - 1
        widths = [
            min(config.max_features, config.block_expansion * 2**i) for i in range(num_blocks)
        ]
        self.embedder = Embedder(widths, align_corners=config.align_corners)
        self.driver = FlowNet([*widths[:-1], config.driving_features], out_channels=2, skips=False)

    def encode_source(self, source_BCHW: Tensor) -> X2FaceSource:
        return X2FaceSource(self.embedder(source_BCHW[:, None]))

    def encode_driving(self, driving_BCHW: Tensor) -> X2FaceDriving:
        return X2FaceDriving(_places(self.driver(driving_BCHW)))

    def render(self, source: X2FaceSource, driving: X2FaceDriving) -> Prediction:
        image_BCHW = functional.grid_sample(
            source.embedded_BCHW, driving.flow_BHW2, align_corners=self.config.align_corners
        )
        return Prediction(image_BCHW)

    def training_losses(self, batch: Batch) -> LossTerms:
        source = self.encode_source(batch.source_BCHW)
        driving = self.encode_driving(batch.driving_BCHW)
        prediction = self.render(source, driving)
        return self.objective.image_terms({"": prediction.image_BCHW}, batch.driving_BCHW)

"""The blocks of `kpmask.models.layers`, faster, for inference alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask.models.layers import DownBlock, Hourglass, ResBlock, UpBlock
from kpmask.optimize.convolve import conv_of
from kpmask.optimize.upsample import PhaseUp


class FusedDown(nn.Module):
    """What a `DownBlock` does."""

    def __init__(self, block: DownBlock, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = conv_of(block.conv, block.norm, relu=True, dtype=dtype)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return functional.avg_pool2d(self.conv(x_BCHW), 2)


class FusedRes(nn.Module):
    """What a `ResBlock` does: its second norm is in the first convolution, the sum in the second.

    The first norm stays: its input is also what is added at the end.
    """

    def __init__(self, block: ResBlock, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.norm = block.norm1
        self.conv1 = conv_of(block.conv1, block.norm2, relu=True, dtype=dtype)
        self.conv2 = conv_of(block.conv2, relu=False, dtype=dtype)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW.to(dtype=self.dtype, memory_format=torch.channels_last)
        y_BCHW: Tensor = self.conv1(self.norm(x_BCHW).relu_())
        summed_BCHW: Tensor = self.conv2(y_BCHW, x_BCHW)
        return summed_BCHW


class FusedHourglass(nn.Module):
    """What an `Hourglass` does, without copies for its skips."""

    def __init__(self, hourglass: Hourglass, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.out_channels = hourglass.out_channels
        downs = (b for b in hourglass.encoder.down_blocks if isinstance(b, DownBlock))
        ups = (b for b in hourglass.decoder.up_blocks if isinstance(b, UpBlock))
        self.down_blocks = nn.ModuleList(FusedDown(block, dtype=dtype) for block in downs)
        self.up_blocks = nn.ModuleList(PhaseUp(block, dtype=dtype) for block in ups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW.to(dtype=self.dtype, memory_format=torch.channels_last)
        encoded = [x_BCHW]
        for block in self.down_blocks:
            encoded.append(block(encoded[-1]))
        x_BCHW = encoded.pop()
        for block, skip_BCHW in zip(self.up_blocks, reversed(encoded), strict=True):
            x_BCHW = block(x_BCHW, skip_BCHW)
        return x_BCHW

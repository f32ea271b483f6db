"""Nearest upsampling by two and a 3x3 convolution, computed on the small input.

Of the nine taps those that fall on the same small pixel are one, whose weight is their sum. What
is left depends on whether an output's row and column are even or odd: four kernels of 2x2 taps,
so 4/9 of the products. They are one convolution with four times the outputs; `PhaseUp` writes
these to every second row and column of the result. Exact but for the order of the sums, borders
included: what is added around the large input is what is added around the small one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kpmask.models.layers import UpBlock
from kpmask.optimize.convolve import FusedConv, folded

PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # of an output's row and column


def phase_kernels(weight_OI33: Tensor) -> Tensor:
    """The kernels of the four phases one after the other: [4 O, I, 2, 2].

    With one row and column of zeros around the small input, output (2y + r, 2x + c) is what the
    kernels of phase (r, c) make of the 2x2 pixels from (y - 1 + r, x - 1 + c) on.
    """
    return torch.cat([_halved(_halved(weight_OI33, 2, row), 3, column) for row, column in PHASES])


def _halved(weight: Tensor, axis: int, phase: int) -> Tensor:
    """Three taps on the large input as two on the small one."""
    first, second, third = weight.unbind(axis)
    taps = (first, second + third) if phase == 0 else (first + second, third)
    return torch.stack(taps, dim=axis)


class PhaseUp(nn.Module):
    """What an `UpBlock` does; it may write its output beside a skip connection's."""

    def __init__(self, block: UpBlock, *, dtype: torch.dtype) -> None:
        super().__init__()
        weight_OI33, bias_O = folded(block.conv, block.norm)
        self.conv = FusedConv(
            phase_kernels(weight_OI33.double()).float(),
            bias_O.repeat(len(PHASES)),
            padding=(1, 1),
            relu=True,
            dtype=dtype,
        )
        self.out_channels = len(bias_O)

    def forward(self, x_BCHW: Tensor, skip_BCHW: Tensor | None = None) -> Tensor:
        """The output [B, C, 2H, 2W], or it and then the skip's channels."""
        phases_BHWC = self.conv(x_BCHW).permute(0, 2, 3, 1)
        batch, height, width = (len(x_BCHW), *x_BCHW.shape[-2:])
        channels = self.out_channels
        room = 0 if skip_BCHW is None else skip_BCHW.shape[1]
        out_BHWC = phases_BHWC.new_empty(batch, 2 * height, 2 * width, channels + room)
        # Rows and columns of the result by their phases.
        split = out_BHWC.view(batch, height, 2, width, 2, channels + room)
        for index, (row, column) in enumerate(PHASES):
            split[:, :, row, :, column, :channels] = phases_BHWC[
                :,
                row : row + height,
                column : column + width,
                index * channels : (index + 1) * channels,
            ]
        if skip_BCHW is not None:
            out_BHWC[..., channels:] = skip_BCHW.permute(0, 2, 3, 1)
        out_BCHW: Tensor = out_BHWC.permute(0, 3, 1, 2)
        return out_BCHW

"""Large kernels with few outputs, as those that draw a frame: 7x7 to 3 channels.

A vector unit computes sixteen outputs at a time whether there are so many or not. So the rows of
the kernel become outputs: a 1x7 convolution to 7 x 3 maps, which are added one row further each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kpmask.optimize.convolve import FusedConv, folded


class SplitHead(nn.Module):
    """What a convolution of stride 1 without a norm does; the output is float32.

    The maps of a bfloat16 convolution are added in float32.
    """

    bias: Tensor

    def __init__(self, conv: nn.Conv2d, *, dtype: torch.dtype) -> None:
        super().__init__()
        weight_OIHW, bias_O = folded(conv, None)
        self.out_channels, _, self.rows, _ = weight_OIHW.shape
        assert not isinstance(conv.padding, str)
        self.padding_px = conv.padding[0]
        # [rows x O, I, 1, columns]
        row_kernels = weight_OIHW.permute(2, 0, 1, 3).flatten(0, 1)[:, :, None]
        self.conv = FusedConv(
            row_kernels,
            torch.zeros(len(row_kernels), device=row_kernels.device),
            padding=(0, conv.padding[1]),
            relu=False,
            dtype=dtype,
        )
        self.register_buffer("bias", bias_O[:, None, None], persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps_BCHW = self.conv(x_BCHW).float().contiguous()
        batch, _, height, width = maps_BCHW.shape
        channels, reach = self.out_channels, self.rows - 1
        sum_BOHW = maps_BCHW.new_zeros(batch, channels, height + reach, width)
        for row in range(self.rows):
            first = reach - row
            sum_BOHW[:, :, first : first + height] += maps_BCHW[
                :, row * channels : (row + 1) * channels
            ]
        first = reach - self.padding_px
        image_BOHW: Tensor = sum_BOHW[:, :, first : height + reach - first] + self.bias
        return image_BOHW


def pays(conv: nn.Conv2d) -> bool:
    """Whether splitting is quicker: few outputs and many rows."""
    whole = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1
    return whole and conv.kernel_size[0] >= 5 and conv.out_channels <= 8

"""Blocks that the systems share (FOMM's blocks; the parameter names are those of its files).

- A block is convolution, batch norm, ReLU. Module names are `conv`, `norm`, so that weights of
  the original code load key by key.
- Coordinates, masks and flow stay in full precision when convolutions run in bfloat16: what
  comes out of a convolution is widened first, and small matrix products are written as sums,
  because autocast narrows `matmul` and leaves products and sums alone.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask.model_config import Hourglass as HourglassConfig


class SameBlock(nn.Module):
    """Convolution, batch norm, ReLU at the same size."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_px: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_px, padding=kernel_px // 2)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x_BCHW)))


class DownBlock(SameBlock):
    """A `SameBlock`, then the mean of every 2x2 pixels."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return functional.avg_pool2d(super().forward(x_BCHW), 2)


class UpBlock(SameBlock):
    """Every pixel doubled in both directions, then a `SameBlock`."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(functional.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Pre-activation residual block: twice (batch norm, ReLU, convolution), plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.conv1(functional.relu(self.norm1(x_BCHW)))
        y_BCHW = self.conv2(functional.relu(self.norm2(y_BCHW)))
        return y_BCHW + x_BCHW


def bottleneck(channels: int, num_blocks: int) -> nn.Sequential:
    """Residual blocks under the names `r0`, `r1`, ..."""
    return nn.Sequential(OrderedDict((f"r{i}", ResBlock(channels)) for i in range(num_blocks)))


class _Encoder(nn.Module):
    def __init__(self, in_channels: int, widths: list[int]) -> None:
        super().__init__()
        pairs = zip([in_channels, *widths[1:-1]], widths[1:], strict=True)
        self.down_blocks = nn.ModuleList(DownBlock(i, o) for i, o in pairs)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        outputs = [x_BCHW]
        for block in self.down_blocks:
            outputs.append(block(outputs[-1]))
        return outputs


class _Decoder(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        num_blocks = len(widths) - 1
        self.up_blocks = nn.ModuleList(
            # All but the innermost block also see the encoder's output of their size.
            UpBlock(widths[i + 1] * (1 if i == num_blocks - 1 else 2), widths[i])
            for i in reversed(range(num_blocks))
        )

    def forward(self, encoded: list[Tensor]) -> Tensor:
        x_BCHW = encoded[-1]
        for block, skip_BCHW in zip(self.up_blocks, reversed(encoded[:-1]), strict=True):
            x_BCHW = torch.cat([block(x_BCHW), skip_BCHW], dim=1)
        return x_BCHW


class Hourglass(nn.Module):
    """U-Net whose last skip is its own input: `out_channels` = block_expansion + in_channels.

    The input's sides must divide by 2**num_blocks.
    """

    def __init__(self, config: HourglassConfig, *, in_channels: int) -> None:
        super().__init__()
        widths = [
            min(config.max_features, config.block_expansion * 2**i)
            for i in range(config.num_blocks + 1)
        ]
        self.encoder = _Encoder(in_channels, widths)
        self.decoder = _Decoder(widths)
        self.out_channels = widths[0] + in_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(self.encoder(narrowed(x_BCHW, self)))
        return decoded


class AntiAlias(nn.Module):
    """Shrink by a Gaussian of sigma (1/scale - 1)/2, then every (1/scale)-th pixel.

    The kernel is a buffer in the state dict, as in the original files. Borders are padded with
    zeros. A scale of 1 is the identity and has no kernel.
    """

    weight: Tensor

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.stride = round(1 / scale)
        if scale != 1:
            kernel_HW = gaussian_kernel(scale)
            self.register_buffer(
                "weight", kernel_HW.expand(channels, 1, *kernel_HW.shape).contiguous()
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.scale == 1:
            return x_BCHW
        whole = 1 / self.scale == self.stride
        channels, pad_px = len(self.weight), self.weight.shape[-1] // 2
        small_BCHW = functional.conv2d(
            x_BCHW,
            self.weight,
            stride=self.stride if whole else 1,
            padding=pad_px,
            groups=channels,
        )
        if whole:
            return small_BCHW
        return functional.interpolate(small_BCHW, scale_factor=self.scale, mode="nearest")


def gaussian_kernel(scale: float) -> Tensor:
    """`AntiAlias`'s kernel for a scale below 1: [k, k], sums to 1, k = 2 * round(4 sigma) + 1."""
    sigma_px = (1 / scale - 1) / 2
    reach_px = round(4 * sigma_px)
    num_px = 2 * reach_px + 1
    # Weights files are read into systems without values. Sums cost nothing there, but the arange
    # is written in Python, and it takes a second to load what that needs.
    if torch.get_default_device().type == "meta":
        return torch.empty(num_px, num_px)
    offset_px = torch.arange(-reach_px, reach_px + 1, dtype=torch.float32)
    weight = torch.exp(-(offset_px**2) / (2 * sigma_px**2))
    kernel_HW = weight[:, None] * weight[None, :]
    return kernel_HW / kernel_HW.sum()


def widened(x: Tensor) -> Tensor:
    """bfloat16 and float16 as float32; anything else as it is."""
    return x.float() if x.dtype in {torch.bfloat16, torch.float16} else x


def narrowed(x_BCHW: Tensor, network: nn.Module) -> Tensor:
    """An input as the network's convolutions take it, in type and layout.

    Each of them would do this for itself, and a skip connection would carry it on unchanged.
    """
    kind, dtype, layout = x_BCHW.device.type, x_BCHW.dtype, torch.preserve_format
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(kind)
    if next(network.parameters()).is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return x_BCHW.to(dtype=dtype, memory_format=layout)


def convolved(x_BCHW: Tensor, *heads: nn.Conv2d) -> tuple[Tensor, ...]:
    """What several convolutions of equal kernels make of one input, computed as one."""
    biases = [head.bias for head in heads if head.bias is not None]
    outputs_BCHW = functional.conv2d(
        x_BCHW,
        torch.cat([head.weight for head in heads]),
        torch.cat(biases) if biases else None,
        padding=heads[0].padding,
    )
    return torch.split(outputs_BCHW, [head.out_channels for head in heads], dim=1)


# --- coordinates -----------------------------------------------------------------------------


def coordinate_grid(height_px: int, width_px: int, *, like: Tensor) -> Tensor:
    """The pixels' (x, y) in [-1, 1], corner-aligned: [H, W, 2]."""
    x_W = _axis(width_px, like)
    y_H = _axis(height_px, like)
    return torch.stack(
        [x_W.expand(height_px, width_px), y_H[:, None].expand(height_px, width_px)], dim=-1
    )


def _axis(size_px: int, like: Tensor) -> Tensor:
    steps = torch.arange(size_px, device=like.device, dtype=like.dtype)
    # A single pixel lies in the middle.
    return steps * (2 / (size_px - 1)) - 1 if size_px > 1 else steps


def gaussian_maps(points_BK2: Tensor, *, size_px: tuple[int, int], variance: float) -> Tensor:
    """exp(-|z - point|^2 / (2 variance)) on a grid of (height, width): [B, K, H, W]."""
    height_px, width_px = size_px
    x_BKW = _axis(width_px, points_BK2) - points_BK2[..., 0, None]
    y_BKH = _axis(height_px, points_BK2) - points_BK2[..., 1, None]
    distance_BKHW = x_BKW.square()[:, :, None, :] + y_BKH.square()[:, :, :, None]
    return torch.exp(distance_BKHW * (-0.5 / variance))


def spatial_mean(heatmap_BKHW: Tensor, values_HW2: Tensor) -> Tensor:
    """The mean of per-pixel vectors under each heatmap: [B, K, 2]."""
    means = [(heatmap_BKHW * values_HW).sum(dim=(2, 3)) for values_HW in values_HW2.unbind(-1)]
    return torch.stack(means, dim=-1)


def product(left_22: Tensor, right_22: Tensor) -> Tensor:
    """Matrix product over the last two axes, for small matrices in full precision."""
    return (left_22[..., :, :, None] * right_22[..., None, :, :]).sum(-2)


def transform(matrix_22: Tensor, vector_2: Tensor) -> Tensor:
    """Matrix times vector over the last axes, in full precision."""
    x, y = vector_2.unbind(-1)  # axes of two are slow to broadcast over
    rows = (matrix_22[..., row, 0] * x + matrix_22[..., row, 1] * y for row in range(2))
    return torch.stack(list(rows), dim=-1)


def inverse(matrix_22: Tensor) -> Tensor:
    """Inverse of 2x2 matrices over the last two axes; a singular one gives infinities."""
    a, b = matrix_22[..., 0, 0], matrix_22[..., 0, 1]
    c, d = matrix_22[..., 1, 0], matrix_22[..., 1, 1]
    adjugate = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
    return adjugate / (a * d - b * c)[..., None, None]


# --- maps ------------------------------------------------------------------------------------


def min_max(map_B1HW: Tensor) -> Tensor:
    """Each map stretched to [0, 1]; a constant one becomes 0."""
    low_B111 = map_B1HW.amin(dim=(1, 2, 3), keepdim=True)
    range_B111 = map_B1HW.amax(dim=(1, 2, 3), keepdim=True) - low_B111
    return (map_B1HW - low_B111) / torch.where(range_B111 > 0, range_B111, 1.0)


def resize_map(map_BCHW: Tensor, side_px: int) -> Tensor:
    """A square map at another size: area means when it shrinks, bilinear when it grows."""
    if map_BCHW.shape[-1] == side_px:
        return map_BCHW
    if map_BCHW.shape[-1] > side_px:
        return functional.interpolate(map_BCHW, size=(side_px, side_px), mode="area")
    return functional.interpolate(
        map_BCHW, size=(side_px, side_px), mode="bilinear", align_corners=False
    )

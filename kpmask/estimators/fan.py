"""The face alignment network (Bulat and Tzimiropoulos 2017): 68 points of a face.

What the papers measure faces with, by the package face-alignment. The rules for the square around
a face, for the points in its maps and for the first face are that package's (1.5.0, without its
average over the mirrored face, as the papers' code has it): points are whole pixels of the frame.
The package itself needs `opencv-python`, which cannot be installed beside ours, and downloads
weights where it finds none.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from kpmask.data.detectors import one_thread
from kpmask.errors import CheckpointError
from kpmask.estimators import Frames, Keypoints, Subject
from kpmask.estimators.frames import EachFrame
from kpmask.estimators.networks import load_weights, network_device, whole_floats
from kpmask.estimators.s3fd import FaceBoxes
from kpmask.estimators.weights import check_published, digest_of, find

NUM_POINTS: Final = 68
_SIDE_PX: Final = 256  # of what the network sees
_MAP_PX: Final = 64  # of its maps
_REFERENCE_PX: Final = 195.0  # width and height together of a face of scale 1
_ROOM_PX: Final = 200.0  # the square's side of a face of scale 1
_UP: Final = 0.12  # of a box's height: how far above its middle the square's middle is
_DEPTH: Final = 4  # of an hourglass, and also how many there are


class _Block(nn.Module):
    """Three convolutions in a row, whose outputs are stacked and added to the input."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        sizes = (channels, out_channels // 2, out_channels // 4, out_channels // 4)
        for index in (1, 2, 3):
            self.add_module(f"bn{index}", nn.BatchNorm2d(sizes[index - 1]))
            layer = nn.Conv2d(sizes[index - 1], sizes[index], 3, padding=1, bias=False)
            self.add_module(f"conv{index}", layer)
        self.downsample = (
            None
            if channels == out_channels
            else nn.Sequential(
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, out_channels, 1, bias=False),
            )
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        outputs, y_NCHW = [], x_NCHW
        for index in (1, 2, 3):
            y_NCHW = F.relu(self.get_submodule(f"bn{index}")(y_NCHW))
            y_NCHW = self.get_submodule(f"conv{index}")(y_NCHW)
            outputs.append(y_NCHW)
        same_NCHW = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        return torch.cat(outputs, dim=1) + same_NCHW


class _Hourglass(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        for level in range(1, _DEPTH + 1):
            names = ("b1", "b2", "b3") if level > 1 else ("b1", "b2", "b2_plus", "b3")
            for name in names:
                self.add_module(f"{name}_{level}", _Block(channels, channels))

    def forward(self, x_NCHW: Tensor, level: int = _DEPTH) -> Tensor:
        beside_NCHW: Tensor = self.get_submodule(f"b1_{level}")(x_NCHW)
        y_NCHW = self.get_submodule(f"b2_{level}")(F.avg_pool2d(x_NCHW, 2))
        if level > 1:
            y_NCHW = self.forward(y_NCHW, level - 1)
        else:
            y_NCHW = self.get_submodule("b2_plus_1")(y_NCHW)
        y_NCHW = self.get_submodule(f"b3_{level}")(y_NCHW)
        return beside_NCHW + F.interpolate(y_NCHW, scale_factor=2.0, mode="nearest")


class FanNetwork(nn.Module):
    """Four hourglasses, named as in face-alignment's file; what the last one says.

    Args:
        narrow: all widths are divided by it; 1 is the published network.
    """

    def __init__(self, narrow: int = 1) -> None:
        super().__init__()
        stem, half, width = 64 // narrow, 128 // narrow, 256 // narrow
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm2d(stem)
        self.conv2, self.conv3 = _Block(stem, half), _Block(half, half)
        self.conv4 = _Block(half, width)
        for i in range(_DEPTH):
            self.add_module(f"m{i}", _Hourglass(width))
            self.add_module(f"top_m_{i}", _Block(width, width))
            self.add_module(f"conv_last{i}", nn.Conv2d(width, width, 1))
            self.add_module(f"bn_end{i}", nn.BatchNorm2d(width))
            self.add_module(f"l{i}", nn.Conv2d(width, NUM_POINTS, 1))
            if i < _DEPTH - 1:
                self.add_module(f"bl{i}", nn.Conv2d(width, width, 1))
                self.add_module(f"al{i}", nn.Conv2d(NUM_POINTS, width, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps of the points (N, 68, 64, 64), of squares of 256 px, RGB in [0, 1]."""
        x_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        x_NCHW = self.conv4(self.conv3(F.avg_pool2d(self.conv2(x_NCHW), 2)))
        maps_NKHW = x_NCHW
        for i in range(_DEPTH):
            y_NCHW = self.get_submodule(f"top_m_{i}")(self.get_submodule(f"m{i}")(x_NCHW))
            y_NCHW = self.get_submodule(f"conv_last{i}")(y_NCHW)
            y_NCHW = F.relu(self.get_submodule(f"bn_end{i}")(y_NCHW))
            maps_NKHW = self.get_submodule(f"l{i}")(y_NCHW)
            if i < _DEPTH - 1:
                x_NCHW = x_NCHW + self.get_submodule(f"bl{i}")(y_NCHW)
                x_NCHW = x_NCHW + self.get_submodule(f"al{i}")(maps_NKHW)
        return maps_NKHW


class Fan:
    """68 points of the surest face of a frame, in whole pixels."""

    name: str = "fan"
    version: str = f"2dfan4-1+{FaceBoxes.version}"
    licence: str = "BSD-3-Clause"
    subject: Subject = "face"
    num_points: int = NUM_POINTS

    def __init__(self, boxes: FaceBoxes, network: nn.Module, *, weights_sha256: str) -> None:
        """
        Args:
            network: as `FanNetwork`, or as the file of older versions has it: a list of such maps,
                of which the last counts.
        """
        self.weights_sha256 = weights_sha256
        self._boxes = boxes
        self._device = network_device()
        self._network = network.eval().to(self._device)
        self._each = EachFrame(self._face, shape=(NUM_POINTS, 3), name=self.name)

    @classmethod
    def load(cls) -> Fan:
        """Raises `find`'s errors."""
        boxes, boxes_found = FaceBoxes.load(device=network_device())
        found = find("fan")
        if _is_torchscript(found.paths[0]):
            check_published("fan", found)
        digest = digest_of((found.sha256, boxes_found.sha256))
        return cls(boxes, read_network(found.paths[0]), weights_sha256=digest)

    def estimate(self, frames_THWC: Frames) -> Keypoints:
        """See `PointEstimator`. A score is the height of a point's peak."""
        found_TKC = self._each(frames_THWC)
        scores_TK = np.clip(np.nan_to_num(found_TKC[..., 2], nan=0.0), 0, 1)
        return Keypoints(points_TK2=found_TKC[..., :2], scores_TK=scores_TK)

    def _face(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        """x, y and score of each point (K3)."""
        with one_thread():
            boxes_N5 = self._boxes.find(frame_HWC)
            if not len(boxes_N5):
                return None
            centre_2, side_px = square_of(boxes_N5[0])
            square_HWC = square(frame_HWC, centre_2, side_px)
        if square_HWC is None:
            return None
        image_NCHW = torch.from_numpy(square_HWC).to(self._device).permute(2, 0, 1)[None] / 255
        with torch.inference_mode(), whole_floats():
            maps = self._network(image_NCHW)
        maps_KHW = (maps if isinstance(maps, Tensor) else maps[-1])[0].cpu().numpy()
        points_K2, scores_K = peaks(maps_KHW)
        # Cut off, as the package's are, and not rounded.
        in_frame_K2 = np.trunc(points_K2 * (side_px / _MAP_PX) + centre_2 - side_px / 2)
        return np.column_stack([in_frame_K2, scores_K])


def read_network(path: Path) -> nn.Module:
    """The network in a file of tensors, or in one of TorchScript, as older versions have it.

    TorchScript is a program: it can read and write files. It is run only since `Fan.load` has seen
    that its digest is that of the file that the authors published.
    """
    if _is_torchscript(path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # there is no other reader
                return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-any-return, no-untyped-call]
        except RuntimeError as error:
            raise CheckpointError("cannot be read as TorchScript", subject=str(path)) from error
    network = FanNetwork()
    load_weights(network, path)
    return network


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def square_of(box_5: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Centre (x, y) and side (px) of the square around a face's box."""
    left, top, right, bottom = box_5[:4]
    centre_2 = np.array([(left + right) / 2, (top + bottom) / 2 - _UP * (bottom - top)])
    return centre_2, _ROOM_PX * float(right - left + bottom - top) / _REFERENCE_PX


def square(
    frame_HWC: NDArray[np.uint8], centre_2: NDArray[np.float64], side_px: float
) -> NDArray[np.uint8] | None:
    """What the network sees: a square of whole pixels, black beyond the frame, of 256 px then."""
    low_2 = np.trunc(side_px / _SIDE_PX + centre_2 - side_px / 2).astype(int)
    high_2 = np.trunc(centre_2 + side_px / 2).astype(int)
    (left, top), (right, bottom) = low_2, high_2
    height_px, width_px = frame_HWC.shape[:2]
    if (
        min(right - left, bottom - top) < 1
        or max(-right, left - width_px, -bottom, top - height_px) >= 0
    ):
        return None  # nothing of the frame is in it
    cut_HWC = np.zeros((bottom - top, right - left, 3), np.uint8)
    inside_HWC = frame_HWC[max(top, 0) : bottom, max(left, 0) : right]
    y, x = max(-top, 0), max(-left, 0)
    cut_HWC[y : y + inside_HWC.shape[0], x : x + inside_HWC.shape[1]] = inside_HWC
    seen_HWC = cv2.resize(cut_HWC, (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_LINEAR)
    return np.asarray(seen_HWC, np.uint8)


def peaks(maps_KHW: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where each map is highest (x and y in its pixels, K2), and how high (K).

    A quarter of a pixel towards the higher neighbour, where the peak is not at the edge.
    """
    num, height_px, width_px = maps_KHW.shape
    y_K, x_K = np.divmod(maps_KHW.reshape(num, -1).argmax(1), width_px)
    each_K = np.arange(num)
    points_K2 = np.column_stack([x_K, y_K]) + 0.5
    inner_K = (x_K > 0) & (x_K < width_px - 1) & (y_K > 0) & (y_K < height_px - 1)
    k, y, x = each_K[inner_K], y_K[inner_K], x_K[inner_K]
    slopes_N2 = np.column_stack(
        [
            maps_KHW[k, y, x + 1] - maps_KHW[k, y, x - 1],
            maps_KHW[k, y + 1, x] - maps_KHW[k, y - 1, x],
        ]
    )
    points_K2[inner_K] += 0.25 * np.sign(slopes_N2)
    return points_K2, maps_KHW[each_K, y_K, x_K].astype(np.float64)

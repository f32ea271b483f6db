"""OpenPose's network of 2017 (Cao et al.): 18 points of a body.

Its weights for torch are those that the papers' evaluation uses. Two estimators look through it:

- `openpose` is that evaluation to the letter: five sizes of the frame and of its mirror image, and
  of each joint the last peak in reading order, whosever it is. It takes a GPU: a frame is some
  17,000 GFLOP.
- `openposeone` looks at one size and its mirror image, at a thirtieth of the cost, and gives the
  joints of one person. Its numbers do not belong beside published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kpmask.data.detectors import one_thread
from kpmask.estimators import Frames, Keypoints, Subject
from kpmask.estimators.frames import EachFrame
from kpmask.estimators.networks import frozen, load_weights, network_device, whole_floats
from kpmask.estimators.people import (
    LIMBS,
    MIRRORED,
    NUM_JOINTS,
    last_peaks,
    peaks_of,
    surest_person,
)
from kpmask.estimators.weights import find

_SIDE_PX: Final = 368  # of the frame's shorter side at size 1
_CELL_PX: Final = 8  # of the maps
_NUM_FIELDS: Final = 2 * len(LIMBS)
_NUM_MAPS: Final = NUM_JOINTS + 1  # the last one is of what is no joint
_TRUNK: Final = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 256, 128)  # 0: a pool
_STAGES: Final = 6


def _mirrored_fields() -> tuple[int, ...]:
    """Which channel of the fields each one is in a mirror image."""
    limbs = [(MIRRORED[start], MIRRORED[end]) for start, end in LIMBS]
    return tuple(2 * LIMBS.index(limb) + axis for limb in limbs for axis in (0, 1))


_MIRRORED_FIELDS: Final = _mirrored_fields()


class PoseNetwork(nn.Module):
    """Ten layers of VGG-19, and six stages that each correct the one before.

    Named as in the port for torch: `model0` and `model1_1` (fields) to `model6_2` (maps).

    Args:
        narrow: all widths are divided by it; 1 is the published network.
    """

    def __init__(self, narrow: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in _TRUNK:
            if width:
                layers += [nn.Conv2d(channels, width // narrow, 3, padding=1), nn.ReLU()]
                channels = width // narrow
            else:
                layers.append(nn.MaxPool2d(2))
        self.model0 = nn.Sequential(*layers)
        for stage in range(1, _STAGES + 1):
            for branch, out_channels in ((1, _NUM_FIELDS), (2, _NUM_MAPS)):
                inputs = channels if stage == 1 else channels + _NUM_FIELDS + _NUM_MAPS
                made = _stage(inputs, out_channels, first=stage == 1, narrow=narrow)
                self.add_module(f"model{stage}_{branch}", made)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Fields (N, 38, H / 8, W / 8) and maps (N, 19, H / 8, W / 8).

        Args:
            x_NCHW: BGR in [-0.5, 0.5).
        """
        trunk_NCHW = seen_NCHW = self.model0(x_NCHW)
        fields_NCHW = maps_NCHW = trunk_NCHW
        for stage in range(1, _STAGES + 1):
            fields_NCHW = self.get_submodule(f"model{stage}_1")(seen_NCHW)
            maps_NCHW = self.get_submodule(f"model{stage}_2")(seen_NCHW)
            seen_NCHW = torch.cat([fields_NCHW, maps_NCHW, trunk_NCHW], dim=1)
        return fields_NCHW, maps_NCHW


def _stage(in_channels: int, out_channels: int, *, first: bool, narrow: int) -> nn.Sequential:
    kernels_px = (3, 3, 3, 1) if first else (7, 7, 7, 7, 7, 1)
    widths = [128 // narrow] * len(kernels_px)
    if first:
        widths[-1] = 512 // narrow
    layers: list[nn.Module] = []
    for kernel_px, width in zip(kernels_px, widths, strict=True):
        layers += [nn.Conv2d(in_channels, width, kernel_px, padding=kernel_px // 2), nn.ReLU()]
        in_channels = width
    return nn.Sequential(*layers, nn.Conv2d(in_channels, out_channels, 1))


@dataclass(frozen=True, slots=True)
class _Kind:
    version: str
    sizes: tuple[float, ...]  # of the frame, over `_SIDE_PX`


_KINDS: Final = {
    "openpose": _Kind("rtpose-vgg19-1", (0.5, 1.0, 1.5, 2.0, 2.5)),
    "openposeone": _Kind("rtpose-vgg19-1", (1.0,)),
}


class OpenPose:
    """18 points: nose, neck, right arm, left arm, right leg, left leg, eyes, ears."""

    licence: str = "LicenseRef-OpenPose"
    subject: Subject = "person"
    num_points: int = NUM_JOINTS

    def __init__(
        self, name: Literal["openpose", "openposeone"], network: nn.Module, *, weights_sha256: str
    ) -> None:
        """
        Args:
            network: as `PoseNetwork`.
        """
        self.name: str = name
        self.version = _KINDS[name].version
        self.weights_sha256 = weights_sha256
        self._sizes = _KINDS[name].sizes
        self._device = network_device()
        self._network = frozen(network).to(self._device)
        self._each = EachFrame(self._person, shape=(NUM_JOINTS, 3), name=self.name)

    @classmethod
    def load(cls, name: Literal["openpose", "openposeone"]) -> OpenPose:
        """Raises `find`'s errors."""
        found = find("openpose")
        return cls(name, read_network(found.paths[0]), weights_sha256=found.sha256)

    def estimate(self, frames_THWC: Frames) -> Keypoints:
        """See `PointEstimator`. A score is the height of a joint's peak."""
        found_TKC = self._each(frames_THWC)
        scores_TK = np.clip(np.nan_to_num(found_TKC[..., 2], nan=0.0), 0, 1)
        return Keypoints(points_TK2=found_TKC[..., :2], scores_TK=scores_TK)

    def _person(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        """x, y and score of each joint (K3)."""
        with one_thread():
            fields_HWC, maps_HWC = self.look(frame_HWC)
        peaks = [peaks_of(maps_HWC[..., joint]) for joint in range(NUM_JOINTS)]
        if self.name == "openpose":
            return last_peaks(peaks)
        return surest_person(peaks, fields_HWC)

    def look(self, frame_HWC: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Fields and maps (HWC) of a frame, in its size: means over sizes and both directions."""
        bgr_HWC = frame_HWC[..., ::-1]
        fields_HWC, maps_HWC = self._look_once(bgr_HWC)
        mirrored = [each[:, ::-1] for each in self._look_once(bgr_HWC[:, ::-1])]
        mirror_fields_HWC = mirrored[0][..., _MIRRORED_FIELDS]
        mirror_fields_HWC[..., ::2] *= -1  # x points the other way
        mirror_maps_HWC = mirrored[1][..., (*MIRRORED, NUM_JOINTS)]
        return (fields_HWC + mirror_fields_HWC) / 2, (maps_HWC + mirror_maps_HWC) / 2

    def _look_once(
        self, bgr_HWC: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        height_px, width_px = bgr_HWC.shape[:2]
        sized = [_resized(bgr_HWC, size * _SIDE_PX) for size in self._sizes]
        # All in one corner of a grey square of the largest one's size, as the papers' code has
        # them: what lies beyond a frame's edge changes what is seen at it.
        room = tuple(-(-side_px // _CELL_PX) * _CELL_PX for side_px in sized[-1].shape[:2])
        fields_HWC = np.zeros((height_px, width_px, _NUM_FIELDS))
        maps_HWC = np.zeros((height_px, width_px, _NUM_MAPS))
        for image_HWC in sized:
            found = self._maps(image_HWC, room)
            for total_HWC, map_HWC in zip((fields_HWC, maps_HWC), found, strict=True):
                total_HWC += _fitted(map_HWC, image_HWC, (width_px, height_px)) / len(sized)
        return fields_HWC, maps_HWC

    def _maps(
        self, image_HWC: NDArray[np.uint8], room: tuple[int, ...]
    ) -> list[NDArray[np.float32]]:
        """Fields and maps (HWC) of the cells of an image."""
        cells = tuple(-(-side_px // _CELL_PX) for side_px in image_HWC.shape[:2])
        canvas_HWC = np.zeros((*room, 3), np.float32)
        height_px, width_px = (cell * _CELL_PX for cell in cells)
        canvas_HWC[:height_px, :width_px] = -0.5  # black up to the next whole cell
        canvas_HWC[: image_HWC.shape[0], : image_HWC.shape[1]] = image_HWC / 256.0 - 0.5
        canvas_NCHW = torch.from_numpy(canvas_HWC).to(self._device).permute(2, 0, 1)[None]
        with torch.inference_mode(), whole_floats():
            found = self._network(canvas_NCHW)
        return [
            np.ascontiguousarray(each[0, :, : cells[0], : cells[1]].permute(1, 2, 0).cpu().numpy())
            for each in found
        ]


def read_network(path: Path) -> PoseNetwork:
    """The network in a file of tensors.

    Raises:
        CheckpointError: it is another's, or none.
    """
    network = PoseNetwork()
    load_weights(network, path)
    return network


def _resized(image_HWC: NDArray[np.uint8], short_px: float) -> NDArray[np.uint8]:
    scale = short_px / min(image_HWC.shape[:2])
    image_HWC = np.ascontiguousarray(image_HWC)
    resized_HWC = cv2.resize(image_HWC, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized_HWC, np.uint8)


def _fitted(
    map_HWC: NDArray[np.float32], image_HWC: NDArray[np.uint8], size_px: tuple[int, int]
) -> NDArray[np.float32]:
    """A map of cells in the frame's size."""
    large_HWC = cv2.resize(map_HWC, None, fx=_CELL_PX, fy=_CELL_PX, interpolation=cv2.INTER_CUBIC)[
        : image_HWC.shape[0], : image_HWC.shape[1]
    ]
    return np.asarray(cv2.resize(large_HWC, size_px, interpolation=cv2.INTER_CUBIC), np.float32)

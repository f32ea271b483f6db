"""FID and FVD: the Fréchet distances that papers report, with the networks that they are of.

| name | features | of |
|---|---|---|
| `fid` | 2048 of Inception-v3, as pytorch-fid (Heusel et al. 2017) | single frames |
| `fvd` | 400 of I3D, as StyleGAN-V (Unterthiner et al. 2018) | 16 frames in a row |

Numbers of either compare only where the videos are of the same set, as many, as long and of the
same size: both sides are resized alike, but what a small video lost is not in it any more. Here
all frames of all videos count, and of a video all windows of 16 that follow one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kpmask.estimators.i3d import I3D, NUM_FRAMES
from kpmask.estimators.inception import InceptionV3
from kpmask.estimators.networks import at_once, load_weights, whole_floats
from kpmask.estimators.weights import find
from kpmask.metrics.frechet import Features, FrechetMetric


@dataclass(frozen=True)
class Fid(FrechetMetric):
    """Fréchet Inception Distance of the frames of two sets; 0 is equal, lower is better."""

    network: InceptionV3
    weights_sha256: str
    licence: str
    name: ClassVar[str] = "fid"
    version: ClassVar[str] = "1"

    @classmethod
    def load(cls) -> Fid:
        """With the weights that are on this machine.

        Raises:
            ConfigError: they are not here; the hint is the command that gets them.
            CheckpointError: they are other weights.
        """
        found = find("inception")
        network = InceptionV3()
        load_weights(network, found.paths[0], unread=("fc.",))
        return cls(network, found.sha256, found.licence)

    def features(self, frames_NTCHW: Tensor) -> Features:
        network = self.network.to(frames_NTCHW.device)
        frames_NCHW = frames_NTCHW[:, 0].float()
        with torch.inference_mode(), whole_floats():
            parts = [network(part) for part in torch.split(frames_NCHW, at_once(frames_NCHW))]
        return torch.cat(parts).double().cpu().numpy()


@dataclass(frozen=True)
class Fvd(FrechetMetric):
    """Fréchet Video Distance of two sets; 0 is equal, lower is better.

    The network's file is a program: see `kpmask.estimators.i3d`.
    """

    network: I3D
    weights_sha256: str
    licence: str
    name: ClassVar[str] = "fvd"
    version: ClassVar[str] = "1"
    frames_per_window: ClassVar[int] = NUM_FRAMES

    @classmethod
    def load(cls) -> Fvd:
        """As `Fid.load`."""
        return cls(*I3D.load())

    def features(self, frames_NTCHW: Tensor) -> Features:
        return self.network.features(frames_NTCHW).double().cpu().numpy()

"""I3D (Carreira and Zisserman 2017), trained on Kinetics-400, as the Fréchet Video Distance has it.

The authors of FVD (Unterthiner et al. 2018) published a graph of TensorFlow; those of StyleGAN-V
(Skorokhodov et al. 2022) turned it into a TorchScript that gives the same numbers, which most
papers since have used. A TorchScript is a program. It runs no Python, but among the operators that
it may call are some that read and write files: so it is loaded only where its SHA-256 is the
pinned one, and there is no switch for another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from kpmask.errors import CheckpointError
from kpmask.estimators.networks import at_once, whole_floats
from kpmask.estimators.weights import check_published, find

NUM_FRAMES: Final = 16


class I3D:
    """400 numbers for a video of 16 frames: what comes before the softmax of its classes."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: of the TorchScript, whose digest the caller has checked.

        Raises:
            CheckpointError: it is none.
        """
        try:
            with warnings.catch_warnings():
                # TorchScript is deprecated; the file is one, and the version of torch is pinned.
                warnings.simplefilter("ignore", DeprecationWarning)
                load: Callable[..., nn.Module] = torch.jit.load
                self._network = load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise CheckpointError("not a TorchScript", subject=str(path)) from error

    @classmethod
    def load(cls) -> tuple[I3D, str, str]:
        """With the weights that are on this machine; their SHA-256 and licence.

        Raises:
            ConfigError: they are not here; the hint is the command that gets them.
            CheckpointError: they are other weights.
        """
        found = find("i3d")
        check_published("i3d", found)
        return cls(found.paths[0]), found.sha256, found.licence

    def features(self, frames_NTCHW: Tensor) -> Tensor:
        """The features (N, 400) of N videos of 16 frames, RGB in [0, 1] of any size.

        The TorchScript itself brings them to 224x224 px and [-1, 1].
        """
        self._network.to(frames_NTCHW.device)
        count = max(1, at_once(frames_NTCHW[:, 0]) // NUM_FRAMES)
        with torch.inference_mode(), whole_floats():
            return torch.cat([self._of(part) for part in torch.split(frames_NTCHW, count)])

    def _of(self, frames_NTCHW: Tensor) -> Tensor:
        levels_NCTHW = frames_NTCHW.float().transpose(1, 2).contiguous() * 255
        features_ND: Tensor = self._network(
            levels_NCTHW, rescale=True, resize=True, return_features=True
        )
        return features_ND

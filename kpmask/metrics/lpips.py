"""LPIPS: how far apart two images look, by a network's maps (Zhang et al. 2018).

The Unreasonable Effectiveness of Deep Features as a Perceptual Metric: maps of AlexNet, of each
pixel a vector of length 1, and squared differences weighted by what people judged. Version 0.1,
which is what papers report as "LPIPS" or "LPIPS-Alex"; its weights are two files, `kpmask weights
fetch lpips` and `kpmask weights fetch alexnet`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kpmask.estimators import alexnet
from kpmask.estimators.alexnet import AlexNet
from kpmask.estimators.networks import at_once, frozen, load_weights, whole_floats
from kpmask.estimators.weights import digest_of, find

# What images in [-1, 1] are normalised by before AlexNet sees them.
_SHIFT: Final = (-0.030, -0.088, -0.188)
_SCALE: Final = (0.458, 0.448, 0.450)
_TINY: Final = 1e-10  # keeps a vector of zeros one of zeros


@dataclass(frozen=True)
class Lpips:
    """LPIPS of AlexNet, version 0.1; 0 is equal, lower is better, above 1 hardly ever.

    Frames are 31 px or more on each side. A frame with a value that is no number is not scored.

    Attributes:
        weights_sha256: one digest of AlexNet's and the heads' files.
    """

    network: LpipsNetwork
    weights_sha256: str
    licence: str
    name: ClassVar[str] = "lpips_alex"
    counts_first: ClassVar[bool] = False
    frames_before: ClassVar[int] = 0
    version: ClassVar[str] = "0.1"
    higher_is_better: ClassVar[bool] = False

    @classmethod
    def load(cls) -> Lpips:
        """With the weights that are on this machine.

        Raises:
            ConfigError: they are not here; the hint is the command that gets them.
            CheckpointError: they are other weights.
        """
        under, heads = find("alexnet"), find("lpips")
        network = LpipsNetwork()
        load_weights(network.network, under.paths[0], unread=("classifier.",))
        load_weights(network.heads, heads.paths[0])
        return cls(
            network=network,
            weights_sha256=digest_of((under.sha256, heads.sha256)),
            licence=f"{under.licence} AND {heads.licence}",
        )

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        network = self.network.to(generated_TCHW.device)
        count = at_once(generated_TCHW)
        sides = (torch.split(frames, count) for frames in (generated_TCHW, reference_TCHW))
        with torch.inference_mode(), whole_floats():
            values_T = torch.cat(
                [network(a.float(), b.float()) for a, b in zip(*sides, strict=True)]
            )
        return values_T.cpu().numpy()


class LpipsNetwork(nn.Module):
    """AlexNet and what its maps weigh."""

    shift_C11: Tensor
    scale_C11: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = AlexNet()
        self.heads = _Heads()
        for name, values in (("shift_C11", _SHIFT), ("scale_C11", _SCALE)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)
        frozen(self)

    def forward(self, a_NCHW: Tensor, b_NCHW: Tensor) -> Tensor:
        """The distance of each pair of images (N), float64.

        Raises:
            ValueError: they are too small for the network.
        """
        if min(a_NCHW.shape[-2:]) < alexnet.MIN_SIDE_PX:
            raise ValueError(
                f"LPIPS needs images of {alexnet.MIN_SIDE_PX} px or more, not {tuple(a_NCHW.shape)}"
            )
        maps = [self._maps(image_NCHW) for image_NCHW in (a_NCHW, b_NCHW)]
        total_N = torch.zeros(len(a_NCHW), dtype=torch.float64, device=a_NCHW.device)
        for weight_1C11, mine_NCHW, theirs_NCHW in zip(self.heads.weights(), *maps, strict=True):
            difference_NHW = ((mine_NCHW - theirs_NCHW).square() * weight_1C11).sum(1)
            total_N += difference_NHW.double().mean((1, 2))
        return total_N

    def _maps(self, image_NCHW: Tensor) -> list[Tensor]:
        maps = self.network((image_NCHW * 2 - 1 - self.shift_C11) / self.scale_C11)
        return [map_NCHW / (map_NCHW.norm(dim=1, keepdim=True) + _TINY) for map_NCHW in maps]


class _Heads(nn.Module):
    """One weight for each channel of each map, named as the package's layers are."""

    def __init__(self) -> None:
        super().__init__()
        for index, channels in enumerate(alexnet.CHANNELS):
            layer = nn.Conv2d(channels, 1, 1, bias=False)
            # The package's first layer, a dropout, has no weights.
            self.add_module(f"lin{index}", nn.ModuleDict({"model": nn.ModuleDict({"1": layer})}))

    def weights(self) -> list[Tensor]:
        return list(self.parameters())

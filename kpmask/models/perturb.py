"""The identity perturbation P of masks (paper 003): it takes from a mask whose shape it is.

- At test time (`perturb_for_test`) faint pixels vanish and the mask shrinks about its centre.
- At training time (`RandomPerturbation`) strips of columns and of rows are widened and narrowed,
  each by itself, the whole is stretched, faint pixels vanish, and noise comes on top.
- The published code works image by image in 8 bits. Here a batch goes at once, and levels from 0 to
  255 are rounded down once, at the start, not again after each interpolation.

Masks are [B, 1, H, W], square, in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from kpmask.errors import ConfigError
from kpmask.model_config import Perturbation

# The published code cuts masks of 64 px at columns (and rows) from 15 to 45.
FIRST_CUT, LAST_CUT = 15 / 64, 45 / 64


def perturb_for_test(mask_B1HW: Tensor, config: Perturbation) -> Tensor:
    """P_test: without its faint pixels, in 8 bits, and shrunk about the centre."""
    level_B1HW = mask_B1HW * 255
    faint_B1HW = _faint(level_B1HW, config, _median(level_B1HW))
    level_B1HW = level_B1HW.masked_fill(faint_B1HW, 0).floor()
    zoom_B1 = level_B1HW.new_full((len(level_B1HW), 1), config.zoom)
    whole_B0 = zoom_B1[:, :0].long()
    return _scale_both(level_B1HW, (whole_B0, zoom_B1), (whole_B0, zoom_B1)) / 255


@dataclass(frozen=True)
class RandomPerturbation:
    """P_train: one draw for each mask of a batch, S strips in either direction.

    Attributes:
        column_cuts_BN, row_cuts_BN: where strips 1, 2, ... begin, ascending; N = S - 1.
        column_scale_BS, row_scale_BS: the factors of the strips' widths and heights.
        height_scale_B1, width_scale_B1: of the whole, after its columns and after its rows.
        noise_B1HW: what is added in the end, on 0 to 255.
    """

    column_cuts_BN: Tensor
    column_scale_BS: Tensor
    height_scale_B1: Tensor
    row_cuts_BN: Tensor
    row_scale_BS: Tensor
    width_scale_B1: Tensor
    noise_B1HW: Tensor

    @classmethod
    def draw(cls, config: Perturbation, *, like: Tensor) -> Self:
        """From torch's global CPU random state, so that a seed means the same on every device.

        Args:
            like: masks [B, 1, H, W].
        """
        count, side_px = len(like), like.shape[-1]

        def cuts_BN() -> Tensor:
            return _random_cuts(count, side_px, config.num_strips - 1)

        def scale_BS(num_strips: int) -> Tensor:
            return 1 + config.strip_scale * (2 * torch.rand(count, num_strips) - 1)

        drawn = cls(
            cuts_BN(),
            scale_BS(config.num_strips),
            scale_BS(1),
            cuts_BN(),
            scale_BS(config.num_strips),
            scale_BS(1),
            _random_noise(like.shape, config.noise),
        )
        return cls(**{name: value.to(like.device) for name, value in vars(drawn).items()})

    def apply(self, mask_B1HW: Tensor, config: Perturbation) -> Tensor:
        """The perturbed masks, detached."""
        whole_B0 = self.column_cuts_BN[:, :0]
        level_B1HW = (mask_B1HW.detach() * 255).floor()
        median_B111 = _median(level_B1HW)
        level_B1HW = _scale_both(
            level_B1HW,
            (self.column_cuts_BN, self.column_scale_BS),
            (whole_B0, self.height_scale_B1),
        )
        level_B1HW = _scale_both(
            level_B1HW, (whole_B0, self.width_scale_B1), (self.row_cuts_BN, self.row_scale_BS)
        )
        level_B1HW = level_B1HW.masked_fill(_faint(level_B1HW, config, median_B111), 0)
        return (level_B1HW + self.noise_B1HW).clamp(0, 255) / 255


def check_strips(config: Perturbation, side_px: int) -> None:
    """Raises:
    ConfigError: masks of `side_px` are too small to be cut into so many strips.
    """
    first_px, last_px = _cut_range(side_px)
    most = last_px - first_px + 2
    if config.num_strips > most:
        raise ConfigError(
            f"a mask of {side_px} px has room for {most} strips",
            subject="perturbation.num_strips",
        )


# --- drawing ---------------------------------------------------------------------------------


def _cut_range(side_px: int) -> tuple[int, int]:
    return round(FIRST_CUT * side_px), round(LAST_CUT * side_px)


def _random_cuts(count: int, side_px: int, num_cuts: int) -> Tensor:
    """Distinct places between the first and the last that may be cut, ascending: [B, N]."""
    first_px, last_px = _cut_range(side_px)
    order_BP = torch.rand(count, last_px - first_px + 1).argsort(dim=1)
    return first_px + order_BP[:, :num_cuts].sort(dim=1).values


def _random_noise(shape: torch.Size, rate: float) -> Tensor:
    """Poisson numbers with a random sign each."""
    sign = torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)
    return sign * torch.poisson(torch.full(shape, rate))


# --- on levels from 0 to 255 -----------------------------------------------------------------


def _median(level_B1HW: Tensor) -> Tensor:
    """Of each mask, the mean of the two middle ones of an even number: [B, 1, 1, 1]."""
    return level_B1HW.flatten(1).quantile(0.5, dim=1)[:, None, None, None]


def _faint(level_B1HW: Tensor, config: Perturbation, median_B111: Tensor) -> Tensor:
    """Which pixels vanish.

    The paper's are below the median: one that equals it stays, or a mask that is mostly full would
    vanish. The code's are at its fixed threshold or below.
    """
    if config.threshold == "median":
        return level_B1HW < median_B111
    return level_B1HW <= config.threshold


def _scale_both(
    map_B1HW: Tensor, columns: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]
) -> Tensor:
    """`_scale_strips` of columns, then of rows; each has (cuts_BN, scale_BS)."""
    scaled_B1HW = _scale_strips(map_B1HW, *columns)
    return _scale_strips(scaled_B1HW.mT, *rows).mT


def _scale_strips(map_B1HW: Tensor, cuts_BN: Tensor, scale_BS: Tensor) -> Tensor:
    """Each strip of columns scaled in width about its own centre, within its own box.

    Bilinear; what a narrowed strip leaves free is 0, what of a widened one stands out is cut off.

    Args:
        cuts_BN: the first columns of all strips but the first; none: the map is one strip.
        scale_BS: factors.
    """
    side_px = map_B1HW.shape[-1]
    column_W = torch.arange(side_px, device=map_B1HW.device)
    strip_BW = (column_W[:, None] >= cuts_BN[:, None, :]).sum(-1)
    edges_BE = functional.pad(functional.pad(cuts_BN, (1, 0)), (0, 1), value=side_px)
    first_BW = edges_BE.gather(1, strip_BW)
    end_BW = edges_BE.gather(1, strip_BW + 1)
    centre_BW = (first_BW + end_BW - 1) / 2
    place_BW = (column_W - centre_BW) / scale_BS.gather(1, strip_BW) + centre_BW
    scaled_B1HW = torch.zeros_like(map_B1HW)
    for tap_BW in (place_BW.floor(), place_BW.floor() + 1):
        inside_BW = (tap_BW >= first_BW) & (tap_BW < end_BW)
        weight_BW = torch.where(inside_BW, 1 - (place_BW - tap_BW).abs(), 0.0)
        source_BW = tap_BW.clamp(0, side_px - 1).long()
        taken_B1HW = map_B1HW.gather(-1, source_BW[:, None, None, :].expand(map_B1HW.shape))
        scaled_B1HW = scaled_B1HW + taken_B1HW * weight_BW[:, None, None, :]
    return scaled_B1HW

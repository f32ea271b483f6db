"""The papers' augmentation of frame pairs, batched.

- Half the pairs are reversed in time; of the other half, half are mirrored; never both.
- One colour change is drawn for a pair and put on both its frames: brightness, contrast and
  saturation factors and a hue shift, applied in a random order.
- The colour operations are those of Pillow's ImageEnhance and of a turn of HSV hue, in float
  instead of through 8-bit images: no rounding between them, clamped to [0, 1] after each.
- `draw` is a pure function of the pair's seed and `augment` one of its draws, so that a resumed
  training sees the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kpmask.config import Augmentation
from kpmask.models.base import Batch

OPERATIONS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True, slots=True)
class Draw:
    """What happens to one pair. `order` lists `OPERATIONS` by index, first applied first.

    `brightness`, `contrast` and `saturation` are factors (1 changes nothing); `hue` is a part of
    a full turn (0 changes nothing).
    """

    reverse: bool
    mirror: bool
    order: tuple[int, ...]
    brightness: float
    contrast: float
    saturation: float
    hue: float


def draw(config: Augmentation, seed: int) -> Draw:
    """The change that `seed` stands for."""
    random = np.random.default_rng(seed)
    flips = random.random(2) < 0.5
    reverse = bool(config.flip and flips[0])

    def factor(amount: float) -> float:
        return float(random.uniform(1 - amount, 1 + amount))

    return Draw(
        reverse=reverse,
        mirror=bool(config.flip and not reverse and flips[1]),
        order=tuple(random.permutation(len(OPERATIONS)).tolist()),
        brightness=factor(config.brightness),
        contrast=factor(config.contrast),
        saturation=factor(config.saturation),
        hue=float(random.uniform(-config.hue, config.hue)),
    )


def augment(batch: Batch, draws: Sequence[Draw]) -> Batch:
    """The batch with draw b put on pair b; the result shares no memory with its input."""
    reverse = _column([d.reverse for d in draws], batch.source_BCHW) > 0
    mirror = _column([d.mirror for d in draws], batch.source_BCHW) > 0
    source_BCHW = torch.where(reverse, batch.driving_BCHW, batch.source_BCHW)
    driving_BCHW = torch.where(reverse, batch.source_BCHW, batch.driving_BCHW)
    # Both frames of a pair side by side: [B, 2, C, H, W], so that one draw covers both.
    frames = torch.stack([source_BCHW, driving_BCHW], dim=1)
    frames = torch.where(mirror[:, None], frames.flip(-1), frames)
    frames = _jitter(frames, draws)
    return Batch(source_BCHW=frames[:, 0], driving_BCHW=frames[:, 1])


def recolour(image_BCHW: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The colour change alone of draw b on image b; shares no memory with its input."""
    return _jitter(image_BCHW[:, None].clone(), draws)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)


def _jitter(frames: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Colour changes of [B, 2, 3, H, W], each pair in its own order."""
    functions = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for place in range(len(OPERATIONS)):
        for number, (name, function) in enumerate(zip(OPERATIONS, functions, strict=True)):
            rows = [b for b, d in enumerate(draws) if d.order[place] == number]
            if rows:
                amounts = [getattr(draws[b], name) for b in rows]
                frames = _at_rows(frames, rows, function, amounts)
    return frames


def _at_rows(
    frames: Tensor,
    rows: list[int],
    function: Callable[[Tensor, Tensor], Tensor],
    amounts: list[float],
) -> Tensor:
    index = torch.tensor(rows, device=frames.device)
    amount = _column(amounts, frames)[..., None]
    return frames.index_copy(0, index, function(frames.index_select(0, index), amount))


# --- colour operations on [..., 3, H, W] in [0, 1]; `amount` broadcasts against the image --------


def _gray(image: Tensor) -> Tensor:
    """Luma (ITU-R 601, as Pillow's mode L), with a channel axis of one."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype, device=image.device)
    return (image * weights.view(3, 1, 1)).sum(dim=-3, keepdim=True)


def adjust_brightness(image: Tensor, amount: Tensor) -> Tensor:
    """Blend with black."""
    return (image * amount).clamp(0, 1)


def adjust_contrast(image: Tensor, amount: Tensor) -> Tensor:
    """Blend with the image's mean gray."""
    mean = _gray(image).mean(dim=(-2, -1), keepdim=True)
    return (mean + (image - mean) * amount).clamp(0, 1)


def adjust_saturation(image: Tensor, amount: Tensor) -> Tensor:
    """Blend with the image in gray."""
    gray = _gray(image)
    return (gray + (image - gray) * amount).clamp(0, 1)


def adjust_hue(image: Tensor, amount: Tensor) -> Tensor:
    """Turn the HSV hue by `amount` of a full turn.

    Channel n of an HSV colour is v - v*s*clamp(min(k, 4 - k), 0, 1), k = (n + 6h) mod 6, with
    n = 5, 3, 1 for red, green, blue.
    """
    value, _ = image.max(dim=-3, keepdim=True)
    chroma = value - image.amin(dim=-3, keepdim=True)
    red, green, blue = (image.narrow(-3, channel, 1) for channel in range(3))
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = sixths + 6 * amount
    channels = []
    for offset in (5, 3, 1):
        k = (offset + turned) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.cat(channels, dim=-3).clamp(0, 1)

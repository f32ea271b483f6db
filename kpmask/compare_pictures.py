"""Picture strips of a comparison: systems below each other, the same clips and frames across."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Frame = NDArray[np.uint8]  # HWC RGB
Frames = NDArray[np.uint8]  # THWC RGB

MIN_TILE_PX: Final = 96
FONT_PX: Final = 14
MARGIN_PX: Final = 8
SHOWN_AT: Final = (0.35, 0.7)  # of a clip's length: the frames of a still strip


@dataclass(frozen=True, slots=True)
class StripRow:
    """A row: its label, and a video for each column."""

    label: str
    videos: Sequence[Frames]


def still_strip(rows: Sequence[StripRow]) -> Frame:
    """Two frames of every column's videos, the same ones in all rows; uint8 HWC.

    A video of one frame (a source) shows that one twice.
    """
    gutter_HWC = _gutter([row.label for row in rows], _tile_px(rows))
    lengths = [_length(rows, column) for column in range(len(rows[0].videos))]
    columns = [
        _column(rows, column, int(share * length))
        for column, length in enumerate(lengths)
        for share in SHOWN_AT
    ]
    return np.concatenate([gutter_HWC, *columns], axis=1)


def moving_strip(rows: Sequence[StripRow]) -> Iterator[Frame]:
    """All columns moving, as long as the shortest of them; uint8 HWC frames of one size."""
    gutter_HWC = _gutter([row.label for row in rows], _tile_px(rows))
    columns = range(len(rows[0].videos))
    for number in range(min(_length(rows, column) for column in columns)):
        shown = [_column(rows, column, number) for column in columns]
        yield np.concatenate([gutter_HWC, *shown], axis=1)


def _length(rows: Sequence[StripRow], column: int) -> int:
    """Frames of a column's videos; pictures (one frame) do not count unless all are."""
    lengths = [len(row.videos[column]) for row in rows]
    return min((n for n in lengths if n > 1), default=1)


def _column(rows: Sequence[StripRow], column: int, number: int) -> Frame:
    videos = [row.videos[column] for row in rows]
    frames = [video[min(number, len(video) - 1)] for video in videos]
    factor = _factor(frames[0].shape[0])
    return np.concatenate(frames, axis=0).repeat(factor, axis=0).repeat(factor, axis=1)


def _factor(side_px: int) -> int:
    """Small tiles are enlarged by a whole number."""
    return max(1, -(-MIN_TILE_PX // side_px))


def _tile_px(rows: Sequence[StripRow]) -> int:
    side_px: int = rows[0].videos[0].shape[1]
    return side_px * _factor(side_px)


def _gutter(labels: Sequence[str], tile_px: int) -> Frame:
    """The labels, black on white, each beside its row."""
    font = ImageFont.load_default(FONT_PX)
    width_px = 2 * MARGIN_PX + max(int(font.getlength(label)) + 1 for label in labels)
    image = Image.new("RGB", (width_px, tile_px * len(labels)), "white")
    draw = ImageDraw.Draw(image)
    for place, label in enumerate(labels):
        middle = (MARGIN_PX, (place + 0.5) * tile_px)
        draw.text(middle, label, fill="black", font=font, anchor="lm")
    return np.asarray(image)

"""Small pictures of clips: strips of frames that a page plays, and sheets of many clips.

- A strip is one JPEG with a clip's frames side by side. The page shows one frame of it and moves it
  along in steps: a clip plays without a video element, from a few kB, offline.
- The strips lie beside the page, one file a clip, so that the page stays small and a browser loads
  those that are on the screen.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

PREVIEWS: Final = "previews"
PREVIEW_FRAMES: Final = 8
PREVIEW_PX: Final = 96  # whole blocks of a JPEG, so that no frame runs into the next one
MAX_PREVIEW_HEIGHT_PX: Final = 4 * PREVIEW_PX
PREVIEW_QUALITY: Final = 80
MAX_SHEET_BYTES: Final = 140_000  # under 200 kB as a `data:` URI
MAX_JPEG_PX: Final = 65_500
SHEET_QUALITIES: Final = (85, 70, 55, 40)
WELL: Final = (38, 42, 49)  # what a frame leaves of its cell


def preview_key(clip_id: str) -> str:
    """Where a clip's strip lies, relative to the page."""
    return f"{PREVIEWS}/{clip_id}.jpg"


def preview_frame_numbers(num_frames: int) -> list[int]:
    """Up to PREVIEW_FRAMES numbers in [0, num_frames), rising, spread evenly."""
    count = min(PREVIEW_FRAMES, num_frames)
    return [(2 * index + 1) * num_frames // (2 * count) for index in range(count)]


def preview_strip(frames_THWC: np.ndarray) -> bytes:
    """Frames side by side, each PREVIEW_PX wide, as one JPEG.

    Args:
        frames_THWC: uint8 RGB, at least one; all of them are taken.

    Raises:
        ValueError: there is no frame.
    """
    from PIL import Image

    if len(frames_THWC) == 0:
        raise ValueError("a strip needs at least one frame")
    height, width = frames_THWC.shape[1:3]
    # A clip that is far higher than wide is squeezed; the page knows its size and stretches it.
    height_px = min(max(1, round(PREVIEW_PX * height / width)), MAX_PREVIEW_HEIGHT_PX)
    strip = Image.new("RGB", (PREVIEW_PX * len(frames_THWC), height_px))
    for number, frame_HWC in enumerate(frames_THWC):
        frame = Image.fromarray(frame_HWC).resize((PREVIEW_PX, height_px), Image.Resampling.LANCZOS)
        strip.paste(frame, (PREVIEW_PX * number, 0))
    # Decoders smooth subsampled colours over the borders of frames.
    return _jpeg(strip, PREVIEW_QUALITY, subsampling=0)


def contact_sheet(frames: Sequence[np.ndarray], *, columns: int, width_px: int) -> bytes:
    """Frames in rows of square cells, as one JPEG of at most MAX_SHEET_BYTES.

    Args:
        frames: uint8 HWC RGB, at least one, of any sizes; each is fitted into its cell.
        columns: cells in a row.
        width_px: of the whole. The picture is narrower where it would be too many bytes.

    Raises:
        ValueError: there is no frame, or a cell would have no pixel.
    """
    rows = math.ceil(len(frames) / max(1, columns))
    cell_px = min(width_px // max(1, columns), MAX_JPEG_PX // max(1, rows))
    if not frames or columns < 1 or cell_px < 1:
        raise ValueError(f"{len(frames)} frames in {columns} columns of {width_px} px in all")
    while True:
        sheet = _sheet(frames, columns, cell_px)
        for quality in SHEET_QUALITIES:
            data = _jpeg(sheet, quality)
            if len(data) <= MAX_SHEET_BYTES or cell_px == 1:
                return data
        cell_px = max(1, cell_px * 3 // 4)


def _sheet(frames: Sequence[np.ndarray], columns: int, cell_px: int) -> Image.Image:
    from PIL import Image

    rows = math.ceil(len(frames) / columns)
    sheet = Image.new("RGB", (columns * cell_px, rows * cell_px), WELL)
    for number, frame_HWC in enumerate(frames):
        height, width = frame_HWC.shape[:2]
        scale = cell_px / max(height, width)
        size_px = (max(1, round(scale * width)), max(1, round(scale * height)))
        picture = Image.fromarray(frame_HWC).resize(size_px, Image.Resampling.LANCZOS)
        row, column = divmod(number, columns)
        left_px = column * cell_px + (cell_px - picture.width) // 2
        top_px = row * cell_px + (cell_px - picture.height) // 2
        sheet.paste(picture, (left_px, top_px))
    return sheet


def _jpeg(image: Image.Image, quality: int, *, subsampling: int = 2) -> bytes:
    options = {"quality": quality, "subsampling": subsampling}
    data = io.BytesIO()
    try:
        image.save(data, "JPEG", optimize=True, **options)
    except OSError:  # Pillow's buffer for this holds a byte a pixel, and noise takes more
        data = io.BytesIO()
        image.save(data, "JPEG", **options)
    return data.getvalue()

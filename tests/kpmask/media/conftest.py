"""Synthetic videos whose frames say their own number, and somebody else's decoder."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
import pytest

_COLUMNS, _ROWS = 4, 3


def barcode(index: int, *, width_px: int = 128, height_px: int = 96) -> np.ndarray:
    """A frame that shows 12 bits of its number as black and white blocks on a soft ground."""
    x_W, y_H = np.linspace(40, 200, width_px), np.linspace(0, 50, height_px)
    image_HWC = np.stack(
        [x_W + 0 * y_H[:, None], y_H[:, None] + x_W / 2, 250 - x_W + 0 * y_H[:, None]], -1
    )
    image_HWC = image_HWC.astype(np.uint8)
    for bit in range(_COLUMNS * _ROWS):
        rows, columns = _block(bit, width_px, height_px)
        image_HWC[rows, columns] = 235 if index >> bit & 1 else 20
    return image_HWC


def _block(bit: int, width_px: int, height_px: int) -> tuple[slice, slice]:
    row, column = divmod(bit, _COLUMNS)
    height, width = height_px // _ROWS, width_px // _COLUMNS
    return (
        slice(row * height + height // 6, (row + 1) * height - height // 6),
        slice(column * width + width // 6, (column + 1) * width - width // 6),
    )


def number_of(image_HWC: np.ndarray) -> int:
    """The number that a barcode shows."""
    height_px, width_px = image_HWC.shape[:2]
    levels = [image_HWC[_block(bit, width_px, height_px)].mean() for bit in range(12)]
    assert all(abs(level - 127) > 40 for level in levels), levels
    return sum(1 << bit for bit, level in enumerate(levels) if level > 127)


def write_video(
    path: Path,
    images: Iterable[np.ndarray],
    *,
    codec: str = "libx264",
    rate: Fraction | int = 25,
    pix_fmt: str = "yuv420p",
    times_s: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    set_up: Callable[[Any], None] = lambda stream: None,
) -> Path:
    """A video of uint8 HWC images, written with PyAV."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {"crf": "10"})
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if times_s is not None:
            stream.codec_context.time_base = Fraction(1, 16000)
        first = True
        for index, image_HWC in enumerate(images):
            if first:
                stream.height, stream.width = image_HWC.shape[:2]
                set_up(stream)
                first = False
            frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24")
            if times_s is not None:
                frame.pts, frame.time_base = round(times_s[index] * 16000), Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def ffmpeg(*arguments: str | Path) -> bytes:
    """Run the ffmpeg program: the other implementation."""
    argv = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout


def ffmpeg_rgb(path: Path, size_px: tuple[int, int], *arguments: str) -> np.ndarray:
    """All frames by the ffmpeg program, as uint8 THWC."""
    raw = ffmpeg(
        "-i", path, *arguments, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24",
        "-sws_flags", "bilinear+accurate_rnd+full_chroma_int", "-",
    )  # fmt: skip
    return np.frombuffer(raw, np.uint8).reshape(-1, size_px[1], size_px[0], 3)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """What the tests here make their media with."""
    return SimpleNamespace(
        barcode=barcode,
        number_of=number_of,
        write_video=write_video,
        ffmpeg=ffmpeg,
        ffmpeg_rgb=ffmpeg_rgb,
    )

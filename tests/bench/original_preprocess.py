"""Cutting clips as the published preparation scripts do: the yardstick for ours.

Written anew from their description. One process, video after video: every frame of the file is
decoded by one imageio-ffmpeg reader, from the first to the last; a frame that belongs to a row is
cropped with the row's box, scaled to the file's size by int(), resized by scikit-image with
antialiasing and made 8 bits again; all clips of the video wait in memory until its end and are
then written as folders of PNG files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from skimage import img_as_ubyte
from skimage.transform import resize

from kpmask.data.metadata import clip_name
from kpmask.records import SourceRow


def cut_video(path: Path, rows: Sequence[SourceRow], out: Path, *, size_px: int) -> int:
    """Write `out/<clip>/<number>.png` for each row; the number of frames that were written."""
    chunks: list[list[np.ndarray]] = [[] for _ in rows]
    reader = imageio.get_reader(path, "ffmpeg")
    fps = reader.get_meta_data()["fps"]
    for number, frame_HWC in enumerate(reader):
        for row, chunk in zip(rows, chunks, strict=True):
            if row.start_frame * fps <= number * row.ref_fps < row.end_frame * fps:
                crop_HWC = _crop(frame_HWC, row)
                small_HWC = resize(crop_HWC, (size_px, size_px), anti_aliasing=True)
                chunk.append(img_as_ubyte(small_HWC))
    reader.close()
    for row, chunk in zip(rows, chunks, strict=True):
        folder = out / name_of(row)
        folder.mkdir(parents=True)
        for number, frame_HWC in enumerate(chunk):
            imageio.imwrite(folder / f"{number:07d}.png", frame_HWC)
    return sum(map(len, chunks))


def name_of(row: SourceRow) -> str:
    """What a row's clip is called."""
    return clip_name(row, start_frame=row.start_frame, end_frame=row.end_frame)


def _crop(frame_HWC: np.ndarray, row: SourceRow) -> np.ndarray:
    left, top, right, bottom = row.bbox_px
    x_scale = frame_HWC.shape[1] / row.ref_size_px[0]
    y_scale = frame_HWC.shape[0] / row.ref_size_px[1]
    return frame_HWC[
        int(top * y_scale) : int(bottom * y_scale), int(left * x_scale) : int(right * x_scale)
    ]

"""Frames to an MP4 file that gives them back bit by bit: H.264 in RGB, without loss.

Few browsers play it; ffmpeg and what is built on it do. Equal frames give equal bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from kpmask.errors import MediaError
from kpmask.media.decode import as_rate
from kpmask.media.encode import encode_error, same_bytes_options, verify, written_beside
from kpmask.records import EncodedVideo


def encode_lossless(
    path: Path, frames: Iterable[NDArray[np.uint8]], *, fps: Fraction | float
) -> EncodedVideo:
    """Write uint8 HWC RGB frames of one size, odd ones too; arguments and errors as `encode`."""
    rate = fps if isinstance(fps, Fraction) else as_rate(fps)
    with written_beside(path) as beside:
        try:
            num_frames = _write(beside, frames, rate)
        except av.error.FFmpegError as error:
            raise encode_error(error, path) from error
        return verify(beside, num_frames=num_frames, subject=path.name)


def _write(path: Path, frames: Iterable[NDArray[np.uint8]], rate: Fraction) -> int:
    iterator = iter(frames)
    first_HWC = next(iterator, None)
    if first_HWC is None:
        raise MediaError("there is no frame to encode", subject=path.name, code="no_frames")
    muxing = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(f"file:{path.absolute()}", "w", format="mp4", options=muxing) as container:
        options = {"crf": "0", "preset": "veryfast", **same_bytes_options()}
        stream = container.add_stream("libx264rgb", rate=rate, options=options)
        stream.height, stream.width = first_HWC.shape[:2]
        stream.pix_fmt = "rgb24"
        stream.codec_context.time_base = 1 / rate
        stream.codec_context.thread_count = 1  # the number of threads shapes the bytes
        num_frames = 0
        for image_HWC in itertools.chain([first_HWC], iterator):
            if image_HWC.dtype != np.uint8 or image_HWC.shape != first_HWC.shape:
                raise ValueError(f"a frame of {image_HWC.dtype} {image_HWC.shape}")
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
            frame.pts, frame.time_base = num_frames, 1 / rate
            container.mux(stream.encode(frame))
            num_frames += 1
        container.mux(stream.encode(None))
    return num_frames

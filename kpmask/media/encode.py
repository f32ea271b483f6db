"""Frames to an H.264 file that every browser plays.

- yuv420p, BT.709 in limited range and tagged so, index at the front (`+faststart`).
- yuv420p has even sides: odd ones are padded by repeating the last row or column.
- One encoder thread and no dates: equal frames give equal bytes.
- Written beside, read back, then renamed: a file under the wanted name is whole.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import av.error
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)
from av.video.stream import VideoStream
from numpy.typing import NDArray

from kpmask.errors import MediaError, StorageError
from kpmask.media.decode import as_rate
from kpmask.records import EncodedVideo

# EFBIG is a file-size limit of the user or file system: for the caller the same as a full disk.
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_BEFORE_AVX512 = "MMX2,SSE2,SSE2Fast,LZCNT,SSSE3,SSE4.2,AVX,FMA3,BMI2,AVX2"

_INTERPOLATION = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)


def encode(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    *,
    fps: Fraction | float,
    crf: int = 18,
    preset: str = "veryfast",
) -> EncodedVideo:
    """Write uint8 HWC RGB frames of one size to an MP4 file.

    Args:
        path: is replaced where it exists; its folder must.
        frames: are taken one at a time. Whatever they raise leaves no file behind.
        fps: a float is taken as the usual rate next to it (29.97 as 30000/1001).
        crf: x264's quality, 0 (lossless) to 51.
        preset: x264's.

    Raises:
        MediaError: no_frames, or encode_failed.
        StorageError: no_space.
        ValueError: a frame of another shape or type.
    """
    rate = fps if isinstance(fps, Fraction) else as_rate(fps)
    with written_beside(path) as beside:
        try:
            options = {"crf": str(crf), "preset": preset, **same_bytes_options()}
            num_frames = write_video(beside, frames, rate, options)
        except av.error.FFmpegError as error:
            raise encode_error(error, path) from error
        return verify(beside, num_frames=num_frames, subject=path.name)


@functools.cache
def same_bytes_options() -> dict[str, str]:
    """What x264 needs to give equal bytes for equal frames.

    Its AVX-512 code for macroblock trees does not: on a machine that has it, it is told to use what
    comes before. (Elsewhere nothing is said: naming a feature that is not there would crash.)
    """
    try:
        has_avx512 = " avx512f " in Path("/proc/cpuinfo").read_text()
    except OSError:
        has_avx512 = False
    return {"x264-params": f"asm={_BEFORE_AVX512}"} if has_avx512 else {}


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`; what is there becomes `path` on success.

    Raises:
        StorageError: no_space, denied.
    """
    beside = path.with_name(f".tmp-{secrets.token_hex(8)}{path.suffix}")
    try:
        yield beside
        try:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError as error:
            raise storage_error(error, path) from error
    finally:
        beside.unlink(missing_ok=True)


def storage_error(error: OSError, path: Path) -> StorageError:
    """What a failed write means for the store."""
    if error.errno in _NO_SPACE:
        hint = f"free some space in {path.parent}, or write elsewhere (TMPDIR, for what is cut)"
        cause = "no space left to write it"
        return StorageError(cause, subject=path.name, code="no_space", hint=hint)
    cause = error.strerror or str(error)
    return StorageError(f"it cannot be written: {cause}", subject=path.name, code="denied")


def encode_error(error: av.error.FFmpegError, path: Path) -> MediaError | StorageError:
    """What a failure of libav's while writing means."""
    if isinstance(error, OSError):
        return storage_error(error, path)
    return MediaError(f"encoding failed: {error}", subject=path.name, code="encode_failed")


def write_video(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    rate: Fraction,
    options: dict[str, str],
    *,
    codec: Literal["libx264", "libvpx-vp9"] = "libx264",
) -> int:
    """Encode into `path`, MP4 or WebM as the codec wants; the number of frames.

    Raises:
        MediaError: no_frames.
        FFmpegError: encoding or writing failed.
        ValueError: a frame of another shape or type.
    """
    container_name = "mp4" if codec == "libx264" else "webm"
    iterator = iter(frames)
    first_HWC = next(iterator, None)
    if first_HWC is None:
        raise MediaError("there is no frame to encode", subject=path.name, code="no_frames")
    muxing = {"fflags": "+bitexact"}
    if container_name == "mp4":
        muxing["movflags"] = "+faststart"
    with av.open(
        f"file:{path.absolute()}", "w", format=container_name, options=muxing
    ) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        _set_up(stream, first_HWC.shape, rate)
        num_frames = 0
        reformatter = VideoReformatter()  # one for each frame would set up its filters each time
        for image_HWC in _chained(first_HWC, iterator):
            frame = _yuv(image_HWC, first_HWC.shape, reformatter)
            frame.pts, frame.time_base = num_frames, 1 / rate
            container.mux(stream.encode(frame))
            num_frames += 1
        container.mux(stream.encode(None))
    return num_frames


def _chained(
    first_HWC: NDArray[np.uint8], rest: Iterator[NDArray[np.uint8]]
) -> Iterator[NDArray[np.uint8]]:
    yield first_HWC
    yield from rest


def _set_up(stream: VideoStream, shape: tuple[int, ...], rate: Fraction) -> None:
    context = stream.codec_context
    stream.height, stream.width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
    stream.pix_fmt = "yuv420p"
    context.time_base = 1 / rate
    context.thread_count = 1  # the number of threads shapes the bytes
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG


def _yuv(
    image_HWC: NDArray[np.uint8], shape: tuple[int, ...], reformatter: VideoReformatter
) -> VideoFrame:
    if image_HWC.dtype != np.uint8 or image_HWC.shape != shape or shape[2:] != (3,):
        raise ValueError(f"a frame of {image_HWC.dtype} {image_HWC.shape} among uint8 {shape}")
    height_px, width_px = shape[:2]
    if height_px % 2 or width_px % 2:
        pad = ((0, height_px % 2), (0, width_px % 2), (0, 0))
        image_HWC = np.pad(image_HWC, pad, mode="edge")
    return reformatter.reformat(
        VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24"),
        format="yuv420p",
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=_INTERPOLATION,
    )


def verify(
    path: Path, *, num_frames: int | None = None, subject: str | None = None
) -> EncodedVideo:
    """Read a written video file back: every packet and the first frame, and its checksum.

    Args:
        num_frames: must be in the file; None is not to check.

    Raises:
        MediaError: encode_failed.
    """
    subject = subject or path.name
    try:
        with av.open(f"file:{path.absolute()}", options={"protocol_whitelist": "file"}) as file:
            stream = file.streams.video[0]
            found = sum(1 for packet in file.demux(stream) if packet.size)
            has_audio = bool(file.streams.audio)
            file.seek(0)
            first = next(file.decode(stream))
            size_px = (first.width, first.height)
            fps = float(stream.average_rate or 0)
    except (av.error.FFmpegError, IndexError, StopIteration) as error:
        raise MediaError(
            f"what was written cannot be read back: {error!r}",
            subject=subject,
            code="encode_failed",
        ) from error
    if num_frames is not None and found != num_frames:
        raise MediaError(
            f"{found} frames were written of {num_frames}", subject=subject, code="encode_failed"
        )
    return EncodedVideo(
        num_frames=found,
        fps=fps,
        width_px=size_px[0],
        height_px=size_px[1],
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        has_audio=has_audio,
    )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Frames to the file that was asked for: MP4, WebM, GIF, or a ZIP of pictures.

- Whatever the form: frames are taken one at a time, equal frames give equal bytes, and a file under
  the wanted name is whole and was read back.
- A GIF has one palette for all of it, so that colours do not change from frame to frame, which
  takes two passes: the frames wait in a lossless file beside it, not in memory.
- A ZIP holds 000000.png and so on, uncompressed since PNGs are, and `sequence.json` with the frame
  rate, which pictures do not say.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Final

import av
import av.error
import numpy as np
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from kpmask.errors import MediaError
from kpmask.media.decode import as_rate
from kpmask.media.encode import (
    encode,
    encode_error,
    file_sha256,
    storage_error,
    verify,
    write_video,
    written_beside,
)
from kpmask.media.images import decode_image, encode_png
from kpmask.media.lossless import encode_lossless
from kpmask.records import MAX_GIF_FPS, EncodedVideo, OutputFormat

Frames = Iterable[NDArray[np.uint8]]

SEQUENCE: Final = "sequence.json"
_VP9: Final = {"crf": "30", "b:v": "0", "deadline": "good", "cpu-used": "4", "row-mt": "0"}
_PALETTE_FRAMES: Final = 250  # that a palette is made from, evenly over all: its memory is bounded
_TICKS_PER_S: Final = 100  # a GIF's clock
_ZIP_DATE: Final = (1980, 1, 1, 0, 0, 0)  # the earliest that there is


def write(
    path: Path, frames: Frames, *, fps: Fraction | float, form: OutputFormat = "mp4"
) -> EncodedVideo:
    """Write uint8 HWC RGB frames of one size to a file.

    Args:
        path: is replaced where it exists; its folder must.
        frames: are taken one at a time. Whatever they raise leaves no file behind.
        fps: a float is taken as the usual rate next to it (29.97 as 30000/1001).
        form: of the file, whatever its name.

    Raises:
        MediaError: no_frames, or encode_failed.
        StorageError: no_space, denied.
        ValueError: a frame of another shape or type, or a GIF of more than 50 frames/s.
    """
    rate = fps if isinstance(fps, Fraction) else as_rate(fps)
    if form == "mp4":
        return encode(path, frames, fps=rate)
    return _WRITERS[form](path, frames, rate)


def write_webm(path: Path, frames: Frames, rate: Fraction) -> EncodedVideo:
    """VP9 in 4:2:0, tagged as `encode` does; arguments and errors as `write`."""
    with written_beside(path) as beside:
        try:
            num_frames = write_video(beside, frames, rate, dict(_VP9), codec="libvpx-vp9")
        except av.error.FFmpegError as error:
            raise encode_error(error, path) from error
        return verify(beside, num_frames=num_frames, subject=path.name)


# --- GIF -------------------------------------------------------------------------------------


def write_gif(path: Path, frames: Frames, rate: Fraction) -> EncodedVideo:
    """A GIF that repeats for ever; arguments and errors as `write`."""
    if rate > MAX_GIF_FPS:
        raise ValueError(f"a GIF of {float(rate):g} frames/s, and the most is {MAX_GIF_FPS:g}")
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder,
        written_beside(path) as beside,
    ):
        spool = Path(folder) / "frames.mp4"
        num_frames = encode_lossless(spool, frames, fps=rate).num_frames
        try:
            palette = _palette(spool, step=-(-num_frames // _PALETTE_FRAMES))
            _write_gif(beside, spool, palette, rate)
        except av.error.FFmpegError as error:
            raise encode_error(error, path) from error
        written = verify(beside, num_frames=num_frames, subject=path.name)
        return dataclasses.replace(written, fps=float(rate))  # a GIF's clock has hundredths


def _spooled(spool: Path, rate: Fraction | None = None) -> Iterator[VideoFrame]:
    """The frames, by the GIF's clock where a rate is given, else one a tick."""
    with av.open(f"file:{spool.absolute()}", options={"protocol_whitelist": "file"}) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            frame = frame.reformat(format="rgb24")
            frame.pts = number if rate is None else round(number * _TICKS_PER_S / rate)
            frame.time_base = Fraction(1, _TICKS_PER_S)
            yield frame


def _palette(spool: Path, *, step: int) -> VideoFrame:
    """The colours for all frames, from every `step`-th."""
    frames = itertools.islice(_spooled(spool), 0, None, step)
    first = next(frames)
    graph = Graph()
    graph.threads = 1
    source = _source(graph, first)
    sink = graph.add("buffersink")
    graph.link_nodes(source, graph.add("palettegen", "stats_mode=full"), sink)
    graph.configure()
    for frame in itertools.chain([first], frames):
        source.push(frame)
    source.push(None)
    palette = sink.pull()
    assert isinstance(palette, VideoFrame)
    return palette


def _write_gif(path: Path, spool: Path, palette: VideoFrame, rate: Fraction) -> None:
    frames = _spooled(spool, rate)
    first = next(frames)
    graph = Graph()
    graph.threads = 1
    source, colours = _source(graph, first), _source(graph, palette)
    # An ordered pattern stays where it is when nothing moves; spread errors would flicker.
    use = graph.add("paletteuse", "dither=bayer:bayer_scale=4:diff_mode=rectangle")
    sink = graph.add("buffersink")
    source.link_to(use, 0, 0)
    colours.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    palette.pts, palette.time_base = 0, Fraction(1, _TICKS_PER_S)
    colours.push(palette)
    colours.push(None)
    with av.open(f"file:{path.absolute()}", "w", format="gif") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.width, stream.height = first.width, first.height
        stream.pix_fmt = "pal8"
        stream.codec_context.time_base = Fraction(1, _TICKS_PER_S)
        for frame in itertools.chain([first], frames):
            source.push(frame)
            container.mux(stream.encode(_pulled(sink)))
        container.mux(stream.encode(None))


def _pulled(sink: FilterContext) -> VideoFrame:
    frame = sink.pull()
    assert isinstance(frame, VideoFrame)
    return frame


def _source(graph: Graph, like: VideoFrame) -> FilterContext:
    size = f"video_size={like.width}x{like.height}"
    return graph.add("buffer", f"{size}:pix_fmt={like.format.name}:time_base=1/{_TICKS_PER_S}")


# --- pictures --------------------------------------------------------------------------------


def write_pictures(path: Path, frames: Frames, rate: Fraction) -> EncodedVideo:
    """A ZIP of PNGs; arguments and errors as `write`."""
    with written_beside(path) as beside:
        try:
            shape, num_frames = _write_zip(beside, frames, rate, path.name)
            _check_zip(beside, num_frames, path.name)
        except OSError as error:
            raise storage_error(error, path) from error
        return EncodedVideo(
            num_frames=num_frames,
            fps=float(rate),
            width_px=shape[1],
            height_px=shape[0],
            size_bytes=beside.stat().st_size,
            sha256=file_sha256(beside),
            has_audio=False,
        )


def pictures(path: Path) -> Iterator[NDArray[np.uint8]]:
    """The frames of a ZIP that `write` made, uint8 HWC RGB."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name != SEQUENCE:
                yield decode_image(archive.read(name))


def _write_zip(
    path: Path, frames: Frames, rate: Fraction, subject: str
) -> tuple[tuple[int, ...], int]:
    shape: tuple[int, ...] = ()
    count = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for image_HWC in frames:
            shape = shape or image_HWC.shape
            if image_HWC.dtype != np.uint8 or image_HWC.shape != shape or shape[2:] != (3,):
                raise ValueError(f"a frame of {image_HWC.dtype} {image_HWC.shape} among {shape}")
            archive.writestr(_entry(f"{count:06d}.png"), encode_png(image_HWC))
            count += 1
        if not count:
            raise MediaError("there is no frame to encode", subject=subject, code="no_frames")
        about = {"fps": float(rate), "num_frames": count, "rate": str(rate)}
        archive.writestr(_entry(SEQUENCE), json.dumps(about, sort_keys=True))
    return shape, count


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _ZIP_DATE)
    entry.create_system = 3  # the same on every machine
    entry.external_attr = 0o644 << 16
    return entry


def _check_zip(path: Path, num_frames: int, subject: str) -> None:
    """Raises:
    MediaError: encode_failed: what was written is not what was meant.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            found = len(archive.namelist()) - 1
    except zipfile.BadZipFile as error:
        raise MediaError(str(error), subject=subject, code="encode_failed") from error
    if broken is not None or found != num_frames:
        cause = f"{found} pictures were written of {num_frames}; broken: {broken}"
        raise MediaError(cause, subject=subject, code="encode_failed")


_WRITERS: Final[dict[OutputFormat, Callable[[Path, Frames, Fraction], EncodedVideo]]] = {
    "webm": write_webm,
    "gif": write_gif,
    "png": write_pictures,
}

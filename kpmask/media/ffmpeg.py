"""The one command-line job: sound, and files that cannot be read from their middle.

- ffmpeg-python builds the argument list; no shell sees it. The binary comes from imageio-ffmpeg,
  or from IMAGEIO_FFMPEG_EXE.
- The same fences as in-process: listed demuxers only, no protocol but file and pipe, a limit of
  time, no standard input.
- Results are written beside, read back and renamed.
"""

from __future__ import annotations

import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import ffmpeg
import imageio_ffmpeg

from kpmask.config import MediaLimits
from kpmask.errors import KpmaskError, MediaError, StorageError
from kpmask.media.container import (
    DEMUXERS,
    UNTIMED_DEMUXERS,
    decodable,
    frame_rate,
    open_container,
    pick_stream,
    sniff,
)
from kpmask.media.encode import verify, written_beside
from kpmask.records import EncodedVideo

_LIMITS = MediaLimits()
# What browsers play in a container; the rest becomes AAC or Opus.
_COPIED_CODECS = {".mp4": frozenset({"aac", "mp3"}), ".webm": frozenset({"opus", "vorbis"})}
_NO_SPACE_TEXTS = ("No space left on device", "File too large", "Disk quota exceeded")
_NUM_ERROR_LINES = 5


def copy_audio(
    video: Path,
    audio_from: Path,
    out: Path,
    *,
    duration_s: float,
    limits: MediaLimits = _LIMITS,
    timeout_s: float = 600.0,
) -> EncodedVideo:
    """Write `video` with the first sound track of `audio_from` to `out`, an MP4 or WebM file.

    The picture is copied bit by bit. The sound starts where the first frame of `audio_from` is
    shown, is cut to `duration_s` seconds, and becomes AAC (in WebM: Opus) where it is not something
    that browsers play in such a file. A source without sound (a folder, a GIF) gives a copy of
    `video`.

    Raises:
        MediaError: `audio_from` cannot be read; ffmpeg_failed; encode_failed.
        StorageError: no_space.
    """
    written = verify(video)
    sound = _sound_of(audio_from, limits)
    with written_beside(out) as beside:
        if sound is None:
            shutil.copyfile(video, beside)
            return verify(beside, num_frames=written.num_frames, subject=out.name)
        codec, offset_s = sound
        cut: dict[str, Any] = {"t": f"{duration_s:.6f}"}
        if offset_s > 0:
            cut["ss"] = f"{offset_s:.6f}"
        streams = [_input(video)["v:0"], _input(audio_from, **cut)["a:0"]]
        suffix = out.suffix.lower()
        coded = _AAC if suffix == ".mp4" else _OPUS
        audio_codec = {"acodec": "copy"} if codec in _COPIED_CODECS[suffix] else coded
        _run(_output(streams, beside, vcodec="copy", **audio_codec), out, timeout_s)
        return verify(beside, num_frames=written.num_frames, subject=out.name)


def normalise(
    src: Path, out: Path, *, limits: MediaLimits = _LIMITS, timeout_s: float = 3600.0
) -> EncodedVideo:
    """Write a video as H.264 in MP4 with timestamps, an index and a key frame every 2 s.

    For AVI, MPEG and raw streams, which cannot be read from their middle (`can_seek`). Worth it
    where many short spans of a long file are wanted. Upright, and nearly lossless (crf 10).

    Raises:
        MediaError: it cannot be read, breaks a limit, or is damaged (ffmpeg_failed).
        StorageError: no_space.
    """
    with open_container(src, limits) as container:
        stream = pick_stream(container, limits, subject=src.name)
        rate = frame_rate(container, stream, limits)
        untimed = container.format.name in UNTIMED_DEMUXERS
        number, has_audio = stream.index, any(map(decodable, container.streams.audio[:1]))
        odd = stream.codec_context.width % 2 or stream.codec_context.height % 2
    timing = {"r": f"{rate.numerator}/{rate.denominator}"} if untimed else {}
    with written_beside(out) as beside:
        source = _input(src, err_detect="explode", max_pixels=limits.max_side_px**2, **timing)
        streams = [source[str(number)], *([source["a:0"]] if has_audio else [])]
        video: dict[str, Any] = {"vcodec": "libx264", "crf": 10, "preset": "veryfast"}
        video |= {"g": max(1, round(2 * rate)), "threads": 1}
        video |= {"pix_fmt": "yuv444p" if odd else "yuv420p"}
        _run(_output(streams, beside, **video, **_AAC), out, timeout_s)
        return verify(beside, subject=out.name)


_AAC: dict[str, Any] = {"acodec": "aac", "audio_bitrate": "160k", "flags:a": "+bitexact"}
_OPUS: dict[str, Any] = {"acodec": "libopus", "audio_bitrate": "128k", "flags:a": "+bitexact"}


def _sound_of(path: Path, limits: MediaLimits) -> tuple[str, float] | None:
    """The codec of the first sound track, and when the picture starts by the file's clock.

    The clock is the command line's: 0 is the earliest start of any stream.
    """
    if sniff(path) in ("folder", "image"):
        return None
    with open_container(path, limits) as container:
        if not container.streams.audio or not decodable(container.streams.audio[0]):
            return None
        stream = pick_stream(container, limits, subject=path.name)
        start_s = Fraction(container.start_time or 0, 1_000_000)
        offset_s = (stream.start_time or 0) * (stream.time_base or Fraction(1)) - start_s
        return container.streams.audio[0].codec_context.codec.canonical_name, float(offset_s)


def _input(path: Path, **options: Any) -> Any:  # noqa: ANN401 - ffmpeg-python has no types
    fences = {"protocol_whitelist": "file,pipe", "format_whitelist": ",".join(DEMUXERS)}
    return ffmpeg.input(f"file:{path.absolute()}", **fences, **options)


def _output(streams: list[Any], path: Path, **options: Any) -> Any:  # noqa: ANN401
    tidy = {"map_metadata": -1, "map_chapters": -1, "fflags": "+bitexact"}
    is_mp4 = path.suffix.lower() == ".mp4"
    container = {"f": "mp4", "movflags": "+faststart"} if is_mp4 else {"f": "webm"}
    return ffmpeg.output(*streams, f"file:{path.absolute()}", **container, **tidy, **options)


def binary() -> str:
    """The path of the ffmpeg program.

    Raises:
        MediaError: ffmpeg_failed: there is none.
    """
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise MediaError(
            "there is no ffmpeg program",
            code="ffmpeg_failed",
            hint="install imageio-ffmpeg for this platform, or set IMAGEIO_FFMPEG_EXE",
        ) from error


def _run(command: Any, out: Path, timeout_s: float) -> None:  # noqa: ANN401
    program = binary()
    built = command.compile(cmd=program, overwrite_output=True)
    argv = [program, "-nostdin", "-hide_banner", "-loglevel", "error", "-xerror", *built[1:]]
    try:
        done = subprocess.run(  # noqa: S603 - a list, of our own making
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise MediaError(
            f"ffmpeg took more than {timeout_s:g} s", subject=out.name, code="ffmpeg_failed"
        ) from error
    if done.returncode:
        raise _failure(done.stderr.decode(errors="replace"), done.returncode, out)


def _failure(stderr: str, status: int, out: Path) -> KpmaskError:
    if any(text in stderr for text in _NO_SPACE_TEXTS):
        return StorageError("no space left to write it", subject=out.name, code="no_space")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    tail = " | ".join(lines[-_NUM_ERROR_LINES:]) or f"status {status}"
    return MediaError(f"ffmpeg failed: {tail}", subject=out.name, code="ffmpeg_failed")

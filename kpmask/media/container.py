"""Opening an untrusted file: what it is by its content, and which stream of it is the video.

- The name says nothing: the first bytes decide between picture, video and neither.
- libavformat may use only the demuxers listed here and only the file protocol. Playlists and
  image lists (HLS, DASH, ffconcat, image2) would make it open other files or addresses.
- Sizes are checked before anything is decoded; the decoder is bound to the same limit, since a
  stream may change its size in the middle.
- Damage is an error, not a picture: by default libavcodec paints over lost blocks and goes on.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Literal

import av
import av.error
from av.container import InputContainer
from av.stream import Stream
from av.video.stream import VideoStream

from kpmask.config import MediaLimits
from kpmask.errors import MediaError

Content = Literal["folder", "image", "video", "unknown"]

DEMUXERS = (
    "mov",
    "matroska",
    "avi",
    "flv",
    "mpegts",
    "mpeg",
    "mpegvideo",
    "m4v",
    "h264",
    "hevc",
    "ogg",
    "asf",
    "gif",
    "ivf",
    "yuv4mpegpipe",
)
# These carry no time for each frame (AVI's are wrong for B-frames): frames are counted instead.
UNTIMED_DEMUXERS = frozenset({"avi", "h264", "hevc", "m4v", "mpegvideo"})
# Only in these does a frame keep its timestamp however it is reached: an MPEG program stream, for
# one, gives other times after a seek. The rest are read from their start.
SEEKABLE_DEMUXERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv"})
# Of these the header, and not the data, says how long the file is.
HEADER_LENGTH_DEMUXERS = frozenset({"matroska,webm", "avi", "flv", "asf"})

_MIN_RATE, _MAX_RATE = Fraction(1, 1000), Fraction(100_000)

_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")
_IMAGE_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1"})
_EBML = b"\x1aE\xdf\xa3"
_VIDEO_MAGIC = (
    _EBML,  # Matroska, WebM
    b"GIF8",
    b"FLV\x01",
    b"OggS",
    b"\0\0\x01\xba",  # MPEG program stream
    b"\0\0\x01\xb3",  # MPEG-1/2 video
    b"0&\xb2u\x8ef\xcf\x11",  # ASF
    b"DKIF",  # IVF
    b"YUV4MPEG2",
)
_MP4_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp"})


def sniff(path: Path) -> Content:
    """What a path holds, by its first bytes.

    Raises:
        MediaError: not_found, empty_file, not_media (a pipe or device).
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise MediaError(
            error.strerror or str(error), subject=path.name, code="not_found"
        ) from error
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        raise MediaError("not a regular file", subject=path.name, code="not_media")
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise MediaError("the file is empty", subject=path.name, code="empty_file")
    return content_of(head)


def content_of(head: bytes) -> Content:
    """What a file holds, by its first 16 bytes."""
    if head.startswith(_IMAGE_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return "image"
    if head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS:
        return "image"
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return "image"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "image"
    if head.startswith(_VIDEO_MAGIC) or head[4:8] in _MP4_BOXES:
        return "video"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "video"
    return "unknown"


def declared_bytes(path: Path) -> int:
    """How long a Matroska or RIFF file says it is; 0 where it does not say."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] != _EBML:
        return 0
    length, at = _ebml_size(head, 4)  # of the header, which the segment follows
    at += length
    if head[at : at + 4] != b"\x18S\x80g":
        return 0
    length, at = _ebml_size(head, at + 4)
    return at + length if length else 0


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """An EBML size (RFC 8794, section 5) and the offset behind it; 0 where it is unknown."""
    width = 9 - data[at].bit_length() if data[at : at + 1] else 9
    if width > 8 or at + width > len(data):
        return 0, len(data)
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (0 if value == (1 << 7 * width) - 1 else value), at + width


def check_bytes(path: Path, limits: MediaLimits) -> None:
    """Refuse a file larger than the limit.

    Raises:
        MediaError: too_large.
    """
    size_bytes = path.stat().st_size
    if size_bytes > limits.max_bytes:
        raise MediaError(
            f"{size_bytes} bytes, and the limit is {limits.max_bytes}",
            subject=path.name,
            code="too_large",
        )


def check_size(width_px: int, height_px: int, limits: MediaLimits, *, subject: str) -> None:
    """Refuse a picture whose sides break the limits.

    Raises:
        MediaError: dimensions_over_limit, too_small.
    """
    if max(width_px, height_px) > limits.max_side_px:
        raise MediaError(
            f"{width_px}x{height_px}, and the limit is {limits.max_side_px} px a side",
            subject=subject,
            code="dimensions_over_limit",
        )
    if min(width_px, height_px) < limits.min_side_px:
        raise MediaError(
            f"{width_px}x{height_px}, and the least is {limits.min_side_px} px a side",
            subject=subject,
            code="too_small",
        )


def open_container(path: Path, limits: MediaLimits) -> InputContainer:
    """Open a video file for reading, with nothing but the file itself in reach.

    Raises:
        MediaError: not_found, empty_file, not_media, container_unreadable, too_large.
    """
    content = sniff(path)
    if content in ("folder", "image"):
        raise MediaError(f"a {content}, not a video file", subject=path.name, code="not_media")
    check_bytes(path, limits)
    try:
        # With the protocol named, a file called "concat:a|b" is a file called that.
        return _open(f"file:{path.absolute()}", limits, max_pixels=str(limits.max_side_px**2))
    except (av.error.FFmpegError, UnicodeError) as error:
        if content == "video":
            raise MediaError(
                f"its container cannot be read: {reason(error)}",
                subject=path.name,
                code="container_unreadable",
            ) from error
        raise MediaError(
            "neither a video nor a picture", subject=path.name, code="not_media"
        ) from error


def _open(url: str, limits: MediaLimits, **options: str) -> InputContainer:
    fences = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": "file"}
    return av.open(
        url,
        mode="r",
        options=fences | options,
        timeout=(limits.timeout_s, limits.timeout_s),
        metadata_errors="replace",
    )


def reason(error: Exception) -> str:
    """The human part of a libav error."""
    return getattr(error, "strerror", None) or str(error)


def pick_stream(container: InputContainer, limits: MediaLimits, *, subject: str) -> VideoStream:
    """The largest video stream, set up for decoding; cover pictures do not count.

    One thread: a worker has one CPU, and which frames come before an error stays the same.

    Raises:
        MediaError: no_video_stream, dimensions_over_limit, frames_over_limit.
    """
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover and decodable(s)]
    if not streams:
        raise MediaError(
            "no video stream that can be decoded", subject=subject, code="no_video_stream"
        )
    sizes_px = _sizes(container, streams, limits)
    stream = max(streams, key=lambda s: sizes_px[s.index][0] * sizes_px[s.index][1])
    context, (width_px, height_px) = stream.codec_context, sizes_px[stream.index]
    if max(width_px, height_px) > limits.max_side_px:
        raise MediaError(
            f"{width_px}x{height_px}, and the limit is {limits.max_side_px} px a side",
            subject=subject,
            code="dimensions_over_limit",
        )
    if stream.frames > limits.max_frames:
        raise MediaError(
            f"{stream.frames} frames, and the limit is {limits.max_frames}",
            subject=subject,
            code="frames_over_limit",
        )
    context.options = {"err_detect": "explode", "max_pixels": str(limits.max_side_px**2)}
    context.thread_count = 1
    return stream


def _sizes(
    container: InputContainer, streams: Sequence[VideoStream], limits: MediaLimits
) -> dict[int, tuple[int, int]]:
    """Width and height of streams by their index; 0 where nothing says it before a frame does."""
    sizes_px = {s.index: (s.codec_context.width, s.codec_context.height) for s in streams}
    if all(min(size_px) for size_px in sizes_px.values()):
        return sizes_px
    # A decoder that refuses a size forgets it, and what it says of its frames is no more than
    # "Invalid argument". Where there is no decoder, what the file's header says stays.
    try:
        with _open(container.name, limits, codec_whitelist="none") as unread:
            said_px = {s.index: (s.width, s.height) for s in unread.streams.video if decodable(s)}
    except (av.error.FFmpegError, UnicodeError):
        return sizes_px  # it was opened before: who reads its frames tells what is wrong
    return {
        i: size_px if min(size_px) else said_px.get(i, (0, 0)) for i, size_px in sizes_px.items()
    }


def decodable(stream: Stream) -> bool:
    """Whether there is a decoder for the stream; PyAV gives it no context otherwise."""
    return getattr(stream, "codec_context", None) is not None


def frame_rate(container: InputContainer, stream: VideoStream, limits: MediaLimits) -> Fraction:
    """Frames per second on average, holes longer than `max_gap_s` left out.

    A damaged header may say anything: what no camera does becomes the nearest that one does.
    """
    return min(max(_said_rate(container, stream, limits), _MIN_RATE), _MAX_RATE)


def _said_rate(container: InputContainer, stream: VideoStream, limits: MediaLimits) -> Fraction:
    average, base = stream.average_rate, stream.base_rate
    if container.format.name in UNTIMED_DEMUXERS:
        # Either may be a multiple of the true rate: fields for frames, or ticks for frames.
        rates = [rate for rate in (average, base) if rate]
        return min(rates) if rates else Fraction(25)
    rate = average or stream.guessed_rate or base or Fraction(25)
    if base and rate * 4 < base:
        rate = _rate_without_gaps(stream, limits) or rate
    return rate


def _rate_without_gaps(stream: VideoStream, limits: MediaLimits) -> Fraction | None:
    """The rate by the index, or None where that has no hole to leave out."""
    time_base = stream.time_base or Fraction(1)
    ticks = [e.timestamp for e in stream.index_entries if not e.is_discard]
    steps = [b - a for a, b in pairwise(ticks)]
    short = [step for step in steps if 0 < step * time_base <= limits.max_gap_s]
    if len(short) == len(steps) or not short:
        return None
    return Fraction(len(short)) / (sum(short) * time_base)

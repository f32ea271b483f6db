"""Images and videos that strangers might send: what points elsewhere, and what claims too much."""

from __future__ import annotations

import io
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
from av.stream import Stream

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


# --- what points elsewhere -------------------------------------------------------------------


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine: its address, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def playlists(target: str) -> dict[str, str]:
    """Texts that name a file or an address, by what they are."""
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{target}\n#EXT-X-ENDLIST\n",
        "hls-key": (
            f'#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n'
            f"#EXTINF:4,\nconcat:{target}|{target}\n#EXT-X-ENDLIST\n"
        ),
        "ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
        "concat": f"file '{target}'\n",
        "dash": (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT4S"><Period><AdaptationSet mimeType="video/mp4">'
            f'<Representation id="0" bandwidth="1"><BaseURL>{target}</BaseURL>'
            "</Representation></AdaptationSet></Period></MPD>"
        ),
        "smooth": (
            '<SmoothStreamingMedia MajorVersion="2" Duration="40000000"><StreamIndex Type="video" '
            f'Url="{target}"/></SmoothStreamingMedia>'
        ),
        "smil": f'<smil><body><video src="{target}"/></body></smil>',
        "asx": f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns={target}\nm=video 5004 RTP/AVP 96\n",
        "rtsp": f"RTSPtextRTSP://{target.partition('://')[2]}\n",
        "imf": (
            '<CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016">'
            f"<Id>{target}</Id></CompositionPlaylist>"
        ),
        "svg": (
            '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64" '
            'xmlns:xlink="http://www.w3.org/1999/xlink">'
            f'<image xlink:href="{target}" width="64" height="64"/></svg>'
        ),
        "xxe": f'<!DOCTYPE svg [<!ENTITY x SYSTEM "{target}">]><svg><text>&x;</text></svg>',
        "mvg": f"push graphic-context\nfill 'url({target})'\npop graphic-context\n",
        "postscript": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n({target}) run\n",
    }


def pointing_elsewhere(video: Path, target: Path) -> bytes:
    """An MP4 file that says its frames lie in another file, by an alias as QuickTime wrote them.

    The alias is as libavformat reads it: names of a volume and a file, two depths of folders, and
    then, as part 2, the file's absolute path.
    """
    path = str(target).encode()
    path += bytes(len(path) % 2)
    alias = bytes(10 + 28 + 12 + 64 + 16 + 4 + 16) + struct.pack(">HH", 2, len(path)) + path
    alias += struct.pack(">hH", -1, 0)
    own = struct.pack(">I4sI", 12, b"url ", 1)  # flag 1: they are in here
    other = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    data = video.read_bytes()
    assert data.count(own) == 1
    data = data.replace(own, other)
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        at = data.index(box) - 4
        size = int.from_bytes(data[at : at + 4], "big") + len(other) - len(own)
        data = data[:at] + struct.pack(">I", size) + data[at + 4 :]
    return data


# --- what claims too much --------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def zeros(num_bytes: int) -> bytes:
    """That many zeros, as zlib packs them, without having them in memory at once."""
    packer, block = zlib.compressobj(1), bytes(2**20)
    parts = [packer.compress(block) for _ in range(num_bytes // len(block))]
    return b"".join([*parts, packer.compress(bytes(num_bytes % len(block))), packer.flush()])


def png_of_zeros(width_px: int, height_px: int) -> bytes:
    """A whole black PNG of any size; a few thousandths of its pixels' bytes."""
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    data = zeros((3 * width_px + 1) * height_px)
    return PNG_MAGIC + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_chunk(png: bytes, kind: bytes, data: bytes, *, before: bytes = b"IDAT") -> bytes:
    """A PNG with a chunk more, before its first chunk of some kind."""
    at = png.index(before) - 4
    return png[:at] + chunk(kind, data) + png[at:]


def with_zip(data: bytes) -> bytes:
    """A file that is a ZIP as well."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("../../escape.txt", "never unpacked")
    return data + buffer.getvalue()


def gif_of_dots(count: int, *, canvas_px: int) -> bytes:
    """A GIF of many frames, each one pixel on a canvas."""
    head = b"GIF89a" + struct.pack("<HHBBB", canvas_px, canvas_px, 0x80, 0, 0)
    palette = b"\0\0\0\xff\xff\xff"
    frame = (
        b"\x21\xf9\x04\0\x04\0\0\0"  # shown for 0.04 s
        + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
        + b"\x02\x02\x4c\x01\0"  # LZW: clear, index 1, end
    )
    return head + palette + frame * count + b"\x3b"


def write_looped(video: Path, out: Path, *, times: int) -> Path:
    """A video over and over, its packets copied: it takes no encoding."""
    with av.open(str(video)) as source, av.open(str(out), "w") as file:
        stream = source.streams.video[0]
        copy = file.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        length = sum(packet.duration or 0 for packet in packets)
        for number in range(times):
            for packet in packets:
                file.mux(_later(packet, number * length, copy))
    return out


def _later(
    packet: av.Packet[av.VideoStream], ticks: int, stream: av.VideoStream
) -> av.Packet[Stream]:
    later = av.Packet(bytes(packet))
    later.pts, later.dts = (packet.pts or 0) + ticks, (packet.dts or 0) + ticks
    later.duration, later.is_keyframe = packet.duration, packet.is_keyframe
    later.time_base, later.stream = packet.time_base, stream
    return later

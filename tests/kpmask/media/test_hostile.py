"""Broken, cut, oversized and hostile files: the right code, and nothing else touched."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import av.error
import numpy as np
import pytest
from PIL import Image

from kpmask.config import MediaLimits
from kpmask.errors import MediaError
from kpmask.media.decode import Span, check_length, frames, spans
from kpmask.media.ffmpeg import copy_audio, normalise
from kpmask.media.graph import Renderer
from kpmask.media.images import read_image
from kpmask.media.probe import probe

LIMITS = MediaLimits()


def _code(iterator: Iterator[object]) -> str:
    with pytest.raises(MediaError) as caught:
        for _ in iterator:
            pass
    return caught.value.code


def _prefix(path: Path, limits: MediaLimits = LIMITS) -> tuple[list[np.ndarray], str]:
    """The frames before the damage, and its code."""
    images: list[np.ndarray] = []
    try:
        for frame in frames(path, limits):
            images.append(frame.rgb_HWC)
    except MediaError as error:
        return images, error.code
    return images, "ok"


@pytest.fixture
def video(tmp_path: Path, kit: SimpleNamespace) -> Path:
    folder = tmp_path / "good"
    folder.mkdir()
    images = (kit.barcode(index) for index in range(100))
    options = {"container_options": {"movflags": "+faststart"}, "options": {"g": "20", "crf": "5"}}
    return kit.write_video(folder / "v.mp4", images, **options)


# --- files that point at others --------------------------------------------------------------


def _playlists(target: Path) -> dict[str, str]:
    return {
        "hls.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{target}\n#EXT-X-ENDLIST\n",
        "hls_file.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nfile://{target}\n",
        "concat.ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
        "concat.mp4": f"ffconcat version 1.0\nfile '{target.name}'\n",
        "dash.mpd": (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT4S"><Period><AdaptationSet mimeType="video/mp4">'
            f'<Representation id="0" bandwidth="1"><BaseURL>{target}</BaseURL>'
            "</Representation></AdaptationSet></Period></MPD>"
        ),
        "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "subtitles.srt": "1\n00:00:00,000 --> 00:00:01,000\nhello\n",
        "meta.txt": ";FFMETADATA1\ntitle=x\n",
        "imf.xml": "<CompositionPlaylist xmlns='http://www.smpte-ra.org/schemas/2067-3/2016'/>",
    }


def test_playlists_are_not_followed(video: Path, kit: SimpleNamespace) -> None:
    for name, text in _playlists(video).items():
        path = video.with_name(name)
        path.write_text(text)
        out = video.with_name("out.mp4")
        for attempt in (
            lambda p=path: probe(p, LIMITS),
            lambda p=path: list(frames(p, LIMITS)),
            lambda p=path, o=out: normalise(p, o),
            lambda p=path, o=out: copy_audio(video, p, o, duration_s=1),
        ):
            with pytest.raises(MediaError) as caught:
                attempt()
            assert caught.value.code == "not_media", name
        assert not out.exists()
    # Without fences the list is followed, so the test has teeth.
    kit.ffmpeg("-safe", "0", "-i", video.with_name("concat.ffconcat"), video.with_name("o.mkv"))
    assert video.with_name("o.mkv").stat().st_size > 1000


def test_image_patterns_are_names(tmp_path: Path, kit: SimpleNamespace) -> None:
    Image.fromarray(kit.barcode(0)).save(tmp_path / "001.png")
    with pytest.raises(MediaError) as caught:
        probe(tmp_path / "%03d.png", LIMITS)
    assert caught.value.code == "not_found"


@pytest.mark.parametrize(
    "name",
    ["concat:a|b.mp4", "a b#c%20?.mp4", "-i.mp4", "http:x.mp4", "ü…漢.mp4", "x" * 200 + ".mp4"],
)
def test_odd_names_are_only_names(
    name: str, video: Path, kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = video.rename(video.with_name(name))
    monkeypatch.chdir(path.parent)
    assert probe(Path(name), LIMITS).width_px == 128
    (first, *_) = frames(Path(name), LIMITS)
    assert kit.number_of(first.rgb_HWC) == 0
    assert normalise(Path(name), Path("out.mp4")).num_frames == 100


# --- what is no video ------------------------------------------------------------------------


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(500))
    for path, code in (
        (tmp_path / "none.mp4", "not_found"),
        (tmp_path / "pipe.mp4", "not_media"),
        (Path("/dev/zero"), "not_media"),
        (tmp_path / "empty.mp4", "empty_file"),
        (tmp_path / "cut.mp4", "container_unreadable"),
    ):
        assert _code(frames(path, LIMITS)) == code
        with pytest.raises(MediaError) as caught:
            probe(path, LIMITS)
        assert caught.value.code == code


def test_a_cover_picture_is_no_video(tmp_path: Path, kit: SimpleNamespace) -> None:
    Image.fromarray(kit.barcode(0)).save(tmp_path / "c.png")
    path = tmp_path / "song.m4a"
    kit.ffmpeg(
        "-f", "lavfi", "-i", "sine=duration=1", "-i", tmp_path / "c.png", "-map", "0", "-map", "1",
        "-c:v", "copy", "-disposition:v", "attached_pic", "-f", "mp4", path,
    )  # fmt: skip
    assert _code(frames(path, LIMITS)) == "no_video_stream"


def test_the_largest_stream_is_read(tmp_path: Path, kit: SimpleNamespace) -> None:
    small = kit.write_video(tmp_path / "s.mp4", (kit.barcode(0)[::2, ::2] for _ in range(9)))
    large = kit.write_video(tmp_path / "l.mp4", (kit.barcode(i) for i in range(30)))
    path = tmp_path / "both.mp4"
    kit.ffmpeg("-i", small, "-i", large, "-map", "0", "-map", "1", "-c", "copy", path)
    given = [kit.number_of(frame.rgb_HWC) for frame in frames(path, LIMITS)]
    assert given == list(range(30))
    assert probe(path, LIMITS).stream_index == 1


# --- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ({"max_side_px": 127}, "dimensions_over_limit"),
        ({"min_side_px": 97}, "too_small"),
        ({"max_frames": 99}, "frames_over_limit"),
        ({"max_bytes": 1000}, "too_large"),
    ],
)
def test_limits(limit: dict[str, int], code: str, video: Path) -> None:
    limits = LIMITS.model_copy(update=limit)
    assert _code(frames(video, limits)) == code
    with pytest.raises(MediaError) as caught:
        probe(video, limits)
    assert caught.value.code == code


def test_frames_are_counted_where_the_header_does_not(
    video: Path, tmp_path: Path, kit: SimpleNamespace
) -> None:
    path = tmp_path / "v.mkv"
    kit.ffmpeg("-i", video, "-c", "copy", path)
    images, code = _prefix(path, LIMITS.model_copy(update={"max_frames": 50}))
    assert (len(images), code) == (50, "frames_over_limit")


_PEAK = r"""
import re, sys
from pathlib import Path
from kpmask.config import MediaLimits
from kpmask.errors import MediaError
from kpmask.media.decode import frames
try:
    list(frames(Path(sys.argv[1]), MediaLimits()))
except MediaError as error:
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(error.code, peak[1])
"""


def test_a_huge_picture_is_not_decoded(tmp_path: Path, kit: SimpleNamespace) -> None:
    path = tmp_path / "bomb.mp4"
    kit.ffmpeg(
        "-f", "lavfi", "-i", "color=black:size=8192x8192:rate=1", "-frames:v", "1",
        "-preset", "ultrafast", "-pix_fmt", "yuv420p", path,
    )  # fmt: skip
    argv = [sys.executable, "-c", _PEAK, str(path)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    code, peak_kib = done.stdout.split()
    assert code == "dimensions_over_limit"
    assert int(peak_kib) < 250_000  # a frame of it is 100 MB, as RGB 200 MB


# --- damage ----------------------------------------------------------------------------------


def test_a_cut_file_gives_what_is_whole(video: Path, tmp_path: Path, kit: SimpleNamespace) -> None:
    mkv, avi = tmp_path / "v.mkv", tmp_path / "v.avi"
    for rewrapped in (mkv, avi):
        kit.ffmpeg("-i", video, "-c", "copy", rewrapped)
        assert _prefix(rewrapped)[1] == "ok"
    good = [frame.rgb_HWC for frame in frames(video, LIMITS)]
    for whole in (video, mkv, avi):
        data = whole.read_bytes()
        for share in (0.3, 0.55, 0.8, 0.98):
            cut = tmp_path / f"cut{whole.suffix}"
            cut.write_bytes(data[: int(len(data) * share)])
            images, code = _prefix(cut)
            assert code == "truncated", (whole.suffix, share, len(images))
            assert 0.15 * 100 < len(images) < 100
            assert all(np.array_equal(a, b) for a, b in zip(images, good, strict=False))


def test_a_cut_between_two_packets_is_seen(video: Path, tmp_path: Path) -> None:
    import av

    with av.open(str(video)) as container:
        entry = container.streams.video[0].index_entries[60]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[: entry.pos])
    images, code = _prefix(cut)
    assert code == "truncated"
    assert 55 <= len(images) <= 60  # those that wait for the next to be shown are given up


def test_damage_in_the_middle_ends_the_video(video: Path, tmp_path: Path) -> None:
    import av

    good = [frame.rgb_HWC for frame in frames(video, LIMITS)]
    with av.open(str(video)) as container:
        entry = container.streams.video[0].index_entries[50]
    data = bytearray(video.read_bytes())
    noise = np.random.default_rng(3).integers(0, 256, 400, np.uint8).tobytes()
    data[entry.pos + 8 : entry.pos + 408] = noise
    path = tmp_path / "hurt.mp4"
    path.write_bytes(data)
    images, code = _prefix(path)
    assert code == "decode_errors"
    assert 40 <= len(images) <= 52
    # Nothing that was painted over by the decoder gets out.
    assert all(np.array_equal(a, b) for a, b in zip(images, good, strict=False))
    # What lies before the damage is whole, and nobody needs to hear of the rest.
    assert len(list(frames(path, LIMITS, end_s=1.2))) == 30
    # A span on the other side can be sought; one that holds the damage cannot.
    assert len(list(frames(path, LIMITS, start_s=3.0, end_s=3.4))) == 10
    given = []
    with pytest.raises(MediaError):
        for index, _ in spans(path, LIMITS, [Span(0.0, 1.0), Span(1.0, 3.0)]):
            given.append(index)
    assert given.count(0) == 25
    assert 15 <= given.count(1) <= 27


def test_no_key_frame(video: Path, tmp_path: Path, kit: SimpleNamespace) -> None:
    path = tmp_path / "v.mp4"
    one_key = kit.write_video(
        tmp_path / "k.mp4", (kit.barcode(i) for i in range(40)), options={"g": "99"}
    )
    kit.ffmpeg("-i", one_key, "-c", "copy", "-bsf:v", "noise=drop=eq(n\\,0)", path)
    assert _code(frames(path, LIMITS)) == "no_keyframe"


def test_a_hole_in_time_ends_the_video(tmp_path: Path, kit: SimpleNamespace) -> None:
    times_s = [i / 25 + (3600 if i >= 20 else 0) for i in range(40)]
    images = (kit.barcode(index) for index in range(40))
    path = kit.write_video(tmp_path / "v.mp4", images, times_s=times_s)
    images_HWC, code = _prefix(path)
    assert (len(images_HWC), code) == (20, "timestamp_gap")
    assert len(list(frames(path, LIMITS, end_s=0.8))) == 20  # all of them were before the hole
    assert probe(path, LIMITS).fps == pytest.approx(25, rel=0.01)  # and not 0.01
    patient = LIMITS.model_copy(update={"max_gap_s": 4000.0})
    assert len(list(frames(path, patient))) == 40


def test_a_rate_that_no_camera_has(tmp_path: Path, kit: SimpleNamespace) -> None:
    path = kit.write_video(tmp_path / "v.avi", (kit.barcode(i) for i in range(9)), codec="mpeg4")
    data = bytearray(path.read_bytes())
    scale_at = data.find(b"strh") + 28  # dwScale, which dwRate follows
    data[scale_at : scale_at + 8] = b"\xff\xff\xff\xff\x01\0\0\0"
    path.write_bytes(data)
    assert probe(path, LIMITS).fps == 0.001  # and not one frame in a century
    images_HWC, code = _prefix(path)
    assert (len(images_HWC), code) == (1, "timestamp_gap")


def test_colours_that_nobody_knows(video: Path, tmp_path: Path, kit: SimpleNamespace) -> None:
    path = tmp_path / "v.webm"
    tags = ("-color_primaries", "bt709", "-color_trc", "bt709", "-colorspace", "bt709")
    filters = ("-vf", "setparams=color_primaries=bt709:color_trc=bt709:colorspace=bt709")
    kit.ffmpeg("-i", video, "-t", "0.4", *filters, *tags, "-c:v", "libvpx", path)
    good, code = _prefix(path)
    assert code == "ok"
    data = path.read_bytes()
    for element in (b"\x55\xba\x81", b"\x55\xbb\x81"):  # transfer, primaries
        assert data.count(element + b"\x01") == 1
        path.write_bytes(data.replace(element + b"\x01", element + b"\x21"))
        images, code = _prefix(path)
        assert code == "ok"
        assert np.array_equal(images, good)


def test_what_libav_cannot_convert_is_damage(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise av.error.OSError(95, "Operation not supported")

    monkeypatch.setattr(Renderer, "render", refuse)
    assert _code(frames(video, LIMITS)) == "decode_errors"


def test_a_size_that_changes_ends_the_video(tmp_path: Path, kit: SimpleNamespace) -> None:
    joined = tmp_path / "joined.h264"
    with joined.open("wb") as out:
        for name, step in (("a", 1), ("b", 2)):
            images = (kit.barcode(index)[::step, ::step] for index in range(20))
            part = kit.write_video(tmp_path / f"{name}.h264", images)
            out.write(part.read_bytes())
    images_HWC, code = _prefix(joined)
    assert (len(images_HWC), code) == (20, "inconsistent_frames")


def test_a_span_behind_the_end_is_empty(video: Path) -> None:
    assert list(frames(video, LIMITS, start_s=4.0, end_s=9.0)) == []
    assert list(frames(video, LIMITS, start_s=400.0)) == []
    assert len(list(frames(video, LIMITS, start_s=3.9))) == 2


def test_check_length() -> None:
    check_length(16, min_frames=16, subject="v.mp4")
    with pytest.raises(MediaError, match=r"v\.mp4: 15 frames") as caught:
        check_length(15, min_frames=16, subject="v.mp4")
    assert caught.value.code == "too_short"


# --- the internal collection -----------------------------------------------------------------

_VIDEOS = [
    "ok_reference.mp4",
    "truncated_no_moov.mp4",
    "truncated_faststart.mp4",
    "zero_byte.mp4",
    "html_page.mp4",
    "audio_only.mp4",
    "one_frame.mp4",
    "odd_dimensions.mp4",
    "rotated_90.mp4",
    "variable_frame_rate.mp4",
    "hevc_10bit.mp4",
    "huge_header.mp4",
    "bomb_8192.mp4",
    "animated.gif",
    "png_folder",
    "png_folder_mixed",
    "empty_folder",
    "corrupt_middle.mp4",
    "no_first_keyframe.mp4",
    "webm_named.mp4",
    "jpeg_named.mp4",
    "gray.mp4",
    "anamorphic_sar.mp4",
    "two_video_streams.mp4",
    "timestamp_gap.mp4",
    "slow_1fps.mp4",
]
_IMAGES = [
    "exif_rotated.jpg",
    "cmyk.jpg",
    "rgba.png",
    "gray16.png",
    "palette.png",
    "truncated.jpg",
    "bomb.png",
    "text_named.png",
    "tiny_16.png",
]


def _cases(dev_data: Path) -> dict[str, dict[str, str]]:
    with (dev_data / "bad" / "cases.csv").open(encoding="utf-8", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def test_every_internal_case_is_here(dev_data: Path) -> None:
    rows = _cases(dev_data).values()
    assert {r["file"] for r in rows if r["kind"] in ("video", "folder")} == set(_VIDEOS)
    assert {r["file"] for r in rows if r["kind"] == "image"} == set(_IMAGES)


def _judged(kind: str, path: Path) -> tuple[str, int, str]:
    """The code, the number of good frames, and the size that was displayed."""
    images: list[np.ndarray] = []
    code = "ok"
    try:
        if kind == "image":
            images.append(read_image(path, LIMITS))
        else:
            probe(path, LIMITS)
            images.extend(frame.rgb_HWC for frame in frames(path, LIMITS))
            check_length(len(images), min_frames=16, subject=path.name)
    except MediaError as error:
        code = error.code
    size = f"{images[0].shape[1]}x{images[0].shape[0]}" if images else ""
    return code, len(images), size


@pytest.mark.parametrize("name", [*_VIDEOS, *_IMAGES])
def test_internal_case(name: str, dev_data: Path, tmp_path: Path) -> None:
    row = _cases(dev_data)[name]
    source = dev_data / "bad" / name
    path = tmp_path / name
    shutil.copytree(source, path) if source.is_dir() else shutil.copyfile(source, path)
    code, num_frames, size = _judged(row["kind"], path)
    verdict = row["expected_verdict"]
    if verdict == "either":
        assert code in ("ok", row["reason_code"])
    elif verdict == "accept_partial":
        images, code = _prefix(path)
        assert code == row["reason_code"]
        assert f"{images[0].shape[1]}x{images[0].shape[0]}" == row["expected_display_size"]
        assert len(images) >= 10
    else:
        assert code == row["reason_code"]
    if verdict == "accept":
        assert (num_frames, size) == (int(row["expected_frames"]), row["expected_display_size"])


# --- anything at all -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "gif", "png", "jpg"])
def test_random_damage_is_always_a_media_error(
    kind: str, tmp_path: Path, kit: SimpleNamespace
) -> None:
    images = [kit.barcode(index, width_px=64, height_px=48) for index in range(30)]
    path = tmp_path / f"v.{kind}"
    if kind in ("png", "jpg"):
        Image.fromarray(images[0]).save(path)
    elif kind == "gif":
        pictures = [Image.fromarray(image_HWC) for image_HWC in images]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    else:
        kit.write_video(path, images, codec="mpeg4" if kind == "avi" else "libx264")
    good, seen = path.read_bytes(), set()
    random = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(good[: random.integers(1, len(good))] if random.random() < 0.2 else good)
        reach = min(len(data), 600) if random.random() < 0.5 else len(data)
        for at in random.integers(0, reach, random.choice([1, 5, 50])):
            data[at] = random.integers(0, 256)
        path.write_bytes(data)
        try:
            if kind in ("png", "jpg"):
                read_image(path, LIMITS)
            probe(path, LIMITS)
            for _, frame in spans(path, LIMITS, [Span(0.0, 0.4), Span(1.0, size_px=(32, 32))]):
                assert frame.rgb_HWC.dtype == np.uint8
            seen.add("ok")
        except MediaError as error:
            seen.add(error.code)
    assert len(seen) > 1

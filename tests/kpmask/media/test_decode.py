"""Which frames come out, when, and how they look: against the ffmpeg program and Pillow."""

from __future__ import annotations

import csv
import itertools
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from kpmask.config import MediaLimits
from kpmask.errors import MediaError
from kpmask.media import decode
from kpmask.media.decode import Span, as_rate, frames, kind_of, spans
from kpmask.media.probe import can_seek, probe
from kpmask.media.reader import Reader

LIMITS = MediaLimits()
NUM_FRAMES = 150

# name: codec, rate, options, how the ffmpeg program rewraps it (None: as PyAV writes it)
X264 = {"crf": "15", "preset": "veryfast"}
CASES = {
    "closed.mp4": ("libx264", 25, X264 | {"x264-params": "keyint=40:bframes=3:open-gop=0"}, None),
    "open.mp4": ("libx264", 25, X264 | {"x264-params": "keyint=40:bframes=3:open-gop=1"}, None),
    "ntsc.mp4": ("libx264", Fraction(30000, 1001), X264 | {"g": "40"}, None),
    "ntsc.mkv": ("libx264", Fraction(30000, 1001), X264 | {"g": "40"}, None),
    "hevc.mp4": (
        "libx265",
        25,
        {"x265-params": "log-level=none:keyint=40:bframes=3:open-gop=1", "preset": "ultrafast"},
        None,
    ),
    "vp9.webm": ("libvpx-vp9", 25, {"g": "40", "deadline": "realtime", "cpu-used": "8"}, None),
    "mpeg4.avi": ("mpeg4", 25, {"g": "40", "bf": "2", "q": "3"}, None),
    "mpeg2.mpg": ("mpeg2video", 25, {"g": "12", "bf": "2", "q": "3"}, None),
    "one_key.mp4": ("libx264", 25, X264 | {"g": "999"}, None),
    "edit_list.mp4": ("libx264", 25, X264 | {"g": "40"}, ("-ss", "1.5")),
    "late_start.mp4": ("libx264", 25, X264 | {"g": "40"}, ("-itsoffset", "3.7")),
    "fragments.mp4": ("libx264", 25, X264 | {"g": "40"}, ()),
    "h264.avi": ("libx264", 25, X264 | {"g": "40"}, ()),
    "h264.ts": ("libx264", 25, X264 | {"g": "40"}, ()),
    "raw.h264": ("libx264", 25, X264 | {"g": "40"}, ()),
    "x.flv": ("flv", 25, {"g": "40", "q": "3"}, None),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, kit: SimpleNamespace) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    paths = {}
    for name, (codec, rate, options, rewrap) in CASES.items():
        images = (kit.barcode(i) for i in range(NUM_FRAMES))
        first = folder / (name if rewrap is None else f"first-{name}.mp4")
        paths[name] = kit.write_video(first, images, codec=codec, rate=rate, options=options)
        if rewrap is not None:
            paths[name] = folder / name
            flags = ["-movflags", "frag_keyframe+empty_moov"] if name == "fragments.mp4" else []
            copyts = ["-copyts"] if name == "late_start.mp4" else []
            kit.ffmpeg(*rewrap, "-i", first, "-c", "copy", *copyts, *flags, paths[name])
    return paths


@pytest.mark.parametrize("name", CASES)
def test_spans_hold_exactly_their_frames(
    name: str, made: dict[str, Path], kit: SimpleNamespace
) -> None:
    """Frame i of rate r belongs to [start, end) of rate q if start/q <= i/r < end/q."""
    path, rate = made[name], Fraction(CASES[name][1])
    shown = [kit.number_of(image_HWC) for image_HWC in kit.ffmpeg_rgb(path, (128, 96))]
    assert shown == list(range(NUM_FRAMES - len(shown), NUM_FRAMES))  # an edit list cuts the start

    ends = [(0, 5), (39, 41), (40, 43), (38, 50), (79, 100), (97, 121), (115, 400), (119, 120)]
    wanted = [Span(float(a / rate), float(b / rate)) for a, b in ends]
    # As metadata has it: by frame numbers at another rate.
    wanted += [Span(a / 30, b / 30) for a, b in ((1, 30), (50, 77), (90, 101))]
    expected = [
        [n for i, n in enumerate(shown) if _frac(span.start_s) <= i / rate < _frac(span.end_s)]
        for span in wanted
    ]
    for span, numbers in zip(wanted, expected, strict=True):
        found = frames(path, LIMITS, start_s=span.start_s, end_s=span.end_s)
        assert [kit.number_of(frame.rgb_HWC) for frame in found] == numbers, span

    together: list[list[int]] = [[] for _ in wanted]
    last_s = 0.0
    for index, frame in spans(path, LIMITS, wanted):
        together[index].append(kit.number_of(frame.rgb_HWC))
        assert frame.time_s >= last_s
        last_s = frame.time_s
    assert together == expected


def _frac(time_s: float | None) -> Fraction:
    """The rational time that a float stands for."""
    assert time_s is not None
    return min(
        (Fraction(time_s).limit_denominator(n) for n in (30, 30000)),
        key=lambda f: (abs(float(f) - time_s) > 1e-12, f.denominator),
    )


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("raw.h264",)])
def test_times_are_the_timestamps(name: str, made: dict[str, Path]) -> None:
    rate = CASES[name][1]
    times_s = [frame.time_s for frame in frames(made[name], LIMITS)]
    exact_s = np.arange(len(times_s)) / float(rate)
    assert np.abs(np.array(times_s) - exact_s).max() < (6e-4 if name.endswith("mkv") else 2e-4)
    assert probe(made[name], LIMITS).fps == pytest.approx(float(rate), rel=2e-3)


def test_few_frames_are_decoded_for_far_spans(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[Reader] = []

    class Watched(Reader):
        def __init__(self, path: Path, limits: MediaLimits) -> None:
            readers.append(self)
            super().__init__(path, limits)

    monkeypatch.setattr(decode, "Reader", Watched)
    wanted = [Span(0.0, 0.08), Span(4.84, 4.92), Span(4.88, 4.96)]
    given = list(spans(made["closed.mp4"], LIMITS, wanted))
    assert [index for index, _ in given] == [0, 0, 1, 1, 2, 2]
    assert len(readers) == 1
    assert readers[0].num_decoded < 20  # of 150: the key frame at 4.8 s is 1 frame away


def test_seekable_or_not(made: dict[str, Path]) -> None:
    assert can_seek(made["open.mp4"], LIMITS)
    assert not can_seek(made["raw.h264"], LIMITS)
    assert not can_seek(made["h264.avi"], LIMITS)
    assert not can_seek(made["mpeg2.mpg"], LIMITS)


def test_variable_frame_rate_goes_by_time(tmp_path: Path, kit: SimpleNamespace) -> None:
    steps_s = [0.02, 0.12, 0.04, 0.055, 0.02] * 12
    times_s = [0.0, *itertools.accumulate(steps_s)]
    path = kit.write_video(
        tmp_path / "vfr.mp4",
        (kit.barcode(i) for i in range(len(times_s))),
        times_s=times_s,
        options={"g": "10"},
    )
    given = list(frames(path, LIMITS, start_s=0.5, end_s=1.7))
    assert [kit.number_of(frame.rgb_HWC) for frame in given] == [
        i for i, time_s in enumerate(times_s) if 0.5 <= time_s < 1.7
    ]
    assert [frame.time_s for frame in given] == pytest.approx(
        [time_s for time_s in times_s if 0.5 <= time_s < 1.7], abs=1e-4
    )
    assert probe(path, LIMITS).fps == pytest.approx(len(steps_s) / sum(steps_s), rel=0.05)


# --- how frames look -------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", [(), ("-display_hflip",), ("-display_vflip",)])
def test_display_matrix(
    turn: int, flip: tuple[str, ...], tmp_path: Path, kit: SimpleNamespace
) -> None:
    plain = kit.write_video(tmp_path / "plain.mp4", [_odd_one_out()] * 2)
    path = tmp_path / "turned.mp4"
    kit.ffmpeg("-display_rotation", str(turn), *flip, "-i", plain, "-c", "copy", path)
    found = probe(path, LIMITS)
    size_px = (found.width_px, found.height_px)
    assert size_px == ((96, 160) if turn in (90, 270) else (160, 96))
    expected_THWC = kit.ffmpeg_rgb(path, size_px)  # turns by itself
    given = [frame.rgb_HWC for frame in frames(path, LIMITS)]
    assert np.abs(np.stack(given).astype(int) - expected_THWC).mean() < 1

    box_px = (11, 23, 70, 90)
    (cut, *_) = [frame.rgb_HWC for frame in frames(path, LIMITS, crop_px=box_px)]
    assert np.array_equal(cut, given[0][23:90, 11:70])
    (small, *_) = [f.rgb_HWC for f in frames(path, LIMITS, crop_px=box_px, size_px=(31, 20))]
    assert np.abs(small.astype(int) - _area(cut, (31, 20))).mean() < 1.5


def _odd_one_out() -> np.ndarray:
    """A picture that looks like none of its turned and mirrored versions."""
    y, x = np.mgrid[0:96, 0:160]
    return np.stack([x * 255 // 159, y * 255 // 95, (x > 100) * (y > 60) * 200], -1).astype(
        np.uint8
    )


def _area(image_HWC: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Pillow's box filter: another implementation of averaging over the area."""
    resized = Image.fromarray(image_HWC).resize(size_px, Image.Resampling.BOX)
    return np.asarray(resized).astype(int)


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "size_px"),
    [
        ("yuv420p", "libx264", (130, 74)),
        ("yuv422p", "libx264", (130, 75)),
        ("yuv444p", "libx264", (131, 75)),
        ("yuv420p10le", "libx265", (130, 74)),
        ("gray", "libx264", (130, 74)),
        ("gbrp", "libx264", (131, 75)),
    ],
)
def test_pixel_formats(
    pix_fmt: str, codec: str, size_px: tuple[int, int], tmp_path: Path, kit: SimpleNamespace
) -> None:
    image_HWC = np.asarray(Image.fromarray(_odd_one_out()).resize(size_px))
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {"crf": "5"}
    codec = "libx264rgb" if pix_fmt == "gbrp" else codec
    path = kit.write_video(
        tmp_path / "v.mp4",
        [image_HWC] * 3,
        codec=codec,
        pix_fmt="rgb24" if pix_fmt == "gbrp" else pix_fmt,
        options=options,
    )
    expected_THWC = kit.ffmpeg_rgb(path, size_px)
    given_THWC = np.stack([frame.rgb_HWC for frame in frames(path, LIMITS)])
    assert given_THWC.shape == expected_THWC.shape
    assert np.abs(given_THWC.astype(int) - expected_THWC).mean() < 1
    box_px = (3, 5, 118, 62)
    (cut, *_) = [frame.rgb_HWC for frame in frames(path, LIMITS, crop_px=box_px)]
    assert np.array_equal(cut, given_THWC[0, 5:62, 3:118])
    (scaled, *_) = [f.rgb_HWC for f in frames(path, LIMITS, crop_px=box_px, size_px=(48, 32))]
    assert np.abs(scaled - _area(cut, (48, 32))).mean() < 1.5
    (grown, *_) = [f.rgb_HWC for f in frames(path, LIMITS, crop_px=box_px, size_px=(256, 256))]
    bilinear = Image.fromarray(cut).resize((256, 256), Image.Resampling.BILINEAR)
    assert np.abs(grown.astype(int) - np.asarray(bilinear)).mean() < 2


def test_colour_tags_are_honoured(tmp_path: Path, kit: SimpleNamespace) -> None:
    image_HWC = np.zeros((64, 64, 3), np.uint8)
    image_HWC[:32, :32], image_HWC[32:, :32], image_HWC[:32, 32:] = (
        (200, 30, 40),
        (20, 180, 60),
        250,
    )
    plain = tmp_path / "plain.png"
    Image.fromarray(image_HWC).save(plain)
    for matrix, span in itertools.product(("bt709", "smpte170m", "bt2020nc"), ("tv", "pc")):
        path = tmp_path / f"{matrix}-{span}.mp4"
        scale = f"scale=out_color_matrix={matrix.removesuffix('nc')}:out_range={span}"
        kit.ffmpeg(
            "-loop", "1", "-t", "0.2", "-i", plain, "-vf", f"{scale},format=yuv444p",
            "-colorspace", matrix, "-color_range", span, "-crf", "5", path,
        )  # fmt: skip
        (first, *_) = [frame.rgb_HWC for frame in frames(path, LIMITS)]
        assert np.abs(first.astype(int) - image_HWC).max() <= 4, (matrix, span)


def test_sample_aspect_ratio_is_applied(tmp_path: Path, kit: SimpleNamespace) -> None:
    def anamorphic(stream: object) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2)  # type: ignore[attr-defined]

    path = kit.write_video(tmp_path / "v.mp4", [_odd_one_out()] * 2, set_up=anamorphic)
    found = probe(path, LIMITS)
    assert (found.width_px, found.height_px) == (320, 96)
    (first, *_) = [frame.rgb_HWC for frame in frames(path, LIMITS)]
    (coded,) = kit.ffmpeg_rgb(path, (160, 96))[:1]
    wide = np.asarray(Image.fromarray(coded).resize((320, 96), Image.Resampling.BICUBIC))
    assert np.abs(first.astype(int) - wide).mean() < 2
    with pytest.raises(MediaError, match="limit is 300") as caught:
        probe(path, LIMITS.model_copy(update={"max_side_px": 300}))
    assert caught.value.code == "dimensions_over_limit"


def test_gif_and_its_transparency(tmp_path: Path) -> None:
    shown = []
    for index in range(5):
        image = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
        image.paste((200, 40 * index, 60, 255), (8, 8, 40, 40))
        shown.append(image)
    path = tmp_path / "a.gif"
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=100, disposal=2)
    given = list(frames(path, LIMITS))
    assert [frame.time_s for frame in given] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert probe(path, LIMITS).fps == pytest.approx(10)
    for frame, image in zip(given, shown, strict=True):
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        expected = np.asarray(Image.alpha_composite(black, image).convert("RGB")).astype(int)
        assert np.abs(frame.rgb_HWC - expected).max() <= 4  # a GIF has 256 colours
    (small, *_) = frames(path, LIMITS, crop_px=(8, 8, 40, 40), size_px=(16, 16))
    assert np.abs(small.rgb_HWC.astype(int) - [200, 0, 60]).max() <= 4


def test_half_alpha_is_blended_over_black(tmp_path: Path, kit: SimpleNamespace) -> None:
    Image.new("RGBA", (64, 64), (200, 100, 50, 128)).save(tmp_path / "p.png")
    path = tmp_path / "v.mov"
    kit.ffmpeg("-loop", "1", "-t", "0.2", "-i", tmp_path / "p.png", "-c:v", "qtrle", path)
    (first, *_) = frames(path, LIMITS)
    assert np.abs(first.rgb_HWC.astype(int) - [100, 50, 25]).max() <= 1


@pytest.mark.parametrize("box_px", [(-1, 0, 9, 9), (0, 0, 129, 9), (5, 5, 5, 9), (0, 90, 9, 97)])
def test_a_crop_outside_the_frame_is_refused(
    box_px: tuple[int, int, int, int], made: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match="not within a frame of 128x96"):
        next(frames(made["closed.mp4"], LIMITS, crop_px=box_px))


# --- folders and stacks ----------------------------------------------------------------------


def test_folder(tmp_path: Path, kit: SimpleNamespace) -> None:
    for index in range(12):
        Image.fromarray(kit.barcode(index)).save(tmp_path / f"{index}.png")
    (tmp_path / ".DS_Store").write_bytes(b"junk")
    (tmp_path / "._3.png").write_bytes(b"junk")
    (tmp_path / "Thumbs.db").write_bytes(b"junk")
    (tmp_path / "sub.png").mkdir()
    given = list(frames(tmp_path, LIMITS, start_s=0.1, end_s=1.1, fps=10))
    assert [kit.number_of(frame.rgb_HWC) for frame in given] == list(range(1, 11))
    assert [frame.time_s for frame in given] == pytest.approx(np.arange(1, 11) / 10)
    found = probe(tmp_path, LIMITS, fps=10)
    assert (found.num_frames_from_header, found.width_px, found.fps) == (12, 128, 10)

    Image.fromarray(kit.barcode(3)[:64]).save(tmp_path / "3.png")
    with pytest.raises(MediaError) as caught:
        list(frames(tmp_path, LIMITS))
    assert caught.value.code == "inconsistent_frames"


def test_stack(tmp_path: Path, kit: SimpleNamespace) -> None:
    parts = [kit.barcode(index, width_px=96) for index in range(50)]
    path = tmp_path / "stack.mp4"  # whatever it is called
    Image.fromarray(np.concatenate(parts, axis=1)).save(path, "PNG")
    assert kind_of(path) == "stack"
    given = list(frames(path, LIMITS, crop_px=(1, 2, 95, 90)))  # wider than a picture may be
    for frame, part in zip(given, parts, strict=True):
        assert np.array_equal(frame.rgb_HWC, part[2:90, 1:95])
    assert given[-1].time_s == pytest.approx(49 / 25)
    Image.fromarray(parts[0][:, :90]).save(path, "PNG")
    with pytest.raises(MediaError, match="row of square frames") as caught:
        probe(path, LIMITS)
    assert caught.value.code == "inconsistent_frames"


# --- memory ----------------------------------------------------------------------------------

_MEASURE = r"""
import re, sys
from pathlib import Path
from kpmask.config import MediaLimits
from kpmask.media.decode import frames
count = sum(1 for _ in frames(Path(sys.argv[1]), MediaLimits(), end_s=float(sys.argv[2])))
peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
print(count, peak[1])
"""


def test_memory_does_not_grow_with_length(tmp_path: Path, kit: SimpleNamespace) -> None:
    path = tmp_path / "long.mp4"
    kit.ffmpeg(
        "-f", "lavfi", "-i", "testsrc=size=640x480:rate=25:duration=40",
        "-preset", "ultrafast", "-pix_fmt", "yuv420p", path,
    )  # fmt: skip
    peaks_kib = []
    for end_s, num_frames in (("4", 100), ("40", 1000)):
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(path), end_s],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        count, peak_kib = map(int, done.stdout.split())
        assert count == num_frames
        peaks_kib.append(peak_kib)
    assert peaks_kib[1] - peaks_kib[0] < 20_000  # the frames alone are 920 MB


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (25.0, Fraction(25)),
        (29.97, Fraction(30000, 1001)),
        (30000 / 1001, Fraction(30000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (12.5, Fraction(25, 2)),
        (625 / 31, Fraction(625, 31)),
        (0.0005, Fraction(1, 2000)),
        (2.0**-30, Fraction(1, 2**30)),
    ],
)
def test_as_rate(fps: float, rate: Fraction) -> None:
    assert as_rate(fps) == rate


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_as_rate_refuses(fps: float) -> None:
    with pytest.raises(ValueError, match="not a frame rate"):
        as_rate(fps)


def test_pyav_agrees_on_the_whole_picture(made: dict[str, Path]) -> None:
    """PyAV's own conversion, which is up to 2 levels darker (it truncates)."""
    with av.open(str(made["open.mp4"])) as container:
        theirs = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    ours = [frame.rgb_HWC for frame in frames(made["open.mp4"], LIMITS)]
    difference = np.stack(ours).astype(int) - np.stack(theirs)
    assert np.abs(difference).mean() < 3


# --- the internal collection -----------------------------------------------------------------


def test_internal_chunks(dev_data: Path) -> None:
    """Spans of real videos of several codecs: frame counts and mean colours as recorded."""
    with (dev_data / "metadata" / "expected_chunks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_video: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_video.setdefault(row["video_id"], []).append(row)
    for video_id, chunks in by_video.items():
        path = dev_data / "raw" / f"{video_id}.mp4"
        rate = as_rate(probe(path, LIMITS).fps)
        wanted = [_chunk_span(row, rate) for row in chunks]
        counts = [0] * len(chunks)
        ends: dict[tuple[int, str], np.ndarray] = {}
        for index, frame in spans(path, LIMITS, wanted):
            counts[index] += 1
            ends.setdefault((index, "first"), frame.rgb_HWC)
            ends[index, "last"] = frame.rgb_HWC
        assert counts == [int(row["n_frames"]) for row in chunks]
        for (index, which), image_HWC in ends.items():
            expected = np.array(chunks[index][f"{which}_mean_rgb"].split("-"), float)
            assert np.abs(image_HWC.mean((0, 1)) - expected).max() <= 3, chunks[index]


def _chunk_span(row: dict[str, str], rate: Fraction) -> Span:
    left, top, right, bottom = map(int, row["raw_box"].split("-"))
    first, last = int(row["raw_first_frame"]), int(row["raw_last_frame"])
    return Span(float(first / rate), float((last + 1) / rate), (left, top, right, bottom))

"""Images and videos of strangers, animated as a user would: refused for what they are, or done.

What a picture or a video may be is tested beside its reader (tests/kpmask/media); here it is what
becomes of a pair or of a catalog with it, and how much memory it takes at most.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kpmask.config import AnimateJob, Cluster, Credentials, MediaLimits, MediaWorkers, Output
from kpmask.errors import MediaError
from kpmask.media import ffmpeg
from kpmask.media.encode import encode
from kpmask.media.formats import pictures
from kpmask.records import AnimationRecord, Failure, from_table
from tasks.animate import animate_catalog, animate_pair
from tests.support import bad_media, big_catalog
from tests.support.catalogs import inline_catalogs
from tests.support.peak import Peak, peak_of

NUM_FRAMES = 6  # of v0.mp4
MB = 10**6


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images s0.png to s7.png and driving videos v0.mp4 to v3.mp4."""
    folder = tmp_path_factory.mktemp("media")
    big_catalog.write_media(folder)
    return folder


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    inline_catalogs(monkeypatch)


def job_of(media: Path, out: Path, **changed: Any) -> AnimateJob:
    values: dict[str, Any] = {
        "checkpoint": str(media / "w.safetensors"),
        "out": str(out),
        "device": "cpu",
        "credentials": Credentials(enabled=False),
        "cluster": Cluster(num_workers=1),
        "media_workers": MediaWorkers(per_worker=0),
        "max_failed_fraction": 1.0,
    }
    if "catalog" not in changed:
        values |= {"source": str(media / "s0.png"), "driving": str(media / "v0.mp4")}
    return AnimateJob(**(values | changed))


def code_of(job: AnimateJob) -> str:
    """With what code a pair is refused; nothing is written for it."""
    out = Path(job.out)
    with pytest.raises(MediaError) as caught:
        animate_pair(job)
    assert not out.exists()
    assert not list(out.parent.glob("*tmp*"))
    return caught.value.code


def table(path: Path, rows: list[tuple[Path, Path, str]]) -> str:
    lines = [f'"{source}","{driving}",{name}' for source, driving, name in rows]
    path.write_text("\n".join(["source,driving,name", *lines]) + "\n")
    return str(path)


def made(out: Path) -> dict[str, AnimationRecord]:
    records = from_table(pq.read_table(out / "manifest.parquet"), AnimationRecord)
    return {record.name: record for record in records}


def lost(out: Path) -> dict[str, str]:
    failures = from_table(pq.read_table(out / "failures.parquet"), Failure)
    return {failure.item: failure.code for failure in failures}


# --- what points elsewhere -------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An address on this machine, and what was asked of it."""
    with bad_media.listening() as found:
        yield found


def test_nothing_that_a_text_names_is_opened(
    media: Path, tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    """Playlists, pictures with addresses and the like, whatever they are called."""
    address, asked = server
    targets = {
        "passwd": "file:///etc/passwd",
        "address": f"{address}/a.ts",
        "video": str(media / "v0.mp4"),
    }
    rows = []
    for name, target in targets.items():
        for kind, text in bad_media.playlists(target).items():
            for number, suffix in enumerate(("mp4", "png", "gif")):
                path = tmp_path / f"{name}-{kind}.{suffix}"
                path.write_text(text + "\n" * number)  # equal ones would be one animation
                rows.append((path, media / "v0.mp4", f"image-{path.name}"))
                rows.append((media / "s0.png", path, f"video-{path.name}"))
    out = tmp_path / "out"
    animate_catalog(job_of(media, out, catalog=table(tmp_path / "c.csv", rows), audio=True))
    assert made(out) == {}
    assert set(lost(out).values()) == {"not_media"}
    assert len(lost(out)) == len(rows)
    assert asked == []


def test_nor_by_a_pair(media: Path, tmp_path: Path, server: tuple[str, list[str]]) -> None:
    address, asked = server
    path = tmp_path / "a.mp4"
    path.write_text(bad_media.playlists(f"{address}/a.ts")["hls"])
    for given in ({"source": str(path)}, {"driving": str(path), "audio": True}):
        assert code_of(job_of(media, tmp_path / "out.mp4", **given)) == "not_media"
    assert asked == []


def test_such_texts_are_followed_without_fences(
    media: Path, tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    """So that the test before this one has teeth."""
    address, asked = server
    path = tmp_path / "a.m3u8"
    path.write_text(bad_media.playlists(f"{address}/teeth.ts")["hls"])
    fences = ["-protocol_whitelist", "file,http,tcp", "-allowed_extensions", "ALL"]
    argv = [ffmpeg.binary(), "-nostdin", *fences, "-i", str(path), "-f", "null", "-"]
    subprocess.run(argv, check=False, capture_output=True, timeout=60)
    assert asked and set(asked) == {"/teeth.ts"}
    asked.clear()


def test_a_video_whose_frames_lie_elsewhere(media: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    path.write_bytes(bad_media.pointing_elsewhere(media / "v0.mp4", media / "v0.mp4"))
    given = {"driving": str(path), "audio": True}
    assert code_of(job_of(media, tmp_path / "out.mp4", **given)) in {"no_frames", "no_keyframe"}
    # Without fences they are found.
    fences = ["-enable_drefs", "1", "-use_absolute_path", "1"]
    argv = [ffmpeg.binary(), "-nostdin", *fences, "-i", str(path), "-f", "null", "-"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60)
    assert int(done.stderr.rpartition("frame=")[2].split()[0]) == NUM_FRAMES


def test_odd_names_are_only_names(media: Path, tmp_path: Path) -> None:
    """Of files, where libav and a shell see more in them, and of rows."""
    names = [
        *("concat:a|b.mp4", "%03d.mp4", "-i.mp4", "http:x.mp4", "a b#c?*[0].mp4", "ü…漢.mp4"),
        *("$(touch x).mp4", "';&.mp4", "e\u0301.mp4", "\u00e9.mp4", "x" * 240 + ".mp4"),
    ]
    for number, name in enumerate(names):  # no two are equal, or they would be one animation
        (tmp_path / name).write_bytes((media / "v0.mp4").read_bytes() + b"\0" * (8 + number))
    rows = [
        (media / "s0.png", tmp_path / name, f"../{'n' * 300}/{i}") for i, name in enumerate(names)
    ]
    out = tmp_path / "out"
    job = job_of(media, out, catalog=table(tmp_path / "c.csv", rows), audio=True)
    manifest = animate_catalog(job)
    assert (manifest.num_items, manifest.num_failures) == (len(names), 0)
    records = made(out).values()
    assert {record.driving for record in records} == {str(tmp_path / name) for name in names}
    assert {path.name for path in out.glob("*.mp4")} == {record.key for record in records}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "out", "c.csv", "cache"}


# --- what claims too much --------------------------------------------------------------------

PACKED_BYTES = 2**28
SMALL = MediaLimits(max_side_px=1024)


@pytest.fixture(scope="module")
def bad_images(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, each named by what should become of it."""
    folder = tmp_path_factory.mktemp("images")
    good, packed = (media / "s0.png").read_bytes(), bad_media.zeros(PACKED_BYTES)
    some = bad_media.zeros(2**19)  # each of them is allowed
    many = [bad_media.chunk(b"zTXt", b"%d\0\0" % i + some) for i in range(300)]
    at = good.index(b"IDAT") - 4
    svg = bad_media.playlists("https://example.org/x.png")["svg"].encode()
    bad = {
        "dimensions_over_limit.huge": bad_media.png_of_zeros(20_000, 20_000),
        "dimensions_over_limit.wide": bad_media.png_of_zeros(1025, 64),
        "too_small.dot": bad_media.png_of_zeros(1, 1),
        "too_large.text": bad_media.with_chunk(good, b"tEXt", b"a\0" + b"x" * (64 * MB)),
        "too_large.unknown": bad_media.with_chunk(good, b"xxXx", b"x" * (64 * MB)),
        "decode_errors.profile": bad_media.with_chunk(good, b"iCCP", b"p\0\0" + packed),
        "decode_errors.text": bad_media.with_chunk(good, b"zTXt", b"p\0\0" + packed),
        "decode_errors.late": bad_media.with_chunk(
            good, b"zTXt", b"p\0\0" + packed, before=b"IEND"
        ),
        "decode_errors.itxt": bad_media.with_chunk(good, b"iTXt", b"p\0\1\0en\0p\0" + packed),
        "decode_errors.texts": good[:at] + b"".join(many) + good[at:],
        "not_media.svg": svg,
        "not_media.xml": b'<?xml version="1.0"?>' + svg,
        "not_media.zip": bad_media.with_zip(b""),
        "ok.zip": bad_media.with_zip(good),
        "ok.apng": bad_media.with_chunk(good, b"acTL", bytes([0x7F, *[255] * 3, 0, 0, 0, 0])),
        "ok.gif": bad_media.gif_of_dots(100_000, canvas_px=64),
    }
    for name, data in bad.items():
        (folder / f"{name}.png").write_bytes(data)
    return folder


def test_images_that_claim_too_much(media: Path, bad_images: Path, tmp_path: Path) -> None:
    """Each is refused for what it is, and none is unpacked to see it."""
    paths = sorted(bad_images.iterdir())
    rows = [(path, media / "v0.mp4", path.stem) for path in paths]
    good = [(media / "s0.png", media / "v0.mp4", "ok.alone")]
    alone = table(tmp_path / "alone.csv", good)
    catalog = table(tmp_path / "c.csv", [*good, *rows])
    base = peak_of(job_of(media, tmp_path / "alone", catalog=alone, limits=SMALL))
    peak = peak_of(job_of(media, tmp_path / "out", catalog=catalog, limits=SMALL))
    wanted = {path.stem for path in paths} | {"ok.alone"}
    assert set(made(tmp_path / "out")) == {name for name in wanted if name.startswith("ok.")}
    assert lost(tmp_path / "out") == {
        name: name.partition(".")[0] for name in wanted if not name.startswith("ok.")
    }
    assert peak.peak_bytes < base.peak_bytes + 150 * MB, "unpacked they have 268 MB and more"


def test_an_image_as_large_as_its_limit_is_read(media: Path, tmp_path: Path) -> None:
    """The limit of a picture's file leaves room for pixels that are not packed at all."""
    levels_HWC = np.random.default_rng(0).integers(0, 2**16, (1024, 1024, 3), np.uint16)
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 1024 1024 65535\n" + levels_HWC.astype(">u2").tobytes())
    rgba = tmp_path / "b.tiff"
    Image.fromarray(levels_HWC.view(np.uint8)[..., :4].copy(), "RGBA").save(rgba)
    for source in (path, rgba):
        job = job_of(media, tmp_path / "out.mp4", source=str(source), limits=SMALL)
        assert animate_pair(job).num_frames == NUM_FRAMES


def black(path: Path, size_px: tuple[int, int], count: int, codec: str = "libx264") -> Path:
    """A video of black frames, however large, soon made; width, height."""
    options = {"preset": "ultrafast"} if codec == "libx264" else {"deadline": "realtime"}
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = size_px
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        frame = av.VideoFrame(*size_px, stream.pix_fmt)
        for plane in frame.planes:
            plane.update(bytes([16 if plane is frame.planes[0] else 128]) * plane.buffer_size)
        for number in range(count):
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def eight_k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("8k")
    for name, codec in (("a.mp4", "libx264"), ("a.avi", "mjpeg"), ("a.mkv", "libvpx-vp9")):
        black(folder / name, (7680, 4320), 3, codec)
    (folder / "a.gif").write_bytes(bad_media.gif_of_dots(3, canvas_px=7680))
    return folder


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.gif"])
def test_8k_is_refused_for_its_size(name: str, eight_k: Path, media: Path, tmp_path: Path) -> None:
    """And not as damage, which is all that some decoders say of frames that they refuse."""
    job = job_of(media, tmp_path / "out.mp4", driving=str(eight_k / name))
    with pytest.raises(MediaError, match=r"7680x\d+, and the limit is 4096 px a side") as caught:
        animate_pair(job)
    assert caught.value.code == "dimensions_over_limit"


def test_8k_is_animated_where_the_limit_is_raised(
    eight_k: Path, media: Path, tmp_path: Path
) -> None:
    base = peak_of(job_of(media, tmp_path / "a.mp4"))
    raised = MediaLimits(max_side_px=7680)
    driving = str(eight_k / "a.mp4")
    peak = peak_of(job_of(media, tmp_path / "b.mp4", driving=driving, limits=raised))
    assert (peak.code, peak.num_frames) == ("", 3)
    # A frame has 50 MB, and a decoder of H.264 keeps a few.
    assert peak.peak_bytes < base.peak_bytes + 450 * MB


def test_a_gif_of_dots(media: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(bad_media.gif_of_dots(100_000, canvas_px=1))
    assert code_of(job_of(media, tmp_path / "out.mp4", driving=str(path))) == "too_small"
    path.write_bytes(bad_media.gif_of_dots(100_000, canvas_px=64))
    few = MediaLimits(max_frames=200)
    job = job_of(media, tmp_path / "out.mp4", driving=str(path), limits=few)
    assert code_of(job) == "frames_over_limit"
    path.write_bytes(bad_media.gif_of_dots(200, canvas_px=64))
    assert animate_pair(job).num_frames == 200


# --- videos that are long, quick, uneven or broken -------------------------------------------


def film(count: int, *, seed: int = 0) -> np.ndarray:
    """Coarse noise, 80x64."""
    noise = np.random.default_rng(seed).integers(0, 255, (count, 8, 10, 3), np.uint8)
    return noise.repeat(8, axis=1).repeat(8, axis=2)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("as_catalog", [False, True])
def test_two_hours_take_the_memory_of_ten_seconds(
    as_catalog: bool, media: Path, tmp_path: Path
) -> None:
    """With the usual limits."""
    encode(tmp_path / "short.mp4", film(50), fps=5)
    bad_media.write_looped(tmp_path / "short.mp4", tmp_path / "long.mp4", times=720)
    peaks: list[Peak] = []
    for name in ("short", "long"):
        given: dict[str, Any] = {"driving": str(tmp_path / f"{name}.mp4")}
        out = tmp_path / f"{name}-out.mp4"
        if as_catalog:
            row = (media / "s0.png", tmp_path / f"{name}.mp4", name)
            given, out = {"catalog": table(tmp_path / "c.csv", [row])}, tmp_path / name
        peaks.append(peak_of(job_of(media, out, batch_size=32, **given), timeout_s=1700))
    short, long = peaks
    assert (short.code, short.num_frames) == ("", 50)
    assert (long.code, long.num_frames) == ("", 36_000)
    assert long.peak_bytes < 1.1 * short.peak_bytes


def test_240_frames_a_second(media: Path, tmp_path: Path) -> None:
    encode(tmp_path / "v.mp4", film(48), fps=240)
    driving = {"driving": str(tmp_path / "v.mp4")}
    video = animate_pair(job_of(media, tmp_path / "a.mp4", **driving))
    assert (video.fps, video.num_frames) == (240, 48)
    slower = animate_pair(job_of(media, tmp_path / "b.mp4", **driving, output=Output(fps=60)))
    assert (slower.fps, slower.num_frames) == (60, 12)


def uneven(path: Path, frames_THWC: np.ndarray, times_s: list[Fraction]) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image_HWC, time_s in zip(frames_THWC, times_s, strict=True):
            frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24")
            frame.pts, frame.time_base = int(time_s * 1000), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def test_an_uneven_rate_keeps_its_times(media: Path, tmp_path: Path) -> None:
    """Against ffmpeg: a video of the frames that it shows at each time is animated alike."""
    steps = np.random.default_rng(2).integers(1, 6, 29)
    times_s = [Fraction(int(ticks), 20) for ticks in np.cumsum([0, *steps])]
    path = uneven(tmp_path / "v.mp4", film(30), times_s)
    even = tmp_path / "even.mkv"
    shown = ["-vf", "fps=20", "-c:v", "libx264", "-crf", "0"]
    argv = [ffmpeg.binary(), "-nostdin", "-v", "error", "-i", str(path), *shown, str(even)]
    subprocess.run(argv, check=True, timeout=60)
    found = []
    for driving in (path, even):
        job = job_of(media, tmp_path / "a.zip", driving=str(driving), output=Output(fps=20))
        animate_pair(job)
        found.append(list(pictures(tmp_path / "a.zip")))
    assert len(found[0]) == pytest.approx(times_s[-1] * 20 + 1, abs=3)
    for mine, theirs in zip(*found, strict=False):
        np.testing.assert_array_equal(mine, theirs)


def test_a_broken_middle_ends_the_animation_there(media: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), np.uint8)
    encode(tmp_path / "whole.mp4", noise, fps=20)
    with av.open(str(tmp_path / "whole.mp4")) as file:
        entry = file.streams.video[0].index_entries[30]
    data = bytearray((tmp_path / "whole.mp4").read_bytes())
    data[entry.pos : entry.pos + 400] = np.random.default_rng(3).bytes(400)
    (tmp_path / "broken.mp4").write_bytes(data)
    rows = [(media / "s0.png", tmp_path / f"{n}.mp4", n) for n in ("whole", "broken")]
    out = tmp_path / "out"
    output = Output(format="png")
    animate_catalog(job_of(media, out, catalog=table(tmp_path / "c.csv", rows), output=output))
    records = made(out)
    whole, broken = (list(pictures(out / records[n].key)) for n in ("whole", "broken"))
    assert len(whole) == 60
    assert 2 <= len(broken) <= 31
    assert records["broken"].num_frames_lost == 60 - len(broken)
    for theirs, mine in zip(whole, broken, strict=False):
        np.testing.assert_array_equal(theirs, mine)

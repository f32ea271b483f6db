"""Files of every form, read back with other programs: frames, times, colours, wholeness."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image as PilImage

from kpmask.config import MediaLimits
from kpmask.errors import MediaError
from kpmask.media import decode
from kpmask.media.encode import encode
from kpmask.media.ffmpeg import copy_audio
from kpmask.media.formats import pictures, write
from kpmask.media.probe import probe
from kpmask.records import SUFFIXES, OutputFormat

LIMITS = MediaLimits(min_side_px=8)
FORMS: list[OutputFormat] = ["mp4", "webm", "gif", "png"]


def film(count: int, *, height_px: int = 41, width_px: int = 50) -> np.ndarray:
    """A block that moves over even colours, on odd sides."""
    frames = np.zeros((count, height_px, width_px, 3), np.uint8)
    frames[..., 0] = np.linspace(40, 200, width_px).astype(np.uint8)
    frames[..., 1] = np.linspace(200, 60, height_px).astype(np.uint8)[:, None]
    frames[..., 2] = 90
    for t in range(count):
        frames[t, 10:22, 2 * t : 2 * t + 12] = (240, 60, 30)
    return frames


def read(path: Path, form: OutputFormat) -> np.ndarray:
    if form == "png":
        return np.stack(list(pictures(path)))
    return np.stack([frame.rgb_HWC for frame in decode.frames(path, LIMITS)])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_frames(form: OutputFormat, tmp_path: Path) -> None:
    frames = film(12)
    path = tmp_path / f"x{SUFFIXES[form]}"
    written = write(path, iter(frames), fps=12.5, form=form)
    assert (written.num_frames, written.fps) == (12, 12.5)
    assert written.size_bytes == path.stat().st_size
    assert not written.has_audio
    back = read(path, form)
    assert (written.height_px, written.width_px) == back.shape[1:3]
    error = np.abs(back[:, :41, :50].astype(int) - frames)
    assert error.mean() < (0.001 if form == "png" else 6)
    assert error[:, :8].mean() < 6  # away from what moves
    again = write(tmp_path / f"y{SUFFIXES[form]}", iter(frames), fps=12.5, form=form)
    assert again.sha256 == written.sha256
    assert [p.name[0] for p in tmp_path.iterdir() if p.name[0] not in "xy"] == []


@pytest.mark.parametrize("form", FORMS)
def test_a_failure_leaves_nothing(form: OutputFormat, tmp_path: Path) -> None:
    path = tmp_path / f"x{SUFFIXES[form]}"

    def broken() -> Iterator[np.ndarray]:
        yield from film(2)
        raise MediaError("the driving video is damaged", code="truncated")

    with pytest.raises(MediaError, match="damaged"):
        write(path, broken(), fps=10, form=form)
    with pytest.raises(MediaError) as caught:
        write(path, [], fps=10, form=form)
    assert caught.value.code == "no_frames"
    with pytest.raises(ValueError, match="frame of"):
        write(path, [film(1)[0], film(1, width_px=48)[0]], fps=10, form=form)
    assert list(tmp_path.iterdir()) == []


def test_mp4_is_what_encode_writes(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", film(4), fps=Fraction(30000, 1001))
    encode(tmp_path / "b.mp4", film(4), fps=29.97)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_webm_is_vp9_with_the_colours_said(tmp_path: Path) -> None:
    write(tmp_path / "x.webm", film(4), fps=25, form="webm")
    with av.open(str(tmp_path / "x.webm")) as file:
        assert "webm" in file.format.name
        context = file.streams.video[0].codec_context
        assert context.name in {"vp9", "libvpx-vp9"}
        assert context.pix_fmt == "yuv420p"
        frame = next(file.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, limited


@pytest.mark.parametrize("fps", [10, 30, 50, 29.97])
def test_a_gifs_clock_does_not_drift(fps: float, tmp_path: Path) -> None:
    frames = film(16)
    write(tmp_path / "x.gif", frames, fps=fps, form="gif")
    with PilImage.open(tmp_path / "x.gif") as image:
        assert image.info["loop"] == 0  # for ever
        assert image.n_frames == 16
        delays_ms = []
        for number in range(16):
            image.seek(number)
            delays_ms.append(image.info["duration"])
    ends_ms = np.cumsum(delays_ms)[:-1]
    np.testing.assert_allclose(ends_ms, 1000 / fps * np.arange(1, 16), atol=5.1)


def test_a_gifs_palette_is_one_for_all(tmp_path: Path) -> None:
    frames = film(10)
    write(tmp_path / "x.gif", frames, fps=10, form="gif")
    back = read(tmp_path / "x.gif", "gif")
    colours = np.unique(back.reshape(-1, 3), axis=0)
    assert len(colours) <= 256
    # what does not move does not flicker
    assert (back[:, 30:] == back[0, 30:]).all()


def test_a_gif_of_frames_that_are_all_the_same(tmp_path: Path) -> None:
    write(tmp_path / "x.gif", film(1).repeat(6, axis=0), fps=10, form="gif")
    back = read(tmp_path / "x.gif", "gif")
    assert len(back) == 6
    assert (back == back[0]).all()


def test_a_gif_that_is_too_fast_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="50"):
        write(tmp_path / "x.gif", film(2), fps=60, form="gif")


def test_a_zip_is_numbered_pictures_and_the_rate(tmp_path: Path) -> None:
    frames = film(11)
    write(tmp_path / "x.zip", frames, fps=29.97, form="png")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        names = archive.namelist()
        assert names == [*(f"{n:06d}.png" for n in range(11)), "sequence.json"]
        about = json.loads(archive.read("sequence.json"))
        assert (about["num_frames"], about["rate"]) == (11, "30000/1001")
        for frame, name in zip(frames, names, strict=False):
            with PilImage.open(io.BytesIO(archive.read(name))) as image:
                np.testing.assert_array_equal(np.array(image), frame)


@pytest.mark.parametrize("codec", ["aac", "libopus"])
def test_sound_in_webm_is_opus(codec: str, tmp_path: Path) -> None:
    write(tmp_path / "v.webm", film(20), fps=10, form="webm")
    rate = 48000
    with av.open(str(tmp_path / "d.mkv"), "w") as file:
        stream: Any = file.add_stream(codec, rate=rate, layout="mono")
        wave = (8000 * np.sin(np.arange(3 * rate) * 2 * np.pi * 440 / rate)).astype(np.int16)
        video = file.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 50, 40, "yuv420p"
        for frame in film(30, height_px=40):
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        sound.rate, sound.pts = rate, 0
        resampler = av.AudioResampler(stream.format, "mono", rate, frame_size=stream.frame_size)
        for part in [*resampler.resample(sound), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    written = copy_audio(
        tmp_path / "v.webm", tmp_path / "d.mkv", tmp_path / "out.webm", duration_s=2.0
    )
    assert written.has_audio
    assert written.num_frames == 20
    with av.open(str(tmp_path / "out.webm")) as file:
        assert file.streams.audio[0].codec_context.name in {"opus", "libopus"}
        assert float(file.duration or 0) / 1e6 == pytest.approx(2.0, abs=0.1)
    assert probe(tmp_path / "out.webm", LIMITS).has_audio

"""The command-line job: sound carried over, files made seekable, failures told."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from kpmask.config import MediaLimits
from kpmask.errors import MediaError, StorageError
from kpmask.media import ffmpeg as job
from kpmask.media.decode import Span, frames, spans
from kpmask.media.encode import encode
from kpmask.media.ffmpeg import copy_audio, normalise
from kpmask.media.probe import can_seek, probe

LIMITS = MediaLimits()


@pytest.fixture
def video(tmp_path: Path, kit: SimpleNamespace) -> Path:
    """2 s of picture without sound."""
    path = tmp_path / "picture.mp4"
    encode(path, (kit.barcode(index) for index in range(50)), fps=25)
    return path


def _packets(path: Path, kind: str) -> list[bytes]:
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        return [bytes(packet) for packet in container.demux(stream) if packet.size]


def _sound(path: Path) -> tuple[np.ndarray, int]:
    """All samples of the first sound track, mono, and their rate."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(stream)]
        return np.concatenate(parts), stream.rate


def _beeping(path: Path, kit: SimpleNamespace, codec: str, *extra: str) -> Path:
    """3 s of picture with silence that turns into a tone at 1.5 s."""
    kit.ffmpeg(
        "-f", "lavfi", "-i", "testsrc=size=128x96:rate=25:duration=3",
        "-f", "lavfi", "-i", "aevalsrc='if(gt(t,1.5),sin(2*PI*1000*t),0)':s=48000:d=3",
        *extra, "-c:v", "libx264", "-c:a", codec, path,
    )  # fmt: skip
    return path


def _onset_s(path: Path) -> float:
    samples, rate = _sound(path)
    return float(np.argmax(np.abs(samples) > 0.3 * np.abs(samples).max()) / rate)


@pytest.mark.parametrize(
    ("name", "codec", "kept"),
    [("a.mp4", "aac", True), ("a.mkv", "libopus", False), ("a.avi", "pcm_s16le", False)],
)
def test_sound_is_carried_over(
    name: str, codec: str, kept: bool, video: Path, tmp_path: Path, kit: SimpleNamespace
) -> None:
    driving = _beeping(tmp_path / name, kit, codec)
    written = copy_audio(video, driving, tmp_path / "out.mp4", duration_s=2.0)
    assert written.has_audio
    assert (written.num_frames, written.fps) == (50, 25.0)
    assert _packets(tmp_path / "out.mp4", "video") == _packets(video, "video")
    with av.open(str(tmp_path / "out.mp4")) as container:
        (sound,) = container.streams.audio
        assert sound.codec_context.codec.canonical_name == "aac"
        assert float(sound.duration * sound.time_base) == pytest.approx(2.0, abs=0.05)
    assert _onset_s(tmp_path / "out.mp4") == pytest.approx(1.5, abs=0.05)
    if kept:
        theirs = _packets(driving, "audio")
        ours = _packets(tmp_path / "out.mp4", "audio")
        assert ours == theirs[: len(ours)]
    again = copy_audio(video, driving, tmp_path / "again.mp4", duration_s=2.0)
    assert again == written


def test_sound_starts_with_the_first_frame(
    video: Path, tmp_path: Path, kit: SimpleNamespace
) -> None:
    """The picture of this file starts 0.5 s after its sound."""
    kit.ffmpeg(
        "-itsoffset", "0.5", "-f", "lavfi", "-i", "testsrc=size=128x96:rate=25:duration=2",
        "-f", "lavfi", "-i", "aevalsrc='if(gt(t,1.5),sin(2*PI*1000*t),0)':s=48000:d=3",
        "-c:v", "libx264", "-c:a", "aac", tmp_path / "late.mkv",
    )  # fmt: skip
    copy_audio(video, tmp_path / "late.mkv", tmp_path / "out.mp4", duration_s=2.0)
    assert _onset_s(tmp_path / "out.mp4") == pytest.approx(1.0, abs=0.05)


def test_short_sound_does_not_shorten_the_picture(
    video: Path, tmp_path: Path, kit: SimpleNamespace
) -> None:
    kit.ffmpeg(
        "-f", "lavfi", "-i", "testsrc=size=128x96:rate=25:duration=1",
        "-f", "lavfi", "-i", "sine=duration=0.5", "-c:v", "libx264", "-c:a", "aac",
        tmp_path / "short.mp4",
    )  # fmt: skip
    written = copy_audio(video, tmp_path / "short.mp4", tmp_path / "out.mp4", duration_s=2.0)
    assert (written.num_frames, written.has_audio) == (50, True)


def test_a_source_without_sound(video: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for source in (video, tmp_path / "folder"):
        written = copy_audio(video, source, tmp_path / "out.mp4", duration_s=2.0)
        assert not written.has_audio
        assert (tmp_path / "out.mp4").read_bytes() == video.read_bytes()


@pytest.mark.parametrize("name", ["v.avi", "v.h264", "v.mpg", "v.ts"])
def test_normalised_files_can_be_sought(name: str, tmp_path: Path, kit: SimpleNamespace) -> None:
    source = kit.write_video(
        tmp_path / name,
        (kit.barcode(index) for index in range(150)),
        codec="mpeg2video" if name == "v.mpg" else "libx264",
        options={"bf": "2", "q": "2"},
    )
    assert not can_seek(source, LIMITS)
    written = normalise(source, tmp_path / "out.mp4")
    assert (written.num_frames, written.fps) == (150, 25.0)
    assert can_seek(tmp_path / "out.mp4", LIMITS)
    wanted = [Span(0.2, 0.4), Span(5.0, 5.2)]
    for path in (source, tmp_path / "out.mp4"):
        shown = [kit.number_of(f.rgb_HWC) for _, f in spans(path, LIMITS, wanted)]
        assert shown == [*range(5, 10), *range(125, 130)]
    assert normalise(source, tmp_path / "again.mp4") == written


def test_normalised_is_upright_odd_and_close(tmp_path: Path, kit: SimpleNamespace) -> None:
    images = [kit.barcode(index, width_px=125, height_px=95) for index in range(5)]
    plain = kit.write_video(tmp_path / "p.mp4", images, pix_fmt="yuv444p")
    turned = tmp_path / "t.mp4"
    kit.ffmpeg("-display_rotation", "90", "-i", plain, "-c", "copy", turned)
    normalise(turned, tmp_path / "out.mp4")
    found = probe(tmp_path / "out.mp4", LIMITS)
    assert (found.width_px, found.height_px, found.rotation_deg) == (95, 125, 0)
    pairs = zip(frames(turned, LIMITS), frames(tmp_path / "out.mp4", LIMITS), strict=True)
    for before, after in pairs:
        assert np.abs(before.rgb_HWC.astype(int) - after.rgb_HWC).mean() < 2


# --- failures --------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a shell script in the place of the ffmpeg program."""

    def use(script: str) -> None:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return use


def test_failures(video: Path, tmp_path: Path, program: Callable[[str], None]) -> None:
    out = tmp_path / "out.mp4"
    program("echo 'first line' >&2; echo 'the last words' >&2; exit 3")
    with pytest.raises(MediaError, match=r"first line \| the last words") as caught:
        normalise(video, out)
    assert caught.value.code == "ffmpeg_failed"
    program("echo 'av_interleaved_write_frame(): No space left on device' >&2; exit 228")
    with pytest.raises(StorageError) as full:
        normalise(video, out)
    assert full.value.code == "no_space"
    program("exec sleep 60")
    with pytest.raises(MediaError, match=r"more than 0\.2 s"):
        normalise(video, out, timeout_s=0.2)
    program("exit 0")  # claims success and writes nothing
    with pytest.raises(MediaError, match="read back"):
        normalise(video, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["picture.mp4", "program"]


def test_the_argument_list(video: Path, tmp_path: Path, program: Callable[[str], None]) -> None:
    program(f'printf "%s\\n" "$@" > {tmp_path}/arguments; cat > {tmp_path}/stdin; exit 1')
    with pytest.raises(MediaError):
        normalise(video, tmp_path / "out.mp4")
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[0] == "-nostdin"
    before_input = arguments[: arguments.index("-i")]
    assert before_input[before_input.index("-protocol_whitelist") + 1] == "file,pipe"
    allowed = before_input[before_input.index("-format_whitelist") + 1].split(",")
    assert not {"hls", "concat", "dash", "image2"} & set(allowed)
    assert arguments[arguments.index("-i") + 1] == f"file:{video}"
    assert (tmp_path / "stdin").read_bytes() == b""


def test_a_damaged_source_is_not_normalised(
    tmp_path: Path, video: Path, kit: SimpleNamespace
) -> None:
    data = bytearray(video.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = np.random.default_rng(1).integers(0, 256, 300, np.uint8).tobytes()
    path = tmp_path / "hurt.mp4"
    path.write_bytes(data)
    with pytest.raises(MediaError) as caught:
        normalise(path, tmp_path / "out.mp4")
    assert caught.value.code == "ffmpeg_failed"
    assert not (tmp_path / "out.mp4").exists()


def test_no_program(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(job.imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(MediaError, match="IMAGEIO_FFMPEG_EXE"):
        normalise(video, tmp_path / "out.mp4")

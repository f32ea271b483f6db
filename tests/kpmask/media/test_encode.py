"""What is written: which frames, which colours, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image, ImageFilter

from kpmask.config import MediaLimits
from kpmask.errors import MediaError
from kpmask.media.decode import frames
from kpmask.media.encode import encode, verify

LIMITS = MediaLimits()


def test_frames_rate_and_container(tmp_path: Path, kit: SimpleNamespace) -> None:
    path = tmp_path / "out.mp4"
    images = [kit.barcode(index) for index in range(40)]
    written = encode(path, iter(images), fps=29.97)
    assert (written.num_frames, written.width_px, written.height_px) == (40, 128, 96)
    assert written.size_bytes == path.stat().st_size
    assert not written.has_audio
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(30000, 1001)
        context = stream.codec_context
        assert (context.codec.canonical_name, context.pix_fmt) == ("h264", "yuv420p")
        tags = (context.colorspace, context.color_primaries, context.color_trc)
        assert (*tags, context.color_range) == (1, 1, 1, 1)  # BT.709, limited range
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    shown = kit.ffmpeg_rgb(path, (128, 96))
    assert [kit.number_of(image_HWC) for image_HWC in shown] == list(range(40))
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_equal_frames_give_equal_bytes(tmp_path: Path, kit: SimpleNamespace) -> None:
    written = [
        encode(tmp_path / f"{name}.mp4", (kit.barcode(i) for i in range(30)), fps=Fraction(25))
        for name in ("a", "b")
    ]
    assert written[0] == written[1]
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_moving_texture_gives_equal_bytes_time_and_again(tmp_path: Path) -> None:
    """x264's AVX-512 code for macroblock trees gave up to six other files in a dozen."""
    square_HWC = np.random.default_rng(20).integers(64, 255, (8, 8, 3), np.uint8)
    square_HWC = square_HWC.repeat(4, 0).repeat(4, 1)
    images = []
    for i in range(16):
        image_HWC = np.zeros((64, 96, 3), np.uint8) + np.arange(96, dtype=np.uint8)[:, None]
        image_HWC[16:48, i : i + 32] = square_HWC
        images.append(image_HWC)
    found = set()
    for _ in range(12):
        found.add(encode(tmp_path / "a.mp4", images, fps=25.0).sha256)
    assert len(found) == 1


def test_colours_survive(tmp_path: Path, kit: SimpleNamespace) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(4))
    soft_HWC = np.clip((np.asarray(image).astype(float) - 127) * 4 + 127, 0, 255).astype(np.uint8)
    encode(tmp_path / "v.mp4", [soft_HWC] * 3, fps=25, crf=1)
    (ours, *_) = [frame.rgb_HWC for frame in frames(tmp_path / "v.mp4", LIMITS)]
    difference = ours.astype(float) - soft_HWC
    assert np.abs(difference).mean() < 2
    assert np.abs(difference.mean((0, 1))).max() < 0.3  # no channel is brighter or darker
    theirs = kit.ffmpeg_rgb(tmp_path / "v.mp4", (120, 90))[0].astype(float) - soft_HWC
    assert np.abs(theirs).mean() < 2
    for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 60, 30)]:
        encode(tmp_path / "c.mp4", [np.full((64, 64, 3), colour, np.uint8)] * 2, fps=25)
        (flat, *_) = [frame.rgb_HWC for frame in frames(tmp_path / "c.mp4", LIMITS)]
        assert np.abs(flat.astype(int) - colour).max() <= 2, colour


def test_odd_sides_are_padded_by_repeating(tmp_path: Path, kit: SimpleNamespace) -> None:
    odd = [kit.barcode(index, width_px=125, height_px=93) for index in range(3)]
    written = encode(tmp_path / "v.mp4", odd, fps=25)
    assert (written.width_px, written.height_px) == (126, 94)
    (first, *_) = [frame.rgb_HWC for frame in frames(tmp_path / "v.mp4", LIMITS)]
    assert kit.number_of(first[:93, :125]) == 0
    assert np.abs(first[-1].astype(int) - first[-2]).mean() < 8


@pytest.mark.parametrize("fps", [Fraction(25, 2), 1.0, 20.16129, 120.0, 1000.0, 0.5])
def test_rates(fps: Fraction | float, tmp_path: Path, kit: SimpleNamespace) -> None:
    written = encode(tmp_path / "v.mp4", [kit.barcode(i) for i in range(10)], fps=fps)
    assert written.fps == pytest.approx(float(fps), rel=1e-4)
    times_s = [frame.time_s for frame in frames(tmp_path / "v.mp4", LIMITS)]
    assert times_s == pytest.approx(np.arange(10) / float(fps), rel=1e-3)


def test_nothing_to_encode(tmp_path: Path) -> None:
    with pytest.raises(MediaError) as caught:
        encode(tmp_path / "v.mp4", [], fps=25)
    assert caught.value.code == "no_frames"
    assert list(tmp_path.iterdir()) == []


def test_a_failure_on_the_way_leaves_what_was_there(tmp_path: Path, kit: SimpleNamespace) -> None:
    path = tmp_path / "v.mp4"
    encode(path, [kit.barcode(1)] * 3, fps=25)
    before = path.read_bytes()

    def failing() -> Iterator[np.ndarray]:
        yield kit.barcode(2)
        raise MediaError("cut", code="truncated")

    with pytest.raises(MediaError, match="cut"):
        encode(path, failing(), fps=25)
    with pytest.raises(ValueError, match="among uint8"):
        encode(path, [kit.barcode(2), kit.barcode(2)[:50]], fps=25)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from kpmask.errors import StorageError
from kpmask.media.encode import encode
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
noise = np.random.default_rng(0).integers(0, 256, (60, 128, 128, 3), np.uint8)
try:
    encode(Path(sys.argv[1]), noise, fps=25)
except StorageError as error:
    sys.exit(0 if error.code == "no_space" else str(error))
sys.exit("no error")
"""


@pytest.mark.parametrize("room_bytes", [0, 10_000, 100_000])
def test_a_full_disk(room_bytes: int, tmp_path: Path) -> None:
    """A limit of the file's size stands in for a full disk: the write fails as it would there."""
    argv = [sys.executable, "-c", _FULL_DISK, str(tmp_path / "v.mp4"), str(room_bytes)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_what_is_wrong(tmp_path: Path, kit: SimpleNamespace) -> None:
    path = tmp_path / "v.mp4"
    written = encode(path, [kit.barcode(1)] * 9, fps=25)
    assert verify(path) == written
    with pytest.raises(MediaError, match="9 frames were written of 10"):
        verify(path, num_frames=10)
    path.write_bytes(b"0" * 1000)
    with pytest.raises(MediaError, match="cannot be read back"):
        verify(path)

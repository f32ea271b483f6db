"""Driving videos at another rate and in another crop: what is shown when, and how much is lost."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kpmask.config import MediaLimits
from kpmask.driving import DrivingVideo, paced
from kpmask.errors import MediaError
from kpmask.media import decode
from kpmask.media.decode import Frame
from kpmask.media.encode import encode

LIMITS = MediaLimits(min_side_px=16)
SIDE_PX = 32


def levels(count: int, *, size_px: tuple[int, int] = (48, 40)) -> np.ndarray:
    """Frames that tell their number by how bright they are."""
    frames = np.zeros((count, size_px[1], size_px[0], 3), np.uint8)
    frames[:] = (20 + 5 * np.arange(count))[:, None, None, None] % 230
    return frames


def numbers(frames: Any) -> list[int]:
    return [round((float(frame.mean()) - 20) / 5) for frame in frames]


def times(*times_s: float) -> list[Frame]:
    return [Frame(np.full((1, 1, 3), n, np.uint8), time_s) for n, time_s in enumerate(times_s)]


def shown(frames: list[Frame], rate: Fraction, own_rate: Fraction) -> list[int]:
    return [int(f.rgb_HWC[0, 0, 0]) for f in paced(iter(frames), rate, own_rate=own_rate)]


def of_video(path: Path, **options: Any) -> DrivingVideo:
    return DrivingVideo(path, LIMITS, side_px=SIDE_PX, min_frames=2, **options)


@pytest.mark.parametrize("rate", [1, 7, 10, 24, 25, Fraction(30000, 1001), 60, 240])
@pytest.mark.parametrize("own", [12, 25, Fraction(30000, 1001), 240])
def test_pacing_is_what_is_on_screen_at_each_time(rate: Fraction, own: Fraction) -> None:
    rate, own, count = Fraction(rate), Fraction(own), 37
    frames = times(*[float(n / own) for n in range(count)])
    got = shown(frames, rate, own)
    slack = Fraction(1, 4) / max(rate, own)
    for number, frame in enumerate(got):  # exactly, in fractions
        place = (number / rate + slack) * own
        least, most = (int(place + tie) for tie in (-Fraction(1, 10**9), Fraction(1, 10**9)))
        assert min(least, count - 1) <= frame <= min(most, count - 1)
    slower_s = 1 / min(rate, own)
    assert abs(len(got) / rate - count / own) < slower_s


def test_at_its_own_rate_nothing_changes_whatever_the_clocks_jitter() -> None:
    jitter_s = np.random.default_rng(0).uniform(-0.0005, 0.0005, 50)
    jitter_s[0] = 0
    frames = times(*(np.arange(50) / 60 + jitter_s))
    assert shown(frames, Fraction(60), Fraction(60)) == list(range(50))


def test_uneven_times_are_kept() -> None:
    frames = times(0.0, 0.1, 0.8, 0.9)  # 4 frames in 1 s
    assert shown(frames, Fraction(10), Fraction(10)) == [0, 1, 1, 1, 1, 1, 1, 1, 2, 3]
    assert shown(frames, Fraction(2), Fraction(10)) == [0, 1]
    assert shown(times(0.0), Fraction(1), Fraction(25)) == [0]


@pytest.mark.parametrize(
    ("own", "wanted", "count"),
    [(240, 30, 6), (240, 24, 5), (25, 10, 20), (12.5, 25, 96)],
)
def test_a_video_at_another_rate(own: float, wanted: float, count: int, tmp_path: Path) -> None:
    encode(tmp_path / "v.mp4", levels(50 if own == 25 else 48), fps=own)
    plain, driving = of_video(tmp_path / "v.mp4"), of_video(tmp_path / "v.mp4", fps=wanted)
    frames = list(driving)
    assert driving.fps == wanted
    assert len(frames) == driving.num_frames == driving.num_frames_expected == count
    assert driving.num_frames_lost == 0
    everything = numbers(plain)
    expected = [everything[min(int(n / wanted * own + 0.01), 999)] for n in range(count)]
    assert numbers(frames) == expected
    assert numbers(driving) == expected, "every pass gives the same"


def test_only_what_is_too_fast_is_slowed_down(tmp_path: Path) -> None:
    encode(tmp_path / "fast.mp4", levels(24), fps=240)
    encode(tmp_path / "slow.mp4", levels(6), fps=10)
    fast, slow = (of_video(tmp_path / f"{n}.mp4", max_fps=50.0) for n in ("fast", "slow"))
    assert (fast.fps, len(list(fast))) == (50, 5)
    assert (slow.fps, numbers(slow)) == (10, list(range(6)))


def test_a_crop_is_what_is_given(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 60, 80, 3), dtype=np.uint8)
    encode(tmp_path / "v.mp4", frames, fps=10)
    box = (33, 9, 71, 47)
    expected = decode.frames(tmp_path / "v.mp4", LIMITS, crop_px=box, size_px=(32, 32))
    given = of_video(tmp_path / "v.mp4", crop_px=box)
    for frame, other in zip(given, expected, strict=True):
        np.testing.assert_array_equal(frame, other.rgb_HWC)


def test_a_broken_middle_counts_in_the_videos_own_frames(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    encode(tmp_path / "v.mp4", noise, fps=20)
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    own = of_video(tmp_path / "cut.mp4")
    good = len(list(own))
    driving = of_video(tmp_path / "cut.mp4", fps=10)
    assert len(list(driving)) == pytest.approx(good / 2, abs=1)
    assert good + driving.num_frames_lost == good + own.num_frames_lost == 40
    strict = DrivingVideo(tmp_path / "cut.mp4", LIMITS, side_px=32, min_frames=39, fps=10)
    with pytest.raises(MediaError) as caught:
        list(strict)
    assert caught.value.code in {"truncated", "decode_errors"}


def test_one_frame_is_too_short_at_any_rate(tmp_path: Path) -> None:
    encode(tmp_path / "v.mp4", levels(1), fps=1)
    with pytest.raises(MediaError) as caught:
        list(of_video(tmp_path / "v.mp4", fps=240))
    assert caught.value.code == "too_short"


def test_few_frames_far_apart_do_not_become_endlessly_many(tmp_path: Path) -> None:
    encode(tmp_path / "v.mp4", levels(3), fps=0.5)
    limits = LIMITS.model_copy(update={"max_frames": 100})
    driving = DrivingVideo(tmp_path / "v.mp4", limits, side_px=32, min_frames=2, fps=240)
    with pytest.raises(MediaError) as caught:
        list(driving)
    assert caught.value.code == "frames_over_limit"

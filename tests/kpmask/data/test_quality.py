"""What is measured of a clip: against slow formulas, planted cases and real videos."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pickle
import tracemalloc
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.fft import dctn

from kpmask.config import Clips, MediaLimits, PreprocessJob, Quality, resolve_job
from kpmask.data.crop import crop_box
from kpmask.data.duplicates import look_distances, near_duplicates
from kpmask.data.quality import LOOK_LENGTH, ClipMeter, Measures, check_quality, overlay_share
from kpmask.errors import ConfigError, QualityError
from kpmask.media.decode import Span, frames, spans
from kpmask.media.encode import encode
from kpmask.media.probe import probe
from tests.support.metadata import read_metadata

LIMITS = MediaLimits()
SIDE_PX = 128


def measured(clip: Iterable[np.ndarray]) -> Measures:
    meter = ClipMeter()
    for frame_HWC in clip:
        meter.add(frame_HWC)
    return meter.measures()


@functools.cache
def texture(seed: int, side_px: int = 2 * SIDE_PX, grain_px: float = 1.5) -> np.ndarray:
    """A picture with detail of every size down to a grain, uint8 HWC."""
    noise_HWC = np.random.default_rng(seed).normal(size=(side_px, side_px, 3)).astype(np.float32)
    layers_HWC = sum(cv2.GaussianBlur(noise_HWC, (0, 0), grain_px * k) * k for k in (1, 2, 4, 8))
    layers_HWC = layers_HWC / np.std(layers_HWC)
    return np.clip(128 + 50 * layers_HWC, 0, 255).astype(np.uint8)


def panning(seed: int = 0, num_frames: int = 48) -> list[np.ndarray]:
    """A window that moves over a picture by two pixels a frame."""
    wide_HWC = texture(seed, side_px=SIDE_PX + 2 * num_frames)
    return [
        np.ascontiguousarray(wide_HWC[i : i + SIDE_PX, 2 * i :][:, :SIDE_PX])
        for i in range(num_frames)
    ]


def walking(seed: int, num_frames: int = 48, scene: int = 0) -> list[np.ndarray]:
    """Something that walks about before a still picture."""
    random = np.random.default_rng(seed)
    points = np.cumsum(random.normal(size=(num_frames // 12 + 4, 2)), axis=0)
    points = 90 * (points - points.min(0)) / np.ptp(points, axis=0)
    clip = []
    for i in range(num_frames):
        k, part = divmod(i / 12, 1)
        x, y = points[int(k)] * (1 - part) + points[int(k) + 1] * part
        frame_HWC = texture(scene, SIDE_PX).copy()
        cv2.circle(frame_HWC, (int(x) + 19, int(y) + 19), 18, (230, 180, 150), -1, cv2.LINE_AA)
        clip.append(frame_HWC)
    return clip


def logo_on(clip: list[np.ndarray]) -> list[np.ndarray]:
    marked = [frame_HWC.copy() for frame_HWC in clip]
    for frame_HWC in marked:
        cv2.putText(frame_HWC, "KPTV", (6, 118), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (255,) * 3, 2)
        cv2.putText(frame_HWC, "KPTV", (6, 117), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (0,) * 3, 1)
    return marked


# --- against slow formulas -------------------------------------------------------------------


def luma(frame_HWC: np.ndarray) -> np.ndarray:
    return np.rint(frame_HWC @ [0.299, 0.587, 0.114])


def means(luma_HW: np.ndarray, side_px: int) -> np.ndarray:
    step = luma_HW.shape[0] // side_px
    return luma_HW.reshape(side_px, step, side_px, step).mean((1, 3))


@pytest.mark.parametrize("num_frames", [1, 2, 31, 32, 33, 48, 65, 200])
def test_measures_are_the_formulas(num_frames: int) -> None:
    random = np.random.default_rng(num_frames)
    steps = random.integers(0, 60, num_frames)
    wide_HWC = texture(1)
    clip = [np.ascontiguousarray(wide_HWC[s : s + SIDE_PX, s : s + SIDE_PX]) for s in steps]
    got = measured(iter(clip))

    # The samples: every k-th, for the smallest power of two that makes them 32 at most.
    stride = 2 ** max(0, math.ceil(math.log2(num_frames / 32)))
    samples = [luma(frame_HWC) for frame_HWC in clip[::stride]]
    assert len(samples) == num_frames or 16 <= len(samples) <= 32
    sharpness = []
    for luma_HW in samples:
        wide_HW = np.pad(luma_HW, 1, mode="reflect")
        around = wide_HW[:-2, 1:-1] + wide_HW[2:, 1:-1] + wide_HW[1:-1, :-2] + wide_HW[1:-1, 2:]
        sharpness.append(np.var(around - 4 * luma_HW))
    assert got.sharpness == pytest.approx(np.median(sharpness), rel=1e-2)
    assert got.brightness == pytest.approx(np.mean(samples) / 255, abs=1e-3)
    grids = [means(luma(frame_HWC), 64) for frame_HWC in clip]
    changes = [np.abs(a - b).mean() / 255 for a, b in itertools.pairwise(grids)] or [0.0]
    assert got.motion == pytest.approx(np.mean(changes), abs=2e-3)
    assert got.jump == pytest.approx(np.max(changes), abs=2e-3)
    # A coefficient may be next to 0.
    slow = slow_look(np.stack(samples), stride, num_frames)
    assert sum(look_distances(got.look, slow)) <= 2


def slow_look(samples_THW: np.ndarray, stride: int, num_frames: int) -> str:
    """Hashes by SciPy's cosine transform."""
    small_THW = np.stack([np.rint(means(sample_HW, 32)) for sample_HW in samples_THW])
    blends = []
    for quarter in range(4):
        weights = [
            max(0.0, 1 - abs(4 * (i + 0.5) * stride / num_frames - quarter - 0.5)) + 1e-6
            for i in range(len(samples_THW))
        ]
        blends.append(np.average(small_THW, axis=0, weights=weights))
    pictures = [small_THW.mean(axis=0)]
    for before_HW, after_HW in itertools.pairwise(blends):
        change_HW = after_HW - before_HW
        pictures.append(change_HW if change_HW.std() >= 0.5 else after_HW)
    hashes = []
    for picture_HW in pictures:
        low = dctn(picture_HW, norm="ortho")[:8, :8].ravel()
        hashes.append(sum(1 << (63 - i) for i in range(1, 64) if low[i] > 0))
    return "".join(f"{value:016x}" for value in hashes)


def test_overlay_is_its_formula() -> None:
    clip_THW = np.stack([luma(frame_HWC) for frame_HWC in logo_on(panning())]).astype(np.uint8)
    mean_HW, deviation_HW = clip_THW.mean(axis=0), clip_THW.std(axis=0)
    wide_HW = np.pad(mean_HW, 1, mode="reflect")
    moving_HW = np.pad((deviation_HW > 8).astype(float), 24, mode="reflect")
    count = 0
    for y, x in np.ndindex(SIDE_PX, SIDE_PX):
        about_HW = wide_HW[y : y + 3, x : x + 3]
        across = (about_HW[:, 2] - about_HW[:, 0]) @ [1, 2, 1] / 8
        down = (about_HW[2] - about_HW[0]) @ [1, 2, 1] / 8
        on_edge = math.hypot(across, down) > 16 and deviation_HW[y, x] < 4
        count += bool(on_edge and moving_HW[y : y + 48, x : x + 48].mean() > 1 / 3)
    assert overlay_share(clip_THW) == pytest.approx(count / SIDE_PX**2, abs=2e-4)
    assert count > 100


# --- planted cases ---------------------------------------------------------------------------


def test_blur_lowers_sharpness() -> None:
    clip = [texture(i, grain_px=0.7) for i in range(4)]
    values = [measured(clip).sharpness]
    for sigma in (0.5, 1.0, 1.5, 2.0, 3.0, 5.0):
        values.append(measured([cv2.GaussianBlur(f, (0, 0), sigma) for f in clip]).sharpness)
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
    assert values[-1] < values[0] / 10


def test_one_blurred_moment_is_no_blurred_clip() -> None:
    clip = panning()
    some = [cv2.GaussianBlur(f, (0, 0), 5) if 10 <= i < 20 else f for i, f in enumerate(clip)]
    assert measured(some).sharpness == pytest.approx(measured(clip).sharpness, rel=0.1)


def test_black_white_and_frozen_clips() -> None:
    black = measured([np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)] * 40)
    assert dataclasses.astuple(black) == (0, 0, 0, 0, 0, "0" * LOOK_LENGTH)
    white = measured([np.full((SIDE_PX, SIDE_PX, 3), 255, np.uint8)] * 40)
    assert (white.brightness, white.look) == (1, black.look)
    random = np.random.default_rng(0)
    noisy = [random.integers(0, 6, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8) for _ in range(40)]
    assert measured(noisy).look == black.look
    frozen = measured(panning(num_frames=1) * 40)
    assert (frozen.motion, frozen.jump, frozen.overlay) == (0, 0, 0)
    assert frozen.look != black.look
    assert measured(panning()).motion > 0.01


def test_a_cut_is_a_jump() -> None:
    one, other = panning(0, 24), panning(5, 24)
    cut = measured(one + other)
    assert cut.jump > 0.12 > 2 * max(measured(one).jump, measured(other).jump)
    before, after = luma(one[-1]), luma(other[0])
    assert cut.jump == pytest.approx(
        np.abs(means(before, 64) - means(after, 64)).mean() / 255, abs=2e-3
    )


def test_a_logo_over_what_moves_is_an_overlay() -> None:
    assert measured(panning()).overlay == 0
    assert measured(logo_on(panning())).overlay > 0.02
    # Nothing moves: a still clip has edges, and they say nothing.
    assert measured(logo_on(panning(num_frames=1) * 40)).overlay == 0
    # Nor do those of a still background about what moves.
    assert measured(walking(0)).overlay < 0.01


def test_memory_and_odd_sizes() -> None:
    def peak_bytes(num_frames: int) -> int:
        frame_HWC = texture(0)
        tracemalloc.start()
        measured(frame_HWC for _ in range(num_frames))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(1024) < peak_bytes(32) + 50_000
    for height_px, width_px in ((16, 16), (9, 300), (300, 9), (1, 1), (128, 64)):
        some = np.random.default_rng(0).integers(0, 256, (20, height_px, width_px, 3), np.uint8)
        got = measured(some)
        assert len(got.look) == LOOK_LENGTH and math.isfinite(got.sharpness)


# --- looks -----------------------------------------------------------------------------------


def coded(clip: list[np.ndarray], path: Path, *, side_px: int, crf: int) -> list[np.ndarray]:
    size = (side_px, side_px)
    encode(path, (cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in clip), fps=25, crf=crf)
    back = (clip[0].shape[1], clip[0].shape[0])
    return [f.rgb_HWC for f in frames(path, LIMITS, size_px=back)]


def changed(clip: list[np.ndarray], folder: Path) -> dict[str, list[np.ndarray]]:
    """The same frames again, in ways in which videos come again."""
    height_px, width_px = clip[0].shape[:2]
    x, y = round(0.012 * width_px), round(0.012 * height_px)
    again = coded(clip, folder / "again.mp4", side_px=width_px, crf=28)
    return {
        "coded again": again,
        "smaller": coded(clip, folder / "smaller.mp4", side_px=width_px // 2, crf=26),
        "cropped": [cv2.resize(f[y:-y, x:-x], (width_px, height_px)) for f in clip],
        "fewer frames": [f for i, f in enumerate(again) if i % 6],
        "later": again[1:],
        "brighter": [(255 * (f / 255) ** 0.8).astype(np.uint8) for f in again],
    }


def test_the_same_again_looks_the_same(tmp_path: Path) -> None:
    for seed in range(3):
        clip = walking(seed)
        look = measured(clip).look
        for name, other in changed(clip, tmp_path).items():
            picture, change = look_distances(look, measured(other).look)
            assert picture <= 6 and change <= 8, (seed, name, picture, change)


def test_other_motion_before_the_same_picture_looks_different() -> None:
    looks = [measured(walking(seed)).look for seed in range(12)]
    for one, other in itertools.combinations(looks, 2):
        picture, change = look_distances(one, other)
        assert picture <= 12 and change >= 15
    assert near_duplicates(looks, max_bits=8) == [-1] * 12


def test_still_clips_are_told_by_their_pictures() -> None:
    looks = [measured([texture(seed, SIDE_PX)] * 30).look for seed in range(8)]
    again = [measured([texture(seed, SIDE_PX)] * 50).look for seed in range(8)]
    assert near_duplicates(looks + again, max_bits=6) == [-1] * 8 + list(range(8))


def real_clips(dev_data: Path) -> dict[str, list[np.ndarray]]:
    """Spans of real videos, most beside each other, some from the very same box."""
    rows, _ = read_metadata(dev_data / "metadata/vox-like-metadata.csv")
    clips: dict[str, list[np.ndarray]] = {}
    for video_id in ("_pR6HKXMvTY", "piDQJU-BI_s", "smmKXvxUApc", "-hPRgjYD0r9"):
        path = dev_data / f"raw/{video_id}.mp4"
        facts = probe(path, LIMITS)
        wanted = []
        for row in (row for row in rows if row.video_id == video_id):
            assert row.bbox_px and row.ref_size_px and row.ref_fps
            box_px, _ = crop_box(
                row.bbox_px,
                ref_size_px=row.ref_size_px,
                frame_px=(facts.width_px, facts.height_px),
                clips=Clips(),
            )
            times = [frame / row.ref_fps for frame in (row.start_frame, row.end_frame)]
            wanted.append(Span(*times, box_px, (SIDE_PX, SIDE_PX)))
        for index, frame in spans(path, LIMITS, wanted):
            clips.setdefault(f"{video_id} {index}", []).append(frame.rgb_HWC)
    return clips


def test_looks_of_the_dev_data(dev_data: Path, tmp_path: Path) -> None:
    """Real spans: found again when changed, and never taken for another span of their video."""
    clips = real_clips(dev_data)
    looks = {name: measured(clip).look for name, clip in clips.items()}
    assert len(looks) == 17
    assert near_duplicates(looks.values(), max_bits=8) == [-1] * 17
    neighbours = [
        look_distances(looks[one], looks[other])
        for one, other in itertools.combinations(looks, 2)
        if one.split()[0] == other.split()[0]
    ]
    assert min(change for _, change in neighbours) > 12
    assert min(picture for picture, _ in neighbours) < 6  # which alone would not tell
    for name in list(clips)[::4]:
        for kind, other in changed(clips[name], tmp_path).items():
            assert near_duplicates([looks[name], measured(other).look], max_bits=8) == [-1, 0], kind


# --- limits ----------------------------------------------------------------------------------

SOME = Measures(sharpness=80.0, brightness=0.4, motion=0.01, jump=0.05, overlay=0.004, look="")


@pytest.mark.parametrize(
    ("limits", "code", "value", "cause"),
    [
        ({"min_brightness": 0.5}, "dark", 0.4, "brightness 0.4, under 0.5"),
        ({"max_brightness": 0.3}, "bright", 0.4, "brightness 0.4, over 0.3"),
        ({"min_motion": 0.02}, "static", 0.01, "motion 0.01, under 0.02"),
        ({"max_jump": 0.04}, "jumpy", 0.05, "largest change between two frames 0.05, over 0.04"),
        ({"min_sharpness": 81}, "blurred", 80.0, "sharpness 80, under 81"),
        ({"max_overlay": 0.001}, "overlay", 0.004, "share of burnt-in pixels 0.004, over 0.001"),
    ],
)
def test_each_limit_refuses(limits: dict[str, float], code: str, value: float, cause: str) -> None:
    with pytest.raises(QualityError) as error:
        check_quality(SOME, Quality(**limits))
    copy = pickle.loads(pickle.dumps(error.value))
    for one in (error.value, copy):
        assert (one.code, one.value, one.cause, one.retryable) == (code, value, cause, False)


def test_limits_are_off_and_what_is_at_them_is_kept() -> None:
    worst = Measures(sharpness=0, brightness=0, motion=0, jump=1, overlay=1, look="")
    check_quality(worst, Quality())
    check_quality(dataclasses.replace(worst, brightness=1), Quality())
    at = {"min_sharpness": 80, "min_brightness": 0.4, "max_brightness": 0.41, "min_motion": 0.01}
    check_quality(SOME, Quality(**at, max_jump=0.05, max_overlay=0.004))


def test_the_limits_that_a_preset_proposes() -> None:
    """The commented lines of the preset are settings, and refuse none of what is ordinary."""
    path = resources.files("kpmask") / "presets" / "taichi256.toml"
    lines = path.read_text(encoding="utf-8").splitlines()
    overrides = [line[2:] for line in lines if line.startswith("# quality.")]
    flags = {"out": "o", "videos": "v"}
    assert resolve_job(PreprocessJob, preset="taichi256", flags=flags).quality == Quality()
    proposed = resolve_job(PreprocessJob, flags=flags, overrides=overrides).quality
    assert len(proposed.model_fields_set) == len(overrides) == 6
    for clip in (panning(), walking(0)):
        check_quality(measured(clip), proposed)
    for clip, code in (
        ([np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)] * 20, "dark"),
        (panning(num_frames=1) * 20, "static"),
        (panning(0, 20) + panning(5, 20), "jumpy"),
        ([cv2.GaussianBlur(f, (0, 0), 4) for f in panning()], "blurred"),
        (logo_on(panning()), "overlay"),
    ):
        with pytest.raises(QualityError) as error:
            check_quality(measured(clip), proposed)
        assert error.value.code == code


@pytest.mark.parametrize(
    ("setting", "cause"),
    [
        ("quality.min_brightness=1.0", "is not under max_brightness"),
        ("quality.max_overlay=2", "max_overlay"),
        ("quality.max_hash_bits=40", "max_hash_bits"),
        ('quality.duplicates="some"', "'keep' or 'drop'"),
        ("quality.sharpness=1", "sharpness"),
    ],
)
def test_settings_that_make_no_sense(setting: str, cause: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_job(PreprocessJob, flags={"out": "o", "videos": "v"}, overrides=[setting])
    assert cause in str(error.value)

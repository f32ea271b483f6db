"""Cuts are found where the pictures change for good, and not where things move."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from kpmask.config import Subject
from kpmask.data.shots import ShotDetector

HEIGHT_PX, WIDTH_PX = 90, 160


def scene(seed: int) -> np.ndarray:
    """Soft blobs of colour, twice as wide as a frame."""
    noise = np.random.default_rng(seed).integers(0, 255, (9, 32, 3), dtype=np.uint8)
    return cv2.resize(noise, (2 * WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_CUBIC)


def pan(seed: int, count: int, step_px: int) -> list[np.ndarray]:
    """A camera that turns over a scene."""
    wide = scene(seed)
    return [wide[:, i * step_px : i * step_px + WIDTH_PX].copy() for i in range(count)]


def cuts_of(images: list[np.ndarray], settings: Subject) -> tuple[list[int], int]:
    shots = ShotDetector(settings)
    cuts: list[int] = []
    for number, image in enumerate(images):
        starts = shots.starts(number, image)
        assert all(number - shots.delay <= start <= number for start in starts)
        cuts += starts
    return cuts, shots.delay


@pytest.mark.parametrize("kind", ["adaptive", "content"])
def test_shots_begin_where_scenes_do(kind: str) -> None:
    lengths = [20, 31, 4, 25]
    images = [
        image for seed, count in enumerate(lengths) for image in pan(seed, count, step_px=seed % 2)
    ]
    cuts, _ = cuts_of(images, Subject(shots=kind))  # type: ignore[arg-type]
    assert cuts == list(itertools.accumulate(lengths))[:-1]


def test_a_fast_camera_is_no_cut() -> None:
    """Every frame differs much from the one before: no frame more than its neighbours."""
    images = pan(5, 16, step_px=10)
    assert cuts_of(images, Subject(shots="adaptive"))[0] == []
    content, delay = cuts_of(images, Subject(shots="content", shot_threshold=5))
    assert (len(content), delay) == (15, 0)


def test_off_and_thresholds() -> None:
    images = pan(1, 10, 0) + pan(2, 10, 0)
    assert cuts_of(images, Subject(shots="none")) == ([], 0)
    assert cuts_of(images, Subject(shots="content", shot_threshold=250))[0] == []
    assert cuts_of(images, Subject(shots="content", shot_threshold=10))[0] == [10]


def test_size_does_not_matter() -> None:
    """Frames larger than PySceneDetect's thresholds are meant for are made smaller."""
    images = [
        cv2.resize(image, (1280, 720), interpolation=cv2.INTER_LINEAR)
        for image in pan(1, 8, 1) + pan(2, 8, 1)
    ]
    assert cuts_of(images, Subject())[0] == [8]

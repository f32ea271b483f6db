"""Joints and people in maps and fields that are painted here."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kpmask.estimators import people
from kpmask.estimators.people import LIMBS, MIRRORED, NUM_JOINTS, last_peaks, peaks_of, people_of

SIDE_PX = 160
# A figure in a square of 1: nose, neck, right arm, left arm, right leg, left leg, eyes, ears.
FIGURE = np.array(
    [
        *([0.50, 0.12], [0.50, 0.25]),
        *([0.38, 0.26], [0.30, 0.42], [0.26, 0.58]),
        *([0.62, 0.26], [0.70, 0.42], [0.74, 0.58]),
        *([0.43, 0.58], [0.42, 0.76], [0.41, 0.94]),
        *([0.57, 0.58], [0.58, 0.76], [0.59, 0.94]),
        *([0.47, 0.09], [0.53, 0.09], [0.43, 0.11], [0.57, 0.11]),
    ]
)


def paint(
    *figures: NDArray[np.float64], strength: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Maps and fields of figures (K2, px): a soft spot for a joint, unit vectors along a limb."""
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    maps_HWC = np.zeros((SIDE_PX, SIDE_PX, NUM_JOINTS + 1))
    fields_HWC = np.zeros((SIDE_PX, SIDE_PX, 2 * len(LIMBS)))
    for joints_K2 in figures:
        for joint, (left, top) in enumerate(joints_K2):
            bump = strength * np.exp(-((x - left) ** 2 + (y - top) ** 2) / 8)
            maps_HWC[..., joint] = np.maximum(maps_HWC[..., joint], bump)
        for limb, (start, end) in enumerate(LIMBS):
            way = joints_K2[end] - joints_K2[start]
            length = np.linalg.norm(way)
            unit = way / length
            dx, dy = x - joints_K2[start][0], y - joints_K2[start][1]
            along, beside = dx * unit[0] + dy * unit[1], np.abs(dx * unit[1] - dy * unit[0])
            on_it = (along >= -1) & (along <= length + 1) & (beside <= 2)
            fields_HWC[on_it, 2 * limb : 2 * limb + 2] = unit
    return maps_HWC, fields_HWC


def figure(left_px: float, top_px: float, side_px: float) -> NDArray[np.float64]:
    return np.asarray((FIGURE * side_px + [left_px, top_px]).round())


def all_peaks(maps_HWC: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    return [peaks_of(maps_HWC[..., joint]) for joint in range(NUM_JOINTS)]


def test_one_figures_joints_are_given_back() -> None:
    joints_K2 = figure(10, 5, 140)
    maps_HWC, fields_HWC = paint(joints_K2)
    peaks = all_peaks(maps_HWC)
    assert [len(each) for each in peaks] == [1] * NUM_JOINTS
    for found_K3 in (last_peaks(peaks), people.surest_person(peaks, fields_HWC)):
        np.testing.assert_array_equal(found_K3[:, :2], joints_K2)
        np.testing.assert_allclose(found_K3[:, 2], 1)
    (person,) = people_of(peaks, fields_HWC)
    assert person.num_limbs == len(LIMBS)
    # All limbs are as strong as can be; the heights of all joints come to them.
    assert person.score == pytest.approx(NUM_JOINTS + len(LIMBS), abs=0.1)


def test_of_two_figures_each_keeps_its_joints() -> None:
    large, small = figure(0, 0, 100), figure(85, 75, 75)
    maps_HWC, fields_HWC = paint(large, small)
    peaks = all_peaks(maps_HWC)
    assert [len(each) for each in peaks] == [2] * NUM_JOINTS
    found = people_of(peaks, fields_HWC)
    assert len(found) == 2
    left = [large, small]
    for person in found:
        joints_K2 = np.array([peaks[k][person.peaks[k], :2] for k in range(NUM_JOINTS)])
        left = [whole for whole in left if not np.array_equal(joints_K2, whole)]
    assert left == []
    # The papers' rule: of each joint the one further down, here the small figure's.
    np.testing.assert_array_equal(last_peaks(peaks)[:, :2], small)


def test_the_surest_person_is_taken_and_parts_of_it_may_be_missing() -> None:
    first, second = figure(0, 0, 75), figure(80, 10, 78)
    (maps_HWC, fields_HWC), (faint_HWC, more_HWC) = paint(first), paint(second, strength=0.4)
    both = all_peaks(np.maximum(maps_HWC, faint_HWC))
    joints_K3 = people.surest_person(both, np.where(fields_HWC != 0, fields_HWC, more_HWC))
    np.testing.assert_array_equal(joints_K3[:, :2], first)
    maps_HWC[..., 4] = 0  # the right wrist
    joints_K3 = people.surest_person(all_peaks(maps_HWC), fields_HWC)
    assert np.isnan(joints_K3[4]).all()
    np.testing.assert_array_equal(np.delete(joints_K3[:, :2], 4, 0), np.delete(first, 4, 0))
    assert np.isnan(last_peaks(all_peaks(maps_HWC))[4]).all()


def test_no_field_no_person() -> None:
    maps_HWC, fields_HWC = paint(figure(0, 0, 150))
    peaks = all_peaks(maps_HWC)
    assert people_of(peaks, np.zeros_like(fields_HWC)) == []
    assert people_of(peaks, -fields_HWC) == []  # all limbs point the other way
    assert np.isnan(people.surest_person(peaks, -fields_HWC)).all()
    assert people_of(all_peaks(np.zeros_like(maps_HWC)), fields_HWC) == []


def test_connections_are_the_greedy_ones_of_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        field_HW2 = rng.normal(0.2, 0.3, (40, 40, 2))
        starts, ends = (np.column_stack([rng.integers(0, 40, (n, 2)), np.ones(n)]) for n in (4, 5))
        scores = {}
        for i, (x0, y0, _) in enumerate(starts):
            for j, (x1, y1, _) in enumerate(ends):
                length = np.hypot(x1 - x0, y1 - y0)
                if length == 0:
                    continue
                samples = []
                for step in range(10):
                    x, y = (int(np.round(a + (b - a) * step / 9)) for a, b in ((x0, x1), (y0, y1)))
                    fx, fy = field_HW2[y, x]
                    samples.append((fx * (x1 - x0) + fy * (y1 - y0)) / length)
                score = float(np.mean(samples)) + min(20 / length - 1, 0)
                if sum(s > 0.05 for s in samples) > 8 and score > 0:
                    scores[i, j] = score
        expected = []
        while scores:
            i, j = max(scores, key=lambda pair: scores[pair])
            expected.append((i, j, scores[i, j]))
            scores = {(a, b): s for (a, b), s in scores.items() if a != i and b != j}
        found = people.connections(starts, ends, field_HW2)
        assert [(i, j) for i, j, _ in found] == [(i, j) for i, j, _ in expected]
        np.testing.assert_allclose([s for *_, s in found], [s for *_, s in expected])


def test_peaks_are_higher_than_what_is_beside_them_and_come_in_reading_order() -> None:
    map_HW = np.zeros((12, 12))
    map_HW[9, 2], map_HW[2, 7], map_HW[5, 5] = 0.5, 0.3, 0.1  # the last is not high enough
    map_HW[2, 8] = 0.2
    np.testing.assert_allclose(peaks_of(map_HW), [[7, 2, 0.3], [2, 9, 0.5]])
    map_HW[8, 3] = 0.6  # touches by a corner: both are peaks, and both move to the higher one
    np.testing.assert_allclose(peaks_of(map_HW), [[7, 2, 0.3], [3, 8, 0.6], [3, 8, 0.6]])
    assert peaks_of(np.zeros((3, 3))).shape == (0, 3)


def test_mirroring_twice_changes_nothing() -> None:
    assert [MIRRORED[MIRRORED[joint]] for joint in range(NUM_JOINTS)] == list(range(NUM_JOINTS))
    mirrored = figure(0, 0, 100)[list(MIRRORED)]
    np.testing.assert_allclose(100 - mirrored[:, 0], figure(0, 0, 100)[:, 0], atol=1)
    assert {(MIRRORED[a], MIRRORED[b]) for a, b in LIMBS} == set(LIMBS)

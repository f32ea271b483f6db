"""Joints and people in part confidence maps and part affinity fields (Cao et al. 2017).

A joint is where its map has a peak. A limb joins two of them where the field along the way points
from one to the other. Limbs that share a joint are of one person.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import generate_binary_structure, maximum_filter

NUM_JOINTS: Final = 18
# Nose, neck; right shoulder, elbow, wrist; the left ones; right hip, knee, ankle; the left ones;
# right and left eye; right and left ear.
MIRRORED: Final = (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16)
# From which joint to which each limb goes, in the order of the fields, x and y of each.
LIMBS: Final = (
    *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 2), (2, 3), (3, 4), (2, 16), (1, 5), (5, 6), (6, 7), (5, 17)),
    *((1, 0), (0, 14), (0, 15), (14, 16), (15, 17)),
)
MIN_PEAK: Final = 0.1
_MIN_FIELD: Final = 0.05
_ENOUGH: Final = 0.8  # of the way, on which the field must be as strong
_STEPS: Final = 10  # along a limb
_WINDOW_PX: Final = 2  # how far a peak may move to a higher pixel
_MIN_LIMBS: Final = 2  # of a person
_MIN_MEAN: Final = 0.2  # of a person's score over its joints
# In which order limbs are given to people: shoulders and arms, legs, face, ears to shoulders.
_ORDER: Final = (6, 10, 7, 8, 11, 12, 0, 1, 2, 3, 4, 5, 14, 15, 17, 16, 18, 9, 13)

Map = NDArray[np.floating]  # HW
Peaks = NDArray[np.float64]  # N3: x and y (px), and the height


@dataclass(slots=True)
class Person:
    """Which of the peaks of each joint are somebody's.

    Attributes:
        peaks: by joint, the number of the peak.
        score: of its peaks and limbs together.
    """

    peaks: dict[int, int] = field(default_factory=dict)
    score: float = 0.0
    num_limbs: int = 0


def peaks_of(map_HW: Map) -> Peaks:
    """Pixels higher than `MIN_PEAK` and than those beside them, in reading order.

    Each is moved to the highest pixel of the 5 by 5 around it, as the papers' code does; so one
    may be there twice.
    """
    highest_HW = maximum_filter(map_HW, footprint=generate_binary_structure(2, 1))
    found = []
    for y, x in np.argwhere((highest_HW == map_HW) & (map_HW > MIN_PEAK)):
        top, left = max(y - _WINDOW_PX, 0), max(x - _WINDOW_PX, 0)
        around = map_HW[top : y + _WINDOW_PX + 1, left : x + _WINDOW_PX + 1]
        dy, dx = np.unravel_index(int(around.argmax()), around.shape)
        found.append((left + dx, top + dy, around[dy, dx]))
    return np.array(found, np.float64).reshape(-1, 3)


def last_peaks(peaks: list[Peaks]) -> NDArray[np.float64]:
    """Of each joint's peaks the last in reading order: x, y and height (K3), NaN without any.

    As the papers' code has it: fields are not looked at, and of two people in a frame each joint is
    that of whoever has it further down.
    """
    none = np.full(3, np.nan)
    return np.array([each[-1] if len(each) else none for each in peaks])


def surest_person(peaks: list[Peaks], fields_HWC: NDArray[np.floating]) -> NDArray[np.float64]:
    """The joints of the person with the highest score (K3), NaN for those that are not there."""
    joints_K3 = np.full((NUM_JOINTS, 3), np.nan)
    people = people_of(peaks, fields_HWC)
    if people:
        best = max(people, key=lambda person: person.score)
        for joint, number in best.peaks.items():
            joints_K3[joint] = peaks[joint][number]
    return joints_K3


def people_of(peaks: list[Peaks], fields_HWC: NDArray[np.floating]) -> list[Person]:
    """Who is there.

    Args:
        peaks: of each joint, see `peaks_of`.
        fields_HWC: x and y of each limb's field, in the order of `LIMBS`.
    """
    people: list[Person] = []
    for limb in _ORDER:
        start, end = LIMBS[limb]
        limb_HW2 = fields_HWC[..., 2 * limb : 2 * limb + 2]
        for i, j, score in connections(peaks[start], peaks[end], limb_HW2):
            _join(people, peaks, (start, i), (end, j), score)
    return [
        person
        for person in people
        if person.num_limbs >= _MIN_LIMBS and person.score / len(person.peaks) >= _MIN_MEAN
    ]


def connections(
    starts: Peaks, ends: Peaks, field_HW2: NDArray[np.floating]
) -> list[tuple[int, int, float]]:
    """Which starts and ends are of one limb, and its score: the strongest first, each used once."""
    found = []
    for i, start in enumerate(starts):
        for j, end in enumerate(ends):
            score = _strength(start[:2], end[:2], field_HW2)
            if score is not None:
                found.append((score, i, j))
    limbs: list[tuple[int, int, float]] = []
    for score, i, j in sorted(found, key=lambda each: -each[0]):
        if all(i != used_i and j != used_j for used_i, used_j, _ in limbs):
            limbs.append((i, j, score))
    return limbs


def _strength(
    start: NDArray[np.float64], end: NDArray[np.float64], field_HW2: NDArray[np.floating]
) -> float | None:
    """How much of a field goes from one point to another; None where it does not.

    Points further apart than half the frame's height are less likely to be of one limb.
    """
    way = end - start
    length_px = float(np.linalg.norm(way)) + 1e-8
    x, y = np.linspace(start, end, _STEPS).round().astype(int).T
    along = field_HW2[y, x] @ (way / length_px)
    score = float(along.mean()) + min(0.5 * field_HW2.shape[0] / length_px - 1, 0.0)
    enough = np.count_nonzero(along > _MIN_FIELD) > _ENOUGH * _STEPS
    return score if enough and score > 0 else None


def _join(
    people: list[Person],
    peaks: list[Peaks],
    start: tuple[int, int],
    end: tuple[int, int],
    score: float,
) -> None:
    """Give a limb to whoever has one of its joints; who has none of them is somebody new.

    Of two people who share a joint type none gets it: they cannot be one.
    """
    owners = [
        person
        for person in people
        if person.peaks.get(start[0]) == start[1] or person.peaks.get(end[0]) == end[1]
    ]
    if len(owners) == 2 and owners[0].peaks.keys().isdisjoint(owners[1].peaks):
        owner, other = owners
        owner.peaks |= other.peaks
        owner.score += other.score
        owner.num_limbs += other.num_limbs
        people[:] = [person for person in people if person is not other]
    elif len(owners) == 1:
        owner = owners[0]
        if any(owner.peaks.get(joint, number) != number for joint, number in (start, end)):
            return
    elif not owners:
        owner = Person()
        people.append(owner)
    else:
        return
    for joint, number in (start, end):
        if joint not in owner.peaks:
            owner.peaks[joint] = number
            owner.score += float(peaks[joint][number, 2])
    owner.score += score
    owner.num_limbs += 1

"""Tubes from detections, against the rules written out frame by frame."""

from __future__ import annotations

import random

import pytest

from kpmask.config import Subject
from kpmask.data.detectors import Detection, FloatBox
from kpmask.data.tracks import Limits, Moment, Tracker, Tube, inside, iou, square_of
from kpmask.errors import MediaError

FRAME = (400, 400)
LIMITS = Limits(min_frames=1, max_frames=1000, min_box_px=0)
FOLLOW = Subject(detector="face", increase=0.0)
FIXED = FOLLOW.model_copy(update={"rule": "fixed", "min_inside": 0.9})


def box(left: float, top: float, side: float = 40) -> FloatBox:
    return left, top, left + side, top + side


def track(
    looks: dict[int, list[FloatBox]],
    count: int,
    settings: Subject = FOLLOW,
    limits: Limits = LIMITS,
) -> tuple[list[Tube], Tracker]:
    """Tubes of `count` frames of 10 a second, with looks at some of them."""
    tracker = Tracker(settings, frame_px=FRAME, limits=limits)
    tubes = []
    for number in range(count):
        tracker.frame(Moment(number, number / 10))
        if number in looks:
            tubes += tracker.found([Detection(one, 1.0) for one in looks[number]])
    tubes += tracker.cut(Moment(count, count / 10))
    return tubes, tracker


def spans_of(tubes: list[Tube]) -> list[tuple[int, int, str]]:
    return [(tube.start_frame, tube.end_frame, tube.ended) for tube in tubes]


def test_a_still_subject_is_one_tube_to_the_end() -> None:
    (tube,), _ = track({i: [box(100, 100)] for i in range(0, 21, 4)}, 23)
    assert tube == Tube(0, 23, 0.0, 2.3, (100, 100, 140, 140), False, "cut")


def test_follow_is_the_published_rule_frame_by_frame() -> None:
    """Union of boxes until the overlap with the first is under 0.25, then anew."""
    rng = random.Random(3)
    for _ in range(20):
        boxes, x, y = [], 150.0, 150.0
        for _ in range(60):
            boxes.append(box(x, y))
            x, y = (min(max(at + rng.uniform(-8, 9), 0), 350) for at in (x, y))
        expected, first, union, start = [], boxes[0], boxes[0], 0
        for number in range(1, 61):
            over = number == 60 or iou(first, boxes[number]) < 0.25 or number - start == 25
            if over:
                expected.append((start, number, union))
            if number < 60:
                now = boxes[number]
                joined = (*map(min, union[:2], now[:2]), *map(max, union[2:], now[2:]))
                first, union, start = (now, now, number) if over else (first, joined, start)
        tubes, _ = track(
            {i: [one] for i, one in enumerate(boxes)},
            60,
            FOLLOW.model_copy(update={"border": "move"}),
            Limits(min_frames=1, max_frames=25, min_box_px=0),
        )
        assert [(t.start_frame, t.end_frame) for t in tubes] == [e[:2] for e in expected]
        for tube, (_, _, union) in zip(tubes, expected, strict=True):
            side = max(round(union[2]) - round(union[0]), round(union[3]) - round(union[1]))
            assert abs(tube.crop_px[2] - tube.crop_px[0] - side) <= 2
            assert inside(union, tuple(map(float, tube.crop_px))) > 0.95  # type: ignore[arg-type]


def test_between_looks_a_subject_moves_evenly() -> None:
    """Looks at every tenth frame of a subject that moves 2 px a frame: as with all looks."""
    path = {i: [box(100 + 2 * i, 100)] for i in range(71)}
    every, _ = track(path, 71)
    some, _ = track({i: path[i] for i in range(0, 71, 10)}, 71)
    # 40 px wide: the overlap (40 - d) / (40 + d) falls under 0.25 at d = 24, with 13 frames.
    assert spans_of(every)[0] == (0, 13, "moved")
    assert some == every


def test_fixed_keeps_the_first_box_grown_and_ends_where_it_is_left() -> None:
    settings = FIXED.model_copy(update={"increase": 0.25})
    path = {i: [box(100 + i, 100)] for i in range(28)}
    (first, second), _ = track(path, 28, settings)
    # Grown by 10 px on each side; 4 of its 40 px are outside after 14, which is still 0.9.
    assert (first.start_frame, first.end_frame, first.ended) == (0, 15, "moved")
    assert (first.crop_px, second.start_frame) == ((90, 90, 150, 150), 15)
    assert second.crop_px == (105, 90, 165, 150)


def test_a_subject_that_is_missed_a_few_times_goes_on() -> None:
    looks = {i: [box(100, 100)] for i in range(0, 50, 2)} | {i: [] for i in (10, 12, 14, 16)}
    assert spans_of(track(looks, 50)[0]) == [(0, 50, "cut")]
    looks[18] = []  # the fifth
    tubes, _ = track(looks, 50)
    assert spans_of(tubes) == [(0, 9, "lost"), (20, 50, "cut")]


def test_what_was_missed_last_ends_where_it_was_seen_last() -> None:
    looks = {0: [box(100, 100)], 4: [box(100, 100)], 8: []}
    assert spans_of(track(looks, 12)[0]) == [(0, 5, "lost")]


def test_two_subjects_at_once_are_two_tubes() -> None:
    looks = {i: [box(50, 50), box(300, 300)] for i in range(0, 20, 2)}
    looks[6] = looks[6][::-1]
    tubes, _ = track(looks, 20)
    assert [t.crop_px for t in tubes] == [(50, 50, 90, 90), (300, 300, 340, 340)]
    assert spans_of(tubes) == [(0, 20, "cut")] * 2


@pytest.mark.parametrize("settings", [FOLLOW, FIXED])
def test_a_subject_that_another_touches_ends_before_it(settings: Subject) -> None:
    """The other comes from the right by 10 px a frame, stays for a while, and goes."""
    other_x = [200 - 10 * min(i, 30 - i, 10) for i in range(31)]
    looks = {i: [box(100, 100), box(x, 120)] for i, x in enumerate(other_x)}
    tubes, _ = track(looks, 31, settings)
    still = [t for t in tubes if t.crop_px[0] == 100 and t.crop_px[2] == 140]
    # Boxes 40 px wide at 100 and x touch while x < 140: frames 7 to 23.
    assert [t[:2] for t in spans_of(still)] == [(0, 7), (24, 31)]
    assert all(t.end_frame <= 7 or t.start_frame >= 24 for t in tubes)
    both, _ = track(looks, 31, settings.model_copy(update={"alone": False}))
    assert (0, 31, "cut") in spans_of(both)


def test_refusals_are_counted_and_say_what_was_measured() -> None:
    limits = Limits(min_frames=10, max_frames=1000, min_box_px=50)
    looks = {i: [box(200, 200, 45)] for i in range(15)} | {i: [] for i in range(15, 30)}
    looks |= {i: [box(200, 200, 48)] for i in range(30, 45)} | {i: [] for i in range(45, 60)}
    looks |= {i: [box(0, 0, 60)] for i in range(60, 66)}
    tubes, tracker = track(looks, 66, limits=limits)
    found = {code: (e.value, n) for code, (e, n) in tracker.refusals.by_code.items()}
    assert (tubes, found) == ([], {"too_small": (48, 2), "too_short": (6, 1)})


@pytest.mark.parametrize("rule", ["follow", "fixed"])
def test_a_square_that_leaves_the_frame(rule: str) -> None:
    settings = FOLLOW.model_copy(update={"rule": rule, "increase": 0.25})
    looks = {i: [(5.0, 100.0, 45.0, 180.0)] for i in range(10)}
    tubes, tracker = track(looks, 10, settings)
    assert (tubes, list(tracker.refusals.by_code)) == ([], ["leaves_frame"])
    (tube,), _ = track(looks, 10, settings.model_copy(update={"border": "move"}))
    # 80 px high: 120 with its growth, about x = 25, moved in from the left.
    assert (tube.crop_px, tube.clamped) == ((0, 80, 120, 200), False)


def test_square_larger_than_the_frame_loses_a_part() -> None:
    settings = FOLLOW.model_copy(update={"border": "move"})
    wide = (0.0, 100.0, 640.0, 200.0)
    crop, clamped = square_of(wide, frame_px=(640, 300), settings=settings, min_box_px=0)
    assert (crop, clamped) == ((170, 0, 470, 300), True)
    with pytest.raises(MediaError) as refused:
        square_of((5.0, 5.0, 5.2, 50.0), frame_px=(640, 300), settings=settings, min_box_px=0)
    assert refused.value.code == "too_small"


def test_frames_of_one_time_make_no_tube() -> None:
    """A file whose time stamps stand still has no span that could be cut."""
    tracker = Tracker(FOLLOW, frame_px=FRAME, limits=LIMITS)
    for number in range(5):
        tracker.frame(Moment(number, 0.0))
        assert tracker.found([Detection(box(100, 100), 1.0)]) == []
    assert tracker.cut(Moment(5, 0.0)) == []

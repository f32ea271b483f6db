"""The crop rule, against closed forms and the slow formula."""

from __future__ import annotations

import random

import pytest

from kpmask.config import Clips
from kpmask.data import crop
from kpmask.errors import MediaError, RowError


def test_scale_truncates_each_side() -> None:
    # 91 * 360 / 480 = 68.25, 133 * 360 / 480 = 99.75
    assert crop.scale_box((91, 133, 430, 472), from_px=(480, 480), to_px=(360, 360)) == (
        68,
        99,
        322,
        354,
    )


def test_scale_has_no_float_error() -> None:
    # 49 / (1000 / 3000) is 146.99... in floats
    for left in range(1000):
        box = (left, left, left + 1, left + 1)
        scaled = crop.scale_box(box, from_px=(1000, 1000), to_px=(3000, 3000))
        assert scaled == (3 * left, 3 * left, 3 * left + 3, 3 * left + 3)


def test_reference_of_unknown_width_has_the_files_aspect_ratio() -> None:
    box = (101, 61, 340, 181)
    for frame in ((640, 360), (1280, 720), (480, 360), (405, 720), (853, 480)):
        by_height = tuple(edge * frame[1] // 360 for edge in box)
        assert crop.scale_box(box, from_px=(0, 360), to_px=frame) == by_height
    # 640 x 360 has the aspect ratio of 1920 x 1080
    known = crop.scale_box(box, from_px=(640, 360), to_px=(1920, 1080))
    assert crop.scale_box(box, from_px=(0, 360), to_px=(1920, 1080)) == known
    got = crop.crop_box(
        (100, 60, 340, 300), ref_size_px=(0, 360), frame_px=(1280, 720), clips=Clips()
    )
    assert got == ((200, 120, 680, 600), False)


def test_edges_before_the_frame_are_truncated_too() -> None:
    assert crop.scale_box((-3, -2, 5, 5), from_px=(2, 2), to_px=(1, 1)) == (-1, -1, 2, 2)


def test_grown_square_box_is_20_percent_larger() -> None:
    assert crop.grow_box((100, 200, 200, 300), increase=0.1) == (90, 190, 210, 310)


def test_grown_tall_box_is_a_square_on_its_grown_height() -> None:
    # h = 200 grows to 240; the width of 100 grows to 240 too: 70 px on each side.
    assert crop.grow_box((300, 100, 400, 300), increase=0.1) == (230, 80, 470, 320)


def test_growth_by_nothing_squares() -> None:
    assert crop.grow_box((300, 100, 400, 300), increase=0.0) == (250, 100, 450, 300)


def test_growth_against_the_float_formula() -> None:
    rng = random.Random(5)
    for _ in range(300):
        left, top = rng.randrange(2000), rng.randrange(2000)
        width, height = rng.randrange(1, 900), rng.randrange(1, 900)
        a = rng.choice([0.0, 0.05, 0.1, 0.25])
        by_w = max(a, ((1 + 2 * a) * height - width) / (2 * width)) * width
        by_h = max(a, ((1 + 2 * a) * width - height) / (2 * height)) * height
        box = (left, top, left + width, top + height)
        expected = (left - by_w, top - by_h, left + width + by_w, top + height + by_h)
        grown = crop.grow_box(box, increase=a)
        assert all(abs(g - e) < 1.0001 for g, e in zip(grown, expected, strict=True))
        assert abs((grown[2] - grown[0]) - (grown[3] - grown[1])) <= 2


def test_increase_refuses_a_box_that_leaves_the_frame() -> None:
    clips = Clips(increase=0.1)
    arguments = {"ref_size_px": (500, 500), "frame_px": (500, 500), "clips": clips}
    assert crop.crop_box((10, 10, 110, 110), **arguments) == ((0, 0, 120, 120), False)
    with pytest.raises(RowError, match="leaves the frame"):
        crop.crop_box((8, 10, 108, 110), **arguments)


@pytest.mark.parametrize(
    ("box", "expected", "lost"),
    [
        ((300, 100, 400, 300), (250, 100, 450, 300), False),  # fits about its centre
        ((0, 100, 100, 300), (0, 100, 200, 300), False),  # moved in from the left
        ((540, 100, 640, 300), (440, 100, 640, 300), False),  # and from the right
        ((100, 380, 300, 480), (100, 280, 300, 480), False),  # and from below
        ((0, 0, 640, 100), (80, 0, 560, 480), True),  # wider than the frame is high
        ((-20, 100, 180, 300), (0, 100, 200, 300), True),  # annotated outside
    ],
)
def test_square_stays_in_the_frame(box: crop.Box, expected: crop.Box, lost: bool) -> None:
    got = crop.crop_box(box, ref_size_px=(640, 480), frame_px=(640, 480), clips=Clips())
    assert got == (expected, lost)


def test_stretch_keeps_the_box_and_clamps_it() -> None:
    clips = Clips(fit="stretch")
    arguments = {"ref_size_px": (640, 480), "frame_px": (640, 480), "clips": clips}
    assert crop.crop_box((10, 20, 110, 320), **arguments) == ((10, 20, 110, 320), False)
    assert crop.crop_box((600, 20, 700, 320), **arguments) == ((600, 20, 640, 320), True)


def test_every_square_is_whole_and_inside() -> None:
    rng = random.Random(7)
    for _ in range(500):
        frame = (rng.randrange(64, 2000), rng.randrange(64, 2000))
        left, top = rng.randrange(frame[0] - 8), rng.randrange(frame[1] - 8)
        box = (left, top, left + rng.randrange(1, 1500), top + rng.randrange(1, 1500))
        square, lost = crop.crop_box(box, ref_size_px=frame, frame_px=frame, clips=Clips())
        assert square[2] - square[0] == square[3] - square[1] > 0
        assert crop.contains((0, 0, *frame), square)
        assert lost or crop.contains(square, box)


def test_small_box_is_refused_only_when_both_sides_are_small() -> None:
    clips = Clips(min_box_px=256)
    arguments = {"ref_size_px": (640, 480), "frame_px": (640, 480), "clips": clips}
    with pytest.raises(MediaError) as refused:
        crop.crop_box((0, 0, 200, 255), **arguments)
    assert refused.value.code == "too_small"
    crop.crop_box((0, 0, 200, 256), **arguments)


def test_box_without_area_after_scaling_is_refused() -> None:
    with pytest.raises(RowError, match="no area"):
        crop.crop_box((5, 5, 6, 6), ref_size_px=(1000, 1000), frame_px=(64, 64), clips=Clips())


def test_centre_square() -> None:
    assert crop.centre_square((640, 480)) == (80, 0, 560, 480)
    assert crop.centre_square((101, 300)) == (0, 99, 101, 200)

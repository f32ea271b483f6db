"""Where a clip is cut: from an annotated box to a rectangle of whole pixels inside the frame.

Boxes are (left, top, right, bottom) in pixels, right and bottom exclusive. The rule of the
published preparation code, and where this differs from it:

- An annotated box is in a reference frame; it is scaled to the real frame and truncated. A
  reference frame of width 0 has a height only, and the real frame's aspect ratio.
- It is clamped to the frame here, because libavfilter silently *moves* a crop that leaves it.
- With `increase` a > 0 the box is first grown, keeping its centre, to the square that contains
  it grown by a of its side on each side; a box that then leaves the frame is refused.
- With `fit="square"` a box that is not square becomes the square on its longer side about its
  centre, moved into the frame where it sticks out. Where the frame is narrower than that, the
  square is as large as the frame allows and a part of the box is lost: the aspect ratio is kept
  rather than the content, because a stretched body is another body. (`fit="stretch"` leaves the
  box as it is, so that the resize stretches it, as the published code does.)
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from kpmask.config import Clips
from kpmask.errors import MediaError, RowError

Box = tuple[int, int, int, int]
Size = tuple[int, int]


def crop_box(box_px: Box, *, ref_size_px: Size, frame_px: Size, clips: Clips) -> tuple[Box, bool]:
    """The rectangle to cut from a real frame, and whether a part of the wanted box is lost.

    Args:
        box_px: the annotated box in the reference frame.
        ref_size_px: (width, height) of the reference frame; width 0: as wide as it has to be.
        frame_px: (width, height) of the real frame, as displayed.
        clips: the settings `min_box_px`, `increase` and `fit`.

    Raises:
        RowError: nothing of the box lies in the frame, or the grown box leaves it.
        MediaError: `too_small`, both sides are under `min_box_px`.
    """
    scaled = scale_box(box_px, from_px=ref_size_px, to_px=frame_px)
    if max(scaled[2] - scaled[0], scaled[3] - scaled[1]) < clips.min_box_px:
        width, height = scaled[2] - scaled[0], scaled[3] - scaled[1]
        raise MediaError(
            f"the box is {width}x{height} px, under {clips.min_box_px} px", code="too_small"
        )
    if clips.increase > 0:
        grown = grow_box(scaled, increase=clips.increase)
        if clamp_box(grown, frame_px=frame_px) != grown:
            raise RowError(f"the box grown by {clips.increase:g} to {grown} leaves the frame")
        return grown, False
    inside = clamp_box(scaled, frame_px=frame_px)
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise RowError(f"the box {scaled} has no area in the {frame_px[0]}x{frame_px[1]} frame")
    if clips.fit == "stretch":
        return inside, inside != scaled
    square = square_box(inside, frame_px=frame_px)
    return square, inside != scaled or not contains(square, inside)


def subject_box(
    box_px: Box, *, frame_px: Size, increase: float, border: Literal["refuse", "move"]
) -> tuple[Box, bool]:
    """The square to cut about a found subject, and whether a part of the subject is lost.

    Args:
        box_px: the subject's box; it may leave the frame.
        frame_px: (width, height) of the frame.
        increase: of `grow_box`.
        border: what becomes of a grown box that leaves the frame.

    Raises:
        MediaError: `leaves_frame`, with border="refuse".
    """
    grown = grow_box(box_px, increase=increase)
    if contains((0, 0, *frame_px), grown):
        return grown, False
    if border == "refuse":
        raise MediaError(
            f"the box grown by {increase:g} to {grown} leaves the {frame_px[0]}x{frame_px[1]} "
            f"frame",
            code="leaves_frame",
            hint="subject.border = 'move' moves such boxes inside",
        )
    square = square_box(grown, frame_px=frame_px)
    return square, not contains(square, clamp_box(box_px, frame_px=frame_px))


def scale_box(box_px: Box, *, from_px: Size, to_px: Size) -> Box:
    """A box of one frame size in another, each edge truncated (towards 0) to whole pixels.

    With a width of 0 in `from_px`, both directions are scaled as the height is.
    """
    (from_w, from_h), (to_w, to_h) = from_px, to_px
    if from_w == 0:
        from_w, to_w = from_h, to_h
    left, top, right, bottom = box_px
    return (
        _truncated(left * to_w, from_w),
        _truncated(top * to_h, from_h),
        _truncated(right * to_w, from_w),
        _truncated(bottom * to_h, from_h),
    )


def _truncated(value: int, divisor: int) -> int:
    """A quotient without its fraction; in whole numbers, since floats are off by one at times."""
    return value // divisor if value >= 0 else -(-value // divisor)


def clamp_box(box_px: Box, *, frame_px: Size) -> Box:
    """The part of a box that lies in the frame (without area where none does)."""
    width, height = frame_px
    left, top, right, bottom = box_px
    return max(left, 0), max(top, 0), min(right, width), min(bottom, height)


def grow_box(box_px: Box, *, increase: float) -> Box:
    """The square about a box's centre that contains the box grown by `increase` of its sides.

    The width grows on each side by max(a, ((1 + 2a) h - w) / 2w) of itself, the height likewise,
    each edge truncated (so sides may differ by a pixel or two, as in the published code).
    """
    left, top, right, bottom = box_px
    a = Fraction(increase).limit_denominator(1_000_000)  # 0.1 as meant, not as the float has it
    width, height = right - left, bottom - top
    by_width = max(a, ((1 + 2 * a) * height - width) / (2 * width)) * width
    by_height = max(a, ((1 + 2 * a) * width - height) / (2 * height)) * height
    # int() truncates towards 0, so a box that leaves the frame by less than a pixel stays in it.
    return (
        int(left - by_width),
        int(top - by_height),
        int(right + by_width),
        int(bottom + by_height),
    )


def square_box(box_px: Box, *, frame_px: Size) -> Box:
    """The square on the longer side of a box, about its centre, moved and cut to fit the frame."""
    left, top, right, bottom = box_px
    side = min(max(right - left, bottom - top), *frame_px)
    x = min(max((left + right - side) // 2, 0), frame_px[0] - side)
    y = min(max((top + bottom - side) // 2, 0), frame_px[1] - side)
    return x, y, x + side, y + side


def centre_square(frame_px: Size) -> Box:
    """The largest square about a frame's centre."""
    return square_box((0, 0, *frame_px), frame_px=frame_px)


def contains(outer_px: Box, inner_px: Box) -> bool:
    """Whether no part of the inner box lies outside the outer one."""
    return (
        outer_px[0] <= inner_px[0]
        and outer_px[1] <= inner_px[1]
        and outer_px[2] >= inner_px[2]
        and outer_px[3] >= inner_px[3]
    )


def inside_fraction(box_px: Box, *, frame_px: Size) -> float:
    """How much of a box's area lies in the frame, in [0, 1]; the box must have an area."""
    left, top, right, bottom = clamp_box(box_px, frame_px=frame_px)
    inside = max(right - left, 0) * max(bottom - top, 0)
    return inside / ((box_px[2] - box_px[0]) * (box_px[3] - box_px[1]))

"""From a picture of any size to the model's square, and from its frames back to what is delivered.

- The crop is given, found (a face, a person) or the largest centred square; it is always square,
  as the model's frames are, and within the picture.
- The drawn frames go back into the whole picture with a soft seam: there the two are mixed, from
  the picture at the crop's border to the frame `feather_px` further in. Outside the crop the
  picture stays as it is, to the byte; where the crop ends with the picture there is no seam.
- Frames pass one at a time, and each is made by itself: memory does not grow with their number and
  chunks do not show.

Boxes are (left, top, right, bottom) in pixels of the picture as displayed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from math import ceil, floor
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from kpmask.config import Clips, MediaLimits, Output, Subject
from kpmask.data.crop import Box, contains, square_box, subject_box
from kpmask.data.detectors import Detection, FloatBox, Kind, area, detector_of, require_detector
from kpmask.data.subjects import find_first, frame_size
from kpmask.errors import MediaError
from kpmask.media import images
from kpmask.media.probe import probe
from kpmask.records import Delivery, parse_box

Frame = NDArray[np.uint8]  # HWC RGB
How = Literal["centre", "auto", "face", "person"]

VERSION: Final = 1  # raise it when the same picture and settings give another crop or frame
MAX_PANEL_PX: Final = 720  # the height of what stands side by side, which is only for looking at

# `auto`: how high a subject must be, over the picture's shorter side. A small face belongs to a
# person who is the subject as a whole.
_HEIGHTS: Final[dict[Kind, float]] = {"face": 1 / 6, "person": 1 / 4}


# --- where to cut ----------------------------------------------------------------------------


def source_crop(image_HWC: Frame, rule: str, settings: Output, limits: MediaLimits) -> Box:
    """What is animated of an image.

    Args:
        image_HWC: uint8 RGB.
        rule: as `Output.crop`.
        settings: how a subject's box becomes a crop, and what to do where there is none.
        limits: a crop has at least `min_side_px` a side.

    Raises:
        MediaError: no_subject, leaves_frame (a given box), too_small.
        ConfigError: the detector cannot be had here.
    """
    given = parse_box(rule)
    how: How = "centre" if given is not None else rule  # type: ignore[assignment]
    return choose_crop(
        image_HWC,
        how=how,
        given=given,
        increase=settings.crop_increase,
        no_subject=settings.no_subject,
        min_side_px=limits.min_side_px,
    )


def choose_crop(
    image_HWC: Frame,
    *,
    how: How = "centre",
    given: Box | None = None,
    increase: float = 0.3,
    no_subject: Literal["fail", "centre"] = "fail",
    min_side_px: int = 1,
) -> Box:
    """The square to cut out of a picture; `given`, made square, comes before `how`.

    Raises:
        MediaError: no_subject, leaves_frame (a given box), too_small.
        ConfigError: the detector cannot be had here.
    """
    frame_px = (image_HWC.shape[1], image_HWC.shape[0])
    wanted = given
    if given is None and how != "centre":
        found = _find(image_HWC, how)
        if found is None and no_subject == "fail":
            looked_for = "face or person" if how == "auto" else how
            raise MediaError(
                f"no {looked_for} in the picture",
                code="no_subject",
                hint="output.no_subject = 'centre' takes the centre instead",
            )
        if found is not None:
            return _large_enough(_about(found, frame_px, increase), min_side_px)
    return _large_enough(_square(wanted or (0, 0, *frame_px), frame_px), min_side_px)


def driving_crop(path: Path, rule: str, settings: Output, limits: MediaLimits) -> Box | None:
    """What is taken of every frame of a driving video; None is the largest centred square.

    Args:
        path: the video, or a folder of its frames.
        rule: as `Output.driving_crop`; a subject is looked for in the first second.
        settings: how a subject's box becomes a crop, and what to do where there is none.
        limits: for reading; a crop has at least `min_side_px` a side.

    Raises:
        MediaError: it cannot be read; no_subject, leaves_frame (a given box), too_small.
        ConfigError: the detector cannot be had here.
    """
    if rule == "centre":
        return None
    found = probe(path, limits)
    given = parse_box(rule)
    if given is not None:
        box_px = _square(given, (found.width_px, found.height_px))
        return _large_enough(box_px, limits.min_side_px)
    subject = Subject.model_validate(
        {"detector": rule, "rule": "first", "increase": settings.crop_increase, "border": "move"}
    )
    try:
        box_px, _ = find_first(path, found, subject=subject, clips=Clips(), limits=limits)
    except MediaError as error:
        if error.code == "no_subject" and settings.no_subject == "centre":
            return None
        raise
    return _large_enough(box_px, limits.min_side_px)


@functools.lru_cache(maxsize=16)
def finder(rule: str) -> tuple[str, ...]:
    """Which detectors a rule asks, by name and version: they shape what is made.

    Raises:
        ConfigError, CheckpointError: one cannot be had here.
    """
    if rule == "centre" or parse_box(rule) is not None:
        return ()
    require_detector(rule)  # type: ignore[arg-type]
    kinds: tuple[Kind, ...] = ("face", "person") if rule == "auto" else (rule,)  # type: ignore[assignment]
    return tuple(f"{detector_of(kind).name} {detector_of(kind).version}" for kind in kinds)


def cut(image_HWC: Frame, box_px: Box) -> Frame:
    """The part of a picture in a box, in memory of its own."""
    left, top, right, bottom = box_px
    return np.ascontiguousarray(image_HWC[top:bottom, left:right])


def _square(box_px: Box, frame_px: tuple[int, int]) -> Box:
    if not contains((0, 0, *frame_px), box_px):
        raise MediaError(
            f"the crop {'-'.join(map(str, box_px))} leaves the {frame_px[0]}x{frame_px[1]} picture",
            code="leaves_frame",
        )
    return square_box(box_px, frame_px=frame_px)


def _large_enough(box_px: Box, min_side_px: int) -> Box:
    side_px = min(box_px[2] - box_px[0], box_px[3] - box_px[1])
    if side_px < min_side_px:
        cause = f"the crop is {side_px} px a side, under {min_side_px} px"
        raise MediaError(cause, code="too_small", value=side_px)
    return box_px


def _about(found: FloatBox, frame_px: tuple[int, int], increase: float) -> Box:
    box_px = (floor(found[0]), floor(found[1]), ceil(found[2]), ceil(found[3]))
    return subject_box(box_px, frame_px=frame_px, increase=increase, border="move")[0]


def _find(image_HWC: Frame, how: How) -> FloatBox | None:
    """The largest subject of a picture."""
    kinds: tuple[Kind, ...] = ("face", "person") if how == "auto" else (how,)  # type: ignore[assignment]
    for kind in kinds:
        least_px = _HEIGHTS[kind] * min(image_HWC.shape[:2]) if how == "auto" else 0
        boxes = [one.box_px for one in _detections(image_HWC, kind)]
        boxes = [box for box in boxes if box[3] - box[1] >= least_px]
        if boxes:
            return max(boxes, key=area)
    return None


def _detections(image_HWC: Frame, kind: Kind) -> list[Detection]:
    """Sure detections, in pixels of the picture."""
    detector = detector_of(kind)
    height_px, width_px = image_HWC.shape[:2]
    size_px = frame_size((width_px, height_px), detector)
    x, y = width_px / size_px[0], height_px / size_px[1]
    return [
        Detection((left * x, top * y, right * x, bottom * y), one.score)
        for one in detector.detect(images.resize(image_HWC, size_px))
        if one.score >= detector.min_score
        for left, top, right, bottom in [one.box_px]
    ]


# --- what is delivered -----------------------------------------------------------------------


def composed(
    results: Iterable[Frame],
    *,
    source_HWC: Frame,
    crop_px: Box,
    driving: Iterable[Frame],
    delivery: Delivery,
    feather: float,
) -> Iterator[Frame]:
    """The frames to deliver, for every frame drawn.

    Args:
        results: square frames of the model's size.
        source_HWC: the whole source image.
        crop_px: what was animated of it.
        driving: the driving frames, square; gone through only where they are shown.
        delivery: `paste_back` and `side_by_side` of it count.
        feather: the seam's width as a part of the crop's side, in [0, 0.5].
    """
    if delivery.paste_back:
        feather_px = round(feather * min(crop_px[2] - crop_px[0], crop_px[3] - crop_px[1]))
        results = (paste(source_HWC, result, crop_px, feather_px) for result in results)
    if not delivery.side_by_side:
        yield from results
        return
    shown_HWC = source_HWC if delivery.paste_back else cut(source_HWC, crop_px)
    for result_HWC, driving_HWC in zip(results, driving, strict=True):
        height_px = min(result_HWC.shape[0], MAX_PANEL_PX)
        shown_HWC = _of_height(shown_HWC, height_px)  # the first time; then it has it
        panels = [_of_height(picture_HWC, height_px) for picture_HWC in (driving_HWC, result_HWC)]
        yield np.concatenate([shown_HWC, *panels], axis=1)


def _of_height(picture_HWC: Frame, height_px: int) -> Frame:
    width_px = max(1, round(picture_HWC.shape[1] * height_px / picture_HWC.shape[0]))
    return images.resize(picture_HWC, (width_px, height_px))


def paste(frame_HWC: Frame, patch_HWC: Frame, box_px: Box, feather_px: int) -> Frame:
    """A picture with a patch in a box of it, as a new array.

    Args:
        frame_HWC: uint8 RGB; outside the box it is as it was.
        patch_HWC: uint8 RGB of any size; it is resized to the box.
        box_px: within the frame.
        feather_px: how far from the box's border the patch alone is seen; at most half the box's
            shorter side counts, and along a border that is the frame's there is no seam.

    Raises:
        ValueError: the box is not within the frame or has no area, or the feather is negative.
    """
    left, top, right, bottom = box_px
    height_px, width_px = frame_HWC.shape[:2]
    if not (0 <= left < right <= width_px and 0 <= top < bottom <= height_px) or feather_px < 0:
        raise ValueError(f"a box {box_px}, feather {feather_px}, in {width_px}x{height_px} px")
    feather_px = min(feather_px, min(right - left, bottom - top) // 2)
    weight_HW1 = _weight(box_px, (width_px, height_px), feather_px)
    patch_HWC = images.resize(patch_HWC, (right - left, bottom - top))
    pasted_HWC = frame_HWC.copy()
    inside_HWC, below_HWC = (x_HWC[top:bottom, left:right] for x_HWC in (pasted_HWC, frame_HWC))
    inside_HWC[:] = patch_HWC
    for band in _bands(bottom - top, right - left, feather_px):
        below, above = below_HWC[band].astype(np.float32), patch_HWC[band].astype(np.float32)
        inside_HWC[band] = np.rint(below + weight_HW1[band] * (above - below)).astype(np.uint8)
    return pasted_HWC


def _bands(height_px: int, width_px: int, feather_px: int) -> Iterator[tuple[slice, slice]]:
    """The rows and columns where a seam may be, each pixel once."""
    near_y, near_x = slice(0, feather_px), slice(0, feather_px)
    far_y, far_x = slice(height_px - feather_px, height_px), slice(width_px - feather_px, width_px)
    between = slice(feather_px, height_px - feather_px)
    yield from ((near_y, slice(None)), (far_y, slice(None)), (between, near_x), (between, far_x))


@functools.lru_cache(maxsize=2)
def _weight(box_px: Box, frame_px: tuple[int, int], feather_px: int) -> NDArray[np.float32]:
    """The patch's share of each pixel of its box, float32 HW1 in (0, 1]; 1 further in."""
    left, top, right, bottom = box_px
    x_W = _ramp(right - left, feather_px, left > 0, right < frame_px[0])
    y_H = _ramp(bottom - top, feather_px, top > 0, bottom < frame_px[1])
    weight_HW1 = (y_H[:, None] * x_W)[..., None]
    weight_HW1.setflags(write=False)
    return weight_HW1


def _ramp(length_px: int, feather_px: int, at_start: bool, at_end: bool) -> NDArray[np.float32]:
    """From little to 1 within `feather_px` of the ends that have a seam, evenly."""
    rise = np.minimum(np.arange(1, length_px + 1) / (feather_px + 1), 1).astype(np.float32)
    ones = np.ones(length_px, np.float32)
    return np.minimum(rise if at_start else ones, rise[::-1] if at_end else ones)


def preview(frame_HWC: Frame, side_px: int) -> Frame:
    """A picture at most `side_px` a side."""
    scale = min(1.0, side_px / max(frame_HWC.shape[:2]))
    width_px, height_px = (max(1, round(n * scale)) for n in frame_HWC.shape[1::-1])
    return images.resize(frame_HWC, (width_px, height_px))

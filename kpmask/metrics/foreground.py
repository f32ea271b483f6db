"""Whose motion and whose colours a generated video has, without a network as the judge.

For static cameras: a pixel is foreground where it differs from the median of its own video over
time. That holds for true and generated videos alike, so what stays the same throughout a generated
video (a background that is drawn a little too dark) is no foreground, and of somebody who only
waves, the arms are. A network of one of the compared systems would favour that system.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

THRESHOLD = 0.1  # of the largest difference in a channel; noise of the sensor stays below
BINS = 6  # of a colour histogram, for each channel


def foreground(frames_TCHW: Tensor, *, threshold: float = THRESHOLD) -> Tensor:
    """Which pixels of a video move (THW, bool): they differ from their median over time.

    Args:
        frames_TCHW: float RGB in [0, 1]; of an even number of frames the lower middle value is
            the median.
    """
    background_CHW = frames_TCHW.median(0).values
    return (frames_TCHW - background_CHW).abs().amax(1) > threshold


def overlap(a_THW: Tensor, b_THW: Tensor) -> float:
    """Intersection over union of two foregrounds, over all frames together; NaN if none moves.

    Pooled, since in a single frame in which hardly anything moves the ratio is noise.
    """
    union = int((a_THW | b_THW).sum())
    return int((a_THW & b_THW).sum()) / union if union else math.nan


def colour_histogram(frames_TCHW: Tensor, mask_THW: Tensor, *, bins: int = BINS) -> Tensor:
    """The share of each colour (bins^3) among the pixels of a mask; NaN if it is empty."""
    colours_NC = frames_TCHW.movedim(1, -1)[mask_THW]
    levels_NC = (colours_NC * bins).long().clamp(0, bins - 1)
    red, green, blue = levels_NC.unbind(1)
    counts = torch.bincount((red * bins + green) * bins + blue, minlength=bins**3).double()
    return counts / counts.sum()  # 0 / 0 is NaN


def histogram_distance(a: Tensor, b: Tensor) -> float:
    """Hellinger distance of two histograms: 0 for equal ones, 1 where they share no colour."""
    return math.sqrt(max(0.0, 1.0 - float((a * b).sqrt().sum()))) if _whole(a, b) else math.nan


def _whole(*histograms: Tensor) -> bool:
    return all(bool(torch.isfinite(histogram).all()) for histogram in histograms)


def transfer_scores(
    generated_TCHW: Tensor, source_TCHW: Tensor, driving_TCHW: Tensor
) -> dict[str, float]:
    """Scores of a video that should show the source's object in the driver's motion.

    Args:
        generated_TCHW: as many frames as the driving video has.
        source_TCHW: the source's own video, for its colours. driving_TCHW: the driving video.

    Returns:
        - foreground_iou: `overlap` with the driver's foreground.
        - colour_to_source, colour_to_driver: distances of the foregrounds' colours.
        - leak: the share of the former in their sum: 0 with the source's colours, 1 with the
          driver's. NaN where nothing moves.
    """
    masks = [foreground(video) for video in (generated_TCHW, source_TCHW, driving_TCHW)]
    videos = (generated_TCHW, source_TCHW, driving_TCHW)
    mine, source, driver = (
        colour_histogram(video, mask) for video, mask in zip(videos, masks, strict=True)
    )
    to_source, to_driver = histogram_distance(mine, source), histogram_distance(mine, driver)
    total = to_source + to_driver
    return {
        "foreground_iou": overlap(masks[0], masks[2]),
        "colour_to_source": to_source,
        "colour_to_driver": to_driver,
        "leak": to_source / total if total > 0 else math.nan,
    }

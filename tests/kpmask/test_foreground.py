"""Foreground and colours of videos, against frames made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kpmask.metrics.foreground import (
    colour_histogram,
    foreground,
    histogram_distance,
    overlap,
    transfer_scores,
)

RED, BLUE, GRAY = (0.9, 0.1, 0.1), (0.1, 0.1, 0.9), (0.5, 0.5, 0.5)


def video(
    colour: tuple[float, float, float],
    *,
    top: int = 2,
    wall: tuple[float, float, float] = GRAY,
    step: int = 4,
) -> Tensor:
    """A 4x4 square that moves over a wall of 24x24, never twice at one place; 5 frames."""
    frames_TCHW = torch.tensor(wall)[None, :, None, None].repeat(5, 1, 24, 24)
    for t in range(5):
        frames_TCHW[t, :, top : top + 4, step * t : step * t + 4] = torch.tensor(colour)[
            :, None, None
        ]
    return frames_TCHW


def test_foreground_is_what_moves() -> None:
    mask_THW = foreground(video(RED))
    wanted_THW = np.zeros((5, 24, 24), bool)
    for t in range(5):
        wanted_THW[t, 2:6, 4 * t : 4 * t + 4] = True
    assert (mask_THW.numpy() == wanted_THW).all()


def test_foreground_against_numpy() -> None:
    frames_TCHW = torch.rand(7, 3, 5, 6)  # an odd number: both medians are the middle value
    median_CHW = np.median(frames_TCHW.numpy(), axis=0)
    wanted_THW = np.abs(frames_TCHW.numpy() - median_CHW).max(axis=1) > 0.1
    assert (foreground(frames_TCHW).numpy() == wanted_THW).all()


def test_small_differences_and_still_videos_are_no_foreground() -> None:
    still_TCHW = video(RED)[:1].repeat(5, 1, 1, 1)
    noisy_TCHW = still_TCHW + 0.09 * torch.rand(5, 1, 24, 24)
    assert not foreground(still_TCHW).any()
    assert not foreground(noisy_TCHW).any()


def test_overlap_pools_frames() -> None:
    a_THW, b_THW = torch.zeros(2, 2, 4, dtype=torch.bool), torch.zeros(2, 2, 4, dtype=torch.bool)
    a_THW[0, 0, :2] = b_THW[0, 0, 1:3] = True  # 1 of 3
    a_THW[1] = b_THW[1] = True  # 8 of 8
    assert overlap(a_THW, b_THW) == 9 / 11
    assert overlap(a_THW, ~a_THW) == 0
    assert math.isnan(overlap(torch.zeros_like(a_THW), torch.zeros_like(a_THW)))


def test_histogram_counts_the_colours_under_the_mask() -> None:
    frames_TCHW = torch.zeros(1, 3, 1, 4)
    frames_TCHW[0, :, 0, 0] = 1.0  # white falls into the last bin
    frames_TCHW[0, :, 0, 1] = torch.tensor((0.0, 0.4, 0.6))
    mask_THW = torch.tensor([[[True, True, True, False]]])
    wanted = np.zeros((2, 2, 2))
    wanted[1, 1, 1] = wanted[0, 0, 1] = wanted[0, 0, 0] = 1 / 3
    found = colour_histogram(frames_TCHW, mask_THW, bins=2)
    np.testing.assert_allclose(found.numpy(), wanted.ravel())
    assert colour_histogram(frames_TCHW, ~mask_THW & False, bins=2).isnan().all()


def test_histogram_distance() -> None:
    a, b, c = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]]).double()
    assert histogram_distance(a, a) == pytest.approx(0, abs=1e-7)
    assert histogram_distance(a, c) == 1
    assert histogram_distance(a, b) == pytest.approx(math.sqrt(0.5))
    assert math.isnan(histogram_distance(a, c * math.nan))


def test_transfer_of_ideal_results() -> None:
    source, driver = video(RED, top=10), video(BLUE, top=2, wall=(0.8, 0.8, 0.8))
    ideal = video(RED, top=2)  # the source's colours and wall, the driver's motion
    assert transfer_scores(ideal, source, driver) == pytest.approx(
        {"foreground_iou": 1, "colour_to_source": 0, "colour_to_driver": 1, "leak": 0}, abs=1e-6
    )
    leaking = video(BLUE, top=2)
    assert transfer_scores(leaking, source, driver) == pytest.approx(
        {"foreground_iou": 1, "colour_to_source": 1, "colour_to_driver": 0, "leak": 1}, abs=1e-6
    )
    elsewhere = transfer_scores(source, source, driver)
    assert elsewhere["foreground_iou"] == 0


def test_a_constant_error_is_no_motion() -> None:
    driver = video(BLUE)
    darker = video(RED) * 0.7
    assert transfer_scores(darker, video(RED, top=10), driver)["foreground_iou"] == 1


def test_transfer_of_a_still_result() -> None:
    found = transfer_scores(video(RED)[:1].repeat(5, 1, 1, 1), video(RED), video(BLUE))
    assert found["foreground_iou"] == 0
    assert all(math.isnan(found[name]) for name in found if name != "foreground_iou")

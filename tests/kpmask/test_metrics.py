"""Metrics against scikit-image and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kpmask.metrics import build_metrics
from kpmask.metrics.pixel import L1, MovingL1
from kpmask.metrics.ssim import Ssim, ssim


def random_frames(num_frames: int, height_px: int, width_px: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_frames, 3, height_px // 8 + 1, width_px // 8 + 1, generator=generator)
    size = (height_px, width_px)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    noise = torch.rand(num_frames, 3, height_px, width_px, generator=generator)
    return (0.8 * smooth + 0.2 * noise).clamp(0, 1)


@pytest.mark.parametrize("shape", [(64, 64), (37, 90), (11, 11)])
def test_ssim_equals_scikit_image(shape: tuple[int, int]) -> None:
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    a, b = random_frames(4, *shape, seed=1), random_frames(4, *shape, seed=2)
    b = 0.7 * a + 0.3 * b
    expected = [
        structural_similarity(
            x.double().permute(1, 2, 0).numpy(),
            y.double().permute(1, 2, 0).numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=2,
            data_range=1,
        )
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(Ssim().per_frame(a, b, a[0]), expected, atol=1e-10)


def test_ssim_of_equal_frames_is_one_and_small_frames_are_refused() -> None:
    a = random_frames(2, 32, 32, seed=3)
    np.testing.assert_allclose(Ssim().per_frame(a, a, a[0]), 1.0, atol=1e-12)
    with pytest.raises(ValueError, match="11 px"):
        ssim(a[..., :10], a[..., :10])


def test_l1_is_the_mean_over_pixels_and_channels() -> None:
    a, b = random_frames(3, 24, 40, seed=4), random_frames(3, 24, 40, seed=5)
    expected = [
        np.mean(np.abs(x.double().numpy() - y.double().numpy())) for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(L1().per_frame(a, b, a[0]), expected, atol=1e-7)


def test_moving_l1_counts_only_pixels_that_moved() -> None:
    source = torch.full((3, 8, 8), 0.5)
    reference = source.repeat(2, 1, 1, 1)
    reference[0, 1, 2, 3] = 0.6  # one channel moved: the pixel counts with all its channels
    reference[0, :, 5, 5] = 0.57  # below the threshold: does not count
    generated = reference.clone()
    generated[0, 0, 2, 3] += 0.3
    generated[0, :, 5, 5] += 0.4
    generated[0, :, 0, 0] += 0.4
    values = MovingL1().per_frame(generated, reference, source)
    assert values[0] == pytest.approx(0.1)
    assert np.isnan(values[1])  # nothing moved in the second frame


def test_moving_l1_equals_a_slow_loop() -> None:
    generated, reference = random_frames(2, 16, 16, seed=6), random_frames(2, 16, 16, seed=7)
    source = random_frames(1, 16, 16, seed=8)[0]
    expected = []
    for t in range(2):
        errors = [
            (generated[t, :, y, x] - reference[t, :, y, x]).abs().mean().item()
            for y in range(16)
            for x in range(16)
            if (source[:, y, x] - reference[t, :, y, x]).abs().max() > 0.08
        ]
        expected.append(np.mean(errors))
    np.testing.assert_allclose(
        MovingL1().per_frame(generated, reference, source), expected, atol=1e-6
    )


def test_metrics_are_built_once_each_and_say_what_they_are() -> None:
    metrics = build_metrics(("ssim", "l1", "l1_moving", "l1_with_first", "ssim"))
    assert [m.name for m in metrics] == ["ssim", "l1", "l1_moving", "l1_with_first"]
    assert [m.counts_first for m in metrics] == [False, False, False, True]
    assert all(m.version and m.licence and m.weights_sha256 is None for m in metrics)

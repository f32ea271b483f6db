"""Metrics against scikit-image, OpenCV and plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
import torch

from kpmask.config import MetricName
from kpmask.metric_names import PICTURE_METRICS
from kpmask.metrics import build_metrics
from kpmask.metrics.pixel import L1, MovingL1, Psnr
from kpmask.metrics.ssim import Ssim, ssim
from kpmask.metrics.temporal import Flicker, TemporalError
from kpmask.metrics.warping import WarpingError, motion, warped


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


def test_l1_equals_scikit_image() -> None:
    compare_images = pytest.importorskip("skimage.util").compare_images
    a, b = random_frames(3, 24, 40, seed=4), random_frames(3, 24, 40, seed=5)
    expected = [
        compare_images(x.double().numpy(), y.double().numpy(), method="diff").mean()
        for x, y in zip(a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1), strict=True)
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


def test_psnr_equals_scikit_image() -> None:
    peak_signal_noise_ratio = pytest.importorskip("skimage.metrics").peak_signal_noise_ratio
    a, b = random_frames(4, 37, 90, seed=9), random_frames(4, 37, 90, seed=10)
    b = torch.tensor([0.5, 0.1, 0.01, 1e-4]).view(-1, 1, 1, 1) * b + a * 0.5
    a = a * 0.5
    expected = [
        peak_signal_noise_ratio(y.double().numpy(), x.double().numpy(), data_range=1)
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(Psnr().per_frame(a, b, a[0]), expected, atol=1e-9)
    assert expected[0] < 20 and expected[-1] > 80


def test_psnr_of_equal_frames_ends_at_100_db() -> None:
    a = random_frames(2, 16, 16, seed=11)
    one_level = a.clone()
    one_level[1, 0, 0, 0] = 1 - one_level[1, 0, 0, 0]
    values = Psnr().per_frame(one_level, a, a[0])
    assert values[0] == 100
    gap = abs(1 - 2 * a[1, 0, 0, 0].item())
    assert values[1] == pytest.approx(
        -20 * math.log10(gap) + 10 * math.log10(3 * 16 * 16), abs=1e-4
    )


# --- from frame to frame ---------------------------------------------------------------------


def slow_temporal_error(generated: np.ndarray, reference: np.ndarray, t: int) -> float:
    errors = []
    for index in np.ndindex(generated.shape[1:]):
        own = float(generated[t][index]) - float(generated[t - 1][index])
        true = float(reference[t][index]) - float(reference[t - 1][index])
        errors.append(abs(own - true))
    return sum(errors) / len(errors)


def test_temporal_error_equals_a_slow_loop() -> None:
    a, b = random_frames(4, 9, 12, seed=12), random_frames(4, 9, 12, seed=13)
    values = TemporalError().per_frame(a, b, b[0])
    assert math.isnan(values[0])
    expected = [slow_temporal_error(a.numpy(), b.numpy(), t) for t in range(1, 4)]
    np.testing.assert_allclose(values[1:], expected, atol=1e-6)


def test_an_error_that_stays_is_no_temporal_error() -> None:
    true = 0.5 * random_frames(4, 16, 16, seed=14)
    stains = 0.5 * random_frames(1, 16, 16, seed=15)
    assert np.nanmax(TemporalError().per_frame(true + stains, true, true[0])) < 1e-6
    trembling = true + stains * torch.tensor([0.0, 1.0, 0.0, 1.0]).view(-1, 1, 1, 1)
    mean = stains.double().mean().item()
    values = TemporalError().per_frame(trembling, true, true[0])
    np.testing.assert_allclose(values[1:], mean, atol=1e-6)


def test_flicker_is_of_pixels_that_stand_still() -> None:
    true = torch.full((3, 3, 8, 8), 0.4)
    true[1, 2, :, :4] = 0.6  # the left half moves in one channel, and back again
    true[2] = 0.9  # everything moves
    drawn = true.clone()
    drawn[1, :, :, :4] += 0.3  # among what moves: does not count
    drawn[1, 0, :, 4:] -= 0.3  # one of three channels
    values = Flicker().per_frame(drawn, true, true[0])
    assert math.isnan(values[0])
    assert values[1] == pytest.approx(0.1)
    assert math.isnan(values[2])
    copy = true[:1].expand_as(true)
    assert Flicker().per_frame(copy, true, true[0])[1] == 0


# --- along the motion ------------------------------------------------------------------------


def scene(seed: int, side_px: int = 160) -> np.ndarray:
    """A smooth picture that flow can be found in, HWC in [0, 1]."""
    noise = np.random.default_rng(seed).random((side_px, side_px, 3)).astype(np.float32)
    blurred = cv2.GaussianBlur(noise, (0, 0), 2.5)
    return (blurred - blurred.min()) / (blurred.max() - blurred.min())


def panned(picture: np.ndarray, shifts: Sequence[tuple[int, int]], side_px: int) -> torch.Tensor:
    """Cut-outs of a picture whose corner goes along `shifts` (x, y)."""
    images = [picture[y : y + side_px, x : x + side_px] for x, y in shifts]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def test_the_motion_of_a_pan_is_found() -> None:
    frames = panned(scene(1), [(20, 20), (23, 18), (23, 18)], 96)
    flow_TCHW, visible_THW = motion(frames)
    # What is at x now was at x + (3, -2) before, as the window moved by that.
    inner = flow_TCHW[:, :, 16:-16, 16:-16]
    np.testing.assert_allclose(inner[0].mean((1, 2)), (3, -2), atol=0.05)
    np.testing.assert_allclose(inner[1], 0, atol=0.05)
    assert visible_THW[:, 16:-16, 16:-16].double().mean() > 0.98
    assert not visible_THW[0, :, -2:].any()  # came into the picture on the right


def test_what_was_hidden_is_not_visible() -> None:
    background, square = scene(2, 96), scene(3, 32)
    frames = np.stack([background] * 2)
    frames[0, 32:64, 20:52] = square
    frames[1, 32:64, 28:60] = square  # to the right by 8 px: a strip is uncovered on its left
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    _, visible_THW = motion(images)
    assert visible_THW[0, 36:60, 21:27].double().mean() < 0.35
    assert visible_THW[0, :, 70:].double().mean() > 0.95
    assert visible_THW[0, 38:58, 36:54].double().mean() > 0.9


def test_warping_equals_opencv() -> None:
    images = panned(scene(4), [(0, 0), (30, 10)], 48)
    random = np.random.default_rng(5)
    flow = cv2.resize(random.normal(0, 4, (6, 6, 2)).astype(np.float32), (48, 48))
    y, x = np.mgrid[:48, :48].astype(np.float32)
    expected = cv2.remap(
        np.ascontiguousarray(images[1].permute(1, 2, 0).numpy()),
        x + flow[..., 0],
        y + flow[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    flow_TCHW = torch.from_numpy(flow).permute(2, 0, 1)[None]
    found = warped(images[1:], flow_TCHW)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=0.01)  # OpenCV's steps are 1/32 px


def test_warping_error_is_low_for_the_truth_and_the_change_of_what_trembles() -> None:
    shifts = [(20 + 3 * t, 20 - 2 * t) for t in range(5)]
    true = panned(scene(6), shifts, 96)
    still = true[:1].expand_as(true)
    trembling = true + 0.1 * torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]).view(-1, 1, 1, 1)
    darker = 0.5 * true  # wrong, but the same along the motion
    metric = WarpingError()
    values = [metric.per_frame(f, true, true[0]) for f in (true, darker, trembling, still)]
    assert all(math.isnan(v[0]) for v in values)
    of_true, of_darker, of_trembling, of_still = (v[1:].mean() for v in values)
    assert of_true < 1e-4
    assert of_darker == pytest.approx(of_true / 4, rel=1e-3)
    assert of_trembling == pytest.approx(0.1**2, rel=0.02)
    assert of_still > 20 * of_true


def test_warping_error_equals_a_loop_over_visible_pixels() -> None:
    true = panned(scene(7), [(20, 20), (22, 23)], 40)
    drawn = random_frames(2, 40, 40, seed=16)
    flow_TCHW, visible_THW = motion(true)
    before = np.ascontiguousarray(drawn[0].permute(1, 2, 0).numpy())
    errors = []
    for y, x in zip(*np.nonzero(visible_THW[0].numpy()), strict=True):
        at_x, at_y = float(x + flow_TCHW[0, 0, y, x]), float(y + flow_TCHW[0, 1, y, x])
        left, top = min(int(at_x), 38), min(int(at_y), 38)
        right, down = at_x - left, at_y - top
        corners = before[top : top + 2, left : left + 2]
        weights = np.outer((1 - down, down), (1 - right, right))
        was = (corners * weights[:, :, None]).sum((0, 1))
        errors.append(((drawn[1, :, y, x].numpy() - was) ** 2).mean())
    value = WarpingError().per_frame(drawn, true, true[0])[1]
    assert value == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("shape", [(5, 7), (11, 44), (16, 200)])
def test_flow_of_small_frames(shape: tuple[int, int]) -> None:
    frames = random_frames(3, *shape, seed=17)
    assert motion(frames)[0].shape == (2, 2, *shape)
    values = WarpingError().per_frame(frames, frames[:1].expand_as(frames), frames[0])
    change = frames.diff(dim=0).double().square().mean((1, 2, 3))
    np.testing.assert_allclose(values[1:], change, rtol=1e-5)  # nothing moves: all is visible


def test_one_frame_has_no_frame_before_it() -> None:
    frame = random_frames(1, 32, 32, seed=18)
    for metric in (TemporalError(), Flicker(), WarpingError()):
        assert np.isnan(metric.per_frame(frame, frame, frame[0])).tolist() == [True]


@pytest.mark.parametrize("name", PICTURE_METRICS)
def test_pieces_that_overlap_have_the_values_of_the_whole(name: MetricName) -> None:
    (metric,) = build_metrics([name])
    true = panned(scene(8), [(2 * t, t) for t in range(7)], 64)
    drawn = (true + 0.05 * random_frames(7, 64, 64, seed=19)).clamp(0, 1)
    whole = metric.per_frame(drawn, true, true[0])
    before = metric.frames_before
    assert np.isnan(whole[:before]).all()
    assert np.isfinite(whole[max(before, 1) :]).all()
    for start in range(before, 7, 2):
        piece = slice(start - before, start + 2)
        values = metric.per_frame(drawn[piece], true[piece], true[0])
        np.testing.assert_allclose(values[before:], whole[start : start + 2], rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PICTURE_METRICS)
def test_values_are_the_same_where_the_frames_are_drawn(name: MetricName) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    (metric,) = build_metrics([name])
    true = panned(scene(9), [(2 * t, t) for t in range(5)], 64)
    drawn = (true + 0.05 * random_frames(5, 64, 64, seed=20)).clamp(0, 1)
    expected = metric.per_frame(drawn, true, true[0])
    values = metric.per_frame(drawn.cuda(), true.cuda(), true[0].cuda())
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_metrics_are_built_once_each_and_say_what_they_are() -> None:
    metrics = build_metrics(("ssim", "l1", "l1_moving", "l1_with_first", "ssim"))
    assert [m.name for m in metrics] == ["ssim", "l1", "l1_moving", "l1_with_first"]
    assert [m.counts_first for m in metrics] == [False, False, False, True]
    assert all(m.version and m.licence and m.weights_sha256 is None for m in metrics)
    assert [m.name for m in build_metrics(PICTURE_METRICS)] == list(PICTURE_METRICS)

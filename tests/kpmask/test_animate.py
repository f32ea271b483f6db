"""The animator against slow loops over the seam: chunks, motion, best frame, edges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from kpmask import Animator, checkpoint
from kpmask.animate import Transfer, best_frame, choose_device, fit_square, state_tensors, to_tensor
from kpmask.errors import CheckpointError, ConfigError
from kpmask.model_config import (
    DenseMotion,
    FommGenerator,
    FommModel,
)
from tests.support.models import CIRCLES, DETECTOR, HEATMAP, SIDE_PX, lively_system

SYSTEMS = {
    "heatmap": HEATMAP,
    "circles": CIRCLES,
    "fomm": FommModel(
        image_size_px=SIDE_PX,
        detector=DETECTOR,
        dense_motion=DenseMotion(block_expansion=4, num_blocks=2, max_features=8, scale_factor=0.5),
        generator=FommGenerator(
            block_expansion=4, num_down_blocks=1, num_bottleneck_blocks=1, max_features=8
        ),
    ),
}
RELATIVE = ["circles", "fomm"]
TRANSFER = Transfer()


def make_animator(name: str) -> Animator:
    """Random weights with statistics that are not the initial ones."""
    system = lively_system(SYSTEMS[name])
    for module in system.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return Animator(system, device="cpu")


def some_frames(count: int, *, seed: int = 0, side_px: int = SIDE_PX) -> np.ndarray:
    """A bright square that wanders over noise."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 60, (count, side_px, side_px, 3), dtype=np.uint8)
    for t in range(count):
        left, top = (3 * t + seed) % (side_px - 10), (5 * t) % (side_px - 10)
        frames[t, top : top + 10, left : left + 10] = (250, 120 + 10 * (t % 8), 30)
    return frames


def by_hand(animator: Animator, source: np.ndarray, driving: np.ndarray, **wanted: Any) -> Any:
    """Frame by frame through the seam, without chunks or states that are kept."""
    system = animator.system
    frames = []
    with torch.inference_mode():
        source_state = system.encode_source(to_tensor(source[None]))
        initial = system.encode_driving(to_tensor(driving[wanted.get("start", 0)][None]))
        for frame in driving:
            state = system.encode_driving(to_tensor(frame[None]))
            if wanted.get("motion") == "relative":
                state = system.relative_motion(
                    source_state, state, initial, adapt_scale=wanted.get("adapt_scale", False)
                )
            frames.append(system.render(source_state, state).image_BCHW[0])
    return np.stack([255 * f.permute(1, 2, 0).double().numpy() for f in frames])


@pytest.mark.parametrize("name", SYSTEMS)
def test_absolute_motion_is_the_seam_frame_by_frame(name: str) -> None:
    animator = make_animator(name)
    source, driving = some_frames(1, seed=3)[0], some_frames(7)
    video = animator.animate(source, driving, batch_size=3)
    assert video.shape == driving.shape
    assert video.dtype == np.uint8
    exact = by_hand(animator, source, driving)
    assert np.abs(video - exact).max() <= 0.501  # rounded to the nearest, nothing else
    assert np.ptp(video.astype(int), axis=0).max() > 0, "the result moves"


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("adapt_scale", [False, True])
def test_relative_motion_starts_from_the_first_frame(name: str, adapt_scale: bool) -> None:
    animator = make_animator(name)
    source, driving = some_frames(1, seed=3)[0], some_frames(5)
    wanted = {"motion": "relative", "adapt_scale": adapt_scale}
    video = animator.animate(source, driving, batch_size=2, **wanted)
    assert np.abs(video - by_hand(animator, source, driving, **wanted)).max() <= 0.501


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("best", [False, True])
def test_chunks_do_not_show(name: str, best: bool) -> None:
    animator = make_animator(name)
    source, driving = some_frames(1, seed=3)[0], some_frames(9)
    relative = name in RELATIVE
    options: dict[str, Any] = {"motion": "relative" if relative else "absolute"}
    options["best_frame"] = best and relative
    whole = animator.animate(source, driving, batch_size=9, **options)
    for batch_size in (1, 4, 64):
        chunked = animator.animate(source, driving, batch_size=batch_size, **options)
        assert np.abs(whole.astype(int) - chunked).max() <= 1
        assert (whole != chunked).mean() < 1e-3


def test_float_frames_do_not_depend_on_chunks() -> None:
    animator = make_animator("heatmap")
    source = animator.encode_source(some_frames(1, seed=3)[0])
    driving = some_frames(6)
    whole = animator.render(source, animator.encode_driving(driving))
    parts = [
        animator.render(source, animator.encode_driving(driving[t : t + 2])) for t in (0, 2, 4)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", RELATIVE)
def test_best_frame_is_the_nearest_pose(name: str) -> None:
    animator = make_animator(name)
    driving = some_frames(9)
    source = np.roll(driving[6], (1, 2), axis=(0, 1))
    with torch.inference_mode():
        states = animator.encode_driving(driving)
        wanted = animator.encode_source(source)

    def pose(points: np.ndarray) -> np.ndarray:
        return (points - points.mean(0)) / np.sqrt(ConvexHull(points).volume)

    own = pose(wanted.points_BK2[0].numpy())
    distances = [((pose(p) - own) ** 2).sum() for p in states.points_BK2.numpy()]
    start = int(np.argmin(distances))
    chosen = best_frame(wanted, (states[t : t + 2] for t in range(0, 9, 2)))
    torch.testing.assert_close(chosen.points_BK2[0], states.points_BK2[start])

    options: dict[str, Any] = {"motion": "relative"}
    video = animator.animate(source, driving, batch_size=4, best_frame=True, **options)
    exact = by_hand(animator, source, driving, start=start, **options)
    assert np.abs(video - exact).max() <= 0.51


def test_points_without_area_are_like_nothing() -> None:
    animator = make_animator("circles")
    states = animator.encode_driving(some_frames(3))
    flat = states._map(lambda t: torch.zeros_like(t))
    source = animator.encode_source(some_frames(1)[0])
    mixed = type(states).cat([flat, states])
    chosen = best_frame(source, [mixed])
    torch.testing.assert_close(chosen.points_BK2, states[:1].points_BK2)
    first = best_frame(source, [flat[:1], flat[1:]])  # all alike: the first
    torch.testing.assert_close(first.points_BK2, flat[:1].points_BK2)


@pytest.mark.parametrize("precision", ["plain", "float32"])
def test_a_last_frame_alone_is_drawn_as_the_others(precision: Any) -> None:
    """To the last bit: one image is summed in another order than several."""
    animator = Animator(make_animator("fomm").system, device="cpu", precision=precision)
    source = animator.encode_source(some_frames(1)[0])
    states = animator.encode_driving(some_frames(9))
    chunks = [states[:4], states[4:8], states[8:]]
    drawn = list(animator.stream_states(source, lambda: iter(chunks), Transfer()))
    others = [states[8:].repeat(4), states[4:8], states[:4]]
    expected = list(animator.stream_states(source, lambda: iter(others), Transfer()))
    np.testing.assert_array_equal(drawn[8], expected[0])
    np.testing.assert_array_equal(np.stack(drawn[:4]), np.stack(expected[8:]))


def test_stream_reads_no_further_than_it_must() -> None:
    animator = make_animator("heatmap")
    driving, taken = some_frames(12), 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal taken
        for frame in driving:
            taken += 1
            yield frame

    stream = animator.stream(some_frames(1)[0], frames(), batch_size=4)
    next(stream)
    assert taken == 4
    for _ in range(4):
        next(stream)
    assert taken == 8
    assert len(list(stream)) == 12 - 5


def test_best_frame_refuses_a_single_pass() -> None:
    animator = make_animator("circles")
    with pytest.raises(ValueError, match="twice"):
        animator.stream(some_frames(1)[0], iter(some_frames(3)), motion="relative", best_frame=True)


def test_unsupported_motion_and_empty_options_are_refused_at_once() -> None:
    animator = make_animator("heatmap")
    frames = some_frames(2)
    with pytest.raises(ConfigError, match="supports absolute") as caught:
        animator.stream(frames[0], frames, motion="relative")
    assert caught.value.subject == "motion"
    with pytest.raises(ConfigError, match="motion = relative") as caught:
        make_animator("fomm").stream(frames[0], frames, best_frame=True)
    assert caught.value.subject == "best_frame"


@pytest.mark.parametrize("name", SYSTEMS)
def test_states_are_kept_and_reused(name: str) -> None:
    animator = make_animator(name)
    sources, driving = some_frames(2, seed=3), some_frames(4)
    direct = [animator.animate(source, driving, batch_size=4) for source in sources]
    kept = animator.driving_state(state_tensors(animator.encode_driving(driving)))
    for source, expected in zip(sources, direct, strict=True):
        state = animator.source_state(state_tensors(animator.encode_source(source)))
        again = np.stack(list(animator.stream_states(state, lambda: iter([kept]), TRANSFER)))
        np.testing.assert_array_equal(again, expected)


def test_images_of_any_size_are_cut_square_and_resized() -> None:
    animator = make_animator("heatmap")
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = some_frames(1, side_px=40)[0]
    assert animator.animate(wide, [wide, wide]).shape == (2, SIDE_PX, SIDE_PX, 3)
    square = fit_square(wide, SIDE_PX)
    np.testing.assert_array_equal(square, fit_square(some_frames(1, side_px=40)[0], SIDE_PX))
    np.testing.assert_array_equal(fit_square(square, SIDE_PX), square)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
    ],
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 HWC RGB"):
        make_animator("heatmap").animate(image, some_frames(2))


def test_load_reads_a_weights_file(tmp_path: Path) -> None:
    animator = make_animator("fomm")
    path = tmp_path / "w.safetensors"
    sha256 = checkpoint.save(path, animator.system, {})
    loaded = Animator.load(path, device="cpu", precision="plain")
    assert loaded.weights_sha256 == sha256
    assert loaded.image_size_px == SIDE_PX
    source, driving = some_frames(1)[0], some_frames(3)
    np.testing.assert_array_equal(
        loaded.animate(source, driving), animator.animate(source, driving)
    )
    path.write_bytes(b"not weights")
    with pytest.raises(CheckpointError):
        Animator.load(path)


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(ConfigError) as caught:
            choose_device(name)
        assert caught.value.subject == "device"


def test_weights_carry_no_gradient_and_nothing_is_kept_for_one() -> None:
    animator = make_animator("heatmap")
    assert not any(p.requires_grad for p in animator.system.parameters())
    assert not animator.encode_source(some_frames(1)[0]).mask_B1HW.requires_grad

"""Monkey-Net against loops over single numbers, and as a system: states, training, animation."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask.animate import Animator, to_frames
from kpmask.config import Losses, TrainJob, resolve_job
from kpmask.errors import ConfigError
from kpmask.losses import PerceptualLoss
from kpmask.model_config import (
    Discriminator,
    MonkeyDetector,
    MonkeyGenerator,
    MonkeyMotion,
    MonkeyNetModel,
)
from kpmask.models import build_system
from kpmask.models.base import Batch
from kpmask.models.monkey_net import (
    MonkeyDriving,
    MonkeyNetSystem,
    MonkeySource,
    covariance_maps,
    difference_maps,
)
from kpmask.perceptual import random_features
from kpmask.train import Trainer, initial_system, plan_phases
from tests.support.models import worn_norms

_spec = importlib.util.spec_from_file_location(
    "model_reference", Path(__file__).with_name("model_reference.py")
)
assert _spec is not None
assert _spec.loader is not None
slow = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(slow)

SIDE_PX = 16
NUM_KEYPOINTS = 3
DIVISOR = 5.0
JUDGE = Discriminator(block_expansion=4, num_blocks=2, max_features=8, use_keypoints=True)


def monkey_net(**changes: Any) -> MonkeyNetModel:
    small = {"block_expansion": 4, "num_blocks": 2, "max_features": 8}
    settings: dict[str, Any] = {
        "image_size_px": SIDE_PX,
        "detector": MonkeyDetector(**small, num_keypoints=NUM_KEYPOINTS, scale_factor=0.5),
        "motion": MonkeyMotion(**small, scale_factor=0.5),
        "generator": MonkeyGenerator(**small | {"num_blocks": 3}, num_refinement_blocks=2),
        "heatmap_divisor": DIVISOR,
    }
    return MonkeyNetModel(**(settings | changes))


def built(**changes: Any) -> MonkeyNetSystem:
    """A system in eval mode whose statistics and heads a fresh one would not have."""
    system = build_system(monkey_net(**changes))
    assert isinstance(system, MonkeyNetSystem)
    worn_norms(system)
    with torch.no_grad():
        system.detector.kp.weight.normal_(0, 0.1)
        system.dense_motion.mask.weight.normal_(0, 0.1)
        system.dense_motion.residual.weight.normal_(0, 0.01)
    return system.eval()


def images(count: int = 2, side_px: int = SIDE_PX) -> Tensor:
    """Smooth random pictures, so that points differ from one to the next."""
    small = torch.rand(count, 3, 6, 6)
    return functional.interpolate(small, (side_px, side_px), mode="bicubic").clamp(0, 1)


def poses(count: int = 2) -> MonkeyDriving:
    """Points anywhere, and ellipses of any slant."""
    half = 0.2 * torch.randn(count, NUM_KEYPOINTS, 2, 2)
    covariance = half @ half.mT + 0.01 * torch.eye(2)
    return MonkeyDriving(torch.rand(count, NUM_KEYPOINTS, 2) * 1.6 - 0.8, covariance)


def close(found: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.detach().float(), torch.as_tensor(expected).float(), rtol=0, atol=tolerance
    )


# --- the formulas, slowly --------------------------------------------------------------------


def slow_pose(w: dict[str, Tensor], image: Tensor, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Points [B, K, 2] and covariances [B, K, 2, 2]."""
    features = slow.hourglass(slow.sub(w, "predictor"), slow.antialias(image, scale))
    logits = slow.conv(slow.sub(w, "kp"), features).double().numpy()
    batch, count, height, width = logits.shape
    points, covariance = np.zeros((batch, count, 2)), np.zeros((batch, count, 2, 2))
    for b, k in np.ndindex(batch, count):
        heat = np.exp(logits[b, k] / 0.1 - (logits[b, k] / 0.1).max())
        heat = heat / heat.sum() + 1e-7
        for i, j in np.ndindex(height, width):
            z = np.array([slow.place(j, width), slow.place(i, height)])
            points[b, k] += heat[i, j] * z
        for i, j in np.ndindex(height, width):
            d = np.array([slow.place(j, width), slow.place(i, height)]) - points[b, k]
            covariance[b, k] += heat[i, j] * np.outer(d, d)
    return points, covariance


def slow_maps(points: np.ndarray, covariance: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((*points.shape[:2], size, size))
    for b, k, i, j in np.ndindex(*out.shape):
        d = np.array([slow.place(j, size), slow.place(i, size)]) - points[b, k]
        out[b, k, i, j] = math.exp(-0.5 * d @ np.linalg.solve(covariance[b, k], d))
    return out


Pose = tuple[np.ndarray, np.ndarray]


def slow_difference(source: Pose, driving: Pose, size: int) -> np.ndarray:
    difference: np.ndarray = (slow_maps(*driving, size) - slow_maps(*source, size)) / DIVISOR
    return difference


def slow_flow(
    w: dict[str, Tensor], small: Tensor, source: Pose, driving: Pose, *, align_corners: bool
) -> np.ndarray:
    """The flow as an offset, [B, 2, H, W]."""
    batch, _, size, _ = small.shape
    shift = np.zeros((batch, NUM_KEYPOINTS + 1, 2))
    shift[:, 1:] = source[0] - driving[0]
    heat = np.zeros((batch, NUM_KEYPOINTS + 1, size, size))
    heat[:, 1:] = slow_difference(source, driving, size)
    inputs = []
    for k in range(NUM_KEYPOINTS + 1):
        grid = np.zeros((batch, size, size, 2))
        for b, i, j in np.ndindex(batch, size, size):
            grid[b, i, j] = np.array([slow.place(j, size), slow.place(i, size)]) + shift[b, k]
        inputs.append(torch.from_numpy(heat[:, k : k + 1]).float())
        inputs.append(slow.grid_sample(small, grid, align_corners=align_corners))
    x = torch.cat(inputs, 1)
    for n in range(2):
        block = slow.sub(w, f"group_blocks.{n}")
        parts = []  # a group sees its own motion only
        for k in range(NUM_KEYPOINTS + 1):
            own = slice(4 * k, 4 * k + 4)
            matrix = block["conv.weight"][own, :, 0, 0]
            moved = torch.einsum("oi,bihw->bohw", matrix, x[:, own])
            parts.append(moved + block["conv.bias"][own, None, None])
        x = slow.norm(slow.sub(block, "norm"), torch.cat(parts, 1)).clamp(min=0)
    features = slow.hourglass(slow.sub(w, "hourglass"), x)
    mask = slow.conv(slow.sub(w, "mask"), features).softmax(1).double().numpy()
    flow = slow.conv(slow.sub(w, "residual"), features).double().numpy()
    for b, k, c in np.ndindex(batch, NUM_KEYPOINTS + 1, 2):
        flow[b, c] += mask[b, k] * shift[b, k, c]
    return flow


def resized(maps: np.ndarray, size: int) -> np.ndarray:
    """Area means to a smaller size, bilinear between pixel centres to a larger one."""
    before = maps.shape[-1]
    out = np.zeros((*maps.shape[:2], size, size))
    for i, j in np.ndindex(size, size):
        if size <= before:
            n = before // size
            out[..., i, j] = maps[..., n * i : n * i + n, n * j : n * j + n].mean((-2, -1))
            continue
        row, column = (((v + 0.5) * before / size - 0.5) for v in (i, j))
        row, column = (min(max(v, 0), before - 1) for v in (row, column))
        for p, q in np.ndindex(before, before):
            weight = max(0, 1 - abs(row - p)) * max(0, 1 - abs(column - q))
            out[..., i, j] += weight * maps[..., p, q]
    return out


def slow_frame(
    w: dict[str, Tensor],
    image: Tensor,
    flow: np.ndarray,
    poses: tuple[Pose, Pose],
    *,
    align_corners: bool,
) -> Tensor:
    skips = [image]
    for n in range(len([k for k in w if k.startswith("down_blocks.") and "conv.weight" in k])):
        skips.append(slow.down(slow.sub(w, f"down_blocks.{n}"), skips[-1]))
    heat = slow_difference(*poses, image.shape[-1])
    seen = []
    for skip in skips:
        size = skip.shape[-1]
        grid = resized(flow, size).transpose(0, 2, 3, 1)
        for b, i, j in np.ndindex(len(image), size, size):
            grid[b, i, j] += [slow.place(j, size), slow.place(i, size)]
        warped = slow.grid_sample(skip, grid, align_corners=align_corners)
        seen.append(torch.cat([warped, torch.from_numpy(resized(heat, size)).float()], 1))
    x = seen.pop()
    for n in range(len(seen)):
        x = torch.cat([slow.up(slow.sub(w, f"up_blocks.{n}"), x), seen.pop()], 1)
    for n in range(2):
        x = slow.res(slow.sub(w, f"refinement.r{n}"), x)
    matrix, bias = w["final.weight"][:, :, 0, 0], w["final.bias"]
    return (torch.einsum("oi,bihw->bohw", matrix, x) + bias[:, None, None]).sigmoid()


def numbers(pose: MonkeyDriving) -> Pose:
    return pose.points_BK2.double().numpy(), pose.covariance_BK22.double().numpy()


# --- each part -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5])
@torch.no_grad()
def test_keypoints_are_the_heatmaps_mean_and_spread(scale: float) -> None:
    detector = monkey_net().detector.model_copy(update={"scale_factor": scale})
    system, image = built(detector=detector), images()
    found = system.encode_driving(image)
    points, covariance = slow_pose(system.detector.state_dict(), image, scale)
    close(found.points_BK2, points)
    close(found.covariance_BK22, covariance)
    assert found.points_BK2.std() > 0.01
    assert torch.linalg.eigvalsh(found.covariance_BK22).min() > 0


@torch.no_grad()
def test_a_heatmap_of_one_pixel_is_drawn() -> None:
    system = built()
    system.detector.kp.weight.mul_(1e4)
    pose = system.encode_driving(images())
    maps = covariance_maps(pose, size_px=(SIDE_PX, SIDE_PX))
    assert pose.covariance_BK22.diagonal(dim1=-2, dim2=-1).min() < 1e-4
    assert maps.isfinite().all()
    assert maps.amax() <= 1


def test_gaussians_have_the_covariance() -> None:
    source, driving = poses(), poses()
    maps = covariance_maps(source, size_px=(9, 9))
    close(maps, slow_maps(*numbers(source), 9))
    found = difference_maps(source, driving, size_px=(9, 9), divisor=DIVISOR)
    close(found, slow_difference(numbers(source), numbers(driving), 9))
    # The diagonal of a slanted ellipse goes further than across.
    slanted = torch.tensor([[[[0.1, 0.08], [0.08, 0.1]]]])
    tilted = covariance_maps(MonkeyDriving(torch.zeros(1, 1, 2), slanted), size_px=(3, 3))[0, 0]
    assert tilted[0, 0] == tilted[2, 2] > tilted[0, 2]


@pytest.mark.parametrize("align_corners", [True, False])
@torch.no_grad()
def test_flow_is_the_formula(align_corners: bool) -> None:
    system = built(align_corners=align_corners)
    source, driving = system.encode_source(images()), poses()
    found = system.dense_motion(source, driving)
    expected = slow_flow(
        system.dense_motion.state_dict(),
        source.small_BCHW,
        numbers(source),
        numbers(driving),
        align_corners=align_corners,
    )
    close(found, expected)
    assert found.std() > 0.01


@pytest.mark.parametrize("align_corners", [True, False])
@torch.no_grad()
def test_frame_is_the_formula(align_corners: bool) -> None:
    # The flow has half the image's size: it grows for the image, and shrinks for the inner skips.
    system = built(align_corners=align_corners)
    image = images()
    source, driving = system.encode_source(image), poses()
    flow = 0.1 * torch.randn(2, 2, SIDE_PX // 2, SIDE_PX // 2)
    found = system.generator(source, driving, flow)
    expected = slow_frame(
        system.generator.state_dict(),
        image,
        flow.double().numpy(),
        (numbers(source), numbers(driving)),
        align_corners=align_corners,
    )
    close(found, expected)


@torch.no_grad()
def test_nothing_moves_when_nothing_moved() -> None:
    system = build_system(monkey_net()).eval()
    assert isinstance(system, MonkeyNetSystem)
    image = images()
    source, driving = system.encode_source(image), system.encode_driving(image)
    flow = system.dense_motion(source, driving)
    assert not flow.any()
    maps = system.generator.skips(source.skips_BN)
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]
    for one in maps:
        close(system.generator.warp(one, flow), one)
    close(maps[0], image, 0)


@torch.no_grad()
def test_a_fresh_system_mixes_the_shifts_by_its_bias() -> None:
    system = build_system(monkey_net()).eval()
    assert isinstance(system, MonkeyNetSystem)
    source, driving = system.encode_source(images()), poses()
    flow = system.dense_motion(source, driving)
    share = 1 / (math.exp(2) + NUM_KEYPOINTS)
    expected = share * (source.points_BK2 - driving.points_BK2).sum(1)
    close(flow, expected[:, :, None, None].expand_as(flow))


def test_sizes_are_the_published_ones() -> None:
    # 9.4, 19.1 and 1.7 million, counted in the published networks for the human actions.
    judge = Discriminator(max_features=256, use_keypoints=True)
    with torch.device("meta"):
        system = build_system(MonkeyNetModel(image_size_px=64, discriminator=judge))
    assert isinstance(system, MonkeyNetSystem)

    def millions(*modules: nn.Module | None) -> float:
        return round(sum(p.numel() for m in modules if m for p in m.parameters()) / 1e6, 1)

    assert millions(system.detector) == 9.4
    assert millions(system.dense_motion, system.generator) == 19.1
    assert millions(system.discriminator) == 1.7


# --- the system ------------------------------------------------------------------------------


@torch.no_grad()
def test_states_are_reused_and_batches_do_not_show() -> None:
    system = built()
    source = system.encode_source(images(1))
    driving = system.encode_driving(images(3))
    together = system.render(source.repeat(3), driving).image_BCHW
    assert together.shape == (3, 3, SIDE_PX, SIDE_PX)
    for i in range(3):
        close(system.render(source, driving[i : i + 1]).image_BCHW, together[i : i + 1])
    again = MonkeyDriving.cat([driving[:1], driving[1:]])
    sources = MonkeySource.cat([source] * 3)
    close(system.render(sources, again).image_BCHW, together)
    assert together.amin() >= 0
    assert together.amax() <= 1


@pytest.mark.parametrize("adapt_scale", [False, True])
@torch.no_grad()
def test_relative_motion_from_the_source_itself_is_absolute(adapt_scale: bool) -> None:
    system = built()
    assert system.motions == {"absolute", "relative"}
    image = images(1)
    source, initial = system.encode_source(image), system.encode_driving(image)
    driving = system.encode_driving(images(3))
    moved = system.relative_motion(source.repeat(3), driving, initial, adapt_scale=adapt_scale)
    close(moved.points_BK2, driving.points_BK2)
    absolute = system.render(source.repeat(3), driving).image_BCHW
    close(system.render(source.repeat(3), moved).image_BCHW, absolute)


@torch.no_grad()
def test_relative_motion_moves_points_and_keeps_spreads() -> None:
    system = built()
    source, driving = system.encode_source(images(1)), system.encode_driving(images(3))
    moved = system.relative_motion(source.repeat(3), driving, driving[:1], adapt_scale=False)
    for i in range(3):
        shift = driving.points_BK2[i] - driving.points_BK2[0]
        close(moved.points_BK2[i], source.points_BK2[0] + shift)
    assert torch.equal(moved.covariance_BK22, driving.covariance_BK22)


@pytest.mark.parametrize("judge", [None, JUDGE])
def test_every_loss_reaches_its_networks(judge: Discriminator | None) -> None:
    system = built(discriminator=judge).train()
    losses = Losses(scales=(1,), pixel=2, feature_matching=(3, 1))
    system.set_losses(losses, PerceptualLoss(random_features(), (1,)))
    batch = Batch(images(), images())
    terms = system(batch).terms
    names = {"adversarial", "feature_matching", "discriminator"} if judge else set()
    assert set(terms) == {"perceptual", "pixel"} | names
    sum(terms.values()).backward()
    gradients = {name: p.grad for name, p in system.named_parameters()}
    assert [n for n, g in gradients.items() if g is None or not g.isfinite().all()] == []
    assert [n for n, g in gradients.items() if g is not None and not g.any()] == []


def test_the_judges_loss_moves_the_judge_alone() -> None:
    system = built(discriminator=JUDGE).train()
    system.set_losses(Losses(perceptual=0, pixel=1, feature_matching=(3, 1)), None)
    terms = system(Batch(images(), images())).terms
    terms["discriminator"].backward(retain_graph=True)
    assert {n.split(".")[0] for n, p in system.named_parameters() if p.grad is not None} == {
        "discriminator"
    }
    system.zero_grad(set_to_none=True)
    (terms["adversarial"] + terms["feature_matching"]).backward()
    moved = {n.split(".")[0] for n, p in system.named_parameters() if p.grad is not None}
    assert moved == {"detector", "dense_motion", "generator"}


def test_feature_weights_that_do_not_fit_are_refused() -> None:
    system = built(discriminator=JUDGE)
    with pytest.raises(ConfigError, match=r"feature_matching"):
        system.set_losses(Losses(perceptual=0, pixel=1), None)
    with pytest.raises(ConfigError, match=r"discriminator"):
        built(discriminator=Discriminator(num_blocks=4))


def test_bfloat16_convolutions_leave_coordinates_and_frames_in_full_precision() -> None:
    system = built(discriminator=JUDGE).train()
    system.set_losses(Losses(perceptual=0, pixel=1, feature_matching=(3, 1)), None)
    image = images()
    with torch.autocast("cpu", torch.bfloat16):
        terms = system(Batch(image, images())).terms
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in system.parameters() if p.grad is not None)
    system.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        source, driving = system.encode_source(image), system.encode_driving(images())
        flow = system.dense_motion(source, driving)
        frame = system.render(source, driving).image_BCHW
    states = (source.points_BK2, source.covariance_BK22, source.small_BCHW, source.skips_BN)
    assert {t.dtype for t in (*states, flow, frame)} == {torch.float32}
    with torch.no_grad():
        close(system.render(source, driving).image_BCHW, frame, 0.05)


@torch.no_grad()
def test_channels_last_draws_the_same() -> None:
    system = built()
    source, driving = images(), images()
    plain = system.render(system.encode_source(source), system.encode_driving(driving))
    system.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    source, driving = (i.contiguous(memory_format=torch.channels_last) for i in (source, driving))
    again = system.render(system.encode_source(source), system.encode_driving(driving))
    close(again.image_BCHW, plain.image_BCHW)


# --- the preset ------------------------------------------------------------------------------


def test_the_preset_trains_and_animates() -> None:
    job = resolve_job(
        TrainJob,
        preset="debug",
        systems=["monkey-net"],
        flags={"data": "unused", "out": "unused"},
    )
    (plan,) = plan_phases(job, pairs_per_epoch=1000)
    system = initial_system(plan, seed=0)
    trainer = Trainer(plan, system, features=random_features(), seed=0)
    before = {k: v.clone() for k, v in system.named_parameters()}
    for _ in range(2):
        step = trainer.step(Batch(images(4, 32), images(4, 32)))
        assert math.isfinite(step.loss)
        assert {"perceptual", "pixel", "adversarial", "discriminator"} <= set(step.terms)
    moved = {n.split(".")[0] for n, p in system.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"detector", "dense_motion", "generator", "discriminator"}

    animator = Animator(system, device="cpu")
    source, driving = to_frames(images(1, 32))[0], to_frames(images(5, 32))
    absolute = animator.animate(source, driving, batch_size=2)
    assert absolute.shape == (5, 32, 32, 3)
    own = np.concatenate([source[None], driving])
    relative = animator.animate(source, own, motion="relative", adapt_scale=True, best_frame=True)
    # The source's own pose is the most like it, so motion from there is absolute.
    np.testing.assert_allclose(relative[1:].astype(int), absolute, atol=1)

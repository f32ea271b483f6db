"""The systems against `model_reference`, which computes the same from the formulas."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask.config import Losses
from kpmask.errors import ConfigError
from kpmask.losses import PerceptualLoss
from kpmask.model_config import (
    DenseMotion,
    FommGenerator,
    FommModel,
    Hourglass,
    KeypointDetector,
    KeypointMaskModel,
    LowResolution,
)
from kpmask.models import build_system, layers
from kpmask.models.base import AnimationSystem, Batch
from kpmask.models.fomm import FommDriving, FommSource, FommSystem
from kpmask.models.keypoint_mask import CirclesSystem, KeypointMaskDriving, KeypointMaskSystem
from kpmask.models.motion import relative_jacobian, relative_points, size_ratio
from kpmask.perceptual import random_features
from kpmask.upstream import export_upstream
from tests.support.models import worn_norms

_spec = importlib.util.spec_from_file_location(
    "model_reference", Path(__file__).with_name("model_reference.py")
)
assert _spec is not None
assert _spec.loader is not None
slow = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(slow)

SIDE_PX = 32
DETECTOR = KeypointDetector(
    block_expansion=4, num_blocks=2, max_features=8, num_keypoints=3, scale_factor=0.5
)
MASKS = ("heatmap", "circles", "softmax")


def fomm(**changes: Any) -> FommModel:
    settings: dict[str, Any] = {
        "image_size_px": SIDE_PX,
        "detector": DETECTOR,
        "dense_motion": DenseMotion(
            block_expansion=4, num_blocks=2, max_features=8, scale_factor=0.5
        ),
        "generator": FommGenerator(
            block_expansion=4, num_down_blocks=2, num_bottleneck_blocks=2, max_features=8
        ),
    }
    return FommModel(**(settings | changes))


def keypoint_mask(mask: str = "heatmap", **changes: Any) -> KeypointMaskModel:
    settings: dict[str, Any] = {
        "image_size_px": SIDE_PX,
        "mask": mask,
        "detector": DETECTOR,
        "low_resolution": LowResolution(
            scale_factor=0.5, block_expansion=4, num_bottleneck_blocks=2
        ),
        "high_resolution": Hourglass(block_expansion=4, num_blocks=3, max_features=16),
    }
    return KeypointMaskModel(**(settings | changes))


def scrambled(system: AnimationSystem[Any, Any]) -> AnimationSystem[Any, Any]:
    """The system in eval mode, with batch statistics and heads that a fresh one would not have."""
    worn_norms(system)
    with torch.no_grad():
        detector = system.detector
        assert isinstance(detector, nn.Module)
        for name, head in detector.named_children():
            if name in {"kp", "jacobian"}:
                head.weight.normal_(0, 0.03)
    return system.eval()


def built(config: FommModel | KeypointMaskModel) -> Any:
    return scrambled(build_system(config))


def images(count: int = 2, side_px: int = SIDE_PX) -> Tensor:
    """Smooth random pictures, so that points differ from one to the next."""
    small = torch.rand(count, 3, 6, 6)
    return functional.interpolate(small, (side_px, side_px), mode="bicubic").clamp(0, 1)


def close(found: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.detach().float(), torch.as_tensor(expected).float(), rtol=0, atol=tolerance
    )


# --- layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 0.5, 0.25, 0.125])
def test_antialias_is_a_gaussian_window_around_every_nth_pixel(scale: float) -> None:
    image = torch.rand(2, 3, 16, 16)
    close(layers.AntiAlias(3, scale)(image), slow.antialias(image, scale))


def test_antialias_kernel_is_the_published_one() -> None:
    # sigma 1.5, 13 taps; the tensor `down.weight` of the published files.
    weight = layers.AntiAlias(3, 0.25).weight
    assert weight.shape == (3, 1, 13, 13)
    assert float(weight[0, 0].sum()) == pytest.approx(1)
    assert float(weight[0, 0, 6, 6] / weight[0, 0, 6, 9]) == pytest.approx(np.exp(2))


def test_antialias_of_another_scale_keeps_its_size() -> None:
    assert layers.AntiAlias(3, 0.75)(torch.rand(1, 3, 16, 16)).shape == (1, 3, 12, 12)
    assert layers.AntiAlias(3, 1.0).state_dict() == {}


def test_grid_is_corner_aligned() -> None:
    grid = layers.coordinate_grid(3, 5, like=torch.zeros(1))
    assert grid[0, 0].tolist() == [-1, -1]
    assert grid[2, 4].tolist() == [1, 1]
    assert grid[1, 3].tolist() == [0.5, 0]


def test_gaussians_and_their_means() -> None:
    points = torch.rand(2, 3, 2) * 1.6 - 0.8
    maps = layers.gaussian_maps(points, size_px=(9, 9), variance=0.02)
    expected = np.array([[slow.gaussian(p.numpy(), 9, 0.02) for p in row] for row in points])
    close(maps, expected)
    heat = maps / maps.sum((2, 3), keepdim=True)
    found = layers.spatial_mean(heat, layers.coordinate_grid(9, 9, like=heat))
    close(found, np.array([[slow.soft_argmax(h.numpy()) for h in row] for row in heat]))


def test_small_matrices() -> None:
    left, right = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    close(layers.product(left, right), left @ right)
    close(layers.product(layers.inverse(left), left), torch.eye(2).expand_as(left), 1e-4)
    close(layers.transform(left, right[..., 0]), (left @ right[..., :1])[..., 0])


def test_min_max_is_per_sample_out_of_place_and_safe() -> None:
    maps = torch.stack([torch.rand(1, 5, 5) * 7 - 3, torch.full((1, 5, 5), 4.0)])
    before = maps.clone()
    stretched = layers.min_max(maps)
    assert torch.equal(maps, before)
    close(stretched[0, 0], slow.stretched(maps[0, 0].numpy()))
    assert torch.equal(stretched[1], torch.zeros(1, 5, 5))  # 0/0 in the published code


def test_maps_shrink_by_area_and_grow_bilinearly() -> None:
    mask = torch.rand(1, 1, 8, 8)
    close(layers.resize_map(mask, 4), mask.reshape(1, 1, 4, 2, 4, 2).mean((3, 5)))
    assert layers.resize_map(mask, 8) is mask
    grown = layers.resize_map(mask, 16)
    close(
        grown[0, 0, 1, 1],
        0.75**2 * mask[0, 0, 0, 0]
        + 0.75 * 0.25 * (mask[0, 0, 0, 1] + mask[0, 0, 1, 0])
        + 0.25**2 * mask[0, 0, 1, 1],
    )


# --- the keypoint detector -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"single_jacobian_map": True}, {"estimate_jacobian": False}, {"head_padding": 3}],
)
def test_detector_is_the_formula(changes: dict[str, Any]) -> None:
    config = DETECTOR.model_copy(update=changes)
    system = built(fomm(detector=config))
    image = images()
    found = system.detector(image)
    weights = export_upstream(system)["kp_detector"]
    logits, heat, points, jacobians = slow.detector(
        weights, image, scale=0.5, pad=config.head_padding
    )
    assert found.logits_BKHW.shape[-1] == 10 + 2 * config.head_padding
    assert found.logits_BKHW.shape[-1] == system.detector.map_side_px(SIDE_PX)
    close(found.logits_BKHW, logits)
    close(found.heatmap_BKHW, heat)
    close(found.points_BK2, points)
    if jacobians is None:
        assert found.jacobian_BK22 is None
    else:
        close(found.jacobian_BK22, jacobians)


def test_fresh_jacobians_are_the_identity() -> None:
    system = build_system(fomm())
    found = system.detector(images())  # type: ignore[operator]
    close(found.jacobian_BK22, torch.eye(2).expand(2, 3, 2, 2))


def test_maps_of_no_pixels_are_refused() -> None:
    small = DETECTOR.model_copy(update={"scale_factor": 0.125})
    with pytest.raises(ConfigError, match="head_padding = 3"):
        build_system(fomm(detector=small))
    with pytest.raises(ConfigError):
        build_system(keypoint_mask(detector=small))


# --- FOMM ------------------------------------------------------------------------------------


def numbers(state: Any) -> tuple[np.ndarray, np.ndarray | None]:
    jacobian = state.jacobian_BK22
    return state.points_BK2.double().numpy(), (
        None if jacobian is None else jacobian.double().numpy()
    )


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("has_jacobian", [True, False])
@torch.no_grad()
def test_fomm_is_the_formula(align_corners: bool, has_jacobian: bool) -> None:
    detector = DETECTOR.model_copy(update={"estimate_jacobian": has_jacobian})
    config = fomm(align_corners=align_corners, detector=detector)
    system = built(config)
    source_image, driving_image = images(), images()
    source, driving = system.encode_source(source_image), system.encode_driving(driving_image)
    found = system.render(source, driving).image_BCHW
    expected = slow.fomm_generator(
        export_upstream(system)["generator"],
        source_image,
        numbers(source),
        numbers(driving),
        scale=0.5,
        variance=config.dense_motion.kp_variance,
        align_corners=align_corners,
    )
    close(found, expected)


@torch.no_grad()
def test_dense_motion_is_the_formula() -> None:
    system = built(fomm())
    source = FommSource(
        torch.rand(2, 3, 8, 8),
        torch.empty(2, 0),
        torch.rand(2, 3, 2) - 0.5,
        torch.eye(2) + 0.3 * torch.randn(2, 3, 2, 2),
    )
    driving = FommDriving(torch.rand(2, 3, 2) - 0.5, torch.eye(2) + 0.3 * torch.randn(2, 3, 2, 2))
    network = system.generator.dense_motion_network
    flow, occlusion = network(source, driving)
    weights = slow.sub(export_upstream(system)["generator"], "dense_motion_network")
    expected = slow.dense_motion(
        weights,
        source.small_BCHW,
        numbers(source),
        numbers(driving),
        variance=0.01,
        align_corners=True,
    )
    close(flow, expected[0], 2e-5)
    close(occlusion, expected[1], 2e-5)


@torch.no_grad()
def test_fomm_moves_nothing_when_nothing_moved() -> None:
    system = built(fomm())
    image = images()
    source, driving = system.encode_source(image), system.encode_driving(image)
    flow, _ = system.generator.dense_motion_network(source, driving)
    grid = layers.coordinate_grid(16, 16, like=flow)
    close(flow, grid.expand(2, -1, -1, -1))
    warped = system.generator.warp(source.small_BCHW, flow, None)
    close(warped, source.small_BCHW, 1e-4)  # with corner-aligned sampling only


# --- keypoint mask ---------------------------------------------------------------------------


def slow_mask(config: KeypointMaskModel, found: tuple[Any, ...]) -> Tensor:
    logits, heat, points, _ = found
    ring = 3 - config.detector.head_padding
    if config.mask == "heatmap":
        return slow.mask(logits.double().numpy(), ring=ring)
    if config.mask == "softmax":
        return slow.mask(heat.numpy(), ring=ring)
    side = logits.shape[-1]
    if config.circle_grid == "full":
        side, ring = side + 2 * ring, 0
    circles = [[slow.gaussian(p, side, config.circle_variance) for p in row] for row in points]
    return slow.mask(np.array(circles), ring=ring)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("changes", [{}, {"circle_grid": "full"}, {"head_padding": 3}])
@torch.no_grad()
def test_keypoint_mask_is_the_formula(mask: str, changes: dict[str, Any]) -> None:
    padding = changes.get("head_padding", 0)
    grid = changes.get("circle_grid", "padded")
    config = keypoint_mask(
        mask, detector=DETECTOR.model_copy(update={"head_padding": padding}), circle_grid=grid
    )
    system = built(config)
    source_image, driving_image = images(), images()
    found = system.render(system.encode_source(source_image), system.encode_driving(driving_image))
    weights = export_upstream(system)
    masks = [
        slow_mask(config, slow.detector(weights["kp_detector"], i, scale=0.5, pad=padding))
        for i in (source_image, driving_image)
    ]
    close(found.source_mask_B1HW, masks[0], 2e-5)
    close(found.driving_mask_B1HW, masks[1], 2e-5)
    low, high = slow.keypoint_mask_generator(weights["generator"], source_image, *masks, scale=0.5)
    close(found.low_resolution_BCHW, low)
    close(found.image_BCHW, high)


@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_mask_of_another_size_is_resized(mask: str) -> None:
    # The detector sees 32 px, the first stage works at 16, then at 8 and at 32.
    config = keypoint_mask(mask, detector=DETECTOR.model_copy(update={"scale_factor": 1.0}))
    full = built(
        keypoint_mask(
            mask,
            low_resolution=LowResolution(
                scale_factor=1.0, block_expansion=4, num_bottleneck_blocks=1
            ),
            detector=config.detector,
        )
    )
    half = built(config)
    half.detector.load_state_dict(full.detector.state_dict())
    image = images()
    large, small = full.mask(image), half.mask(image)
    assert large.shape[-1] == 32
    assert small.shape[-1] == 16
    close(small, functional.avg_pool2d(large, 2))
    assert not large[..., :3, :].any()  # the ring that the heads cut off


@torch.no_grad()
def test_a_constant_mask_draws_a_frame() -> None:
    system = built(keypoint_mask("heatmap"))
    for head in (system.detector.kp.weight, system.detector.kp.bias):
        head.zero_()
    image = images()
    prediction = system.render(system.encode_source(image), system.encode_driving(image))
    assert prediction.image_BCHW.isfinite().all()
    assert not prediction.source_mask_B1HW.any()


@torch.no_grad()
def test_circles_stand_where_the_grid_says() -> None:
    point = torch.tensor([[[0.5, -1 / 3]]])
    for grid, expected in (("padded", (3 + 0.75 * 9, 3 + 9 / 3)), ("full", (0.75 * 15, 15 / 3))):
        config = keypoint_mask("circles", circle_grid=grid, circle_variance=0.02)
        mask = built(config).draw(point)[0, 0]
        rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        centre = [float((mask * axis).sum() / mask.sum()) for axis in (columns, rows)]
        assert centre == pytest.approx(expected, abs=0.05)


def test_the_detector_is_frozen_and_stays_in_eval_mode() -> None:
    system = build_system(keypoint_mask("heatmap"))
    system.set_losses(Losses(perceptual=0, pixel=1), None)
    detector = system.detector
    assert isinstance(detector, nn.Module)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    optimiser = torch.optim.Adam([p for p in system.parameters() if p.requires_grad])
    system.train()
    assert system.high_resolution.training  # type: ignore[union-attr]
    for _ in range(2):
        optimiser.zero_grad()
        system(Batch(images(), images())).total.backward()
        optimiser.step()
    assert not detector.training
    assert all(not m.training for m in detector.modules())
    assert all(p.grad is None for p in detector.parameters())
    after = detector.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", ["low", "high"])
def test_each_stage_learns_from_its_own_loss(name: str) -> None:
    system = build_system(keypoint_mask("circles"))
    system.set_losses(Losses(scales=(1,)), PerceptualLoss(random_features(), (1,)))
    system(Batch(images(), images())).terms[f"perceptual_{name}"].backward()
    gradients = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    learning = {n.split("_")[0] for n, gradient in gradients.items() if gradient.any()}
    assert learning == {name}


# --- both ------------------------------------------------------------------------------------

CONFIGS = [fomm(), *(keypoint_mask(mask) for mask in MASKS)]
NAMES = ["fomm", *MASKS]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_a_gradient_reaches_every_trainable_parameter(config: Any) -> None:
    system = build_system(config)
    system.set_losses(Losses(scales=(1,)), PerceptualLoss(random_features(), (1,)))
    losses = system(Batch(images(), images()))
    losses.total.backward()
    trainable = {n: p for n, p in system.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None] == []
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable.values())
    dead = [n for n, p in trainable.items() if p.grad is not None and not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
@torch.no_grad()
def test_encoding_once_and_in_batches_changes_nothing(config: Any) -> None:
    system = built(config)
    source = system.encode_source(images(1))
    driving = system.encode_driving(images(3))
    together = system.render(source.repeat(3), driving).image_BCHW
    for i in range(3):
        close(system.render(source, driving[i : i + 1]).image_BCHW, together[i : i + 1])
    again = type(driving).cat([driving[:1], driving[1:]])
    close(system.render(source.repeat(3), again).image_BCHW, together)
    assert together.amin() >= 0
    assert together.amax() <= 1


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_same_seed_same_weights_losses_and_gradients(config: Any) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(3)
        system = build_system(config)
        system.set_losses(Losses(scales=(1,)), PerceptualLoss(random_features(), (1,)))
        losses = system(Batch(images(), images()))
        losses.total.backward()
        gradients = [p.grad for p in system.parameters() if p.grad is not None]
        return [*losses.terms.values(), *gradients, *system.state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("config", CONFIGS[:2], ids=NAMES[:2])
@torch.no_grad()
def test_channels_last_draws_the_same(config: Any) -> None:
    system = built(config)
    source, driving = images(), images()
    plain = system.render(system.encode_source(source), system.encode_driving(driving))
    system.to(memory_format=torch.channels_last)
    source, driving = (i.contiguous(memory_format=torch.channels_last) for i in (source, driving))
    again = system.render(system.encode_source(source), system.encode_driving(driving))
    close(again.image_BCHW, plain.image_BCHW)


def test_coordinates_stay_in_full_precision_under_autocast() -> None:
    system = built(fomm())
    image = images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        source, driving = system.encode_source(image), system.encode_driving(image)
        flow, _ = system.generator.dense_motion_network(source, driving)
    assert driving.points_BK2.dtype == torch.float32
    assert driving.jacobian_BK22.dtype == torch.float32
    # Nothing moved, so the flow is the grid, whatever the convolutions round.
    close(flow, layers.coordinate_grid(16, 16, like=flow).expand(2, -1, -1, -1), 1e-5)


# --- relative motion -------------------------------------------------------------------------


@pytest.mark.parametrize("adapt_scale", [False, True])
def test_relative_motion_is_the_formula(adapt_scale: bool) -> None:
    source, driving, initial = (torch.rand(2, 6, 2) * 2 - 1 for _ in range(3))
    found = relative_points(source, driving, initial[:1], adapt_scale=adapt_scale)
    for b in range(2):
        ratio = 1.0
        if adapt_scale:
            areas = slow.hull_area(source[b].numpy()), slow.hull_area(initial[0].numpy())
            ratio = (areas[0] / areas[1]) ** 0.5
        close(found[b], (driving[b] - initial[0]) * ratio + source[b])
    still = relative_points(source, initial, initial, adapt_scale=adapt_scale)
    close(still, source)


def test_points_without_an_area_are_not_scaled() -> None:
    line = torch.linspace(-1, 1, 6)[:, None].expand(1, 6, 2)
    square = torch.rand(1, 6, 2)
    assert size_ratio(line, square).tolist() == [1]
    assert size_ratio(square, line).tolist() == [1]
    assert size_ratio(square[:, :2], square[:, :2]).tolist() == [1]
    assert size_ratio(3 * square, square).item() == pytest.approx(3)


def test_relative_jacobian_is_the_formula() -> None:
    source, driving, initial = (torch.eye(2) + 0.2 * torch.randn(2, 3, 2, 2) for _ in range(3))
    expected = driving.numpy() @ np.linalg.inv(initial.numpy()) @ source.numpy()
    close(relative_jacobian(source, driving, initial), expected)


@torch.no_grad()
def test_fomm_relative_motion_starts_at_the_source() -> None:
    system = built(fomm())
    assert isinstance(system, FommSystem)
    assert system.motions == {"absolute", "relative"}
    source_image, driving_image = images(1), images(3)
    source, driving = system.encode_source(source_image), system.encode_driving(driving_image)
    moved = system.relative_motion(source.repeat(3), driving, driving[:1], adapt_scale=True)
    close(moved.points_BK2[:1], source.points_BK2)
    close(moved.jacobian_BK22[:1], source.jacobian_BK22)
    own = system.encode_driving(source_image)
    first = system.render(source, moved[:1]).image_BCHW
    close(first, system.render(source, own).image_BCHW)


@torch.no_grad()
def test_circles_move_relatively_and_heatmaps_do_not() -> None:
    system = built(keypoint_mask("circles"))
    assert isinstance(system, CirclesSystem)
    assert system.motions == {"absolute", "relative"}
    source, driving = system.encode_source(images(1)), system.encode_driving(images(3))
    assert driving.mask_B1HW is None
    moved = system.relative_motion(source.repeat(3), driving, driving[:1], adapt_scale=False)
    prediction = system.render(source.repeat(3), moved)
    close(prediction.driving_mask_B1HW[:1], source.mask_B1HW)
    shifted = source.points_BK2 + driving.points_BK2[2] - driving.points_BK2[0]
    expected = system.draw(shifted)
    close(prediction.driving_mask_B1HW[2:], expected)
    other = built(keypoint_mask("heatmap"))
    assert isinstance(other, KeypointMaskSystem)
    assert other.motions == {"absolute"}
    mask = KeypointMaskDriving(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ConfigError, match="absolute motion only"):
        other.relative_motion(other.encode_source(images(1)), mask, mask, adapt_scale=False)


# --- the published sizes ---------------------------------------------------------------------


def layout(section: dict[str, Tensor]) -> str:
    lines = [f"{k} {list(v.shape)} {v.dtype}" for k, v in sorted(section.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def parameters(section: dict[str, Tensor]) -> int:
    """As counted in the published files: no running statistics and no antialiasing kernels."""
    buffers = ("running_mean", "running_var", "num_batches_tracked", "down.weight")
    return sum(
        v.numel() for k, v in section.items() if not k.endswith((*buffers, "source_first.weight"))
    )


# Tensors, parameters, and a digest of all names, shapes and types of the published checkpoints.
PUBLISHED = {
    "detector": (75, 14_215_368, "892b67fd0b5325e2"),
    "fomm": (196, 45_575_391, "f77d151e6555aa8c"),
    "keypoint-mask": (194, 45_534_878, "175c9c5ca2861160"),
}


@pytest.mark.parametrize(
    "config", [FommModel(), KeypointMaskModel()], ids=["fomm", "keypoint-mask"]
)
def test_default_sizes_are_the_published_ones(config: FommModel | KeypointMaskModel) -> None:
    with torch.device("meta"):
        system = build_system(config)
    sections = meta_sections(system)
    for name, section in ((config.system, "generator"), ("detector", "kp_detector")):
        found = sections[section]
        assert (len(found), parameters(found), layout(found)) == PUBLISHED[name]


def meta_sections(system: AnimationSystem[Any, Any]) -> dict[str, dict[str, Tensor]]:
    """The original layout of a system without memory."""
    system.to_empty(device="cpu")  # pages that are never written take no memory
    sections = export_upstream(system)
    return {k: v for k, v in sections.items() if isinstance(v, dict)}


@torch.no_grad()
def test_a_full_size_frame() -> None:
    system = build_system(KeypointMaskModel()).eval()
    image = torch.rand(1, 3, 256, 256)
    prediction = system.render(system.encode_source(image), system.encode_driving(image))
    assert prediction.image_BCHW.shape == (1, 3, 256, 256)
    assert prediction.low_resolution_BCHW is not None
    assert prediction.low_resolution_BCHW.shape == (1, 3, 256, 256)
    assert prediction.source_mask_B1HW is not None
    mask = prediction.source_mask_B1HW
    assert mask.shape == (1, 1, 64, 64)
    assert (float(mask.amin()), float(mask.amax())) == (0, 1)
    assert system.detector.map_side_px(256) == 58  # type: ignore[operator, union-attr]

"""Loss terms against loops, closed forms and autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kpmask.config import Losses
from kpmask.errors import ConfigError
from kpmask.losses import PerceptualLoss, RandomWarp, equivariance_jacobian, equivariance_value
from kpmask.model_config import (
    DenseMotion,
    FommGenerator,
    FommModel,
    Hourglass,
    KeypointDetector,
    KeypointMaskModel,
    LowResolution,
)
from kpmask.models import build_system
from kpmask.models.base import Batch
from kpmask.models.layers import gaussian_kernel
from kpmask.perceptual import PerceptualFeatures, random_features

DETECTOR = KeypointDetector(
    block_expansion=4, num_blocks=2, max_features=8, num_keypoints=3, scale_factor=0.5
)


def fomm() -> FommModel:
    return FommModel(
        image_size_px=32,
        detector=DETECTOR,
        dense_motion=DenseMotion(block_expansion=4, num_blocks=2, max_features=8, scale_factor=0.5),
        generator=FommGenerator(
            block_expansion=4, num_down_blocks=1, num_bottleneck_blocks=1, max_features=8
        ),
    )


def keypoint_mask() -> KeypointMaskModel:
    return KeypointMaskModel(
        image_size_px=32,
        detector=DETECTOR,
        low_resolution=LowResolution(scale_factor=0.5, block_expansion=4, num_bottleneck_blocks=1),
        high_resolution=Hourglass(block_expansion=4, num_blocks=2, max_features=8),
    )


# --- perceptual ------------------------------------------------------------------------------


class TwoMaps(PerceptualFeatures):
    """Features simple enough to see through: the image itself, and its square."""

    min_side_px = 4

    def taps(self, x_BCHW: Tensor) -> list[Tensor]:
        return [x_BCHW, x_BCHW**2]


def test_perceptual_loss_is_summed_over_maps_and_scales() -> None:
    real, generated = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    kernel = gaussian_kernel(0.5).expand(3, 1, 5, 5)
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    expected = 0.0
    for shrink in (False, True):
        pair = []
        for image in (real, generated):
            if shrink:
                image = functional.conv2d(image, kernel, padding=2, groups=3)[..., ::2, ::2]
            pair.append((image - mean) / std)
        expected += float((pair[0] - pair[1]).abs().mean())
        expected += float((pair[0] ** 2 - pair[1] ** 2).abs().mean())
    loss = PerceptualLoss(TwoMaps(), (1, 0.5))
    assert float(loss(generated, real)) == pytest.approx(expected, rel=1e-5)
    assert float(loss(real, real)) == 0


def test_no_gradient_reaches_the_real_image() -> None:
    real = torch.rand(1, 3, 16, 16, requires_grad=True)
    generated = torch.rand(1, 3, 16, 16, requires_grad=True)
    PerceptualLoss(TwoMaps(), (1,))(generated, real).backward()
    assert real.grad is None
    assert generated.grad is not None


def test_terms_are_named_and_weighted() -> None:
    batch = Batch(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32))
    system = build_system(keypoint_mask()).eval()
    one = PerceptualLoss(random_features(), (1,))
    with torch.no_grad():
        system.set_losses(Losses(perceptual=10, pixel=3, scales=(1,)), one)
        found = system(batch).terms
        drawn = system.render(
            system.encode_source(batch.source_BCHW), system.encode_driving(batch.driving_BCHW)
        )
        assert drawn.low_resolution_BCHW is not None
        images = {"low": drawn.low_resolution_BCHW, "high": drawn.image_BCHW}
        assert set(found) == {f"{k}_{n}" for k in ("perceptual", "pixel") for n in images}
        for name, image in images.items():
            close = pytest.approx(10 * float(one(image, batch.driving_BCHW)), rel=1e-5)
            assert float(found[f"perceptual_{name}"]) == close
            pixel = (image - batch.driving_BCHW).abs().mean()
            assert float(found[f"pixel_{name}"]) == pytest.approx(3 * float(pixel), rel=1e-5)
        total = system(batch).total
        assert float(total) == pytest.approx(sum(map(float, found.values())))


def test_fomm_terms() -> None:
    batch = Batch(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32))
    system = build_system(fomm())
    system.set_losses(Losses(perceptual=0, pixel=1), None)
    with torch.no_grad():
        assert set(system(batch).terms) == {"pixel", "equivariance_value", "equivariance_jacobian"}
        nothing: dict[str, Any] = {"equivariance_value": 0, "equivariance_jacobian": 0}
        system.set_losses(Losses(perceptual=0, pixel=1, **nothing), None)
        assert set(system(batch).terms) == {"pixel"}


def test_the_objective_is_no_part_of_the_weights() -> None:
    system = build_system(keypoint_mask())
    before = set(system.state_dict())
    with pytest.raises(ConfigError, match="set_losses"):
        system(Batch(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)))
    system.set_losses(Losses(scales=(1,)), PerceptualLoss(random_features(), (1,)))
    assert set(system.state_dict()) == before
    assert not [n for n, _ in system.named_modules() if "perceptual" in n]


def test_an_objective_without_an_image_loss_is_refused() -> None:
    system = build_system(keypoint_mask())
    with pytest.raises(ConfigError, match="pixel"):
        system.set_losses(Losses(), None)
    with pytest.raises(ConfigError, match="pixel"):
        system.set_losses(Losses(perceptual=0), PerceptualLoss(random_features(), (1,)))
    with pytest.raises(ConfigError, match=r"0\.25 of 32 px is 8 px; these features need 16 px"):
        system.set_losses(Losses(), PerceptualLoss(random_features(), (1, 0.25)))


# --- equivariance ----------------------------------------------------------------------------


def warp_of(losses: Losses, *, batch: int = 3, dtype: torch.dtype = torch.float32) -> RandomWarp:
    return RandomWarp.draw(losses, like=torch.zeros(batch, 3, 8, 8, dtype=dtype))


STRONG = Losses(transform_sigma_affine=0.2, transform_sigma_tps=0.1)


def slow_warp(warp: RandomWarp, b: int, x: float, y: float) -> tuple[float, float]:
    (a, c, tx), (d, e, ty) = warp.affine_B23[b].tolist()
    bend = 0.0
    for weight, (u, v) in zip(warp.weight_BC[b].tolist(), warp.control_C2.tolist(), strict=True):
        r = abs(x - u) + abs(y - v)
        bend += weight * r * r * math.log(r + 1e-6)
    return a * x + c * y + tx + bend, d * x + e * y + ty + bend


def test_warp_is_the_formula() -> None:
    warp = warp_of(STRONG)
    assert warp.control_C2.shape == (25, 2)
    points = torch.rand(3, 4, 2) * 2 - 1
    found = warp.points(points)
    for b in range(3):
        for n in range(4):
            expected = slow_warp(warp, b, *points[b, n].tolist())
            assert found[b, n].tolist() == pytest.approx(expected, abs=1e-5)


def test_warp_jacobian_is_autograds() -> None:
    warp = warp_of(STRONG, dtype=torch.float64)
    points = (torch.rand(3, 4, 2, dtype=torch.float64) * 2 - 1).requires_grad_()
    found = warp.jacobian(points)
    for row in range(2):
        (gradient,) = torch.autograd.grad(warp.points(points)[..., row].sum(), points)
        torch.testing.assert_close(found[..., row, :], gradient)


def test_warp_of_an_image_takes_pixels_from_the_warped_places() -> None:
    # A picture whose colour is its own coordinates shows where each pixel came from.
    axis = torch.linspace(-1, 1, 33)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    picture = torch.stack([x, y, x * 0]).expand(3, 3, 33, 33)
    warp = warp_of(Losses())
    shown = warp.image(picture, align_corners=True)[:, :2].permute(0, 2, 3, 1)
    places = warp.points(torch.stack([x, y], -1).reshape(1, -1, 2).expand(3, -1, -1))
    reflected = 2 * (((places + 1) / 4) - ((places + 1) / 4).round()).abs() * 2 - 1
    torch.testing.assert_close(shown.reshape(3, -1, 2), reflected, rtol=0, atol=1e-4)


def test_warps_are_drawn_like_published_and_from_the_seed() -> None:
    torch.manual_seed(5)
    warp = warp_of(Losses(), batch=4000)
    noise = warp.affine_B23 - torch.eye(2, 3)
    assert float(noise.std()) == pytest.approx(0.05, rel=0.03)
    assert float(warp.weight_BC.std()) == pytest.approx(0.005, rel=0.03)
    torch.manual_seed(5)
    assert torch.equal(warp.affine_B23, warp_of(Losses(), batch=4000).affine_B23)


def test_equivariant_keypoints_cost_nothing() -> None:
    # A detector that is equivariant finds, in the warped image, p' with T(p') = p, and frames J'
    # with dT(p') J' = J.
    warp = warp_of(Losses(), dtype=torch.float64)
    warped = torch.rand(3, 5, 2, dtype=torch.float64) * 1.6 - 0.8
    frames = torch.eye(2) + 0.1 * torch.randn(3, 5, 2, 2, dtype=torch.float64)
    points, expected = warp.points(warped), warp.jacobian(warped) @ frames
    assert float(equivariance_value(points, warped, warp)) == 0
    assert float(equivariance_jacobian(expected, warped, frames, warp)) == pytest.approx(
        0, abs=1e-12
    )
    assert float(equivariance_value(points + 0.25, warped, warp)) == pytest.approx(0.25)


def test_equivariance_of_jacobians_is_the_formula() -> None:
    warp = warp_of(STRONG)
    warped = torch.rand(3, 5, 2)
    found, frames = (torch.eye(2) + 0.2 * torch.randn(3, 5, 2, 2) for _ in range(2))
    expected = 0.0
    slope = warp.jacobian(warped)
    for b in range(3):
        for k in range(5):
            ratio = torch.linalg.inv(found[b, k]) @ slope[b, k] @ frames[b, k]
            expected += float((torch.eye(2) - ratio).abs().sum()) / (3 * 5 * 4)
    value = equivariance_jacobian(found, warped, frames, warp)
    assert float(value) == pytest.approx(expected, rel=1e-4)

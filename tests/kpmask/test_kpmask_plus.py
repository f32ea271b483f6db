"""kpmask-plus against slow formulas, and who learns from what."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kpmask.animate import Animator
from kpmask.config import Losses
from kpmask.model_config import Hourglass, KeypointDetector, KpmaskPlusModel, LowResolution
from kpmask.models import build_system
from kpmask.models.base import Batch
from kpmask.models.keypoint_mask import recoloured
from kpmask.models.kpmask_plus import KpmaskPlusSystem, fetched

SIDE_PX = 32


def plus(**changes: Any) -> KpmaskPlusModel:
    settings: dict[str, Any] = {
        "image_size_px": SIDE_PX,
        "detector": KeypointDetector(
            scale_factor=0.5,
            head_padding=3,
            block_expansion=4,
            num_blocks=2,
            max_features=8,
            num_keypoints=5,
            estimate_jacobian=False,
        ),
        "low_resolution": LowResolution(
            scale_factor=0.5, block_expansion=4, num_bottleneck_blocks=1
        ),
        "high_resolution": Hourglass(block_expansion=4, num_blocks=2, max_features=8),
    }
    return KpmaskPlusModel(**(settings | changes))


def built(config: KpmaskPlusModel) -> KpmaskPlusSystem:
    torch.manual_seed(0)
    system = build_system(config)
    assert isinstance(system, KpmaskPlusSystem)
    return system.eval()


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("combination", "channels"), [("separate", 5), ("learned", 3), ("sum", 1)])
def test_masks_are_what_their_formula_says(combination: str, channels: int) -> None:
    system = built(plus(combination=combination, num_combined=3))
    image_BCHW = images()
    with torch.inference_mode():
        logits = system.detector.logits(image_BCHW).double().numpy()
        mask = system.mask(image_BCHW).numpy()
    if combination == "sum":
        logits = logits.sum(1, keepdims=True)
    elif combination == "learned":
        mix = system.combination.mix
        assert mix is not None
        weight = mix.weight.detach().double().numpy()[:, :, 0, 0]
        bias = mix.bias.detach().double().numpy() if mix.bias is not None else 0
        logits = np.einsum("mk,bkhw->bmhw", weight, logits) + np.reshape(bias, (1, -1, 1, 1))
    expected = 1 / (1 + np.exp(-logits))
    assert mask.shape == (2, channels, SIDE_PX // 2, SIDE_PX // 2)
    np.testing.assert_allclose(mask, expected, atol=1e-5)


def test_a_fetched_pixel_lies_where_the_flow_points() -> None:
    image = images(1)
    flow = torch.zeros(1, 2, SIDE_PX, SIDE_PX)
    pixel = 2 / (SIDE_PX - 1)  # the distance of two neighbours
    flow[:, 0], flow[:, 1] = 3 * pixel, -2 * pixel
    moved = fetched(image, flow)
    torch.testing.assert_close(moved[..., 2:, :-3], image[..., :-2, 3:], atol=1e-5, rtol=0)
    # Past the border, the border's own pixels.
    torch.testing.assert_close(moved[..., 2:, -1], image[..., :-2, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("warp", [True, False])
@torch.no_grad()
def test_the_frame_is_a_mixture_of_its_parts(warp: bool) -> None:
    system = built(plus(warp=warp))
    source, driving = system.encode_source(images()), system.encode_driving(images().flip(0))
    prediction = system.render(source, driving)
    drawn = prediction.low_resolution_BCHW
    assert drawn is not None
    stage = system.composing
    masks = torch.cat([source.mask_BMHW, driving.mask_BMHW], dim=1)
    large = torch.nn.functional.interpolate(masks, scale_factor=2, mode="bilinear")
    maps = stage.final(stage.hourglass(torch.cat([source.image_BCHW, large, drawn], dim=1)))
    b, y, x = 1, 13, 20
    colour = [
        1 / (1 + math.exp(-(maps[b, c, y, x] + math.log(d / (1 - d)))))
        for c, d in enumerate(drawn[b, :, y, x].tolist())
    ]
    parts = [colour, source.image_BCHW[b, :, y, x].tolist()]
    if warp:
        parts.append(fetched(source.image_BCHW, maps[:, -2:])[b, :, y, x].tolist())
    weights = torch.exp(maps[b, 3 : 3 + len(parts), y, x].double())
    weights = weights / weights.sum()
    for c in range(3):
        expected = sum(w * p[c] for w, p in zip(weights.tolist(), parts, strict=True))
        assert prediction.image_BCHW[b, c, y, x].item() == pytest.approx(expected, abs=1e-5)


def test_every_part_learns() -> None:
    system = built(plus(combination="learned")).train()
    system.set_losses(Losses(perceptual=0, pixel=1, mask_mean=2), None)
    batch = Batch(images(), images().flip(0))
    losses = system.training_losses(batch)
    assert set(losses.terms) == {"pixel_drawn", "pixel", "mask_mean"}
    losses.total.backward()  # type: ignore[no-untyped-call]
    still = [
        name
        for name, parameter in system.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum()
    ]
    # A convolution's bias before batch norm has no effect, and so no gradient but rounding.
    assert [name for name in still if not name.endswith("bias")] == []


def test_noise_is_for_training_alone() -> None:
    quiet, noisy = built(plus()), built(plus(mask_noise=0.5))
    noisy.load_state_dict(quiet.state_dict())
    frames = images()
    shown = [
        system.render(system.encode_source(frames), system.encode_driving(frames)).image_BCHW
        for system in (quiet, noisy)
    ]
    torch.testing.assert_close(*shown)
    losses = []
    for system in (quiet, noisy):
        system.set_losses(Losses(perceptual=0, pixel=1), None)
        torch.manual_seed(0)
        losses.append(system.training_losses(Batch(frames, frames.flip(0))).total)
    assert losses[0] != losses[1]


def test_states_are_reused() -> None:
    animator = Animator(built(plus()), device="cpu")
    frames = np.random.default_rng(0).integers(0, 256, (5, SIDE_PX, SIDE_PX, 3), np.uint8)
    whole = animator.animate(frames[0], frames, batch_size=5)
    chunked = animator.animate(frames[0], frames, batch_size=2)
    assert np.abs(whole.astype(int) - chunked).max() <= 1


def test_uneven_light_is_smooth_and_seeded() -> None:
    gray = torch.full((4, 3, SIDE_PX, SIDE_PX), 0.5)
    torch.manual_seed(3)
    lit = recoloured(gray, light=0.1)
    torch.manual_seed(3)
    assert torch.equal(recoloured(gray, light=0.1), lit)
    inside = lit.std(dim=(-2, -1)).mean()
    steps = (lit[..., 1:] - lit[..., :-1]).abs().mean()
    assert inside > 0.03
    assert steps < inside / 2
    assert recoloured(gray).std(dim=(-2, -1)).max() < 1e-6


def test_bfloat16_leaves_masks_and_frames_in_full_precision() -> None:
    system = built(plus())
    with torch.autocast("cpu", torch.bfloat16):
        source, driving = system.encode_source(images()), system.encode_driving(images())
        prediction = system.render(source, driving)
    for tensor in (source.mask_BMHW, source.small_BCHW, driving.mask_BMHW, prediction.image_BCHW):
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()

"""X2Face against loops over single numbers, and as a system: states, training, animation."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from kpmask.animate import Animator, to_frames
from kpmask.config import Losses, TrainJob, resolve_job
from kpmask.errors import ConfigError
from kpmask.model_config import X2FaceModel
from kpmask.models import build_system
from kpmask.models.base import Batch
from kpmask.models.x2face import X2FaceDriving, X2FaceSource, X2FaceSystem
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


def x2face(**changes: Any) -> X2FaceModel:
    settings = {
        "image_size_px": SIDE_PX,
        "block_expansion": 4,
        "max_features": 8,
        "driving_features": 5,
    }
    return X2FaceModel(**(settings | changes))


def built(**changes: Any) -> X2FaceSystem:
    """A system in eval mode whose statistics and heads a fresh one would not have."""
    system = build_system(x2face(**changes))
    assert isinstance(system, X2FaceSystem)
    worn_norms(system)
    with torch.no_grad():
        for net in (system.embedder.net, system.driver):
            net.head.conv.weight.normal_(0, 0.03)
            net.head.conv.bias.normal_(0, 0.1)
    return system.eval()


def images(count: int = 2, side_px: int = SIDE_PX) -> Tensor:
    small = torch.rand(count, 3, 6, 6)
    return functional.interpolate(small, (side_px, side_px), mode="bicubic").clamp(0, 1)


def close(found: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.detach().float(), torch.as_tensor(expected).float(), rtol=0, atol=tolerance
    )


# --- the formulas, slowly --------------------------------------------------------------------


def halved(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """A 4x4 convolution of stride 2, window by window."""
    padded = functional.pad(x, (1, 1, 1, 1)).double()
    size = x.shape[-1] // 2
    out = torch.zeros(len(x), len(w["weight"]), size, size, dtype=torch.float64)
    for i, j in np.ndindex(size, size):
        window = padded[..., 2 * i : 2 * i + 4, 2 * j : 2 * j + 4]
        out[..., i, j] = torch.einsum("oihw,bihw->bo", w["weight"].double(), window) + w["bias"]
    return out.float()


def doubled(x: Tensor) -> Tensor:
    """Bilinear between pixel centres: three parts of the near pixel, one of the far one."""
    for axis in (2, 3):
        size = x.shape[axis]
        lines = []
        for i in range(2 * size):
            near = i // 2
            far = min(max(near + (1 if i % 2 else -1), 0), size - 1)
            lines.append(0.75 * x.select(axis, near) + 0.25 * x.select(axis, far))
        x = torch.stack(lines, axis)
    return x


def slow_net(w: dict[str, Tensor], image: Tensor, *, skips: bool) -> Tensor:
    count = len([k for k in w if k.startswith("down_blocks.") and "conv.weight" in k])
    encoded = []
    x = image
    for n in range(count):
        block = slow.sub(w, f"down_blocks.{n}")
        x = torch.where(x > 0, x, 0.2 * x) if n else x
        x = halved(slow.sub(block, "conv"), x)
        # None in the outermost and in the innermost.
        assert ("norm.weight" in block) == (0 < n < count - 1)
        if 0 < n < count - 1:
            x = slow.norm(slow.sub(block, "norm"), x)
        encoded.append(x)
    encoded.pop()
    for n in range(count - 1):
        block = slow.sub(w, f"up_blocks.{n}")
        x = slow.conv(slow.sub(block, "conv"), doubled(x.clamp(min=0)))
        x = slow.norm(slow.sub(block, "norm"), x)
        skip = encoded.pop()
        x = torch.cat([x, skip], 1) if skips else x
    assert not encoded
    return slow.conv(slow.sub(w, "head.conv"), doubled(x.clamp(min=0)))


def places(maps: Tensor) -> np.ndarray:
    """[B, H, W, 2]: the pixel's place plus tanh of two maps."""
    offset = maps.double().numpy()
    batch, _, height, width = offset.shape
    out = np.zeros((batch, height, width, 2))
    for b, i, j in np.ndindex(batch, height, width):
        out[b, i, j, 0] = slow.place(j, width) + math.tanh(offset[b, 0, i, j])
        out[b, i, j, 1] = slow.place(i, height) + math.tanh(offset[b, 1, i, j])
    return out


def slow_face(w: dict[str, Tensor], sources: list[Tensor], *, align_corners: bool) -> Tensor:
    """The mean of the warped sources, weighted pixel by pixel."""
    total, weight = torch.zeros(()), torch.zeros(())
    for image in sources:
        maps = slow_net(slow.sub(w, "net"), image, skips=True)
        warped = slow.grid_sample(image, places(maps[:, :2]), align_corners=align_corners)
        confidence = maps[:, 2:].exp() + 0.1
        total, weight = total + confidence * warped, weight + confidence
    return total / weight


# --- each part -------------------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_the_embedded_face_is_the_sources_mean_by_confidence(
    align_corners: bool, count: int
) -> None:
    system = built(align_corners=align_corners)
    sources = [images() for _ in range(count)]
    found = system.embedder(torch.stack(sources, dim=1))
    weights = system.embedder.state_dict()
    close(found, slow_face(weights, sources, align_corners=align_corners))
    if count == 1:
        assert torch.equal(system.encode_source(sources[0]).embedded_BCHW, found)


@pytest.mark.parametrize("num_blocks", [None, 2, 1])
@torch.no_grad()
def test_the_driver_gives_places(num_blocks: int | None) -> None:
    system, image = built(num_blocks=num_blocks), images()
    found = system.encode_driving(image).flow_BHW2
    maps = slow_net(system.driver.state_dict(), image, skips=False)
    close(found, places(maps))
    assert system.driver.down_blocks[-1].conv.out_channels == 5


@pytest.mark.parametrize("align_corners", [True, False])
@torch.no_grad()
def test_the_frame_is_the_embedded_face_sampled(align_corners: bool) -> None:
    system = built(align_corners=align_corners)
    source, driving = system.encode_source(images()), system.encode_driving(images())
    found = system.render(source, driving).image_BCHW
    grid = driving.flow_BHW2.double().numpy()
    close(found, slow.grid_sample(source.embedded_BCHW, grid, align_corners=align_corners))


@torch.no_grad()
def test_a_fresh_system_nearly_copies() -> None:
    system = build_system(x2face()).train()
    image = images(4)
    found = system.render(system.encode_source(image), system.encode_driving(images(4)))
    assert (found.image_BCHW - image).abs().mean() < 0.01
    grid = slow.grid_sample(image, places(torch.zeros(4, 2, SIDE_PX, SIDE_PX)), align_corners=True)
    close(grid, image)


def test_the_bottleneck_is_one_pixel() -> None:
    system = built()
    seen = []
    system.driver.down_blocks[-1].register_forward_hook(lambda m, i, output: seen.append(output))
    system.encode_driving(images())
    assert [s.shape for s in seen] == [(2, 5, 1, 1)]
    with pytest.raises(ValidationError, match="no power of 2"):
        x2face(image_size_px=24)
    with pytest.raises(ValidationError, match="no power of 2"):
        x2face(image_size_px=1)
    assert x2face(image_size_px=24, num_blocks=3).num_blocks == 3


# --- the system ------------------------------------------------------------------------------


@pytest.mark.parametrize("side_px", [2, 16])
def test_a_batch_of_one_trains(side_px: int) -> None:
    system = build_system(x2face(image_size_px=side_px)).train()
    system.set_losses(Losses(perceptual=0, pixel=1), None)
    loss = system(Batch(images(1, side_px), images(1, side_px))).total
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in system.parameters())


def test_a_gradient_reaches_every_parameter() -> None:
    system = build_system(x2face()).train()
    system.set_losses(Losses(perceptual=0, pixel=1), None)
    losses = system(Batch(images(4), images(4)))
    assert set(losses.terms) == {"pixel"}
    losses.total.backward()
    dead = [n for n, p in system.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    # Of one source, any confidence makes the same mean.
    close(system.embedder.net.head.conv.weight.grad[2], torch.zeros(8, 3, 3), 1e-7)


@torch.no_grad()
def test_states_are_reused_and_batches_do_not_show() -> None:
    system = built()
    source = system.encode_source(images(1))
    driving = system.encode_driving(images(3))
    together = system.render(source.repeat(3), driving).image_BCHW
    assert together.shape == (3, 3, SIDE_PX, SIDE_PX)
    for i in range(3):
        close(system.render(source, driving[i : i + 1]).image_BCHW, together[i : i + 1])
    again = X2FaceDriving.cat([driving[:1], driving[1:]])
    close(system.render(X2FaceSource.cat([source] * 3), again).image_BCHW, together)


def test_absolute_motion_only() -> None:
    system = built()
    assert system.motions == {"absolute"}
    source, driving = system.encode_source(images(1)), system.encode_driving(images(1))
    with pytest.raises(ConfigError, match="absolute motion only"):
        system.relative_motion(source, driving, driving, adapt_scale=False)


def test_bfloat16_convolutions_leave_flows_and_frames_in_full_precision() -> None:
    system = built().train()
    system.set_losses(Losses(perceptual=0, pixel=1), None)
    image = images()
    with torch.autocast("cpu", torch.bfloat16):
        loss = system(Batch(image, images())).total
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in system.parameters())
    system.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        source, driving = system.encode_source(image), system.encode_driving(images())
        frame = system.render(source, driving).image_BCHW
    tensors = (source.embedded_BCHW, driving.flow_BHW2, frame)
    assert {t.dtype for t in tensors} == {torch.float32}
    # Above bfloat16's steps: the pixels' own places are not rounded.
    with torch.no_grad():
        close(system.encode_source(image).embedded_BCHW, source.embedded_BCHW, 0.02)


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
        TrainJob, preset="debug", systems=["x2face"], flags={"data": "unused", "out": "unused"}
    )
    (plan,) = plan_phases(job, pairs_per_epoch=1000)
    system = initial_system(plan, seed=0)
    trainer = Trainer(plan, system, features=None, seed=0)
    before = {k: v.clone() for k, v in system.named_parameters()}
    for _ in range(2):
        step = trainer.step(Batch(images(4, 32), images(4, 32)))
        assert math.isfinite(step.loss)
        assert set(step.terms) == {"pixel"}
    moved = {n.split(".")[0] for n, p in system.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"embedder", "driver"}

    animator = Animator(system, device="cpu")
    source, driving = to_frames(images(1, 32))[0], to_frames(images(5, 32))
    frames = animator.animate(source, driving, batch_size=2)
    assert frames.shape == (5, 32, 32, 3)
    with pytest.raises(ConfigError, match="not 'relative'"):
        animator.animate(source, driving, motion="relative")

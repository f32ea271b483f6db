"""Refined masking against its formulas, written with `model_reference` on the original names."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kpmask import Animator, checkpoint
from kpmask.config import Augmentation, Losses, TrainJob, resolve_job
from kpmask.data.augment import augment, draw, recolour
from kpmask.errors import ConfigError
from kpmask.evaluate import reconstruct
from kpmask.losses import PerceptualLoss
from kpmask.model_config import (
    ColourChange,
    EncoderDecoder,
    Hourglass,
    LowResolution,
    MaskGenerator,
    Perturbation,
    RefinedMaskModel,
)
from kpmask.models import build_system
from kpmask.models.base import Batch, LossTerms
from kpmask.models.perturb import RandomPerturbation, perturb_for_test
from kpmask.models.refined_mask import RefinedMaskSystem
from kpmask.perceptual import random_features
from kpmask.train import Trainer, initial_system, plan_phases
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
COUNT = 2
ABLATIONS = ("none", "no_pert", "no_ref", "no_id")
SAME_COLOURS = ColourChange(brightness=0, contrast=0, saturation=0, hue=0)
STRONG_COLOURS = ColourChange(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5)


def refined_mask(**changes: Any) -> RefinedMaskModel:
    settings: dict[str, Any] = {
        "image_size_px": SIDE_PX,
        "mask": MaskGenerator(block_expansion=4, num_blocks=2, max_features=8, scale_factor=0.5),
        "refinement": EncoderDecoder(block_expansion=4, num_blocks=3, max_features=16),
        "perturbation": Perturbation(threshold=110),
        "low_resolution": LowResolution(
            scale_factor=0.5, block_expansion=4, num_bottleneck_blocks=2
        ),
        "high_resolution": Hourglass(block_expansion=4, num_blocks=3, max_features=16),
    }
    return RefinedMaskModel(**(settings | changes))


def built(config: RefinedMaskModel) -> RefinedMaskSystem:
    """In eval mode, with batch statistics that a fresh system would not have."""
    system = build_system(config)
    assert isinstance(system, RefinedMaskSystem)
    worn_norms(system)
    return system.eval()


def images(count: int = COUNT, side_px: int = SIDE_PX) -> Tensor:
    small = torch.rand(count, 3, 6, 6)
    return functional.interpolate(small, (side_px, side_px), mode="bicubic").clamp(0, 1)


def close(found: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.detach(), torch.as_tensor(expected).float(), rtol=0, atol=tolerance
    )


# --- the formulas ----------------------------------------------------------------------------


def encoder_decoder(w: dict[str, Tensor], x: Tensor) -> Tensor:
    count = len([k for k in w if k.startswith("encoder.") and k.endswith("conv.weight")])
    for i in range(count):
        x = slow.down(slow.sub(w, f"encoder.down_blocks.{i}"), x)
    for i in range(count):
        x = slow.up(slow.sub(w, f"decoder.up_blocks.{i}"), x)
    return x


def sharp(logits: Tensor) -> Tensor:
    return 1 / (1 + (-logits.double() / 0.1).exp())


def slow_mask(w: dict[str, Tensor], image: Tensor, *, scale: float, pad: int) -> Tensor:
    features = encoder_decoder(slow.sub(w, "predictor"), slow.antialias(image, scale))
    mask = sharp(slow.conv(slow.sub(w, "ref"), features, pad)).numpy()
    ring = 3 - pad
    return torch.from_numpy(np.pad(mask, ((0, 0), (0, 0), (ring, ring), (ring, ring)))).float()


def halved(image: Tensor) -> Tensor:
    """Bilinear at half the size: between the middle two of every two pixels."""
    pixels = image.double().numpy()
    size = image.shape[-1] // 2
    out = np.zeros((*image.shape[:2], size, size))
    for b, i, j in np.ndindex(len(image), size, size):
        x, y = (2 * j + 1) / size - 1, (2 * i + 1) / size - 1
        out[b, :, i, j] = slow.bilinear(pixels[b], x, y, align_corners=False)
    return torch.from_numpy(out).float()


def slow_refined(w: dict[str, Tensor], image: Tensor, source: Tensor, driving: Tensor) -> Tensor:
    seen = torch.cat([halved(image), source, driving], 1)
    features = encoder_decoder(slow.sub(w, "mask_fix_net"), seen)
    return sharp(slow.conv(slow.sub(w, "ref"), features)).float()


def slow_frames(
    w: dict[str, Tensor], image: Tensor, source: Tensor, driving: Tensor
) -> tuple[Tensor, Tensor]:
    """Both stages' frames; the second sees its inputs in the original order."""
    small = torch.cat([halved(image), source, driving], 1)
    low = slow.decode(w, slow.same(slow.sub(w, "first"), small))
    large_source, large_driving = (
        functional.interpolate(m, image.shape[-2:], mode="bilinear", align_corners=False)
        for m in (source, driving)
    )
    x = torch.cat([image, large_source, low, large_driving], 1)
    x = slow.hourglass(slow.sub(w, "hourglass"), x)
    return low, slow.conv(slow.sub(w, "final_hourglass"), x).sigmoid()


def slow_driving_mask(config: RefinedMaskModel, w: dict[str, Tensor], *seen: Tensor) -> Tensor:
    image, source, driving = seen
    perturbed = perturb_for_test(driving, config.perturbation)
    if config.ablation == "no_id":
        return driving
    if config.ablation == "no_ref":
        return perturbed
    return slow_refined(w, image, source, driving if config.ablation == "no_pert" else perturbed)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("pad", [0, 3])
@torch.no_grad()
def test_a_frame_is_the_formula(ablation: str, pad: int) -> None:
    plain = refined_mask()
    mask = plain.mask.model_copy(update={"head_padding": pad})
    config = refined_mask(mask=mask, ablation=ablation)
    system = built(config)
    weights = export_upstream(system)
    source_image, driving_image = images(), images()
    source, driving = (
        slow_mask(weights["mask_generator"], image, scale=0.5, pad=pad)
        for image in (source_image, driving_image)
    )
    states = system.encode_source(source_image), system.encode_driving(driving_image)
    close(states[0].small_BCHW, halved(source_image))
    close(states[0].mask_B1HW, source)
    close(states[1].mask_B1HW, driving)
    # The perturbation is a step function, so the same mask goes into both.
    driving, source = states[1].mask_B1HW, states[0].mask_B1HW
    expected = slow_driving_mask(config, weights["generator"], source_image, source, driving)
    found = system.render(*states)
    assert found.driving_mask_B1HW is not None
    assert found.low_resolution_BCHW is not None
    close(found.driving_mask_B1HW, expected)
    low, high = slow_frames(weights["generator"], source_image, source, expected)
    close(found.low_resolution_BCHW, low)
    close(found.image_BCHW, high)


@torch.no_grad()
def test_a_mask_of_another_size_is_resized() -> None:
    half = refined_mask()
    full = half.mask.model_copy(update={"scale_factor": 1.0})
    large, small = built(refined_mask(mask=full)), built(half)
    image = images()
    found = large.encode_driving(image).mask_B1HW
    close(found, functional.avg_pool2d(large.mask_generator(image), 2))
    assert found.shape == small.encode_driving(image).mask_B1HW.shape


def test_images_too_small_are_refused() -> None:
    mask = refined_mask().mask.model_copy(update={"num_blocks": 1, "scale_factor": 0.125})
    with pytest.raises(ConfigError, match="leave masks of -2 px"):
        build_system(refined_mask(mask=mask))
    with pytest.raises(ConfigError, match="a mask of 16 px has room for 9 strips"):
        build_system(refined_mask(perturbation=Perturbation(num_strips=10)))


# --- ablations -------------------------------------------------------------------------------


@torch.no_grad()
def test_ablations_share_weights_and_states() -> None:
    system = built(refined_mask())
    source, driving = system.encode_source(images(1)), system.encode_driving(images(1))
    drawn = {}
    for ablation in ABLATIONS:
        twin = system.with_ablation(ablation)  # type: ignore[arg-type]
        assert twin.config == refined_mask(ablation=ablation)
        own = built(twin.config)
        own.load_state_dict(system.state_dict())
        drawn[ablation] = twin.render(source, driving).image_BCHW
        close(drawn[ablation], own.render(source, driving).image_BCHW, 0)
        assert next(iter(twin.parameters())) is next(iter(system.parameters()))
    assert system.config.ablation == "none"
    close(system.render(source, driving).image_BCHW, drawn["none"], 0)
    assert len({float(image.mean()) for image in drawn.values()}) == len(ABLATIONS)


def test_an_ablation_is_kept_with_the_weights(tmp_path: Path) -> None:
    system = built(refined_mask()).with_ablation("no_ref")
    checkpoint.save(tmp_path / "r.safetensors", system, {})
    loaded = checkpoint.load(tmp_path / "r.safetensors").system
    assert loaded.config == refined_mask(ablation="no_ref")


# --- losses ----------------------------------------------------------------------------------


def losses_of(system: RefinedMaskSystem, batch: Batch, **losses: Any) -> LossTerms:
    """The terms of one step; features for one small scale."""
    settings = Losses(**{"scales": (1,), **losses})
    system.set_losses(settings, PerceptualLoss(random_features(), (1,)))
    return system.training_losses(batch)


def names_with_gradients(system: RefinedMaskSystem) -> set[str]:
    return {
        name.partition(".")[0]
        for name, p in system.named_parameters()
        if p.grad is not None and p.grad.any()
    }


@pytest.mark.parametrize(
    ("term", "learning"),
    [
        ("perceptual_low", {"mask_generator", "low_resolution"}),
        ("pixel_low", {"mask_generator", "low_resolution"}),
        ("perceptual_high", {"high_resolution"}),
        ("pixel_high", {"high_resolution"}),
        ("refinement", {"refinement"}),
        ("mask_mean", {"mask_generator"}),
    ],
)
def test_who_learns_from_which_loss(term: str, learning: set[str]) -> None:
    system = built(refined_mask()).train()
    losses = losses_of(system, Batch(images(), images(), epoch=1), pixel=1, mask_mean=1)
    losses.terms[term].backward()  # type: ignore[no-untyped-call]
    assert names_with_gradients(system) == learning


@pytest.mark.parametrize(("epoch", "weight"), [(0.0, 0), (0.99, 0), (1.0, 100), (7.5, 100)])
def test_refinement_loss_is_the_formula_from_its_epoch_on(epoch: float, weight: float) -> None:
    config = refined_mask(driving_colours=SAME_COLOURS)
    system = built(config)
    batch = Batch(images(), images(), epoch)
    torch.manual_seed(5)
    found = losses_of(system, batch)
    torch.manual_seed(5)
    torch.randint(2**62, (COUNT,))  # the colours' seeds
    target = system.mask(batch.driving_BCHW).detach()
    perturbed = RandomPerturbation.draw(config.perturbation, like=target).apply(
        target, config.perturbation
    )
    generator = export_upstream(system)["generator"]
    source = system.mask(batch.source_BCHW).detach()
    refined = slow_refined(generator, batch.source_BCHW, source, perturbed)
    expected = weight * (refined - target).abs().mean().item()
    assert found.terms["refinement"].item() == pytest.approx(expected, rel=1e-4)
    assert set(found.terms) == {"perceptual_low", "perceptual_high", "refinement"}


def test_training_draws_from_the_drivers_own_mask() -> None:
    system = built(refined_mask(driving_colours=SAME_COLOURS))
    batch = Batch(images(), images())
    found = losses_of(system, batch, perceptual=0, pixel=2, mask_mean=3)
    own = system.with_ablation("no_id")
    frame = own.render(
        system.encode_source(batch.source_BCHW), own.encode_driving(batch.driving_BCHW)
    )
    assert frame.low_resolution_BCHW is not None
    for name, image in (("_low", frame.low_resolution_BCHW), ("_high", frame.image_BCHW)):
        expected = 2 * (image - batch.driving_BCHW).abs().mean().item()
        assert found.terms[f"pixel{name}"].item() == pytest.approx(expected, rel=1e-4)
    masks = torch.stack([system.mask(batch.source_BCHW), system.mask(batch.driving_BCHW)])
    assert found.terms["mask_mean"].item() == pytest.approx(3 * masks.mean().item(), rel=1e-4)


def test_the_driver_is_seen_in_other_colours_than_are_drawn() -> None:
    seen: list[Tensor] = []
    batch = Batch(images(), images())
    for colours in (STRONG_COLOURS, ColourChange(), SAME_COLOURS):
        system = built(refined_mask(driving_colours=colours))
        system.mask_generator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        torch.manual_seed(1)
        losses_of(system, batch)
    sources, drivers = seen[::2], seen[1::2]
    assert all(torch.equal(source, batch.source_BCHW) for source in sources)
    change = [float((driver - batch.driving_BCHW).abs().mean()) for driver in drivers]
    assert change[0] > change[1] > 0.01
    close(drivers[2], batch.driving_BCHW)


def test_recoloured_images_are_a_pairs_augmentation() -> None:
    draws = [draw(Augmentation(flip=False), seed) for seed in range(4)]
    batch = Batch(images(4), images(4))
    before = batch.driving_BCHW.clone()
    close(recolour(batch.driving_BCHW, draws), augment(batch, draws).driving_BCHW, 0)
    assert torch.equal(batch.driving_BCHW, before)


def test_a_gradient_reaches_every_parameter_from_the_first_step_on() -> None:
    for epoch in (0, 2):
        system = built(refined_mask()).train()
        losses_of(system, Batch(images(), images(), epoch)).total.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in system.parameters())
        still = {"refinement"} if epoch == 0 else set()
        everyone = {name for name, _ in system.named_children()}
        assert names_with_gradients(system) == everyone - still


def test_same_seed_same_losses_and_gradients() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(3)
        system = built(refined_mask()).train()
        losses = losses_of(system, Batch(images(), images(), 2))
        losses.total.backward()  # type: ignore[no-untyped-call]
        return [
            *losses.terms.values(),
            *(p.grad for p in system.parameters() if p.grad is not None),
        ]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# --- behind the seam -------------------------------------------------------------------------


@torch.no_grad()
def test_encoding_once_and_in_batches_changes_nothing() -> None:
    system = built(refined_mask())
    source, driving = system.encode_source(images(1)), system.encode_driving(images(3))
    together = system.render(source.repeat(3), driving).image_BCHW
    for i in range(3):
        close(system.render(source, driving[i : i + 1]).image_BCHW, together[i : i + 1])
    assert float(together.amin()) >= 0
    assert float(together.amax()) <= 1
    assert system.motions == {"absolute"}
    with pytest.raises(ConfigError, match="absolute motion only"):
        system.relative_motion(source, driving[:1], driving[:1], adapt_scale=False)


def test_masks_and_frames_stay_in_full_precision_under_autocast() -> None:
    system = built(refined_mask())
    source_image, driving_image = images(), images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        source = system.encode_source(source_image)
        prediction = system.render(source, system.encode_driving(driving_image))
        losses = losses_of(system, Batch(source_image, driving_image, 2))
    tensors = [value for value in vars(source).values() if value is not None]
    tensors += [value for value in vars(prediction).values() if value is not None]
    tensors += losses.terms.values()
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_debug_preset_trains_and_animates() -> None:
    flags = {"data": "unused", "out": "unused"}
    job = resolve_job(TrainJob, preset="debug", systems=["refined"], overrides=[], flags=flags)
    plan = plan_phases(job, pairs_per_epoch=20)[-1]  # the refinement joins in the second step
    system = initial_system(plan, seed=0)
    before = {key: value.clone() for key, value in system.state_dict().items()}
    trainer = Trainer(plan, system, features=None, seed=0)
    results = [trainer.step(Batch(images(4), images(4))) for _ in range(2)]
    assert [result.terms["refinement"] > 0 for result in results] == [False, True]
    moved = {
        name.partition(".")[0]
        for name, p in system.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert moved == {name for name, _ in system.named_children()}
    frames = np.random.default_rng(0).integers(0, 256, (3, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    drawn = Animator(system, device="cpu").animate(frames[0], frames, batch_size=2)
    assert drawn.shape == frames.shape
    assert drawn.dtype == np.uint8


# --- the published sizes ---------------------------------------------------------------------

# Tensors, parameters, and a digest of all names, shapes and types of the published checkpoint.
PUBLISHED = {
    "generator": (265, 76_892_959, "abf3bd51ea981781"),
    "mask_generator": (73, 12_564_417, "67e5eb7da19b10ec"),
}


def test_default_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        system = build_system(RefinedMaskModel())
    sections = export_upstream(system.to_empty(device="cpu"))
    for name, expected in PUBLISHED.items():
        section = sections[name]
        lines = [f"{k} {list(v.shape)} {v.dtype}" for k, v in sorted(section.items())]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        buffers = ("running_mean", "running_var", "num_batches_tracked", "down.weight")
        count = sum(v.numel() for k, v in section.items() if not k.endswith(buffers))
        assert (len(section), count, digest) == expected


def test_reconstruction_is_scored_without_hiding_the_identity() -> None:
    animator = Animator(built(refined_mask()), device="cpu")
    side_px = animator.image_size_px
    frames_THWC = np.random.default_rng(0).integers(0, 256, (3, side_px, side_px, 3), np.uint8)
    ((generated_TCHW, _),) = reconstruct(animator, [frames_THWC])
    assert isinstance(animator.system, RefinedMaskSystem)
    unrefined = Animator(animator.system.with_ablation("no_id"), device="cpu")
    source, driving = unrefined.encode_source(frames_THWC[0]), unrefined.encode_driving(frames_THWC)
    torch.testing.assert_close(generated_TCHW, unrefined.render(source, driving))
    assert animator.system.config.ablation == "none"

"""The discriminator against `model_reference`, and who learns from which of its losses."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kpmask.config import Losses, TrainJob, resolve_job
from kpmask.errors import ConfigError
from kpmask.model_config import (
    DenseMotion,
    Discriminator,
    FommGenerator,
    FommModel,
    KeypointDetector,
)
from kpmask.models import build_system
from kpmask.models.base import Batch
from kpmask.models.discriminator import PatchDiscriminator, SpectralConv2d, adversarial_terms
from kpmask.train import PhasePlan, Trainer, initial_system, plan_phases

_spec = importlib.util.spec_from_file_location(
    "model_reference", Path(__file__).with_name("model_reference.py")
)
assert _spec is not None
assert _spec.loader is not None
slow = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(slow)

K = 3
LOSSES = Losses(adversarial=2.0, feature_matching=(3.0, 5.0), discriminator=7.0)
GENERATOR_TERMS = ("adversarial", "feature_matching")


def discriminator(**changes: Any) -> PatchDiscriminator:
    """A small one of 2 blocks, with biases and norms that matter."""
    settings = {"block_expansion": 3, "num_blocks": 2, "max_features": 8, **changes}
    torch.manual_seed(1)
    module = PatchDiscriminator(Discriminator(**settings), num_keypoints=K)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def frames(side_px: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    fake, real = torch.rand(2, 2, 3, side_px, side_px, generator=generator)
    return fake, real, torch.rand(2, K, 2, generator=generator) * 2 - 1


def close(found: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


# --- what it computes ------------------------------------------------------------------------


@pytest.mark.parametrize("side_px", [13, 16, 19])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"spectral_norm": True},
        {"use_keypoints": True, "kp_variance": 0.1},
        {"use_keypoints": True, "spectral_norm": True},
        {"num_blocks": 1},
        {"num_blocks": 3, "max_features": 6},
    ],
)
@torch.no_grad()
def test_discriminator_is_the_formula(side_px: int, changes: dict[str, Any]) -> None:
    side_px += 16 if changes.get("num_blocks") == 3 else 0
    module = discriminator(**changes)
    image, _, points = frames(side_px)
    shown = points.numpy() if module.config.use_keypoints else None
    expected, expected_map = slow.discriminator(
        module.state_dict(), image, shown, variance=module.config.kp_variance
    )
    features, prediction = module(image, points)
    assert len(features) == module.config.num_blocks
    for found, wanted in zip(features, expected, strict=True):
        close(found, wanted)
    close(prediction, expected_map)
    assert prediction.shape == (2, 1, *2 * [module.map_side_px(side_px)])


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (Discriminator(), {"weight": [64, 3, 4, 4]}),
        (Discriminator(use_keypoints=True), {"weight": [64, 13, 4, 4]}),
        (
            Discriminator(spectral_norm=True),
            {"weight_orig": [64, 3, 4, 4], "weight_u": [64], "weight_v": [48]},
        ),
    ],
)
def test_default_sizes_are_the_published_ones(
    config: Discriminator, first: dict[str, list[int]]
) -> None:
    module = PatchDiscriminator(config, num_keypoints=10)
    shapes = {key: list(value.shape) for key, value in module.state_dict().items()}
    for name, shape in first.items():
        assert shapes[f"down_blocks.0.conv.{name}"] == shape
    weight = "weight_orig" if config.spectral_norm else "weight"
    for i, (cin, cout) in enumerate([(64, 128), (128, 256), (256, 512)], 1):
        assert shapes[f"down_blocks.{i}.conv.{weight}"] == [cout, cin, 4, 4]
        assert shapes[f"down_blocks.{i}.norm.weight"] == [cout]
    assert shapes[f"conv.{weight}"] == [1, 512, 1, 1]
    assert len(shapes) == (26 if config.spectral_norm else 16)
    assert module.map_side_px(256) == 26


def test_spectral_norm_is_torchs_and_comes_to_one() -> None:
    ours = SpectralConv2d(3, 5, 4).train()
    theirs = nn.utils.spectral_norm(nn.Conv2d(3, 5, 4)).train()
    theirs.load_state_dict(ours.state_dict())
    image = torch.rand(2, 3, 9, 9)
    for _ in range(60):
        found, expected = ours(image), theirs(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    values = np.linalg.svd(ours.weight().detach().flatten(1).double().numpy())[1]
    assert values.max() == pytest.approx(1, abs=1e-3)


def test_spectral_norm_iterates_in_training_alone_and_in_full_precision() -> None:
    image = torch.rand(1, 3, 9, 9)
    module = SpectralConv2d(3, 5, 4)
    narrow = copy.deepcopy(module)
    before = copy.deepcopy(module.state_dict())
    module.eval()(image)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    module.train()(image)
    assert not torch.equal(before["weight_u"], module.weight_u)
    with torch.autocast("cpu", torch.bfloat16):
        narrow.train()(image)
    assert all(torch.equal(narrow.state_dict()[k], v) for k, v in module.state_dict().items())
    copy.deepcopy(module)  # of what has been trained, for moving averages


# --- its losses ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"use_keypoints": True, "spectral_norm": True}])
@torch.no_grad()
def test_terms_are_the_formulas(changes: dict[str, Any]) -> None:
    module = discriminator(**changes)
    fake, real, points = frames()
    shown = points.numpy() if module.config.use_keypoints else None
    fake_features, fake_map = slow.discriminator(module.state_dict(), fake, shown)
    real_features, real_map = slow.discriminator(module.state_dict(), real, shown)
    pairs = zip((3, 5), fake_features, real_features, strict=True)
    expected = {
        "adversarial": 2 * np.mean((1 - fake_map) ** 2),
        "feature_matching": sum(w * np.mean(np.abs(a - b)) for w, a, b in pairs),
        "discriminator": 7 * (np.mean((1 - real_map) ** 2) + np.mean(fake_map**2)),
    }
    terms = adversarial_terms(module, fake, real, points, LOSSES)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_each_side_learns_from_its_own_terms(spectral_norm: bool) -> None:
    module = discriminator(use_keypoints=True, spectral_norm=spectral_norm).train()
    fake, real, points = frames()
    fake.requires_grad_()
    points.requires_grad_()

    def gradients(*names: str) -> list[Tensor | None]:
        terms = adversarial_terms(module, fake, real, points, LOSSES)
        loss = torch.stack([terms[name] for name in names]).sum()
        inputs = [fake, points, *module.parameters()]
        return list(torch.autograd.grad(loss, inputs, allow_unused=True))

    moved_fake, *others = gradients(*GENERATOR_TERMS)
    assert moved_fake is not None
    assert moved_fake.abs().sum() > 0
    assert others == [None] * len(others)
    *inputs, weight, bias = gradients("discriminator")[:4]
    assert inputs == [None, None]
    for gradient in (weight, bias):
        assert gradient is not None
        assert gradient.abs().sum() > 0
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_one_backward_pass_gives_what_alternating_ones_give() -> None:
    module = discriminator()
    fake, real, _ = frames()
    fake.requires_grad_()
    torch.stack(list(adversarial_terms(module, fake, real, None, LOSSES).values())).sum().backward()
    found = [fake.grad, *(p.grad for p in module.parameters())]
    # As published: the generator's step, then the discriminator's, both of all the weights.
    features, prediction = module(fake)
    matching = sum(
        w * (mine - theirs).abs().mean()
        for w, mine, theirs in zip((3, 5), features, module(real)[0], strict=True)
    )
    expected = torch.autograd.grad(2 * (1 - prediction).square().mean() + matching, fake)
    judging = (1 - module(real)[1]).square().mean() + module(fake.detach())[1].square().mean()
    expected += torch.autograd.grad(7 * judging, list(module.parameters()))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# --- in FOMM ---------------------------------------------------------------------------------

FOMM = FommModel(
    image_size_px=32,
    detector=KeypointDetector(
        block_expansion=4, num_blocks=2, max_features=8, num_keypoints=K, scale_factor=0.5
    ),
    dense_motion=DenseMotion(block_expansion=4, num_blocks=2, max_features=8, scale_factor=0.5),
    generator=FommGenerator(
        block_expansion=4, num_down_blocks=1, num_bottleneck_blocks=1, max_features=8
    ),
    discriminator=Discriminator(
        block_expansion=4, num_blocks=2, max_features=8, use_keypoints=True, spectral_norm=True
    ),
)
PIXEL = LOSSES.model_copy(update={"pixel": 10.0})


def adversarial_fomm() -> Any:
    torch.manual_seed(3)
    system = build_system(FOMM)
    system.set_losses(PIXEL, None)
    return system.train()


def batch() -> Batch:
    fake, real, _ = frames(32)
    return Batch(fake, real)


def test_fomm_adds_its_terms_and_every_weight_learns() -> None:
    system = adversarial_fomm()
    losses = system.training_losses(batch())
    assert list(losses.terms)[-3:] == [*GENERATOR_TERMS, "discriminator"]
    losses.total.backward()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
    plain = build_system(FOMM.model_copy(update={"discriminator": None}))
    plain.set_losses(PIXEL, None)
    assert not {*GENERATOR_TERMS, "discriminator"} & set(plain.training_losses(batch()).terms)


def test_fomm_gives_its_discriminator_and_its_generator_their_own_gradients() -> None:
    system = adversarial_fomm()
    terms = system.training_losses(batch()).terms
    judging = dict(system.discriminator.named_parameters())
    drawing = [p for n, p in system.named_parameters() if not n.startswith("discriminator.")]
    for name, term in terms.items():
        of_judge = torch.autograd.grad(
            term, list(judging.values()), allow_unused=True, retain_graph=True
        )
        of_rest = torch.autograd.grad(term, drawing, allow_unused=True, retain_graph=True)
        is_judges = name == "discriminator"
        assert all((g is not None) == is_judges for g in of_judge), name
        assert any(g is not None for g in of_rest) == (not is_judges), name


@torch.no_grad()
def test_a_discriminator_changes_no_frame_and_no_other_weight() -> None:
    system = adversarial_fomm()
    torch.manual_seed(3)
    plain = build_system(FOMM.model_copy(update={"discriminator": None}))
    weights = system.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in plain.state_dict().items())
    source, driving, _ = frames(32)
    drawn = [
        s.eval().render(s.encode_source(source), s.encode_driving(driving)).image_BCHW
        for s in (system, plain)
    ]
    assert torch.equal(*drawn)


def test_terms_stay_in_full_precision_under_autocast() -> None:
    system = adversarial_fomm().eval()
    expected = system.training_losses(batch()).terms
    with torch.autocast("cpu", torch.bfloat16):
        found = system.training_losses(batch()).terms
    for name in (*GENERATOR_TERMS, "discriminator"):
        assert found[name].dtype == torch.float32
        assert found[name].item() == pytest.approx(expected[name].item(), rel=0.1)


def test_images_too_small_for_the_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="block 3 of 4 has no pixels left of an image") as raised:
        discriminator(num_blocks=4).map_side_px(24)
    assert raised.value.subject == "discriminator.num_blocks"
    deep = FOMM.model_copy(update={"discriminator": Discriminator(num_blocks=4)})
    with pytest.raises(ConfigError, match="of an image of 32 px"):
        build_system(deep)


@pytest.mark.parametrize("weights", [(), (10.0,), (10.0,) * 4])
def test_a_feature_weight_for_every_block(weights: tuple[float, ...]) -> None:
    losses = PIXEL.model_copy(update={"feature_matching": weights})
    with pytest.raises(ConfigError, match=f"lists {len(weights)} weights") as raised:
        build_system(FOMM).set_losses(losses, None)
    assert raised.value.subject == "losses.feature_matching"


def test_distributed_training_finds_every_gradient() -> None:
    system, plain = adversarial_fomm(), adversarial_fomm()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(system)
        for module in (wrapped, wrapped, plain, plain):  # a parameter left out shows in the second
            torch.manual_seed(4)
            module(batch()).total.backward()
    finally:
        distributed.destroy_process_group()
    for mine, other in zip(system.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


# --- training --------------------------------------------------------------------------------


def plans() -> tuple[PhasePlan, ...]:
    job = resolve_job(
        TrainJob, preset="debug", systems=["fomm-adv"], flags={"data": "unused", "out": "unused"}
    )
    return plan_phases(job, pairs_per_epoch=1000)


def test_the_adversarial_phase_goes_on_from_the_plain_one() -> None:
    first, second = plans()
    assert second.phase.takes == "weights"
    before = initial_system(first, seed=0).state_dict()
    system = initial_system(second, seed=0, before=before)
    weights = system.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in before.items())
    added = set(weights) - set(before)
    assert added
    assert all(key.startswith("discriminator.") for key in added)
    trainer = Trainer(second, system, features=None, seed=0)
    moved = {key: value.clone() for key, value in weights.items()}
    pixels = torch.rand(2, 4, 3, 32, 32)
    for _ in range(2):
        result = trainer.step(Batch(*pixels))
    assert {*GENERATOR_TERMS, "discriminator"} < set(result.terms)
    for key, parameter in system.named_parameters():
        assert not torch.equal(moved[key], parameter), key


def test_the_adversarial_phase_also_starts_from_nothing() -> None:
    plan = plans()[1]
    phase = plan.phase.model_copy(update={"takes": "nothing"})
    fresh = PhasePlan(phase, 0, plan.num_steps, 0, plan.steps_per_epoch)
    trainer = Trainer(fresh, initial_system(fresh, seed=0), features=None, seed=0)
    assert "discriminator" in trainer.step(Batch(*torch.rand(2, 4, 3, 32, 32))).terms

"""Training steps against hand-written loops, and that going on from a state changes nothing."""

from __future__ import annotations

import copy
import functools
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from kpmask.config import TrainJob, resolve_job
from kpmask.device import Precision, training_precision
from kpmask.errors import CheckpointError, ConfigError, RunFailed
from kpmask.models.base import Batch
from kpmask.optim import build_optimizer, learning_rate_factor
from kpmask.train import (
    PhasePlan,
    Trainer,
    Worker,
    derived_seed,
    fit,
    initial_system,
    plan_phases,
    shares_statistics,
)

SIDE_PX = 32


def job(system: str = "heatmap", **overrides: Any) -> TrainJob:
    texts = [f"{key}={value}" for key, value in overrides.items()]
    return resolve_job(
        TrainJob,
        preset="debug",
        overrides=texts,
        flags={"data": "unused", "out": "unused"},
        systems=[system],
    )


def plans(system: str = "heatmap", **overrides: Any) -> tuple[PhasePlan, ...]:
    return plan_phases(job(system, **overrides), pairs_per_epoch=1000)


def batches(count: int, size: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    shape = (count, 2, size, 3, SIDE_PX, SIDE_PX)
    return [Batch(f[0], f[1]) for f in torch.rand(shape, generator=generator)]


def laid_out(batch: Batch) -> Batch:
    """In the layout that the trainer uses, so that rounding is the same."""
    frames = (batch.source_BCHW, batch.driving_BCHW)
    return Batch(*(frame.contiguous(memory_format=torch.channels_last) for frame in frames))


def trainer(
    plan: PhasePlan,
    *,
    worker: Worker | None = None,
    precision: Precision = "float32",
    compiled: bool = False,
    **kwargs: Any,
) -> Trainer:
    return Trainer(
        plan,
        initial_system(plan, seed=0, **kwargs),
        features=None,
        seed=0,
        worker=worker,
        precision=precision,
        compile_losses=compiled,
    )


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_phase_lasts_its_epochs_or_max_steps() -> None:
    settings = {
        "phases.0.epochs": 3,
        "phases.0.max_steps": "null",
        "phases.0.batch_size": 28,
        "phases.1.max_steps": 5,
    }
    first, second = plan_phases(job(**settings), pairs_per_epoch=252 * 150)
    assert first.num_steps == 3 * 1350  # the published Taichi training: 1,350 steps an epoch
    assert (second.num_steps, second.steps_before, second.index) == (5, 4050, 1)


@pytest.mark.parametrize("milestones", ["[0.6,0.9]", "[]", "[0.5]"])
def test_the_learning_rate_is_that_of_torchs_multistep(milestones: str) -> None:
    phase = job(**{"phases.0.milestones": milestones}).phases[0]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=phase.learning_rate)
    steps = [int(fraction * 37) for fraction in phase.milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=0.1)
    for step in range(37):
        want = optimizer.param_groups[0]["lr"]
        factor = learning_rate_factor(phase, step, num_steps=37)
        assert phase.learning_rate * factor == pytest.approx(want, rel=1e-12)
        optimizer.step()
        schedule.step()


def test_the_cosine_is_torchs_and_ends_at_a_hundredth() -> None:
    phase = job(**{"phases.0.schedule": "cosine"}).phases[0]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 37, eta_min=0.01)
    for step in range(37):
        factor = learning_rate_factor(phase, step, num_steps=37)
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()


def test_steps_are_those_of_a_plain_loop() -> None:
    plan = plans()[0]
    ours = trainer(plan)
    system = initial_system(plan, seed=0)
    system.set_losses(plan.phase.losses, None)
    system.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(system.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
    for step, batch in enumerate(batches(4)):
        torch.manual_seed(derived_seed(0, 0, 1, step, 0, 0))
        optimizer.zero_grad()
        losses = system.training_losses(laid_out(batch))
        losses.total.backward()
        optimizer.step()
        result = ours.step(batch)
        assert result.loss == pytest.approx(losses.total.item(), rel=1e-6)
        assert sum(result.terms.values()) == pytest.approx(result.loss)
    assert same(weights(system), weights(ours.system))


def test_the_fused_optimiser_is_adam() -> None:
    plan = plans()[0]
    layer = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    weight, moments = layer.weight.detach().double(), [torch.zeros(4, 8, 3, 3).double()] * 2
    optimizer = build_optimizer(plan.phase, layer)
    for step in range(1, 6):
        gradient = torch.randn(4, 8, 3, 3)
        layer.weight.grad = gradient.to(memory_format=torch.channels_last)
        optimizer.step()
        moments[0] = 0.5 * moments[0] + 0.5 * gradient
        moments[1] = 0.999 * moments[1] + 0.001 * gradient.square()
        mean, square = moments[0] / (1 - 0.5**step), moments[1] / (1 - 0.999**step)
        weight = weight - 2e-4 * mean / (square.sqrt() + 1e-8)
    assert torch.allclose(layer.weight.double(), weight, rtol=0, atol=1e-6)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *, atol: float) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.allclose(value, b[key], rtol=0, atol=atol), key


def part_of(batch: Batch, rows: slice) -> Batch:
    return laid_out(Batch(batch.source_BCHW[rows], batch.driving_BCHW[rows]))


def test_accumulation_averages_the_gradients_of_a_batchs_parts() -> None:
    plan = plans(**{"phases.0.accumulate": 2})[0]
    ours = trainer(plan)
    system = initial_system(plan, seed=0)
    system.set_losses(plan.phase.losses, None)
    system.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(system.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
    for step, batch in enumerate(batches(3)):
        optimizer.zero_grad()
        losses = []
        for number in range(2):
            torch.manual_seed(derived_seed(0, 0, 1, step, 0, number))
            part = part_of(batch, slice(2 * number, 2 * number + 2))
            total = system.training_losses(part).total
            total.backward()
            losses.append(total.item())
        for parameter in system.parameters():
            assert parameter.grad is not None
            parameter.grad /= 2
        optimizer.step()
        assert ours.step(batch).loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    close(weights(system), weights(ours.system), atol=1e-5)


def test_the_moving_average_is_the_phases_result() -> None:
    plan = plans(**{"phases.0.ema_decay": 0.3})[0]
    ours = trainer(plan)
    wanted: dict[str, torch.Tensor] = {}
    for step, batch in enumerate(batches(6)):
        ours.step(batch)
        now = weights(ours.system)
        decay = min(0.3, (1 + step) / (10 + step))
        for key, value in now.items():
            first = step == 0 or not value.is_floating_point()
            wanted[key] = value if first else decay * wanted[key] + (1 - decay) * value
    close(weights(ours.result), wanted, atol=1e-6)
    assert not same(weights(ours.result), weights(ours.system))
    assert not ours.result.training
    assert not any(parameter.requires_grad for parameter in ours.result.parameters())


def test_without_an_average_the_last_weights_are_the_result() -> None:
    ours = trainer(plans()[0])
    assert ours.result is ours.system


def test_the_detector_may_learn_at_its_own_rate() -> None:
    slow = trainer(plans(**{"phases.0.detector_learning_rate": 1e-6})[0])
    start, batch = weights(slow.system), batches(1)[0]
    slow.step(batch)
    now = weights(slow.system)
    moved = {k: (now[k] - start[k]).abs().max() for k, _ in slow.system.named_parameters()}
    detector = max(value for key, value in moved.items() if key.startswith("detector."))
    rest = max(value for key, value in moved.items() if not key.startswith("detector."))
    # Adam's first step is the learning rate.
    assert detector == pytest.approx(1e-6, rel=0.2)
    assert rest == pytest.approx(2e-4, rel=0.01)


def test_a_detector_of_rate_zero_keeps_its_weights() -> None:
    ours = trainer(plans(**{"phases.0.detector_learning_rate": 0})[0])
    start = {key: value.clone() for key, value in ours.system.named_parameters()}
    for batch in batches(2):
        ours.step(batch)
    for key, value in ours.system.named_parameters():
        assert torch.equal(value, start[key]) == key.startswith("detector."), key


def test_gradient_descent_with_momentum() -> None:
    plan = plans(**{"phases.0.optimizer": "sgd", "phases.0.learning_rate": 1e-4})[0]
    ours = trainer(plan)
    system = initial_system(plan, seed=0)
    system.set_losses(plan.phase.losses, None)
    system.train().to(memory_format=torch.channels_last)
    velocity = {name: torch.zeros_like(p) for name, p in system.named_parameters()}
    for step, batch in enumerate(batches(3)):
        torch.manual_seed(derived_seed(0, 0, 1, step, 0, 0))
        system.zero_grad()
        system.training_losses(laid_out(batch)).total.backward()
        with torch.no_grad():
            for name, p in system.named_parameters():
                velocity[name] = 0.5 * velocity[name] + p.grad
                p -= 1e-4 * velocity[name]
        ours.step(batch)
    close(weights(system), weights(ours.system), atol=1e-5)


def test_bfloat16_convolutions_with_everything_else_in_float32() -> None:
    plan = plans()[0]
    exact, narrow = trainer(plan), trainer(plan, precision="bfloat16")
    convolved: set[torch.dtype] = set()
    layer = narrow.system.get_submodule("generator.first.conv")
    layer.register_forward_hook(lambda module, inputs, output: convolved.add(output.dtype))
    for batch in batches(3):
        want, got = exact.step(batch), narrow.step(batch)
        assert got.loss == pytest.approx(want.loss, rel=0.05)
        assert got.loss != want.loss
    assert convolved == {torch.bfloat16}
    floats = {v.dtype for v in narrow.system.state_dict().values() if v.is_floating_point()}
    assert floats == {torch.float32}


def test_compiled_losses_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # All of the compiler but its last stage, which takes minutes.
    traced = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    plan = plans()[1]
    before = weights(initial_system(plans()[0], seed=0))
    plain, compiled = trainer(plan, before=before), trainer(plan, before=before, compiled=True)
    for batch in batches(3):
        assert compiled.step(batch).loss == pytest.approx(plain.step(batch).loss, rel=1e-5)


def test_workers_on_gpus_share_batch_statistics() -> None:
    assert shares_statistics(Worker(count=2, device="cuda:1"))
    assert not shares_statistics(Worker(count=1, device="cuda"))
    assert not shares_statistics(Worker(count=2))


def test_shared_statistics_keep_names_and_the_frozen_detector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plans(**{"phases.1.ema_decay": 0.9})[1]
    before = weights(initial_system(plans()[0], seed=0))
    plain = trainer(plan, before=before)
    monkeypatch.setattr("kpmask.train.shares_statistics", lambda worker: True)
    shared = trainer(plan, before=before)
    assert same(weights(plain.system), weights(shared.system))
    norms = [m for m in shared.system.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {type(m) for m in norms} == {nn.SyncBatchNorm}
    assert not any(m.training for m in shared.system.get_submodule("detector").modules())
    assert same(weights(plain.result), weights(shared.result))


def test_bfloat16_only_where_the_processor_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert training_precision(job(), "cpu") == "bfloat16"
    assert training_precision(job(precision="float32"), "cpu") == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert training_precision(job(), "cpu") == "float32"
    assert training_precision(job(precision="bfloat16"), "cpu") == "bfloat16"
    assert training_precision(job(), "mps") == "float32"


def test_a_small_set_is_learnt() -> None:
    plan = plans(**{"phases.0.learning_rate": 2e-3, "phases.0.max_steps": 200})[0]
    ours = trainer(plan)
    image = torch.nn.functional.interpolate(torch.rand(2, 4, 3, 4, 4).flatten(0, 1), SIDE_PX)
    batch = Batch(*image.unflatten(0, (2, 4)))
    pixel = [ours.step(batch).terms["pixel"] for _ in range(60)]
    assert pixel[-1] < 0.5 * pixel[0]


def through_storage(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


SETTINGS = {
    "plain": {},
    "averaged": {"ema_decay": 0.9, "schedule": "cosine", "accumulate": 2},
    "momentum": {"optimizer": "sgd", "detector_learning_rate": 1e-5},
}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_going_on_from_a_state_repeats_the_undisturbed_run(
    index: int, name: str, precision: Precision
) -> None:
    plan = plans(**{f"phases.{index}.{key}": value for key, value in SETTINGS[name].items()})[index]
    whole = trainer(plan, precision=precision)
    for batch in batches(8):
        whole.step(batch)
    before = trainer(plan, precision=precision)
    for batch in batches(8)[:3]:
        before.step(batch)
    state, tensors = through_storage((before.state_dict(), before.system.state_dict()))
    torch.manual_seed(99)  # whatever happened in between
    after = trainer(plan, precision=precision)
    after.system.load_state_dict(tensors)
    after.load_state_dict(state)
    assert after.step_number == 3
    for batch in batches(8)[3:]:
        after.step(batch)
    assert same(weights(after.system), weights(whole.system))
    assert same(weights(after.result), weights(whole.result))


def test_the_detector_comes_from_the_phase_before_and_stays() -> None:
    first, second = plans()
    taught = trainer(first)
    for batch in batches(2):
        taught.step(batch)
    detector = weights(taught.system.get_submodule("detector"))
    ours = trainer(second, before=taught.system.state_dict())
    start = weights(ours.system)
    for batch in batches(3):
        ours.step(batch)
    assert same(weights(ours.system.get_submodule("detector")), detector)
    changed = [k for k, v in weights(ours.system).items() if not torch.equal(v, start[k])]
    assert {key.split(".")[0] for key in changed} == {"low_resolution", "high_resolution"}


def test_a_detector_that_does_not_fit_is_refused() -> None:
    first, second = plans()
    detector = weights(initial_system(first, seed=0).get_submodule("detector"))
    detector["kp.weight"] = detector["kp.weight"][:2]
    with pytest.raises(CheckpointError, match=r"kp\.weight") as error:
        trainer(second, before={f"detector.{key}": value for key, value in detector.items()})
    assert error.value.code == "checkpoint_mismatch"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("detector.num_keypoints", 10, "its detector differs from the one before"),
        ("detector.scale_factor", 0.5, "its detector differs from the one before"),
        ("image_size_px", 64, r"phases differ in image_size_px: \[32, 64\]"),
    ],
)
def test_phases_that_do_not_follow_each_other_are_refused(
    key: str, value: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plans(**{f"phases.1.model.{key}": value})


def test_weights_that_do_not_fit_are_refused() -> None:
    first, second = plans("fomm-adv")
    _, more = plans("fomm-adv", **{"phases.1.model.detector.num_keypoints": 10})
    before = weights(initial_system(first, seed=0))
    initial_system(second, seed=0, before=before)
    of_another_system = {f"low_resolution.{key}": value for key, value in before.items()}
    for plan, taken in ((more, before), (second, of_another_system)):
        with pytest.raises(CheckpointError, match="the weights do not fit") as error:
            initial_system(plan, seed=0, before=taken)
        assert error.value.subject == "fomm-adv"
        assert error.value.code == "checkpoint_mismatch"


def test_fresh_weights_follow_the_seed_and_leave_the_random_state_alone() -> None:
    plan = plans()[0]
    state = torch.get_rng_state()
    one = weights(initial_system(plan, seed=0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert same(one, weights(initial_system(plan, seed=0)))
    assert not same(one, weights(initial_system(plan, seed=1)))


def test_a_loss_that_is_not_finite_stops_with_the_weights_of_before() -> None:
    ours = trainer(plans()[0])
    good = batches(2)
    bad = Batch(good[1].source_BCHW, good[1].driving_BCHW * float("nan"))
    ours.step(good[0])
    # Batch norm's running statistics see the batch before the loss does.
    trained = {name: p.detach().clone() for name, p in ours.system.named_parameters()}
    kept: list[Batch] = []

    def keep(batch: Batch, error: RunFailed) -> RunFailed:
        kept.append(batch)
        assert "step 1: the loss is not finite" in str(error)
        assert "pixel" in str(error)
        return RunFailed("and kept", code=error.code)

    with pytest.raises(RunFailed, match="and kept") as error:
        fit(ours, [bad, good[0]], on_failure=keep)
    assert error.value.code == "training_failed"
    assert kept == [bad]
    assert same(trained, {name: p.detach() for name, p in ours.system.named_parameters()})
    assert ours.step_number == 1


def test_fit_ends_where_it_is_asked_to() -> None:
    ours = trainer(plans()[0])
    assert not fit(ours, batches(5), after_step=lambda result: result.step == 1)
    assert ours.step_number == 2
    assert fit(ours, batches(3)[2:])


# --- two workers -----------------------------------------------------------------------------


def _mean(values: torch.Tensor) -> torch.Tensor:
    summed = values.clone()
    torch.distributed.all_reduce(summed)
    return summed / 2


def halves(batch: Batch) -> list[Batch]:
    pairs = zip(batch.source_BCHW.chunk(2), batch.driving_BCHW.chunk(2), strict=True)
    return [Batch(source, driving) for source, driving in pairs]


# Adam would make the rounding of a gradient that is 0 (a bias before batch norm) as large as any.
SHARED = {
    "phases.0.optimizer": "sgd",
    "phases.0.learning_rate": 1e-4,
    "phases.0.accumulate": 2,
}


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    worker = Worker(rank=rank, count=2, wrap=DistributedDataParallel, mean=_mean)
    ours = trainer(plans(**SHARED)[0], worker=worker)
    losses = [ours.step(halves(batch)[rank]).loss for batch in batches(3)]
    before = weights(ours.system)
    torch.save({"weights": before, "losses": losses}, f"{folder}/{rank}.pt")
    half = halves(batches(4)[3])[rank]
    with pytest.raises(RunFailed, match="step 3: the loss is not finite"):
        ours.step(half if rank == 0 else Batch(half.source_BCHW, half.driving_BCHW * math.nan))
    trained = dict(ours.system.named_parameters())
    assert all(torch.equal(trained[name], before[name]) for name in trained)
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's own, while it starts processes
def test_two_workers_average_their_gradients_and_stop_together(tmp_path: Path) -> None:
    spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert results[0]["losses"] == results[1]["losses"]
    names = dict(initial_system(plans()[0], seed=0).named_parameters())
    for name in names:
        assert torch.equal(results[0]["weights"][name], results[1]["weights"][name]), name
    # By hand: each half, in two parts, through a copy of the model, gradients averaged, one step.
    reference = initial_system(plans()[0], seed=0)
    reference.set_losses(plans()[0].phase.losses, None)
    reference.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-4, momentum=0.5)
    wanted = []
    for step, batch in enumerate(batches(3)):
        copies = [copy.deepcopy(reference).train() for _ in range(2)]
        losses = []
        for rank, (system, half) in enumerate(zip(copies, halves(batch), strict=True)):
            for number in range(2):
                torch.manual_seed(derived_seed(0, 0, 1, step, rank, number))
                part = part_of(half, slice(number, number + 1))
                total = system.training_losses(part).total
                total.backward()
                losses.append(total.item())
        for parameters in zip(*(s.parameters() for s in (reference, *copies)), strict=True):
            parameters[0].grad = (parameters[1].grad + parameters[2].grad) / 4
        optimizer.step()
        wanted.append(sum(losses) / 4)
    assert results[0]["losses"] == pytest.approx(wanted, rel=1e-5)
    for name, parameter in reference.named_parameters():
        assert torch.allclose(results[0]["weights"][name], parameter, atol=1e-5), name

"""Training steps against hand-written loops, and that going on from a state changes nothing."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from kpmask.config import TrainJob, resolve_job
from kpmask.errors import CheckpointError, RunFailed
from kpmask.models.base import Batch
from kpmask.train import (
    PhasePlan,
    Trainer,
    Worker,
    derived_seed,
    fit,
    initial_system,
    learning_rate,
    plan_phases,
)

SIDE_PX = 32


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job(**overrides: Any) -> TrainJob:
    texts = [f"{key}={value}" for key, value in overrides.items()]
    return resolve_job(
        TrainJob, preset="debug", overrides=texts, flags={"data": "unused", "out": "unused"}
    )


def plans(**overrides: Any) -> tuple[PhasePlan, ...]:
    return plan_phases(job(**overrides), pairs_per_epoch=1000)


def batches(count: int, size: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    shape = (count, 2, size, 3, SIDE_PX, SIDE_PX)
    return [Batch(f[0], f[1]) for f in torch.rand(shape, generator=generator)]


def laid_out(batch: Batch) -> Batch:
    """In the layout that the trainer uses, so that rounding is the same."""
    frames = (batch.source_BCHW, batch.driving_BCHW)
    return Batch(*(frame.contiguous(memory_format=torch.channels_last) for frame in frames))


def trainer(plan: PhasePlan, *, worker: Worker | None = None, **kwargs: Any) -> Trainer:
    system = initial_system(plan, seed=0, **kwargs)
    return Trainer(plan, system, features=None, seed=0, worker=worker)


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
        assert learning_rate(phase, step, num_steps=37) == pytest.approx(want, rel=1e-12)
        optimizer.step()
        schedule.step()


def test_steps_are_those_of_a_plain_loop() -> None:
    plan = plans()[0]
    ours = trainer(plan)
    system = initial_system(plan, seed=0)
    system.set_losses(plan.phase.losses, None)
    system.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(system.parameters(), lr=2e-4, betas=(0.5, 0.999))
    for step, batch in enumerate(batches(4)):
        torch.manual_seed(derived_seed(0, 0, 1, step, 0))
        optimizer.zero_grad()
        losses = system.training_losses(laid_out(batch))
        losses.total.backward()
        optimizer.step()
        result = ours.step(batch)
        assert result.loss == pytest.approx(losses.total.item(), rel=1e-6)
        assert sum(result.terms.values()) == pytest.approx(result.loss)
    assert same(weights(system), weights(ours.system))


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


@pytest.mark.parametrize("index", [0, 1])
def test_going_on_from_a_state_repeats_the_undisturbed_run(index: int) -> None:
    plan = plans()[index]
    whole = trainer(plan)
    for batch in batches(8):
        whole.step(batch)
    before = trainer(plan)
    for batch in batches(8)[:3]:
        before.step(batch)
    state, tensors = through_storage((before.state_dict(), before.system.state_dict()))
    torch.manual_seed(99)  # whatever happened in between
    after = trainer(plan)
    after.system.load_state_dict(tensors)
    after.load_state_dict(state)
    assert after.step_number == 3
    for batch in batches(8)[3:]:
        after.step(batch)
    assert same(weights(after.system), weights(whole.system))


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
    with pytest.raises(RunFailed, match="phase 'fomm', step 1: the loss is not finite") as error:
        fit(ours, [bad, good[0]], on_failure=kept.append)
    assert error.value.code == "training_failed"
    assert "pixel" in str(error.value)
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


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    worker = Worker(rank=rank, count=2, wrap=DistributedDataParallel, mean=_mean)
    ours = trainer(plans()[0], worker=worker)
    losses = [ours.step(halves(batch)[rank]).loss for batch in batches(3)]
    torch.save({"weights": ours.system.state_dict(), "losses": losses}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's own, while it starts processes
def test_two_workers_average_their_gradients(tmp_path: Path) -> None:
    spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert results[0]["losses"] == results[1]["losses"]
    names = dict(initial_system(plans()[0], seed=0).named_parameters())
    for name in names:
        assert torch.equal(results[0]["weights"][name], results[1]["weights"][name]), name
    # By hand: each half through a copy of the model, gradients averaged, one Adam step.
    reference = initial_system(plans()[0], seed=0)
    reference.set_losses(plans()[0].phase.losses, None)
    reference.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(reference.parameters(), lr=2e-4, betas=(0.5, 0.999))
    wanted = []
    for step, batch in enumerate(batches(3)):
        copies = [copy.deepcopy(reference).train() for _ in range(2)]
        losses = []
        for rank, (system, half) in enumerate(zip(copies, halves(batch), strict=True)):
            torch.manual_seed(derived_seed(0, 0, 1, step, rank))
            total = system.training_losses(laid_out(half)).total
            total.backward()
            losses.append(total.item())
        for parameters in zip(*(s.parameters() for s in (reference, *copies)), strict=True):
            parameters[0].grad = (parameters[1].grad + parameters[2].grad) / 2
        optimizer.step()
        wanted.append(sum(losses) / 2)
    assert results[0]["losses"] == pytest.approx(wanted, rel=1e-4)
    for name, parameter in reference.named_parameters():
        assert torch.allclose(results[0]["weights"][name], parameter, atol=1e-4), name

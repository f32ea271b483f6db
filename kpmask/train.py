"""Training on one device: how long phases are, what one step does, and its state.

- A phase is a number of steps known beforehand. Step n has its own pairs, its own random numbers
  and its own learning rate, each a pure function of (seed, phase, n, worker). The state to keep is
  therefore weights, optimiser and step number, and going on from it repeats an undisturbed run
  bit for bit.
- Several workers differ from one in two functions only (`Worker`): one that wraps the module, so
  that gradients are averaged, and one that averages numbers. Nothing here knows where they run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kpmask.config import Phase, TrainJob
from kpmask.errors import CheckpointError, ConfigError, RunFailed
from kpmask.losses import PerceptualLoss
from kpmask.models import build_system
from kpmask.models.base import AnimationSystem, Batch, LossTerms
from kpmask.models.keypoint_mask import KeypointMaskSystem
from kpmask.perceptual import PerceptualFeatures

System = AnimationSystem[Any, Any]

LEARNING_RATE_DROP = 0.1  # at every milestone, in FOMM's and the papers' code


def derived_seed(*parts: int) -> int:
    """A seed of 63 bits for a part of the training; different parts, unrelated numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """A phase in the course of a training: its place, its length, and the steps before it."""

    phase: Phase
    index: int
    num_steps: int
    steps_before: int
    steps_per_epoch: float


def plan_phases(job: TrainJob, *, pairs_per_epoch: int) -> tuple[PhasePlan, ...]:
    """How many steps each phase has: its epochs' pairs, or `max_steps` where that is less."""
    lengths = [_num_steps(phase, pairs_per_epoch) for phase in job.phases]
    starts = itertools.accumulate(lengths, initial=0)
    rows = zip(job.phases, lengths, starts, strict=False)
    return tuple(
        PhasePlan(
            phase=phase,
            index=index,
            num_steps=length,
            steps_before=before,
            steps_per_epoch=pairs_per_epoch / phase.batch_size,
        )
        for index, (phase, length, before) in enumerate(rows)
    )


def _num_steps(phase: Phase, pairs_per_epoch: int) -> int:
    steps = math.ceil(phase.epochs * pairs_per_epoch / phase.batch_size)
    return steps if phase.max_steps is None else min(steps, phase.max_steps)


def learning_rate(phase: Phase, step: int, *, num_steps: int) -> float:
    """The rate of step `step` of `num_steps`: a tenth after each milestone."""
    passed = sum(step >= int(milestone * num_steps) for milestone in phase.milestones)
    return phase.learning_rate * LEARNING_RATE_DROP**passed


def _same_module(module: nn.Module) -> nn.Module:
    return module


def _same_tensor(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Worker:
    """One of `count` workers that train one model together.

    Attributes:
        wrap: makes the module average its gradients over the workers.
        mean: averages a small tensor over the workers; every worker calls it equally often.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = _same_module
    mean: Callable[[Tensor], Tensor] = _same_tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """What step `step` was: losses are means over the workers, `terms` sum to `loss`."""

    step: int
    learning_rate: float
    loss: float
    terms: Mapping[str, float]


def initial_system(
    plan: PhasePlan, *, seed: int, before: Mapping[str, Tensor] | None = None
) -> System:
    """A phase's system before its first step, the same on every worker.

    Args:
        before: weights of the phase before, of which this one takes what its settings say.

    Raises:
        CheckpointError: the weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, plan.index, 0))
        system = build_system(plan.phase.model)
    if before is not None:
        _take(system, before, plan.phase)
    if plan.phase.train_detector and isinstance(system, KeypointMaskSystem):
        system.release_detector()
    return system


def _take(system: System, before: Mapping[str, Tensor], phase: Phase) -> None:
    """Give a phase's system what it takes of the phase before."""
    if phase.takes == "detector":
        prefix = "detector."
        detector = {k.removeprefix(prefix): v for k, v in before.items() if k.startswith(prefix)}
        load_weights(system.get_submodule("detector"), detector, subject=phase.name)
    elif phase.takes == "weights":
        load_weights(system, {**system.state_dict(), **before}, subject=phase.name)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, subject: str) -> None:
    """Load a state dict whole or not at all.

    Raises:
        CheckpointError: keys or shapes differ.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).split("\n\t", 1)[-1].splitlines()[0]
        raise CheckpointError(
            f"the weights do not fit: {first}", subject=subject, code="checkpoint_mismatch"
        ) from None


class Trainer:
    """One phase on one worker: `step` by step.

    Args:
        plan: which phase.
        system: its system; trained in place, moved to the worker's device.
        features: for the perceptual loss; None trains without it.
        seed: of the whole training.
        worker: which worker this is.

    Raises:
        ConfigError: the losses leave nothing to minimise.
    """

    def __init__(
        self,
        plan: PhasePlan,
        system: System,
        *,
        features: PerceptualFeatures | None,
        seed: int,
        worker: Worker | None = None,
    ) -> None:
        self.plan = plan
        self.system = system
        self.step_number = 0  # how many steps are done
        self._seed = seed
        self._worker = worker or Worker()
        device = self._worker.device
        losses = plan.phase.losses
        loss = None if features is None else PerceptualLoss(features, losses.scales)
        system.set_losses(losses, loss)
        # Convolutions train 1.4 times as fast on a CPU in this layout, and on a GPU's tensor cores.
        for module in (system, loss):
            if module is not None:
                module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        system.train()
        self._module = self._worker.wrap(system)
        trained = [p for p in system.parameters() if p.requires_grad]
        if not trained:
            raise ConfigError("its model has nothing to train", subject=plan.phase.name)
        self._optimizer = torch.optim.Adam(
            trained, lr=plan.phase.learning_rate, betas=plan.phase.betas
        )

    def step(self, batch: Batch) -> StepResult:
        """Train on the batch of step `step_number`.

        Raises:
            RunFailed: the loss is not finite (on every worker alike). The weights are still those
                of before the step.
        """
        step, phase = self.step_number, self.plan.phase
        rate = learning_rate(phase, step, num_steps=self.plan.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(derived_seed(self._seed, self.plan.index, 1, step, self._worker.rank))
        self._optimizer.zero_grad(set_to_none=True)
        losses: LossTerms = self._module(_channels_last(batch))
        losses.total.backward()  # type: ignore[no-untyped-call]
        result = self._result(losses, rate)
        self._optimizer.step()
        self.step_number += 1
        return result

    def _result(self, losses: LossTerms, rate: float) -> StepResult:
        """The step's losses, fetched from the device at once."""
        values = torch.stack([term.detach() for term in losses.terms.values()]).double()
        terms = dict(zip(losses.terms, self._worker.mean(values).tolist(), strict=True))
        loss = math.fsum(terms.values())
        if not math.isfinite(loss):
            bad = ", ".join(name for name, value in terms.items() if not math.isfinite(value))
            raise RunFailed(
                f"the loss is not finite any more ({bad or 'their sum'})",
                subject=f"phase {self.plan.phase.name!r}, step {self.step_number}",
                code="training_failed",
                hint="lower learning_rate; the last checkpoint is whole",
            )
        return StepResult(self.step_number, rate, loss, terms)

    def state_dict(self) -> dict[str, Any]:
        """All but the weights, which are `system.state_dict()`: tensors and plain data only."""
        return {"step": self.step_number, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the system's weights are loaded separately."""
        self._optimizer.load_state_dict(dict(state["optimizer"]))
        self.step_number = int(state["step"])


def _channels_last(batch: Batch) -> Batch:
    layout = torch.channels_last
    return Batch(
        source_BCHW=batch.source_BCHW.contiguous(memory_format=layout),
        driving_BCHW=batch.driving_BCHW.contiguous(memory_format=layout),
    )


def fit(
    trainer: Trainer,
    batches: Iterable[Batch],
    *,
    after_step: Callable[[StepResult], bool] = lambda result: False,
    on_failure: Callable[[Batch], None] = lambda batch: None,
) -> bool:
    """Train on `batches`, the first of which is that of the trainer's next step.

    Args:
        after_step: called after every step; true ends the training there.
        on_failure: called with the batch of a step that failed, before its error goes on.

    Returns:
        Whether all batches were trained on.

    Raises:
        RunFailed: the loss is not finite any more.
    """
    for batch in batches:
        try:
            result = trainer.step(batch)
        except RunFailed:
            on_failure(batch)
            raise
        if after_step(result):
            return False
    return True

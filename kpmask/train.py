"""Training on one device: how long phases are, what one step does, and its state.

- A phase is a number of steps known beforehand. Step n has its own pairs, its own random numbers
  and its own learning rate, each a pure function of (seed, phase, n, worker). The state to keep is
  therefore weights, optimiser and step number, and going on from it repeats an undisturbed run
  bit for bit.
- Several workers differ from one in two functions only (`Worker`): one that wraps the module, so
  that gradients are averaged, and one that averages numbers. Nothing here knows where they run.
- Convolutions may run in bfloat16 (autocast around the forward pass); weights, optimiser, losses
  and all that `widened` marks stay in float32.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kpmask.config import Phase, TrainJob
from kpmask.device import Precision
from kpmask.errors import CheckpointError, RunFailed
from kpmask.losses import PerceptualLoss
from kpmask.models import build_system
from kpmask.models.base import AnimationSystem, Batch, LossTerms
from kpmask.models.keypoint_mask import KeypointMaskSystem
from kpmask.optim import build_optimizer, learning_rate_factor, moving_average, set_rates
from kpmask.perceptual import PerceptualFeatures

System = AnimationSystem[Any, Any]


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
        precision: what convolutions are computed in.
        compile_losses: compile the forward and backward passes, which takes minutes once and pays
            off on GPUs only.

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
        precision: Precision = "float32",
        compile_losses: bool = False,
    ) -> None:
        self.plan = plan
        self.step_number = 0  # how many steps are done
        self._seed = seed
        self._worker = worker or Worker()
        self._device_type = torch.device(self._worker.device).type
        self._narrow = precision == "bfloat16"
        phase = plan.phase
        if shares_statistics(self._worker):
            system = nn.SyncBatchNorm.convert_sync_batchnorm(system)  # type: ignore[no-untyped-call]
        _place(system, self._worker.device)
        self.system = system.train()
        # Before the losses are set: their features are no part of it.
        self._average = moving_average(system, phase.ema_decay) if phase.ema_decay else None
        loss = None if features is None else PerceptualLoss(features, phase.losses.scales)
        system.set_losses(phase.losses, loss)
        if loss is not None:
            _place(loss, self._worker.device)
        self._optimizer = build_optimizer(phase, system)
        self._module = self._worker.wrap(system)
        self._forward: Callable[[Batch], LossTerms] = self._module
        if compile_losses:
            self._forward = torch.compile(self._module)

    @property
    def result(self) -> System:
        """What the phase makes: the moving average of the weights, where the phase has one."""
        if self._average is None:
            return self.system
        averaged = self._average.module
        assert isinstance(averaged, AnimationSystem)
        return averaged

    def step(self, batch: Batch) -> StepResult:
        """Train on the batch of step `step_number`.

        Raises:
            RunFailed: the loss is not finite (on every worker alike). The weights are still those
                of before the step.
        """
        phase, num_steps = self.plan.phase, self.plan.num_steps
        factor = learning_rate_factor(phase, self.step_number, num_steps=num_steps)
        set_rates(self._optimizer, factor)
        self._optimizer.zero_grad(set_to_none=True)
        terms = self._gradients(batch)
        result = self._result(terms, phase.learning_rate * factor)
        self._update()
        self.step_number += 1
        return result

    def _update(self) -> None:
        """Move the weights, and their average."""
        self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.system)

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Add up the gradients of the batch's parts; the means of their loss terms."""
        count = self.plan.phase.accumulate
        epoch = self.step_number / self.plan.steps_per_epoch
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(_parts(batch, count, epoch=epoch)):
            place = (self.step_number, self._worker.rank, number)
            torch.manual_seed(derived_seed(self._seed, self.plan.index, 1, *place))
            # Workers exchange gradients once a step: with those of the last part.
            with self._no_exchange() if number < count - 1 else contextlib.nullcontext():
                losses = self._losses(part)
                (losses.total / count).backward()  # type: ignore[no-untyped-call]
            for name, term in losses.terms.items():
                value = term.detach() / count
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def _losses(self, part: Batch) -> LossTerms:
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._narrow):
            return self._forward(part)

    def _no_exchange(self) -> contextlib.AbstractContextManager[None]:
        module = self._module
        if isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return contextlib.nullcontext()

    def _result(self, losses: Mapping[str, Tensor], rate: float) -> StepResult:
        """The step's losses, fetched from the device at once."""
        values = torch.stack(list(losses.values())).double()
        terms = dict(zip(losses, self._worker.mean(values).tolist(), strict=True))
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
        state = {"step": self.step_number, "optimizer": self._optimizer.state_dict()}
        if self._average is not None:
            state["average"] = dict(self._average.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the system's weights are loaded separately."""
        self._optimizer.load_state_dict(dict(state["optimizer"]))
        if self._average is not None:
            self._average.load_state_dict(dict(state["average"]))
        self.step_number = int(state["step"])


def shares_statistics(worker: Worker) -> bool:
    """Whether batch norm sees the batches of all workers, as the original projects' does.

    Torch has that for GPUs only. On CPUs each worker normalises by its own part of the batch, and
    the running statistics that are kept are the first worker's.
    """
    return worker.count > 1 and torch.device(worker.device).type == "cuda"


def _place(module: nn.Module, device: str) -> None:
    # Convolutions train 1.4 times as fast on a CPU in this layout, and on a GPU's tensor cores.
    module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _parts(batch: Batch, count: int, *, epoch: float) -> Iterator[Batch]:
    """The batch in `count` equal parts, in the layout that is trained in."""
    layout = torch.channels_last
    pairs = zip(batch.source_BCHW.chunk(count), batch.driving_BCHW.chunk(count), strict=True)
    for source_BCHW, driving_BCHW in pairs:
        yield Batch(
            source_BCHW=source_BCHW.contiguous(memory_format=layout),
            driving_BCHW=driving_BCHW.contiguous(memory_format=layout),
            epoch=epoch,
        )


def fit(
    trainer: Trainer,
    batches: Iterable[Batch],
    *,
    after_step: Callable[[StepResult], bool] = lambda result: False,
    on_failure: Callable[[Batch, RunFailed], RunFailed] = lambda batch, error: error,
) -> bool:
    """Train on `batches`, the first of which is that of the trainer's next step.

    Args:
        after_step: called after every step; true ends the training there.
        on_failure: called with the batch of a step that failed and its error; gives the error
            that goes on.

    Returns:
        Whether all batches were trained on.

    Raises:
        RunFailed: the loss is not finite any more.
    """
    for batch in batches:
        try:
            result = trainer.step(batch)
        except RunFailed as error:
            raise on_failure(batch, error) from None
        if after_step(result):
            return False
    return True

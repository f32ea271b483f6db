"""From gradients to weights: learning rates, the optimiser, and the moving average of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kpmask.config import Phase
from kpmask.errors import ConfigError

LEARNING_RATE_DROP = 0.1  # at every milestone, in FOMM's and the papers' code
COSINE_FLOOR = 0.01  # of the learning rate: where the cosine ends
# Optimisers of which torch has one kernel for all tensors, which is much faster than a loop.
FUSED_DEVICES = frozenset({"cpu", "cuda"})
DETECTOR = "detector."
_Tensors = tuple[Tensor, ...] | list[Tensor]


def learning_rate_factor(phase: Phase, step: int, *, num_steps: int) -> float:
    """What the rates of step `step` of `num_steps` are multiplied with.

    A tenth after each milestone, or half a cosine from 1 down to `COSINE_FLOOR`.
    """
    if phase.schedule == "cosine":
        wave = (1 + math.cos(math.pi * step / num_steps)) / 2
        return COSINE_FLOOR + (1 - COSINE_FLOOR) * wave
    passed = sum(step >= int(milestone * num_steps) for milestone in phase.milestones)
    return LEARNING_RATE_DROP**passed


def build_optimizer(phase: Phase, system: nn.Module) -> torch.optim.Optimizer:
    """The phase's optimiser for what it trains of `system`.

    Each parameter group keeps its own rate, that of step 0, as `base_rate`. A detector whose rate
    is 0 needs no gradient and gets none; its batch norm still sees every batch.

    Raises:
        ConfigError: there is nothing to train.
    """
    rates = {True: phase.detector_learning_rate, False: phase.learning_rate}
    if rates[True] is None:
        rates[True] = phase.learning_rate
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in system.named_parameters():
        is_detector = name.startswith(DETECTOR)
        if not rates[is_detector]:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            groups[is_detector].append(parameter)
    trained = [
        {"params": parameters, "lr": rates[key], "base_rate": rates[key]}
        for key, parameters in groups.items()
        if parameters
    ]
    if not trained:
        raise ConfigError("its model has nothing to train", subject=phase.name)
    fused = next(system.parameters()).device.type in FUSED_DEVICES
    if phase.optimizer == "sgd":
        return torch.optim.SGD(
            trained, lr=phase.learning_rate, momentum=phase.betas[0], fused=fused
        )
    return torch.optim.Adam(trained, lr=phase.learning_rate, betas=phase.betas, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every parameter group its rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * factor


def average_decay(decay: float, num_averaged: int) -> float:
    """The decay of an update after `num_averaged` others: less at first, as the weights are far."""
    return min(decay, (1 + num_averaged) / (10 + num_averaged))


def moving_average(system: nn.Module, decay: float) -> AveragedModel:
    """A copy of `system` that `update_parameters(system)` turns into its moving average.

    Parameters and batch norm's statistics are averaged; counts are taken as they are. The first
    update copies, and those after it follow `average_decay`.
    """

    @torch.no_grad()
    def update(average: _Tensors, now: _Tensors, num_averaged: Tensor | int) -> None:
        if average[0].is_floating_point():
            weight = 1 - average_decay(decay, int(num_averaged))
            torch._foreach_lerp_(average, now, weight)
            return
        for old, new in zip(average, now, strict=True):
            old.copy_(new)

    average = AveragedModel(system, multi_avg_fn=update, use_buffers=True)
    average.requires_grad_(False)
    return average.eval()

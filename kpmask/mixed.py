"""Frames of several animations in one batch, so that short videos fill a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpmask.animate import Animator, Transfer
from kpmask.models.base import State


@dataclass(frozen=True, slots=True)
class Strip:
    """A piece of one animation: a source (1 entry) in the poses of driving states (T entries).

    `initial` (1 entry) is what relative motion starts from.
    """

    source: State
    driving: State
    initial: State | None
    transfer: Transfer


@torch.inference_mode()
def draw(animator: Animator, strips: Sequence[Strip]) -> Tensor:
    """The frames of all strips, one after the other: float32 [sum of T, C, H, W] in [0, 1], on the
    animator's device. Every frame is computed by itself: what it is mixed with does not show.
    """
    if sum(len(strip.driving) for strip in strips) == 1:
        # Kernels for one image sum in another order than those for several.
        return draw(animator, [*strips, *strips])[:1]
    moved = [_moved(animator, strip) for strip in strips]
    sources = _joined([source for source, _ in moved])
    drivings = _joined([driving for _, driving in moved])
    image_BCHW: Tensor = animator.system.render(sources, drivings).image_BCHW
    return image_BCHW


def _joined(states: Sequence[State]) -> State:
    """One state of all entries; a single one is not copied."""
    return states[0] if len(states) == 1 else type(states[0]).cat(states)


def _moved(animator: Animator, strip: Strip) -> tuple[State, State]:
    """The source as often as there are driving states, and these states as the source has them."""
    driving = strip.driving.to(animator.device)
    sources = strip.source.to(animator.device).repeat(len(driving))
    if strip.transfer.motion == "relative":
        assert strip.initial is not None
        driving = animator.system.relative_motion(
            sources,
            driving,
            strip.initial.to(animator.device),
            adapt_scale=strip.transfer.adapt_scale,
        )
    return sources, driving

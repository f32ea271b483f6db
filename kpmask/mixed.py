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
def draw(animator: Animator, strips: Sequence[Strip], *, size: int) -> Tensor:
    """The frames of all strips, one after the other: float32 [sum of T, C, H, W] in [0, 1], on the
    animator's device.

    They are drawn `size` at a time, also when they are fewer: what a frame is drawn with does not
    show then, to the last bit (see `render_by`).
    """
    moved = [_moved(animator, strip) for strip in strips]
    sources = _joined([source for source, _ in moved])
    drivings = _joined([driving for _, driving in moved])
    return animator.draw(sources, drivings, size=size)


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

"""The fastest form of a system that is exact enough, and what was measured of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch

from kpmask.device import Precision, has_bfloat16, keep_freed_memory
from kpmask.errors import ConfigError
from kpmask.models.base import AnimationSystem
from kpmask.optimize.cuda import GraphRecorder
from kpmask.optimize.fixed import Recorder, recorded
from kpmask.optimize.precision import MIN_PSNR_DB, PrecisionCheck, check_precision
from kpmask.optimize.system import has_bfloat16_parts, optimized

log = logging.getLogger(__name__)

Wanted = Literal["auto", "float32", "bfloat16", "plain"]
Computed = Literal["float32", "bfloat16", "plain"]
WANTED: Final[tuple[str, ...]] = get_args(Wanted)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A system to compute with.

    Attributes:
        precision: what its convolutions compute in; `plain` is the system as it was given.
        check: how far bfloat16 is from the plain system, where it was asked for.
        batch_sizes: what runs from recordings.
    """

    system: AnimationSystem[Any, Any]
    precision: Computed
    check: PrecisionCheck | None = None
    batch_sizes: tuple[int, ...] = ()


def choose(
    plain: AnimationSystem[Any, Any],
    wanted: Wanted,
    *,
    device: torch.device | str,
    batch_sizes: Sequence[int] = (),
) -> Chosen:
    """The system in the wanted precision, or in float32 where bfloat16 would show.

    Where the result computes on a CPU, the process keeps its freed memory from now on: pages that
    are given back and fetched anew cost a fifth of a frame.

    Args:
        plain: in eval mode, on the device. It is not changed, and shares some of its weights.
        wanted: auto is bfloat16 where the device has instructions for it and float32 elsewhere.
        batch_sizes: on a GPU these are recorded as CUDA graphs, unless plain is wanted. Where that
            fails, the system works without, and a warning says why.

    Raises:
        ConfigError: there is no such precision.
    """
    if wanted not in WANTED:
        raise ConfigError(f"{wanted!r} is not one of {', '.join(WANTED)}", subject="precision")
    if wanted == "plain":
        return Chosen(plain, "plain")
    kind = torch.device(device).type
    if kind == "cpu":
        keep_freed_memory()
    chosen = _fitting(plain, wanted, kind, device=device)
    if kind != "cuda" or not batch_sizes:
        return chosen
    return with_recordings(chosen, batch_sizes, GraphRecorder(torch.device(device)), device=device)


def with_recordings(
    chosen: Chosen, batch_sizes: Sequence[int], record: Recorder, *, device: torch.device | str
) -> Chosen:
    """The same, from recordings; as it is, with a warning, where they fail."""
    try:
        system = recorded(chosen.system, batch_sizes, record, device=device)
    except RuntimeError as error:  # torch has no narrower one for what CUDA refuses
        log.warning("computing without CUDA graphs: %s", error)
        return chosen
    return dataclasses.replace(chosen, system=system, batch_sizes=tuple(sorted(batch_sizes)))


def _fitting(
    plain: AnimationSystem[Any, Any], wanted: Wanted, kind: str, *, device: torch.device | str
) -> Chosen:
    check = None
    if _precision(plain, wanted, kind) == "bfloat16":
        narrow = optimized(plain, precision="bfloat16")
        check = check_precision(narrow, plain, device=device)
        if check.passed:
            return Chosen(narrow, "bfloat16", check)
        log.warning(
            "bfloat16 changes what this checkpoint draws (%s; wanted %g dB): computing in float32",
            check,
            MIN_PSNR_DB,
        )
    return Chosen(optimized(plain, precision="float32"), "float32", check)


def _precision(plain: AnimationSystem[Any, Any], wanted: Wanted, device_type: str) -> Precision:
    if wanted == "float32" or not has_bfloat16_parts(plain):
        return "float32"
    return "bfloat16" if wanted == "bfloat16" or has_bfloat16(device_type) else "float32"

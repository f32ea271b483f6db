"""Systems side by side: budgets, pairs, and the table with margins. No files, no training.

- Budgets are optimiser steps, all phases of a system together, so that a system whose detector is
  trained first does not get that for nothing.
- A table's row is one system (or none: copies of the source). Its value is the mean over videos,
  of which each is the mean over the seeds. Margins are in percent of the baseline's mean, and
  their intervals come from drawing videos again and again, the same ones for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from kpmask.config import Phase, TrainJob
from kpmask.errors import ConfigError
from kpmask.records import (
    ComparedRow,
    ComparedScore,
    ComparedValue,
    MetricInfo,
    StepMetrics,
)
from kpmask.statistics import margin_interval, margin_percent, sign_test
from kpmask.train import plan_phases

CROSS_METRICS: Final = tuple(
    MetricInfo(
        name=name, version="1", weights_sha256=None, licence="Apache-2.0", higher_is_better=up
    )
    for name, up in (
        ("foreground_iou", True),
        ("colour_to_source", False),
        ("colour_to_driver", True),
        ("leak", False),
    )
)


# --- budget ----------------------------------------------------------------------------------


def split_steps(lengths: Sequence[int], steps: int) -> tuple[int, ...]:
    """`steps` in proportion to `lengths`, each at least 1; what rounding leaves goes to the
    largest remainders, the first of equals.

    Raises:
        ConfigError: fewer steps than parts.
    """
    if steps < len(lengths):
        raise ConfigError(f"{steps} steps are too few for {len(lengths)} phases", subject="steps")
    # One for each part, and the rest in proportion to what each part lacks then.
    exact = [max(length * steps / sum(lengths) - 1, 0.0) for length in lengths]
    left = steps - len(lengths)
    scale = left / sum(exact) if sum(exact) else 0.0
    shares = [math.floor(value * scale) for value in exact]
    by_remainder = sorted(range(len(lengths)), key=lambda i: shares[i] - exact[i] * scale)
    for i in by_remainder[: left - sum(shares)]:
        shares[i] += 1
    return tuple(1 + share for share in shares)


def with_budget(job: TrainJob, steps: int, *, pairs_per_epoch: int) -> TrainJob:
    """The job with phases of `steps` steps in all, in proportion to their planned lengths.

    A loss that begins later keeps its place: it begins at the same part of its phase.

    Raises:
        ConfigError: fewer steps than phases.
    """
    lengths = planned_lengths(job, pairs_per_epoch=pairs_per_epoch)
    shares = split_steps(lengths, steps)
    phases = tuple(
        _of_length(phase, length, share, pairs_per_epoch)
        for phase, length, share in zip(job.phases, lengths, shares, strict=True)
    )
    return job.model_copy(update={"phases": phases})


def planned_lengths(job: TrainJob, *, pairs_per_epoch: int) -> tuple[int, ...]:
    """How many steps each phase has."""
    return tuple(p.num_steps for p in plan_phases(job, pairs_per_epoch=pairs_per_epoch))


def _of_length(phase: Phase, planned: int, steps: int, pairs_per_epoch: int) -> Phase:
    epochs = math.ceil(steps * phase.batch_size / pairs_per_epoch)
    begins = phase.losses.refinement_from_epoch * steps / planned
    return phase.model_copy(
        update={
            "max_steps": steps,
            "epochs": max(phase.epochs, epochs),  # or they would end the phase first
            "losses": phase.losses.model_copy(update={"refinement_from_epoch": begins}),
        }
    )


def steps_within(
    minutes: float, *, lengths: Sequence[int], seconds_per_step: Sequence[float]
) -> int:
    """How many steps fit when they are split over phases of these lengths and speeds.

    Raises:
        ConfigError: fewer than phases.
    """
    mean_s = float(np.average(seconds_per_step, weights=lengths))
    steps = math.floor(60 * minutes / mean_s + 1e-9)  # 3 s hold 5 of 0.6 s
    if steps < len(lengths):
        raise ConfigError(
            f"{minutes:g} minutes are {steps} steps of {mean_s:.2f} s, too few for "
            f"{len(lengths)} phases",
            subject="minutes",
        )
    return steps


def training_seconds(metrics: Iterable[StepMetrics], batch_sizes: Mapping[str, int]) -> float:
    """How long the steps of a run took, by its metrics.

    Args:
        batch_sizes: of each phase, by its name.
    """
    seconds, before = 0.0, ("", 0)
    for row in metrics:
        start = before[1] if row.phase == before[0] else 0
        seconds += (row.step - start) * batch_sizes[row.phase] / row.samples_per_s
        before = row.phase, row.step
    return seconds


# --- pairs -----------------------------------------------------------------------------------


# --- table -----------------------------------------------------------------------------------

_RowKey = tuple[str, str, str, str]  # protocol, system, variant, method


def comparison_rows(
    scores: Iterable[ComparedScore], *, baseline: str, higher_is_better: Mapping[str, bool]
) -> tuple[ComparedRow, ...]:
    """The table: a row for each protocol, system, variant and method, in order of appearance.

    Args:
        baseline: the system whose rows margins are counted from.
        higher_is_better: by metric.
    """
    found: dict[_RowKey, dict[str, list[ComparedScore]]] = {}
    for score in scores:
        key = (score.protocol, score.system, score.variant, score.method)
        found.setdefault(key, {}).setdefault(score.metric, []).append(score)
    rows = []
    for (protocol, system, variant, _), by_metric in found.items():
        base = found.get((protocol, baseline, "", "model"), {})
        if (system, variant) == (baseline, ""):
            base = {}
        values = tuple(
            _value(metric, own, base.get(metric, []), higher_is_better=higher_is_better[metric])
            for metric, own in by_metric.items()
        )
        first = next(iter(by_metric.values()))[0]
        rows.append(ComparedRow(first.protocol, system, variant, first.method, values))
    return tuple(rows)


def _value(
    metric: str,
    scores: Sequence[ComparedScore],
    base: Sequence[ComparedScore],
    *,
    higher_is_better: bool,
) -> ComparedValue:
    own_by_clip, base_by_clip = _over_seeds(scores), _over_seeds(base)
    values = np.array(list(own_by_clip.values()))
    seeds = sorted({score.seed for score in scores})
    means = [np.mean([s.value for s in scores if s.seed == seed]) for seed in seeds]
    both = [clip for clip in own_by_clip if clip in base_by_clip]
    margin = low = high = p_value = None
    own_V = np.array([own_by_clip[clip] for clip in both])
    base_V = np.array([base_by_clip[clip] for clip in both])
    if len(base_V) and base_V.mean() != 0:
        sign = 1 if higher_is_better else -1
        margin = sign * margin_percent(own_V, base_V)
        low, high = sorted(sign * value for value in margin_interval(own_V, base_V))
        p_value = sign_test(int((own_V > base_V).sum()), int((own_V < base_V).sum()))
    return ComparedValue(
        metric=metric,
        mean=float(values.mean()),
        std=float(values.std()),
        num_videos=len(values),
        seed_std=float(np.std(means)) if len(seeds) > 1 else None,
        margin_percent=margin,
        margin_low=low,
        margin_high=high,
        p_value=p_value,
    )


def _over_seeds(scores: Sequence[ComparedScore]) -> dict[str, float]:
    """Each video's mean over the seeds."""
    by_clip: dict[str, list[float]] = {}
    for score in scores:
        by_clip.setdefault(score.clip_id, []).append(score.value)
    return {clip: float(np.mean(values)) for clip, values in by_clip.items()}

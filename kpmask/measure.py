"""Whether numbers may stand in one column: where they were measured alike, on as much."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Final

from kpmask.errors import ConfigError
from kpmask.records import MetricInfo, ScoreTable

MAX_COVERAGE_GAP: Final = 0.01
# What does not change a number: whose licence it is under.
_NOT_MEASURED: Final = frozenset({"licence"})


def same_measure(first: Iterable[MetricInfo], second: Iterable[MetricInfo]) -> None:
    """Let pass what was measured alike: metrics that both have must agree in all that shapes them.

    Raises:
        ConfigError: naming the metric, the field, and what both have there.
    """
    by_name = {info.name: info for info in first}
    for other in second:
        info = by_name.get(other.name)
        if info is not None:
            _refuse_different(info, other)


def _refuse_different(first: MetricInfo, second: MetricInfo) -> None:
    for field in dataclasses.fields(MetricInfo):
        values = [getattr(info, field.name) for info in (first, second)]
        if field.name not in _NOT_MEASURED and values[0] != values[1]:
            shown = " and ".join("none" if value is None else str(value) for value in values)
            raise ConfigError(
                f"measured differently, and its numbers do not compare: {field.name} is {shown}",
                subject=first.name,
                hint="score both again with the same version, weights and protocol",
            )


def covered_alike(shares: Sequence[float | None]) -> bool:
    """Whether values that leave frames out are of about as many frames each.

    Where they are not, one may be better for no reason but what could not be found in its frames.

    Args:
        shares: of frames that each value is of, in [0, 1]; None where it is not known.
    """
    known = [share for share in shares if share is not None]
    if len(known) < len(shares):
        return False
    # A little more than the gap, which is a difference of two decimal fractions.
    return not known or max(known) - min(known) <= MAX_COVERAGE_GAP + 1e-9


def same_tables(tables: Mapping[str, ScoreTable]) -> None:
    """Let tables pass, by name, that may stand beside each other: as `same_measure`, and of one
    setting.

    Raises:
        ConfigError: as `same_measure`, or naming both tables and what they were drawn from.
    """
    for (name, table), (other_name, other) in combinations(tables.items(), 2):
        drawn = [(t.setting, t.motion if t.setting == "cross" else "") for t in (table, other)]
        if drawn[0] != drawn[1]:
            shown = " and ".join(" ".join(part for part in found if part) for found in drawn)
            raise ConfigError(
                f"drawn from different things, and their numbers do not compare: {shown}",
                subject=f"{name} and {other_name}",
            )
        same_measure(table.metrics, other.metrics)

"""The page of a comparison: systems x metrics, margins, ablations, curves, strips."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kpmask.measure import covered_alike
from kpmask.metric_names import missed_of
from kpmask.records import (
    ComparedMethod,
    ComparedRow,
    ComparedRun,
    ComparedValue,
    Comparison,
    MetricInfo,
    StepMetrics,
)
from kpmask.report.curves import Chart, Line, Panel, panels_svg
from kpmask.report.metric_labels import FOUND, metric_label
from kpmask.report.page import Tile, duration, num, render

REFERENCES: Final[Mapping[ComparedMethod, str]] = {
    "copy": "copy of the source",
    "codec": "the codec alone",
    "source": "the source's own video",
    "driving": "the driving video itself",
}
CROSS_LABELS: Final[Mapping[str, tuple[str, str]]] = {
    "foreground_iou": (
        "Foreground IoU",
        "Overlap of what moves in the result with what moves in the driving video.",
    ),
    "colour_to_source": (
        "Colour to source",
        "Hellinger distance of the moving pixels' colours to those of the source's own video.",
    ),
    "colour_to_driver": ("Colour to driver", "The same distance, to the driving video."),
    "leak": (
        "Leak",
        "Colour to source as a share of the sum of both distances: 0 has the source's colours, "
        "1 the driver's.",
    ),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A run's course: its logged steps, and scores on held-out clips by step."""

    label: str
    metrics: Sequence[StepMetrics]
    validation: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True)
class Strip:
    """Paths of a strip, still and moving, relative to the page."""

    title: str
    still: str
    moving: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A value as it is shown; `best` of its column.

    `coverage` is the share of frames in which its estimator found something.
    """

    value: ComparedValue | None
    best: bool
    coverage: float | None = None


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of a table as it is shown; `run` is what it cost, where one run made it."""

    label: str
    row: ComparedRow
    cells: Sequence[Cell]
    run: ComparedRun | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows x metrics."""

    name: str
    title: str
    note: str
    metrics: Sequence[MetricInfo]
    rows: Sequence[TableRow]


def comparison_page(
    *,
    title: str,
    comparison: Comparison,
    curves: Sequence[Curve],
    strips: Sequence[Strip],
    home: str | None = None,
) -> str:
    """The page of a comparison, finished or going on.

    Args:
        curves: a run each.
        strips: picture strips. home: link of an overview page.
    """
    systems = {run.system for run in comparison.runs}
    tiles = [
        Tile(num(len(systems)), "systems"),
        Tile(num(len({run.seed for run in comparison.runs})), "seeds"),
        Tile(num(len(comparison.test_clips)), "test clips"),
        Tile(comparison.device, "device"),
    ]
    if comparison.num_runs_left:
        tiles.append(Tile(num(comparison.num_runs_left), "runs left", bad=True))
    return render(
        "comparison.html",
        title=title,
        kind="comparison",
        home=home,
        own=("chart",),
        comparison=comparison,
        tiles=tiles,
        tables=comparison_tables(comparison),
        labels={info.name: _label_of(info) for info in comparison.metrics},
        duration=duration,
        curves=[Chart.of(panel) for panel in _panels(curves)],
        strips=strips,
    )


def _label_of(info: MetricInfo) -> tuple[str, str]:
    """What a metric is called, and what it is."""
    found = metric_label(info.name)
    return CROSS_LABELS.get(info.name, (found.label, found.text))


# --- tables ----------------------------------------------------------------------------------


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Reconstruction, another identity's motion, and ablations, where there are such rows."""
    found = comparison.rows
    cross = [row for row in found if row.protocol != "reconstruction" and not row.variant]
    ablated = {row.system for row in found if row.variant}
    tables = [
        _table(
            comparison,
            "reconstruction",
            "Reconstruction",
            "Each test clip drawn from its own first frame: mean over clips ± their spread.",
            [row for row in found if row.protocol == "reconstruction" and not row.variant],
            _label,
        ),
        _table(
            comparison,
            "cross",
            "Another identity's motion",
            "Reconstruction rewards a model that lets the driver's shape and colours through; "
            "here the source is somebody else. What moves is what differs from the video's own "
            "median over time by more than 0.1, in true and generated videos alike.",
            cross,
            _motion_label,
        ),
    ]
    tables += [_ablations(comparison, system) for system in sorted(ablated)]
    return [table for table in tables if table.rows]


def _ablations(comparison: Comparison, system: str) -> Table:
    """A row an ablation, its scores of both protocols side by side."""
    variants: dict[str, ComparedRow] = {}
    for row in comparison.rows:
        if row.system == system and row.variant:
            before = variants.get(row.variant)
            values = row.values if before is None else (*before.values, *row.values)
            first = row if before is None else before
            variants[row.variant] = dataclasses.replace(first, values=values)
    return _table(
        comparison,
        f"ablations-{system}",
        f"Ablations of {system}",
        "The same weights, animated without a part: no_pert does not perturb the driver's mask, "
        "no_ref does not refine it, no_id neither. Its row among the reconstructions above is "
        "no_id, as in the paper; its row among the animations is the whole.",
        list(variants.values()),
        _variant_label,
    )


def _table(
    comparison: Comparison,
    name: str,
    title: str,
    note: str,
    rows: Sequence[ComparedRow],
    label: Callable[[ComparedRow], str],
) -> Table:
    shown = {value.metric for row in rows for value in row.values}
    metrics = [info for info in comparison.metrics if info.name in shown]
    best = {info.name: _best(info, rows) for info in metrics}
    runs: dict[str, list[ComparedRun]] = defaultdict(list)
    for run in comparison.runs:
        runs[run.system].append(run)
    table_rows = []
    for row in rows:
        values = {value.metric: value for value in row.values}
        cells = []
        for info in metrics:
            value = values.get(info.name)
            is_best = bool(row.system) and value is not None and value.mean == best[info.name]
            cells.append(Cell(value, is_best, _coverage(info, row)))
        first = runs[row.system][0] if row.system else None
        table_rows.append(TableRow(label(row), row, cells, first))
    return Table(name, title, note, metrics, table_rows)


def _coverage(info: MetricInfo, row: ComparedRow) -> float | None:
    return _mean(info.coverage, row)


def _best(info: MetricInfo, rows: Sequence[ComparedRow]) -> float | None:
    """The best mean of a system, of means that compare; None where all are equal."""
    rivals = [row for row in rows if row.system and info.name in {v.metric for v in row.values}]
    if info.name.endswith(FOUND) and not _found_alike(info, rivals):
        return None
    means = {v.mean for row in rivals for v in row.values if v.metric == info.name}
    if len(means) < 2:
        return None
    return max(means) if info.higher_is_better else min(means)


def _found_alike(info: MetricInfo, rivals: Sequence[ComparedRow]) -> bool:
    """Whether as much was found for each: frames, and where it was measured points of them."""
    if not covered_alike([_coverage(info, row) for row in rivals]):
        return False
    missed = [_mean(missed_of(info.name), row) for row in rivals]
    return all(share is None for share in missed) or covered_alike(missed)


def _mean(metric: str, row: ComparedRow) -> float | None:
    return next((value.mean for value in row.values if value.metric == metric), None)


def _label(row: ComparedRow) -> str:
    return row.system or REFERENCES[row.method]


def _motion_label(row: ComparedRow) -> str:
    relative = row.protocol == "cross-relative"
    return f"{_label(row)} (relative)" if relative else _label(row)


def _variant_label(row: ComparedRow) -> str:
    return ablation_label(row.variant)


def ablation_label(variant: str) -> str:
    """What an ablation is called: a system without one is whole."""
    return "whole" if variant == "none" else variant


# --- curves ----------------------------------------------------------------------------------


def comparison_curves_svg(curves: Sequence[Curve]) -> str:
    """Training loss and validation scores of all runs over steps, as one SVG element.

    Losses differ in kind between systems: what can be compared is how they fall. Text takes the
    colour of whatever page the drawing is put into. Empty without curves.
    """
    return panels_svg(_panels(curves), label=f"Curves of {len(curves)} runs")


def loss_course(metrics: Sequence[StepMetrics]) -> list[tuple[int, float]]:
    """The loss over the steps of all phases in a row."""
    points, before, phase, last = [], 0, None, 0
    for row in metrics:
        if row.phase != phase:
            before, phase = last, row.phase
        last = before + row.step
        points.append((last, row.loss))
    return points


def _panels(curves: Sequence[Curve]) -> list[Panel]:
    courses: dict[str, dict[str, Sequence[tuple[int, float]]]] = {
        "Training loss": {c.label: loss_course(c.metrics) for c in curves},
        "L1 on moving pixels of held-out clips": {c.label: c.validation for c in curves},
    }
    return [_panel(title, lines) for title, lines in courses.items() if any(lines.values())]


def _panel(title: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> Panel:
    """Lines over the steps of all; a line without points stays, so that colours do not change."""
    steps = sorted({step for points in lines.values() for step, _ in points})
    peers = [Line(label, _values_at(steps, points), "peer") for label, points in lines.items()]
    return Panel(title, steps, peers, log=True)


def _values_at(steps: Sequence[int], points: Sequence[tuple[int, float]]) -> Sequence[float]:
    """A line's values, interpolated between its own steps; NaN before the first, after the last."""
    if not points:
        return [math.nan] * len(steps)
    own = dict(sorted(points))
    found = np.interp(steps, list(own), list(own.values()), left=math.nan, right=math.nan)
    return [float(value) for value in found]

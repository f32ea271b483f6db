"""The page of a comparison: systems x metrics, margins, ablations, curves, strips."""

from __future__ import annotations

import dataclasses
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup

from kpmask.measure import covered_alike
from kpmask.records import (
    ComparedMethod,
    ComparedRow,
    ComparedRun,
    ComparedValue,
    Comparison,
    MetricInfo,
    StepMetrics,
)
from kpmask.report.metric_labels import FOUND, metric_label
from kpmask.report.page import Tile, duration, num, render
from kpmask.report.run import INK

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
COLOURS: Final = (
    "#0e8f9b",
    "#c8711c",
    "#8a5bb5",
    "#3f8f4f",
    "#c04a6a",
    "#4a74c0",
    "#7a7f87",
    "#9a8a1c",
)
MAX_POINTS: Final = 400  # of a curve


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
    curves_svg: str,
    strips: Sequence[Strip],
    home: str | None = None,
) -> str:
    """The page of a comparison, finished or going on.

    Args:
        curves_svg: what `comparison_curves_svg` gave, which goes into the page as it is.
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
        comparison=comparison,
        tiles=tiles,
        tables=comparison_tables(comparison),
        labels={info.name: _label_of(info) for info in comparison.metrics},
        duration=duration,
        curves=Markup(curves_svg),  # noqa: S704 - made by comparison_curves_svg
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
        place = (row.system, row.variant, row.protocol)
        cells = [
            Cell(values.get(info.name), best[info.name] == place, _coverage(info, row))
            for info in metrics
        ]
        first = runs[row.system][0] if row.system else None
        table_rows.append(TableRow(label(row), row, cells, first))
    return Table(name, title, note, metrics, table_rows)


def _coverage(info: MetricInfo, row: ComparedRow) -> float | None:
    means = {value.metric: value.mean for value in row.values}
    return means.get(info.coverage) if info.coverage else None


def _best(info: MetricInfo, rows: Sequence[ComparedRow]) -> tuple[str, str, str] | None:
    """Which system's row has the best mean, of means that compare."""
    rivals = [row for row in rows if row.system and info.name in {v.metric for v in row.values}]
    alike = covered_alike([_coverage(info, row) for row in rivals])
    if info.name.endswith(FOUND) and not alike:
        return None
    means = {
        (row.system, row.variant, row.protocol): value.mean
        for row in rows
        for value in row.values
        if value.metric == info.name and row.system
    }
    if len(means) < 2:
        return None
    choose = max if info.higher_is_better else min
    return choose(means, key=lambda key: means[key])


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
    if not curves:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kpmask",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#8a8f98",
        "xtick.color": INK,
        "ytick.color": INK,
        "font.size": 10,
        "text.parse_math": False,
    }
    validated = any(curve.validation for curve in curves)
    with rc_context(settings):
        figure = Figure(figsize=(10.4 if validated else 6.4, 3.8), layout="constrained")
        axes = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
        _draw(axes[0], "training loss", [(c.label, loss_course(c.metrics)) for c in curves])
        if validated:
            held_out = [(c.label, c.validation) for c in curves]
            _draw(axes[1], "L1 on moving pixels of held-out clips", held_out)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    label = f'<svg role="img" aria-label="Curves of {len(curves)} runs" '
    return svg[svg.index("<svg ") :].replace("<svg ", label, 1).replace(INK, "currentColor")


def loss_course(metrics: Sequence[StepMetrics]) -> list[tuple[int, float]]:
    """The loss over the steps of all phases in a row."""
    points, before, phase, last = [], 0, None, 0
    for row in metrics:
        if row.phase != phase:
            before, phase = last, row.phase
        last = before + row.step
        points.append((last, row.loss))
    return points


def _draw(
    axis: Any,  # noqa: ANN401 - matplotlib's
    title: str,
    lines: Sequence[tuple[str, Sequence[tuple[int, float]]]],
) -> None:
    from matplotlib.ticker import LogFormatter

    for place, (label, points) in enumerate(lines):
        if not points:
            continue
        stride = max(1, len(points) // MAX_POINTS)
        shown = [*points[:-1:stride], points[-1]]
        at, values = zip(*shown, strict=True)
        colour = COLOURS[place % len(COLOURS)]
        axis.plot(at, values, linewidth=1.6, color=colour, label=f" {label}")
    if all(value > 0 for _, points in lines for _, value in points):
        axis.set_yscale("log")
        # The usual labels are mathematics, which SVG text cannot show.
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(visible=True, which="major", color="#8a8f98", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, labelspacing=0.2)

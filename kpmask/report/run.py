"""The page of a training run: loss and metric curves, phases, samples, settings."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup

from kpmask.records import RunManifest, StepMetrics, ValidationScore
from kpmask.report.page import Tile, figure, num, render

MAX_SAMPLES: Final = 24
MAX_MARKERS: Final = 40
METRIC_TITLES: Final = {
    "l1": "L1 on test clips",
    "l1_moving": "L1 on moving pixels",
    "ssim": "SSIM on test clips (higher is better)",
}


@dataclass(frozen=True, slots=True)
class _PhaseRow:
    phase: str
    first: StepMetrics
    last: StepMetrics
    samples_per_s: float
    terms: Sequence[tuple[str, float]]


def run_page(
    *,
    title: str,
    manifest: RunManifest | None,
    settings_toml: str,
    metrics: Sequence[StepMetrics],
    curve_svg: str | None = None,
    validation_svg: str = "",
    samples: Sequence[str] = (),
    home: str | None = None,
) -> str:
    """The page of a training run, finished or (manifest None) going on.

    Args:
        settings_toml: the job as it was resolved.
        metrics: every logged step, in order.
        curve_svg: what `loss_curve_svg` gave, which goes into the page as it is; None: made here.
        validation_svg: what `validation_curve_svg` gave.
        samples: sample strips, oldest first: relative paths or `data:` URIs.
        home: link of an overview page.
    """
    curve = loss_curve_svg(metrics) if curve_svg is None else curve_svg
    rows = _phase_rows(metrics)
    tiles = [Tile(num(sum(row.last.step for row in rows)), "steps")]
    if rows:
        tiles.append(Tile(figure(rows[-1].last.loss), "last loss"))
        tiles.append(Tile(figure(rows[-1].samples_per_s), "samples a second"))
        tiles.append(Tile(f"{rows[-1].last.learning_rate:.1e}", "learning rate"))
    if manifest is not None:
        tiles.append(Tile(manifest.system, "system"))
    return render(
        "run.html",
        title=title,
        kind="training run",
        home=home,
        manifest=manifest,
        tiles=tiles,
        curve=Markup(curve),  # noqa: S704 - made by loss_curve_svg
        validation=Markup(validation_svg),  # noqa: S704 - made by validation_curve_svg
        phases=rows,
        samples=list(reversed(samples))[:MAX_SAMPLES],
        hidden_samples=max(0, len(samples) - MAX_SAMPLES),
        settings_toml=settings_toml,
    )


def _by_phase(metrics: Sequence[StepMetrics]) -> dict[str, list[StepMetrics]]:
    groups: dict[str, list[StepMetrics]] = defaultdict(list)
    for step in metrics:
        groups[step.phase].append(step)
    return groups


def _phase_rows(metrics: Sequence[StepMetrics]) -> list[_PhaseRow]:
    rows = []
    for phase, steps in _by_phase(metrics).items():
        rate = statistics.median(step.samples_per_s for step in steps)
        last = steps[-1]
        terms = tuple(zip(last.term_names, last.term_values, strict=True))
        rows.append(_PhaseRow(phase, steps[0], last, rate, terms))
    return rows


INK: Final = "#010203"  # stands for the page's text colour until the drawing is done


def loss_curve_svg(metrics: Sequence[StepMetrics]) -> str:
    """The loss over steps as an SVG element, a panel for each phase; empty without metrics.

    The total is drawn strong, its terms thin, on a logarithmic scale. Text takes the colour of
    whatever page the drawing is put into.
    """
    phases = _by_phase(metrics)
    if not phases:
        return ""

    def draw(axes: Sequence[Any]) -> None:
        for axis, (phase, steps) in zip(axes, phases.items(), strict=True):
            _draw_losses(axis, phase, steps)

    return _drawn(draw, len(phases), f"Loss over steps, {len(phases)} phases")


def validation_curve_svg(metrics: Sequence[StepMetrics], scores: Sequence[ValidationScore]) -> str:
    """Scores on test clips over steps as an SVG element, a panel a metric; empty without scores.

    Steps count on from phase to phase. The scores of a copy of the source are drawn dashed.
    """
    lengths = {phase: steps[-1].step for phase, steps in _by_phase(metrics).items()}
    starts = dict(zip(lengths, itertools.accumulate(lengths.values(), initial=0), strict=False))
    names = [n for n in METRIC_TITLES if any(score.metric == n for score in scores)]
    if not names:
        return ""

    def draw(axes: Sequence[Any]) -> None:
        for axis, name in zip(axes, names, strict=True):
            _draw_scores(axis, name, scores, starts)

    return _drawn(draw, len(names), f"Scores on test clips over steps, {len(names)} metrics")


def _drawn(draw: Callable[[Sequence[Any]], None], num_panels: int, label: str) -> str:
    """An SVG element of panels side by side that `draw` fills."""
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
    with rc_context(settings):
        figure = Figure(figsize=(5.2 * num_panels, 3.4), layout="constrained")
        draw(figure.subplots(1, num_panels, squeeze=False)[0])
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    opening = f'<svg role="img" aria-label="{label}" '
    return svg[svg.index("<svg ") :].replace("<svg ", opening, 1).replace(INK, "currentColor")


def _draw_losses(axis: Any, phase: str, steps: Sequence[StepMetrics]) -> None:  # noqa: ANN401
    from matplotlib.ticker import LogFormatter

    stride = max(1, len(steps) // 1500)
    shown = [*steps[:-1:stride], steps[-1]]
    at = [step.step for step in shown]
    for index, name in enumerate(shown[-1].term_names):
        values = [
            dict(zip(step.term_names, step.term_values, strict=True)).get(name, math.nan)
            for step in shown
        ]
        if any(value > 0 for value in values):
            colour = ("#c8711c", "#8a5bb5", "#3f8f4f", "#c04a6a", "#7a7f87")[index % 5]
            axis.plot(at, values, linewidth=1, alpha=0.75, color=colour, label=f" {name}")
    axis.plot(at, [s.loss for s in shown], linewidth=2.2, color="#0e8f9b", label=" total")
    if all(step.loss > 0 for step in shown):
        axis.set_yscale("log")
        # The usual labels are mathematics, which SVG text cannot show.
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    _finish(axis, title=phase, y_label="loss")


def _draw_scores(
    axis: Any,  # noqa: ANN401 - matplotlib's
    name: str,
    scores: Sequence[ValidationScore],
    starts: Mapping[str, int],
) -> None:
    lines = (("copy_", "copy of the source", "#8a8f98", "--"), ("", "model", "#0e8f9b", "-"))
    for prefix, label, colour, dashes in lines:
        rows = [row for row in scores if row.metric == prefix + name]
        at = [starts.get(row.phase, 0) + row.step for row in rows]
        values = [row.value for row in rows]
        marker = "." if len(rows) <= MAX_MARKERS else ""
        axis.plot(at, values, dashes, color=colour, linewidth=1.8, marker=marker, label=f" {label}")
    _finish(axis, title=METRIC_TITLES[name], y_label=name)


def _finish(axis: Any, *, title: str, y_label: str) -> None:  # noqa: ANN401 - matplotlib's
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.set_ylabel(y_label)
    axis.grid(visible=True, which="major", color="#8a8f98", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, labelspacing=0.2)

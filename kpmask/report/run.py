"""The page of a training run: loss curve, phases, samples, settings."""

from __future__ import annotations

import io
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup

from kpmask.records import RunManifest, StepMetrics
from kpmask.report.page import Tile, figure, num, render

MAX_SAMPLES: Final = 24


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
    samples: Sequence[str] = (),
    home: str | None = None,
) -> str:
    """The page of a training run, finished or (manifest None) going on.

    Args:
        settings_toml: the job as it was resolved.
        metrics: every logged step, in order.
        curve_svg: what `loss_curve_svg` gave, which goes into the page as it is; None: made here.
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
        figure = Figure(figsize=(5.2 * len(phases), 3.4), layout="constrained")
        axes = figure.subplots(1, len(phases), squeeze=False)[0]
        for axis, (phase, steps) in zip(axes, phases.items(), strict=True):
            _draw_losses(axis, phase, steps)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    label = f'<svg role="img" aria-label="Loss over steps, {len(phases)} phases" '
    return svg[svg.index("<svg ") :].replace("<svg ", label, 1).replace(INK, "currentColor")


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
    axis.set_title(phase)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.grid(visible=True, which="major", color="#8a8f98", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, labelspacing=0.2)

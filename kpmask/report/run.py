"""The page of a training run: curves that can be read off, samples over time, what is kept."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kpmask.records import RunManifest, StepMetrics, ValidationScore
from kpmask.report.curves import Chart, Line, Panel, panels_svg
from kpmask.report.page import Tile, figure, num, num_bytes, relative_url, render

MAX_SAMPLES: Final = 120
MAX_STOPS: Final = 4
METRIC_TITLES: Final = {
    "l1": "L1 on test clips (lower is better)",
    "l1_moving": "L1 on moving pixels (lower is better)",
    "ssim": "SSIM on test clips (higher is better)",
}
_STEP = re.compile(r"(?:.*/)?(?P<phase>.*)-step-(?P<step>\d+)(?:-worker-\d+)?\.\w+")


@dataclass(frozen=True, slots=True)
class KeptWeights:
    """A weights file of a run: its path relative to the page, and what it is of."""

    path: str
    what: str
    size_bytes: int

    @property
    def size(self) -> str:
        return num_bytes(self.size_bytes)


@dataclass(frozen=True, slots=True)
class _PhaseRow:
    phase: str
    first: StepMetrics
    last: StepMetrics
    samples_per_s: float
    terms: Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture of a step; `passed`: the training is beyond it."""

    path: str
    phase: str
    step: int | None
    passed: bool = True

    @property
    def label(self) -> str:
        return self.phase if self.step is None else f"{self.phase}, step {num(self.step)}"


def run_page(
    *,
    title: str,
    manifest: RunManifest | None,
    settings_toml: str,
    metrics: Sequence[StepMetrics],
    validation: Sequence[ValidationScore] = (),
    samples: Sequence[str] = (),
    weights: Sequence[KeptWeights] = (),
    stops: Sequence[str] = (),
    home: str | None = None,
) -> str:
    """The page of a training run, finished or (manifest None) going on.

    Args:
        settings_toml: the job as it was resolved.
        metrics: every logged step, in order.
        validation: scores on test clips, in order.
        samples: sample strips named `<phase>-step-<number>.<suffix>`, oldest first: relative
            paths or `data:` URIs. At most `MAX_SAMPLES` are in the page, evenly drawn, and only
            those that are looked at are loaded.
        weights: what is kept, oldest first.
        stops: pictures of batches whose loss was not finite, named like samples.
        home: link of an overview page.
    """
    rows = _phase_rows(metrics)
    shown = [_picture(path) for path in _spread(samples, MAX_SAMPLES)]
    stopped = [_picture(path, rows) for path in stops]
    return render(
        "run.html",
        title=title,
        kind="training run",
        home=home,
        own=("chart", "run"),
        manifest=manifest,
        tiles=_tiles(manifest, rows, stopped),
        losses=[Chart.of(panel) for panel in _loss_panels(metrics)],
        scores=[Chart.of(panel) for panel in _score_panels(metrics, validation)],
        course=[Chart.of(panel) for panel in _course_panels(metrics)],
        phases=rows,
        samples=shown,
        strips=[[relative_url(sample.path), sample.label] for sample in shown],
        num_samples=len(samples),
        stops=stopped[-MAX_STOPS:],
        stopped=manifest is None and any(not stop.passed for stop in stopped),
        weights=weights,
        settings_toml=settings_toml,
    )


def loss_curve_svg(metrics: Sequence[StepMetrics]) -> str:
    """The loss over steps as an SVG element, a panel for each phase; empty without metrics.

    The total is drawn strong, its terms thin, on a logarithmic scale. Text takes the colour of
    whatever page the drawing is put into.
    """
    panels = _loss_panels(metrics)
    return panels_svg(panels, label=f"Loss over steps, {len(panels)} phases")


# --- panels ----------------------------------------------------------------------------------


def _by_phase(metrics: Sequence[StepMetrics]) -> dict[str, list[StepMetrics]]:
    groups: dict[str, list[StepMetrics]] = defaultdict(list)
    for step in metrics:
        groups[step.phase].append(step)
    return groups


def _starts(metrics: Sequence[StepMetrics]) -> dict[str, int]:
    """How many steps of the run lie before each phase."""
    lengths = {phase: steps[-1].step for phase, steps in _by_phase(metrics).items()}
    return dict(zip(lengths, itertools.accumulate(lengths.values(), initial=0), strict=False))


def _loss_panels(metrics: Sequence[StepMetrics]) -> list[Panel]:
    panels = []
    for phase, steps in _by_phase(metrics).items():
        terms = [dict(zip(step.term_names, step.term_values, strict=True)) for step in steps]
        lines = [Line("total", [step.loss for step in steps])]
        for name in dict.fromkeys(name for term in terms for name in term):
            values = [term.get(name, math.nan) for term in terms]
            if any(value != 0 for value in values):
                lines.append(Line(name, values, "term"))
        panels.append(Panel(phase, [step.step for step in steps], lines, log=True))
    return panels


def _score_panels(metrics: Sequence[StepMetrics], scores: Sequence[ValidationScore]) -> list[Panel]:
    """A panel a metric. Steps count on from phase to phase."""
    starts = _starts(metrics)
    panels = []
    for name, title in METRIC_TITLES.items():
        values = {
            kind: {
                starts.get(s.phase, 0) + s.step: s.value
                for s in scores
                if s.metric == f"{kind}{name}"
            }
            for kind in ("", "copy_")
        }
        steps = sorted({*values[""], *values["copy_"]})
        if steps:
            lines = [Line("model", [values[""].get(step, math.nan) for step in steps])]
            if values["copy_"]:
                copies = [values["copy_"].get(step, math.nan) for step in steps]
                lines.append(Line("copy of the source", copies, "base"))
            panels.append(Panel(title, steps, lines, marks=_marks(starts)))
    return panels


def _course_panels(metrics: Sequence[StepMetrics]) -> list[Panel]:
    """Speed and learning rate over the whole run."""
    if not metrics:
        return []
    starts = _starts(metrics)
    steps = [starts[step.phase] + step.step for step in metrics]
    speed = Line("samples a second", [step.samples_per_s for step in metrics])
    rate = Line("learning rate", [step.learning_rate for step in metrics])
    marks = _marks(starts)
    return [
        Panel("Samples a second", steps, [speed], marks=marks),
        Panel("Learning rate", steps, [rate], log=True, marks=marks),
    ]


def _marks(starts: Mapping[str, int]) -> list[tuple[int, str]]:
    return [(step, phase) for phase, step in starts.items() if step > 0]


# --- rows ------------------------------------------------------------------------------------


def _phase_rows(metrics: Sequence[StepMetrics]) -> list[_PhaseRow]:
    rows = []
    for phase, steps in _by_phase(metrics).items():
        rate = statistics.median(step.samples_per_s for step in steps)
        last = steps[-1]
        terms = tuple(zip(last.term_names, last.term_values, strict=True))
        rows.append(_PhaseRow(phase, steps[0], last, rate, terms))
    return rows


def _tiles(
    manifest: RunManifest | None, rows: Sequence[_PhaseRow], stops: Sequence[_Picture]
) -> list[Tile]:
    tiles = [Tile(num(sum(row.last.step for row in rows)), "steps")]
    if rows:
        tiles.append(Tile(figure(rows[-1].last.loss), "last loss"))
        tiles.append(Tile(figure(rows[-1].samples_per_s), "samples a second"))
        tiles.append(Tile(f"{rows[-1].last.learning_rate:.1e}", "learning rate"))
    if manifest is not None:
        tiles.append(Tile(manifest.system, "system"))
    elif any(not stop.passed for stop in stops):
        tiles.append(Tile("stopped", "loss not finite", bad=True))
    return tiles


def _picture(path: str, rows: Iterable[_PhaseRow] = ()) -> _Picture:
    found = None if path.startswith("data:") else _STEP.fullmatch(path)
    if found is None:
        return _Picture(path, "sample", None)
    phase, step = found["phase"], int(found["step"])
    trained = list(rows)
    passed = any(row.phase == phase and row.last.step > step for row in trained)
    # A later phase only begins when this one is over.
    passed = passed or any(row.phase == phase for row in trained[:-1])
    return _Picture(path, phase, step, passed)


def _spread(paths: Sequence[str], most: int) -> list[str]:
    """At most `most` of them, evenly spread, the first and the last among them."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]

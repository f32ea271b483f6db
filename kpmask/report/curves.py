"""Curves over steps as SVG: what a reader sees without a script, and what a script reads from it.

- A panel has one row of steps and several lines over it. It is drawn on a linear scale and, where
  that makes sense, on a logarithmic one too; a page shows one of the two.
- Colours and text are attributes, so that a drawing is whole by itself; a page's style may
  override them. Text takes the colour of whatever page the drawing is put into.
- What is drawn is bounded: beyond `MAX_POINTS` steps each stretch keeps the steps where the first
  line was lowest and highest, so that a spike of one step stays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from markupsafe import Markup, escape

from kpmask.report.page import figure, num

Kind = Literal["main", "peer", "term", "base"]
Scale = Literal["log", "linear"]

WIDTH: Final = 480
HEIGHT: Final = 300
LEFT: Final = 62.0
RIGHT: Final = 470.0
TOP: Final = 20.0
BOTTOM: Final = 256.0
ROW: Final = 18  # of a legend
MAX_POINTS: Final = 300
MAX_MARKERS: Final = 40
MAIN: Final = "#0e8f9b"
BASE: Final = "#858a93"
TERMS: Final = (
    "#c8711c",
    "#9566c2",
    "#3f8f4f",
    "#cc5676",
    "#7a7f87",
    "#4a7fd0",
    "#9a8420",
    "#b457b0",
    "#a2694a",
)
PEERS: Final = (MAIN, *TERMS)
GRID: Final = "#8a8f98"
WIDTHS: Final[Mapping[Kind, float]] = {"main": 2.2, "peer": 1.8, "term": 1.4, "base": 2.2}
STRONG: Final[frozenset[Kind]] = frozenset({"main", "peer"})


@dataclass(frozen=True, slots=True)
class Line:
    """A value at each of the panel's steps; NaN where there is none.

    `main` is drawn strong, and so are `peer`s, each in a colour of its own; a `term` thin, and a
    `base`, to which others are held, dashed.
    """

    label: str
    values: Sequence[float]
    kind: Kind = "main"

    @property
    def width(self) -> float:
        return WIDTHS[self.kind]


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over steps. `marks` are steps at which something begins, with its name.

    Raises:
        ValueError: a line has not one value a step.
    """

    title: str
    steps: Sequence[int]
    lines: Sequence[Line]
    log: bool = False
    marks: Sequence[tuple[int, str]] = ()

    def __post_init__(self) -> None:
        for line in self.lines:
            if len(line.values) != len(self.steps):
                raise ValueError(
                    f"line {line.label} has {len(line.values)} values for {len(self.steps)} steps"
                )

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Those that the panel is drawn on, the one to show first at the front."""
        main = [v for line in self.lines if line.kind in STRONG for v in line.values]
        finite = [value for value in main if math.isfinite(value)]
        return ("log", "linear") if self.log and finite and min(finite) > 0 else ("linear",)


def thinned(panel: Panel) -> Panel:
    """The panel with at most about `MAX_POINTS` steps: first, last, lows and highs."""
    count = len(panel.steps)
    if count <= MAX_POINTS:
        return panel
    lead = panel.lines[0].values
    kept = {0, count - 1}
    stretches = MAX_POINTS // 2
    for stretch in range(stretches):
        start, stop = stretch * count // stretches, (stretch + 1) * count // stretches
        places = [place for place in range(start, stop) if math.isfinite(lead[place])]
        if places:
            kept.add(min(places, key=lead.__getitem__))
            kept.add(max(places, key=lead.__getitem__))
        else:
            kept.add(start)
    order = sorted(kept)
    return Panel(
        panel.title,
        [panel.steps[place] for place in order],
        [Line(ln.label, [ln.values[place] for place in order], ln.kind) for ln in panel.lines],
        panel.log,
        panel.marks,
    )


# --- scales ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Axis:
    """How values lie between two ends of a drawing."""

    low: float
    high: float
    start: float
    end: float
    scale: Scale = "linear"

    def at(self, value: float) -> float:
        """Where a value is drawn."""
        low, high, here = (self._measure(v) for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (here - low) / (high - low)

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (self.scale == "linear" or value > 0)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.scale == "linear" or self.high / self.low < 4:
            return linear_ticks(self.low, self.high)
        return log_ticks(self.low, self.high)

    def _measure(self, value: float) -> float:
        return math.log10(value) if self.scale == "log" else value


def linear_ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten from `low` to `high`."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10, 20) if (high - low) / (m * power) < most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(place * step, digits) for place in range(first, last + 1)]


def log_ticks(low: float, high: float, *, most: int = 8) -> list[float]:
    """At most `most` of 1, 2, 5 in each power of ten from `low` to `high`, or fewer of each."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**p for p in powers for d in digits]
        found = [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def tick_text(value: float) -> str:
    """A tick's value as it is written beside it."""
    if value == int(value) and 1000 <= abs(value) < 1e6:
        return num(int(value))
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.6g}"


def _step_axis(panel: Panel) -> Axis:
    low, high = float(panel.steps[0]), float(panel.steps[-1])
    if high <= low:
        low, high = low - 1, high + 1
    return Axis(low, high, LEFT, RIGHT)


def _value_axis(panel: Panel, scale: Scale) -> Axis:
    values = [v for line in panel.lines for v in line.values if math.isfinite(v)]
    if scale == "log":
        values = [value for value in values if value > 0]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if scale == "log":
        room = max((high / low) ** 0.05, 1.02)
        return Axis(low / room, high * room, BOTTOM, TOP, "log")
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - room, high + room, BOTTOM, TOP)


# --- drawing ---------------------------------------------------------------------------------


def colours(panel: Panel) -> list[str]:
    """Each line's colour."""
    palettes: Mapping[Kind, Iterator[str]] = {
        "main": itertools.repeat(MAIN),
        "peer": itertools.cycle(PEERS),
        "term": itertools.cycle(TERMS),
        "base": itertools.repeat(BASE),
    }
    return [next(palettes[line.kind]) for line in panel.lines]


def panel_svg(panel: Panel) -> str:
    """The panel as an SVG element, each scale a group of its own; only the first is shown."""
    panel = thinned(panel)
    label = f"{panel.title}: {', '.join(line.label for line in panel.lines)} over steps"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(_panel_parts(panel, panel.scales))}</svg>"
    )


def panels_svg(panels: Sequence[Panel], *, label: str) -> str:
    """Panels side by side as one SVG element that is whole by itself, with titles and legends."""
    if not panels:
        return ""
    rows = max(len(_legend_rows(panel)) for panel in panels)
    height = 24 + HEIGHT + ROW * rows
    parts = []
    for place, panel in enumerate(thinned(panel) for panel in panels):
        parts.append(f'<g transform="translate({place * WIDTH} 24)">')
        parts.append(_text((LEFT + RIGHT) / 2, -8, panel.title, anchor="middle", size=14))
        parts += _panel_parts(panel, panel.scales[:1])
        parts += _legend(panel)
        parts.append("</g>")
    width = WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )


def panel_data(panel: Panel) -> Mapping[str, Any]:
    """What a script needs to tell a panel's values: JSON values, of the steps that are drawn."""
    panel = thinned(panel)
    x = _step_axis(panel)
    return {
        "steps": list(panel.steps),
        "x": [x.low, x.high, x.start, x.end],
        "y": {s: [a.low, a.high, a.start, a.end] for s, a in _value_axes(panel).items()},
        "lines": [
            {"label": line.label, "values": [_json_number(value) for value in line.values]}
            for line in panel.lines
        ],
        "marks": [list(mark) for mark in panel.marks],
    }


def _value_axes(panel: Panel) -> dict[Scale, Axis]:
    return {scale: _value_axis(panel, scale) for scale in panel.scales}


def _json_number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _panel_parts(panel: Panel, scales: Sequence[Scale]) -> Iterator[str]:
    x = _step_axis(panel)
    for tick in linear_ticks(x.low, x.high):
        yield _rule(x.at(tick), TOP, x.at(tick), BOTTOM)
        yield _text(x.at(tick), BOTTOM + 17, tick_text(tick), anchor="middle")
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 36, "step", anchor="middle")
    for step, name in panel.marks:
        if x.low < step < x.high:
            yield _rule(x.at(step), TOP, x.at(step), BOTTOM, dashes="2 4", opacity=1.0)
            yield _text(x.at(step), TOP - 6, name)
    for place, scale in enumerate(scales):
        hidden = ' display="none"' if place else ""
        yield f'<g data-scale="{scale}"{hidden}>'
        yield from _scale_parts(panel, x, _value_axis(panel, scale))
        yield "</g>"


def _scale_parts(panel: Panel, x: Axis, y: Axis) -> Iterator[str]:
    for tick in y.ticks():
        yield _rule(LEFT, y.at(tick), RIGHT, y.at(tick))
        yield _text(LEFT - 7, y.at(tick) + 4, tick_text(tick), anchor="end")
    paint = list(zip(range(len(panel.lines)), panel.lines, colours(panel), strict=True))
    # What is strong goes on top of what is thin.
    for place, line, colour in sorted(paint, key=lambda entry: entry[1].kind in STRONG):
        yield f'<g data-line="{place}" fill="none" stroke="{colour}" stroke-width="{line.width}" '
        yield 'stroke-linejoin="round" stroke-linecap="round"'
        yield ' stroke-dasharray="6 5">' if line.kind == "base" else ">"
        yield from _line_parts(panel, line, colour, x, y)
        yield "</g>"


def _line_parts(panel: Panel, line: Line, colour: str, x: Axis, y: Axis) -> Iterator[str]:
    shown = [
        (x.at(step), y.at(value)) if y.shows(value) else None
        for step, value in zip(panel.steps, line.values, strict=True)
    ]
    if any(shown):
        yield f'<path d="{_path(shown)}"/>'
    # A peer's points are not all its own: between them it is interpolated.
    if line.kind in {"main", "base"} and len(shown) <= MAX_MARKERS:
        for point in shown:
            if point is not None:
                yield f'<circle cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="2.4" fill="{colour}" '
                yield 'stroke="none"/>'


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """A path with gaps; a point between two gaps is a line without length, which ends round."""
    parts, before = [], None
    for place, point in enumerate(points):
        if point is not None:
            alone = before is None and (place + 1 == len(points) or points[place + 1] is None)
            parts.append(f"{'M' if before is None else 'L'}{point[0]:.1f} {point[1]:.1f}")
            parts.append("h0" if alone else "")
        before = point
    return "".join(parts)


def _rule(
    x1: float, y1: float, x2: float, y2: float, *, dashes: str = "", opacity: float = 0.28
) -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{GRID}" '
        f'stroke-opacity="{opacity}"{dashed}/>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="currentColor" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


# --- legends ---------------------------------------------------------------------------------


def _legend_rows(panel: Panel) -> list[list[tuple[float, int]]]:
    """Where the lines' names stand: rows of places and line numbers."""
    rows: list[list[tuple[float, int]]] = [[]]
    at = LEFT
    for number, line in enumerate(panel.lines):
        width = 34 + 6.6 * len(line.label)
        if rows[-1] and at + width > WIDTH:
            rows.append([])
            at = LEFT
        rows[-1].append((at, number))
        at += width
    return rows


def _legend(panel: Panel) -> Iterator[str]:
    paint = colours(panel)
    for row, entries in enumerate(_legend_rows(panel)):
        y = HEIGHT + ROW * row + 12
        for at, number in entries:
            line = panel.lines[number]
            dashes = ' stroke-dasharray="6 5"' if line.kind == "base" else ""
            yield (
                f'<line x1="{at:.1f}" x2="{at + 16:.1f}" y1="{y - 4}" y2="{y - 4}" '
                f'stroke="{paint[number]}" stroke-width="{line.width}"{dashes}/>'
            )
            yield _text(at + 21, y, line.label)


def rows_of(panel: Panel, *, most: int = 12) -> list[tuple[str, list[str]]]:
    """Some of the steps with all values as texts, evenly spread, the first and the last among
    them: a table for those who cannot see the drawing.
    """
    count = len(panel.steps)
    places = sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(min(most, count))})
    return [
        (num(panel.steps[place]), [figure(line.values[place]) for line in panel.lines])
        for place in (places if count > most else range(count))
    ]


# --- in a page -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chart:
    """A panel as it goes into a page that has the parts "chart": with values to be read off."""

    panel: Panel
    svg: Markup
    keys: Sequence[tuple[str, str, str]]  # label, colour, kind
    rows: Sequence[tuple[str, Sequence[str]]]
    data: Mapping[str, Any]

    @classmethod
    def of(cls, panel: Panel) -> Chart:
        keys = [
            (line.label, colour, line.kind)
            for line, colour in zip(panel.lines, colours(panel), strict=True)
        ]
        svg = Markup(panel_svg(panel))  # noqa: S704 - it escapes its texts
        return cls(panel, svg, keys, rows_of(panel), panel_data(panel))

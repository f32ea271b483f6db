"""Plots of an evaluation: every video's score, and where other methods' scores lie.

Lengths are units of the drawing's view box.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kpmask.records import ScoreSummary, VideoScore
from kpmask.report.metric_labels import METHODS

WIDTH, LEFT, RIGHT = 360, 14, 346
DOTS_TOP, DOTS_BOTTOM = 24, 66
LANE = 30  # of another method, below
NUM_TICKS: Final = 4
MAX_DOTS: Final = 600
MAX_PAGE_DOTS: Final = 8000


@dataclass(frozen=True, slots=True)
class Dot:
    """A video; `link` leads to it, empty where the page has nothing more of it."""

    x: float
    y: float
    name: str
    value: float
    link: str


@dataclass(frozen=True, slots=True)
class Lane:
    """Another method: the ends, quartiles, median and mean of its videos' scores."""

    method: str
    label: str
    mean: float
    y: float
    x_low: float
    x_first: float
    x_median: float
    x_third: float
    x_high: float
    x_mean: float


@dataclass(frozen=True, slots=True)
class Tick:
    x: float
    label: str
    anchor: str


@dataclass(frozen=True, slots=True)
class ScorePlot:
    """A strip plot of one metric: dots of the model's videos, boxes of other methods'."""

    label: str
    unit: str
    higher_is_better: bool
    low: float
    high: float
    num_videos: int
    mean: float | None
    x_mean: float
    dots: Sequence[Dot]
    lanes: Sequence[Lane]
    ticks: Sequence[Tick]

    @property
    def base(self) -> float:
        return DOTS_BOTTOM + 6 + LANE * len(self.lanes)

    @property
    def height(self) -> float:
        return self.base + 22


def score_plot(
    label: str,
    unit: str,
    *,
    higher_is_better: bool,
    scores: Sequence[VideoScore],
    summaries: Sequence[ScoreSummary],
    links: Mapping[str, str],
    max_dots: int = MAX_DOTS,
) -> ScorePlot | None:
    """The plot of one metric's scores; None where no video has one.

    Args:
        scores, summaries: of this metric, of all methods.
        links: where to go on, by clip id.
        max_dots: of more videos so many are drawn, evenly over their values.
    """
    by_method: dict[str, list[VideoScore]] = defaultdict(list)
    for score in scores:
        if math.isfinite(score.value):
            by_method[score.method].append(score)
    mine = sorted(by_method["model"], key=lambda score: (score.value, score.clip_id))
    if not mine:
        return None
    values = [score.value for found in by_method.values() for score in found]
    axis = _Axis.of(values)
    means = {s.method: s.mean for s in summaries if math.isfinite(s.mean)}
    others = [m for m in METHODS if m != "model" and by_method.get(m)]
    lanes = [
        _lane(method, axis, [s.value for s in by_method[method]], DOTS_BOTTOM + 6 + LANE * place)
        for place, method in enumerate(others)
    ]
    mean = means.get("model")
    return ScorePlot(
        label=label,
        unit=unit,
        higher_is_better=higher_is_better,
        low=mine[0].value,
        high=mine[-1].value,
        num_videos=len(mine),
        mean=mean,
        x_mean=LEFT if mean is None else axis.x(mean),
        dots=[_dot(axis, score, links) for score in _thinned(mine, max_dots)],
        lanes=lanes,
        ticks=axis.ticks,
    )


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> _Axis:
        low, high = min(values), max(values)
        spread = (high - low) or max(abs(high), 1.0) * 0.1
        below = low - 0.05 * spread
        # Errors have no values below 0, so the axis has none either.
        return cls(max(below, 0.0) if low >= 0 else below, high + 0.05 * spread)

    def x(self, value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (value - self.low) / (self.high - self.low), 2)

    @property
    def ticks(self) -> list[Tick]:
        """Round values, two to five of them."""
        step = _round_step((self.high - self.low) / NUM_TICKS)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        digits = max(0, -math.floor(math.log10(step)))
        values = [place * step for place in range(first, last + 1)]
        return [_tick(self.x(value), f"{value:.{digits}f}") for value in values]


def _round_step(least: float) -> float:
    """The next of ..., 0.1, 0.2, 0.5, 1, 2, 5, ..."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= least)


def _tick(x: float, label: str) -> Tick:
    """Labels at the ends stay within the drawing."""
    anchor = "start" if x < LEFT + 20 else "end" if x > RIGHT - 20 else "middle"
    return Tick(x, label, anchor)


def _dot(axis: _Axis, score: VideoScore, links: Mapping[str, str]) -> Dot:
    y = DOTS_TOP + (DOTS_BOTTOM - DOTS_TOP) * _jitter(score.clip_id)
    link = links.get(score.clip_id, "")
    return Dot(axis.x(score.value), round(y, 2), score.name, score.value, link)


def _thinned(scores: Sequence[VideoScore], most: int) -> list[VideoScore]:
    """So many of them, evenly by place, with the first and the last."""
    if len(scores) <= most:
        return list(scores)
    step = (len(scores) - 1) / (most - 1)
    return [scores[round(step * place)] for place in range(most)]


def _lane(method: str, axis: _Axis, values: Sequence[float], y: float) -> Lane:
    several = len(values) > 1
    quarters = statistics.quantiles(values, n=4, method="inclusive") if several else [*values] * 3
    mean = statistics.fmean(values)
    first, median, third = map(axis.x, quarters)
    return Lane(
        method=method,
        label=METHODS[method],
        mean=mean,
        y=y,
        x_low=axis.x(min(values)),
        x_first=first,
        x_median=median,
        x_third=third,
        x_high=axis.x(max(values)),
        x_mean=axis.x(mean),
    )


def _jitter(text: str) -> float:
    """A number in [0, 1] that follows from a text, so that dots do not hide one another."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32

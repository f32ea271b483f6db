"""The page of an evaluation: methods x metrics, plots, scores of each video."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kpmask.records import (
    Average,
    Failure,
    MetricInfo,
    PairedScore,
    Quantise,
    ScoreSummary,
    ScoreTable,
    VideoScore,
)
from kpmask.report.gallery import GalleryMedia, Item
from kpmask.report.page import Tile, failure_tile, failure_values, figure, num, render

METHODS: Final[Mapping[str, str]] = {
    "model": "this model",
    "copy": "copy of the source",
    "codec": "the codec alone",
}
METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "l1": ("L1", "Mean absolute difference of pixels in [0, 1]."),
    "l1_with_first": ("L1 with first", "L1 as the papers' published code has it."),
    "l1_moving": (
        "L1 moving",
        "L1 over the pixels that differ from the source: those that move.",
    ),
    "psnr": ("PSNR", "Peak signal-to-noise ratio in dB; 100 for equal pictures."),
    "ssim": ("SSIM", "Structural similarity; 1 for equal pictures."),
    "temporal_error": (
        "Temporal error",
        "Mean absolute difference of the changes from frame to frame, in [0, 2].",
    ),
    "flicker": (
        "Flicker",
        "Mean absolute change from frame to frame where the true video stands still. A frozen "
        "picture has none, so read it beside the temporal error.",
    ),
    "warping_error": (
        "Warping error",
        "Mean squared change of colour along the true video's motion, by DIS optical flow. A true "
        "video is above 0 too.",
    ),
}
QUANTISED: Final[Mapping[Quantise, str]] = {
    "none": "frames as they are drawn",
    "truncate": "drawn frames cut off to 8 bits",
    "round": "drawn frames rounded to 8 bits",
}
AVERAGES: Final[Mapping[Average, str]] = {
    "videos": "mean of the videos' means",
    "frames": "mean over all frames together",
}
NOT_BEST: Final = frozenset({METHODS["codec"]})  # it shows true frames, and is no rival
MAX_DOTS: Final = 600
LEFT, RIGHT, BASE = 14, 346, 86  # of a plot, in units of its view box


@dataclass(frozen=True, slots=True)
class MetricColumn:
    """A metric as it is shown."""

    info: MetricInfo
    label: str
    text: str
    summary: ScoreSummary | None
    average: Average = "videos"
    paired: PairedScore | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.info.higher_is_better

    @property
    def value(self) -> float | None:
        return None if self.summary is None else shown_mean(self.summary, self.average)[0]

    @property
    def protocol(self) -> str:
        """What its numbers are over."""
        return protocol_line(self.info, self.average)


@dataclass(frozen=True, slots=True)
class _Cell:
    summary: ScoreSummary | None
    value: float | None
    low: float | None
    high: float | None
    best: bool


@dataclass(frozen=True, slots=True)
class MethodRow:
    name: str
    cells: Sequence[_Cell]


@dataclass(frozen=True, slots=True)
class _VideoRow:
    clip_id: str
    name: str
    scores: Sequence[float | None]
    num_frames: int


def evaluation_page(
    *,
    title: str,
    table: ScoreTable,
    scores: Sequence[VideoScore],
    failures: Sequence[Failure],
    media: Mapping[str, GalleryMedia] | None = None,
    note: str = "",
    limit: int = 2000,
    home: str | None = None,
) -> str:
    """The page of an evaluation.

    Args:
        scores: one for each video, metric and method.
        media: by clip id, to show the best, middle and worst videos by the first metric;
            `driving` is the true video.
        note: what else a reader should know.
        limit: of rows in the table of videos.
        home: link of an overview page.
    """
    columns = metric_columns(table)
    rows = _video_rows(columns, scores)
    tiles = [Tile(figure(c.value), c.label) for c in columns if c.value is not None]
    return render(
        "evaluation.html",
        title=title,
        kind="evaluation",
        home=home,
        note=note,
        table=table,
        tiles=[Tile(num(table.num_videos), "videos"), *tiles, failure_tile(table.num_failures)],
        metrics=columns,
        average=AVERAGES[table.average],
        methods=method_rows(table),
        frame={"left": LEFT, "right": RIGHT, "base": BASE, "width": 360, "height": 112},
        plots=[_plot(column, table, scores) for column in columns] if rows else [],
        examples=_examples(columns, rows, media or {}),
        videos=rows[:limit],
        hidden_videos=max(0, len(rows) - limit),
        **failure_values(failures),
    )


def metric_columns(table: ScoreTable) -> list[MetricColumn]:
    """The columns of a table of methods x metrics."""
    mine = {s.metric: s for s in table.summaries if s.method == "model"}
    paired = {p.metric: p for p in table.paired if p.against == "copy"}
    columns = []
    for info in table.metrics:
        label, text = METRICS.get(info.name, (info.name, ""))
        found = (mine.get(info.name), table.average, paired.get(info.name))
        columns.append(MetricColumn(info, label, text, *found))
    return columns


def protocol_line(info: MetricInfo, average: Average) -> str:
    """What a metric's numbers are over, to be read beside them."""
    first = "frame 0 counted" if info.counts_first else "frame 0 left out"
    return f"{first}, {QUANTISED[info.quantise]}, {AVERAGES[average]}"


def shown_mean(summary: ScoreSummary, average: Average) -> tuple[float, float | None, float | None]:
    """The mean that a table shows first, and the ends of its 95 % interval."""
    if average == "frames":
        return summary.pooled, summary.pooled_low, summary.pooled_high
    return summary.mean, summary.mean_low, summary.mean_high


def method_rows(table: ScoreTable) -> list[MethodRow]:
    """Methods x metrics; the best of a column is marked when there is something to compare."""
    methods = dict.fromkeys(s.method for s in table.summaries)
    return _rows(
        table.metrics,
        {METHODS.get(m, m): [s for s in table.summaries if s.method == m] for m in methods},
        table.average,
    )


def compared_rows(tables: Mapping[str, ScoreTable]) -> list[MethodRow]:
    """Models, each with its name and its scores on the same videos, and once what they share."""
    named: dict[str, Sequence[ScoreSummary]] = {
        name: [s for s in table.summaries if s.method == "model"] for name, table in tables.items()
    }
    first = next(iter(tables.values()))
    for method in dict.fromkeys(s.method for s in first.summaries if s.method != "model"):
        found = [s for s in first.summaries if s.method == method]
        named[METHODS.get(method, method)] = found
    return _rows(first.metrics, named, first.average)


def _rows(
    metrics: Sequence[MetricInfo],
    named: Mapping[str, Sequence[ScoreSummary]],
    average: Average,
) -> list[MethodRow]:
    """A row for each name; the best of each metric is marked."""
    best: dict[str, float] = {}
    rivals = [s for name, found in named.items() if name not in NOT_BEST for s in found]
    for info in metrics:
        means = [shown_mean(s, average)[0] for s in rivals if s.metric == info.name]
        finite = [mean for mean in means if math.isfinite(mean)]
        if len(finite) > 1:
            best[info.name] = max(finite) if info.higher_is_better else min(finite)
    rows = []
    for name, found in named.items():
        by_metric = {s.metric: s for s in found}
        marks = {} if name in NOT_BEST else best
        cells = [_cell(by_metric.get(info.name), average, marks) for info in metrics]
        rows.append(MethodRow(name, cells))
    return rows


def _cell(summary: ScoreSummary | None, average: Average, best: Mapping[str, float]) -> _Cell:
    if summary is None:
        return _Cell(None, None, None, None, best=False)
    value, low, high = shown_mean(summary, average)
    return _Cell(summary, value, low, high, best=value == best.get(summary.metric))


def _video_rows(columns: Sequence[MetricColumn], scores: Sequence[VideoScore]) -> list[_VideoRow]:
    found: dict[str, dict[str, VideoScore]] = defaultdict(dict)
    for score in scores:
        if score.method == "model":
            found[score.clip_id][score.metric] = score
    rows = []
    for clip_id, by_metric in found.items():
        row = [by_metric.get(column.info.name) for column in columns]
        name = next(iter(by_metric.values())).name
        num_frames = max(score.num_frames for score in by_metric.values())
        values = [None if score is None else score.value for score in row]
        rows.append(_VideoRow(clip_id, name, values, num_frames))
    return sorted(rows, key=lambda row: (row.name, row.clip_id))


def _examples(
    columns: Sequence[MetricColumn], rows: Sequence[_VideoRow], media: Mapping[str, GalleryMedia]
) -> list[Item]:
    """The best, the middle and the worst video of those that can be shown, by the first metric."""
    if not columns:
        return []
    scored = [(row.scores[0], row) for row in rows if row.clip_id in media]
    ranked = [(value, row) for value, row in scored if value is not None and math.isfinite(value)]
    ranked.sort(key=lambda pair: pair[0], reverse=columns[0].higher_is_better)
    places = {0: "best", len(ranked) // 2: "middle", len(ranked) - 1: "worst"}
    places.update({0: "best"} if ranked else {})
    items = []
    for place, word in sorted(places.items()) if ranked else ():
        value, row = ranked[place]
        line = f"{word}: {columns[0].label} {figure(value)}"
        items.append(Item(name=row.name, media=media[row.clip_id], lines=[line]))
    return items


# --- plots: lengths are units of the drawing's view box --------------------------------------


@dataclass(frozen=True, slots=True)
class _Mark:
    x: float
    label: str
    value: float
    style: str
    y: float = 0.0


@dataclass(frozen=True, slots=True)
class _Tick:
    x: float
    label: str
    anchor: str


@dataclass(frozen=True, slots=True)
class _MeanBar:
    label: str
    text: str
    width: float


@dataclass(frozen=True, slots=True)
class _Plot:
    """A strip plot of one metric, and a bar for each method's mean."""

    metric: MetricColumn
    low: float
    high: float
    dots: Sequence[_Mark]
    lines: Sequence[_Mark]
    ticks: Sequence[_Tick]
    bars: Sequence[_MeanBar]


def _plot(column: MetricColumn, table: ScoreTable, scores: Sequence[VideoScore]) -> _Plot:
    name = column.info.name
    mine = [s for s in scores if s.metric == name and s.method == "model"]
    mine = [s for s in mine if math.isfinite(s.value)]
    summaries = [s for s in table.summaries if s.metric == name and math.isfinite(s.mean)]
    values = [score.value for score in mine] + [summary.mean for summary in summaries]
    low, high = min(values, default=0.0), max(values, default=1.0)
    spread = (high - low) or max(abs(high), 1.0) * 0.1
    low, high = low - 0.05 * spread, high + 0.05 * spread

    def x_of(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (value - low) / (high - low), 2)

    stride = max(1, math.ceil(len(mine) / MAX_DOTS))
    dots = [
        _Mark(x_of(s.value), s.name, s.value, "dot", y=round(22 + 52 * _jitter(s.clip_id), 2))
        for s in mine[::stride]
    ]
    lines = [
        _Mark(x_of(s.mean), METHODS[s.method], s.mean, "mean" if s.method == "model" else "other")
        for s in summaries
    ]
    middle = (low + high) / 2
    ticks = [
        _Tick(x_of(value), figure(value), anchor)
        for value, anchor in ((low, "start"), (middle, "middle"), (high, "end"))
    ]
    return _Plot(column, low, high, dots, lines, ticks, _mean_bars(summaries))


def _mean_bars(summaries: Sequence[ScoreSummary]) -> list[_MeanBar]:
    most = max((abs(s.mean) for s in summaries), default=1.0) or 1.0
    full = RIGHT - LEFT
    return [
        _MeanBar(METHODS[s.method], figure(s.mean), round(max(1.0, full * abs(s.mean) / most), 2))
        for s in summaries
    ]


def _jitter(text: str) -> float:
    """A number in [0, 1] that follows from a text, so that dots do not hide one another."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32

"""The page of an evaluation: methods x metrics, published numbers, plots, clips, every score.

- Numbers stand with what they were made with: protocol, estimator, version, weights, licence; and
  those of an estimator with how often it found something, since who draws no faces has no errors
  of faces.
- Published numbers stand by themselves: see `kpmask.report.published`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kpmask.errors import ConfigError
from kpmask.measure import covered_alike, same_tables
from kpmask.metric_names import METRICS as METRIC_NAMES
from kpmask.metric_names import SET_METRICS, kind_of, missed_of
from kpmask.records import (
    Average,
    Failure,
    FrameScores,
    MetricInfo,
    PairedScore,
    ScoreSummary,
    ScoreTable,
    SetScore,
    VideoScore,
)
from kpmask.report.gallery import GalleryMedia
from kpmask.report.metric_labels import (
    AVERAGES,
    FOUND,
    GROUPS,
    METHODS,
    QUANTISED,
    counted,
    metric_label,
)
from kpmask.report.page import Tile, failure_tile, failure_values, figure, num, render
from kpmask.report.published import PUBLISHED, PublishedMetric, PublishedTable, differences
from kpmask.report.score_clips import ScoredVideo, clip_cards, clip_data, with_media
from kpmask.report.score_plots import (
    LEFT,
    MAX_DOTS,
    MAX_PAGE_DOTS,
    RIGHT,
    WIDTH,
    ScorePlot,
    score_plot,
)

METRICS: Final[Mapping[str, tuple[str, str]]] = {
    name: (metric_label(name).label, metric_label(name).text)
    for name in (*METRIC_NAMES, *SET_METRICS)
}
# They show frames that nobody drew, and are no rivals.
NOT_BEST: Final = frozenset({METHODS["codec"], METHODS["driving"]})
# A copy is the best of these by nature, which is no merit: it stands still, and it is the source.
COPY_IS_BEST: Final = frozenset({"flicker", "csim_source", "coverage_source"})
MAX_TILES: Final = 4
MAX_CELLS: Final = 60_000  # of the table of videos
PREVIEW_FRAMES: Final = 100


@dataclass(frozen=True, slots=True)
class MetricColumn:
    """A metric as it is shown."""

    info: MetricInfo
    label: str
    text: str
    summary: ScoreSummary | None
    average: Average = "videos"
    paired: PairedScore | None = None
    set_score: SetScore | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.info.higher_is_better

    @property
    def value(self) -> float | None:
        if self.set_score is not None:
            return self.set_score.value
        return None if self.summary is None else shown_mean(self.summary, self.average)[0]

    @property
    def protocol(self) -> str:
        """What its numbers are over."""
        return protocol_line(self.info, self.average)

    @property
    def short(self) -> str:
        """Its label under its group's heading."""
        return metric_label(self.info.name).short

    @property
    def unit(self) -> str:
        return metric_label(self.info.name).unit

    @property
    def group(self) -> str:
        return "sets" if self.info.of_set else metric_label(self.info.name).group


@dataclass(frozen=True, slots=True)
class _Cell:
    """A value; `coverage` is the share of frames that it is of, for an estimator's metric."""

    summary: ScoreSummary | None
    value: float | None
    low: float | None
    high: float | None
    best: bool
    coverage: float | None = None
    set_score: SetScore | None = None


@dataclass(frozen=True, slots=True)
class MethodRow:
    name: str
    cells: Sequence[_Cell]


@dataclass(frozen=True, slots=True)
class _MetricGroup:
    """Metrics that stand in one table: methods x metrics."""

    key: str
    title: str
    columns: Sequence[MetricColumn]
    rows: Sequence[MethodRow]

    @property
    def protocol(self) -> str:
        """What the numbers are over: once for those that agree."""
        return _said_once([(column.short, column.protocol) for column in self.columns])

    @property
    def made_with(self) -> str:
        """Estimator, version, weights and licence: once for those that agree."""
        return _said_once([(column.short, _made_with(column.info)) for column in self.columns])

    @property
    def is_paired(self) -> bool:
        return any(column.paired is not None for column in self.columns)


@dataclass(frozen=True, slots=True)
class _VideoRow:
    """`number` is its place in the table; `clip` that of its card, None where it has none."""

    clip_id: str
    name: str
    scores: Sequence[float | None]
    num_frames: int
    number: int = 0
    clip: int | None = None


@dataclass(frozen=True, slots=True)
class _PublishedColumn:
    """A published metric; `value` is ours, None where `reasons` say why it does not compare."""

    metric: PublishedMetric
    reasons: Sequence[str]
    value: float | None


@dataclass(frozen=True, slots=True)
class _Published:
    table: PublishedTable
    columns: Sequence[_PublishedColumn]

    @property
    def compares(self) -> bool:
        return any(column.value is not None for column in self.columns)


def evaluation_page(
    *,
    title: str,
    table: ScoreTable,
    scores: Sequence[VideoScore],
    failures: Sequence[Failure],
    media: Mapping[str, GalleryMedia] | None = None,
    frames: Iterable[FrameScores] = (),
    preview_frames: int = PREVIEW_FRAMES,
    note: str = "",
    limit: int = 2000,
    home: str | None = None,
) -> str:
    """The page of an evaluation.

    Args:
        scores: one for each video, metric and method.
        media: by clip id, to show the worst and the best videos by any metric; `driving` is the
            true video.
        frames: scores of these clips frame by frame, to be drawn beside them; gone through once.
        preview_frames: as many first frames have the media's videos, or all where they are fewer.
        note: what else a reader should know.
        limit: of rows in the table of videos, or fewer where there are many metrics.
        home: link of an overview page.
    """
    columns = metric_columns(table)
    rows = _video_rows(columns, scores, media or {})
    by_video = [column for column in columns if not column.info.of_set]
    listed = rows[: min(limit, MAX_CELLS // max(1, len(by_video)))]
    return render(
        "evaluation.html",
        title=title,
        kind="evaluation",
        home=home,
        own=("evaluation",),
        note=note,
        lead=_lead(table),
        table=table,
        tiles=[
            Tile(num(table.num_videos), counted(table.setting, table.num_videos)),
            *_tiles(columns),
            failure_tile(table.num_failures),
        ],
        metrics=columns,
        counted=lambda count: counted(table.setting, count),
        average=AVERAGES[table.average],
        groups=_groups(columns, method_rows(table)),
        published=[_published(found, table, columns) for found in PUBLISHED],
        frame={"left": LEFT, "right": RIGHT, "width": WIDTH},
        plots=_plot_groups(by_video, table, scores, _links(listed, rows)),
        **_clip_values(columns, rows, media or {}, frames, preview_frames),
        trio=("source", "driving" if table.setting == "cross" else "true", "result"),
        scored=by_video,
        choices=_choices(by_video),
        videos=listed,
        hidden_videos=len(rows) - len(listed),
        **failure_values(failures),
    )


def _tiles(columns: Sequence[MetricColumn]) -> list[Tile]:
    """The values to see first: of pixels, structure, points, and identities or sets."""
    valued = [column for column in columns if column.value is not None and not _covers(column)]
    kinds = [(kind_of(column.info.name), column) for column in valued]
    wanted = (
        [c for kind, c in kinds if kind == "l1"],
        [c for kind, c in kinds if kind == "ssim"],
        [c for kind, c in kinds if kind.startswith("akd")],
        [c for kind, c in kinds if kind.startswith(("csim", "aed")) or c.info.of_set],
    )
    first = [found[0] for found in wanted if found]
    return [Tile(figure(c.value or 0.0), _with_unit(c)) for c in (first or valued)[:MAX_TILES]]


def _references(table: ScoreTable) -> str:
    """What the rows are that nobody drew."""
    methods = {s.method for s in table.summaries} | {s.method for s in table.sets}
    if "codec" not in methods:
        return "The row of copies repeats the source: who is no better has learnt nothing."
    return (
        "The row of copies repeats the source, and that of the codec has the true frames after the "
        "encoder that results are stored with: between them stands what a number is worth."
    )


def _lead(table: ScoreTable) -> str:
    """What was drawn from what, in words."""
    if table.setting == "cross" and not table.dataset_id:
        motion = "into the poses" if table.motion == "absolute" else "by the motion"
        return (
            f"A finished catalog, as its results are stored: each image was moved {motion} of its "
            "driving video. There is no true result: metrics compare with the driving frames that "
            "the model saw, and those of identities with the image. A copy of the image is the "
            "right subject and never moves, the driving video itself moves rightly and is another: "
            "a model should be neither."
        )
    if not table.dataset_id:
        return (
            "Videos that were made before, each compared frame by frame with the true one of the "
            f"same name, whose first frame counts as the source. {_references(table)}"
        )
    if table.setting == "cross":
        motion = "in its poses" if table.motion == "absolute" else "by its motion from frame 0 on"
        return (
            "Another identity's motion: one clip's first frame is animated by a clip of somebody "
            f"else, {motion}. There is no true result: metrics compare with the driving frames, "
            "and those of identities with the source. A copy of the source is the right person and "
            "never moves, the driving video itself moves rightly and is somebody else: a model "
            "should be neither."
        )
    if table.setting == "few_shot":
        return (
            "Few shots, of which none is used: a person's held-out frames are drawn from one "
            f"other frame of the same person, without fine-tuning (#FT = 0). {_references(table)}"
        )
    return (
        "The papers' reconstruction protocol: the first frame of a test video is animated by the "
        f"video itself, and each result frame is compared with the true one. {_references(table)}"
    )


# --- methods x metrics -----------------------------------------------------------------------


def metric_columns(table: ScoreTable) -> list[MetricColumn]:
    """The columns of a table of methods x metrics."""
    mine = {s.metric: s for s in table.summaries if s.method == "model"}
    paired = {p.metric: p for p in table.paired if p.against == "copy"}
    sets = {s.metric: s for s in table.sets if s.method == "model"}
    columns = []
    for info in table.metrics:
        label = metric_label(info.name)
        found = (mine.get(info.name), table.average, paired.get(info.name), sets.get(info.name))
        columns.append(MetricColumn(info, label.label, label.text, *found))
    return columns


def protocol_line(info: MetricInfo, average: Average) -> str:
    """What a metric's numbers are over, to be read beside them."""
    first = "frame 0 counted" if info.counts_first else "frame 0 left out"
    if info.of_set:
        return f"{first}, {QUANTISED[info.quantise]}, one value for all videos"
    return f"{first}, {QUANTISED[info.quantise]}, {AVERAGES[average]}"


def shown_mean(summary: ScoreSummary, average: Average) -> tuple[float, float | None, float | None]:
    """The mean that a table shows first, and the ends of its 95 % interval."""
    if average == "frames":
        return summary.pooled, summary.pooled_low, summary.pooled_high
    return summary.mean, summary.mean_low, summary.mean_high


@dataclass(frozen=True, slots=True)
class _Named:
    """What a row is made of."""

    summaries: Mapping[str, ScoreSummary]
    sets: Mapping[str, SetScore]

    @classmethod
    def of(cls, table: ScoreTable, method: str) -> _Named:
        return cls(
            {s.metric: s for s in table.summaries if s.method == method},
            {s.metric: s for s in table.sets if s.method == method},
        )

    def value(self, metric: str, average: Average) -> float | None:
        if metric in self.sets:
            return self.sets[metric].value
        summary = self.summaries.get(metric)
        return None if summary is None else shown_mean(summary, average)[0]


def method_rows(table: ScoreTable) -> list[MethodRow]:
    """Methods x metrics; the best of a column is marked when there is something to compare."""
    methods = dict.fromkeys([s.method for s in table.summaries] + [s.method for s in table.sets])
    named = {METHODS.get(m, m): _Named.of(table, m) for m in methods}
    return _rows(table.metrics, named, table.average)


def compared_rows(tables: Mapping[str, ScoreTable]) -> list[MethodRow]:
    """Models, each with its name and its scores on the same videos, and once what they share.

    Raises:
        ConfigError: their numbers do not compare: they are of other videos, or were made otherwise.
    """
    same_tables(tables)
    first = next(iter(tables.values()))
    for name, table in tables.items():
        if table.dataset_id != first.dataset_id:
            raise ConfigError("scores of two datasets do not compare", subject=name)
    named = {name: _Named.of(table, "model") for name, table in tables.items()}
    for method in dict.fromkeys(s.method for s in first.summaries if s.method != "model"):
        named[METHODS.get(method, method)] = _Named.of(first, method)
    return _rows(first.metrics, named, first.average)


def _rows(
    metrics: Sequence[MetricInfo], named: Mapping[str, _Named], average: Average
) -> list[MethodRow]:
    """A row for each name; the best of each metric is marked."""
    rivals = {info.name: [name for name in named if _is_rival(name, info.name)] for info in metrics}
    best = {
        info.name: _best(info, [named[name] for name in rivals[info.name]], average)
        for info in metrics
    }
    rows = []
    for name, found in named.items():
        marks = {metric: value for metric, value in best.items() if name in rivals[metric]}
        rows.append(MethodRow(name, [_cell(info, found, average, marks) for info in metrics]))
    return rows


def _is_rival(name: str, metric: str) -> bool:
    """Whether a row may be the best of a metric."""
    is_copy = name == METHODS["copy"]
    return name not in NOT_BEST and not (is_copy and kind_of(metric) in COPY_IS_BEST)


def _best(info: MetricInfo, rivals: Sequence[_Named], average: Average) -> float | None:
    """The best value of those that compare; None where no two of them differ."""
    having = [found for found in rivals if _finite(found.value(info.name, average))]
    if info.name.endswith(FOUND) and not _found_alike(info, having, average):
        return None
    values = {value for found in having if (value := found.value(info.name, average)) is not None}
    if len(values) < 2:
        return None
    return max(values) if info.higher_is_better else min(values)


def _found_alike(info: MetricInfo, rivals: Sequence[_Named], average: Average) -> bool:
    """Whether as much was found for each: frames, and where it was measured points of them."""
    if not covered_alike([found.value(info.coverage, average) for found in rivals]):
        return False
    missed = [found.value(missed_of(info.name), average) for found in rivals]
    return all(share is None for share in missed) or covered_alike(missed)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _cell(
    info: MetricInfo, found: _Named, average: Average, best: Mapping[str, float | None]
) -> _Cell:
    coverage = found.value(info.coverage, average) if info.coverage else None
    value = found.value(info.name, average)
    is_best = value is not None and value == best.get(info.name)
    if info.name in found.sets:
        return _Cell(None, value, None, None, is_best, coverage, found.sets[info.name])
    summary = found.summaries.get(info.name)
    if summary is None:
        return _Cell(None, None, None, None, best=False)
    _, low, high = shown_mean(summary, average)
    return _Cell(summary, value, low, high, is_best, coverage)


def _groups(columns: Sequence[MetricColumn], rows: Sequence[MethodRow]) -> list[_MetricGroup]:
    """One table for pictures, one for each estimator, one for sets."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, column in enumerate(columns):
        places[column.group].append(place)
    return [
        _MetricGroup(
            key, title, [columns[place] for place in places[key]], _part(rows, places[key])
        )
        for key, title in GROUPS.items()
        if key in places
    ]


def _part(rows: Sequence[MethodRow], places: Sequence[int]) -> list[MethodRow]:
    """Some columns of the rows, without rows that have nothing in them."""
    parts = [MethodRow(row.name, [row.cells[place] for place in places]) for row in rows]
    return [row for row in parts if any(cell.value is not None for cell in row.cells)]


def _made_with(info: MetricInfo) -> str:
    estimator = f"estimator {info.estimator}, " if info.estimator else ""
    weights = f"weights {info.weights_sha256[:16]}, " if info.weights_sha256 else ""
    return f"{estimator}version {info.version}, {weights}{info.licence}"


def _said_once(said: Sequence[tuple[str, str]]) -> str:
    """What most have, then the others by name: "this; L1, SSIM: that"."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, text in said:
        names[text].append(name)
    first, *others = sorted(names, key=lambda text: -len(names[text]))
    return "; ".join([first, *(f"{', '.join(names[text])}: {text}" for text in others)])


def _covers(column: MetricColumn) -> bool:
    """Whether it says how often an estimator found something."""
    return column.info.name.startswith("coverage")


def _with_unit(column: MetricColumn) -> str:
    return f"{column.label}, {column.unit}" if column.unit else column.label


# --- published numbers -----------------------------------------------------------------------


def _published(
    found: PublishedTable, table: ScoreTable, columns: Sequence[MetricColumn]
) -> _Published:
    values = {column.info.name: column.value for column in columns}
    shown = []
    for metric in found.metrics:
        reasons = differences(metric, table)
        shown.append(_PublishedColumn(metric, reasons, None if reasons else values[metric.ours]))
    return _Published(found, shown)


# --- videos ----------------------------------------------------------------------------------


def _video_rows(
    columns: Sequence[MetricColumn],
    scores: Sequence[VideoScore],
    media: Mapping[str, GalleryMedia],
) -> list[_VideoRow]:
    found: dict[str, dict[str, VideoScore]] = defaultdict(dict)
    for score in scores:
        if score.method == "model":
            found[score.clip_id][score.metric] = score
    scored = [column.info.name for column in columns if not column.info.of_set]
    rows = []
    for clip_id, by_metric in found.items():
        row = [by_metric.get(name) for name in scored]
        name = next(iter(by_metric.values())).name
        num_frames = max(score.num_frames for score in by_metric.values())
        values = [None if score is None else score.value for score in row]
        rows.append(_VideoRow(clip_id, name, values, num_frames))
    rows.sort(key=lambda row: (row.name, row.clip_id))
    cards = {row.clip_id: at for at, row in enumerate(with_media(rows, media))}
    return [
        _VideoRow(r.clip_id, r.name, r.scores, r.num_frames, at, cards.get(r.clip_id))
        for at, r in enumerate(rows)
    ]


def _links(listed: Sequence[_VideoRow], rows: Sequence[_VideoRow]) -> dict[str, str]:
    """Where a dot leads: to the clip's card, else to its row."""
    links = {row.clip_id: f"#video-{row.number}" for row in listed}
    return links | {row.clip_id: f"#clip-{row.clip}" for row in rows if row.clip is not None}


def _plot_groups(
    columns: Sequence[MetricColumn],
    table: ScoreTable,
    scores: Sequence[VideoScore],
    links: Mapping[str, str],
) -> list[tuple[str, Sequence[ScorePlot]]]:
    """Plots under their groups' titles."""
    by_metric: dict[str, list[VideoScore]] = defaultdict(list)
    for score in scores:
        by_metric[score.metric].append(score)
    most = max(2, min(MAX_DOTS, MAX_PAGE_DOTS // max(1, len(columns))))
    groups: dict[str, list[ScorePlot]] = defaultdict(list)
    for column in columns:
        plot = score_plot(
            column.label,
            column.unit,
            higher_is_better=column.higher_is_better,
            scores=by_metric[column.info.name],
            summaries=[s for s in table.summaries if s.metric == column.info.name],
            links=links,
            max_dots=most,
        )
        if plot is not None:
            groups[column.group].append(plot)
    return [(title, groups[key]) for key, title in GROUPS.items() if key in groups]


def _choices(columns: Sequence[MetricColumn]) -> list[tuple[str, Sequence[tuple[int, str]]]]:
    """Places and labels of metrics to choose from, under their groups' titles."""
    groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for place, column in enumerate(columns):
        groups[column.group].append((place, column.label))
    return [(title, groups[key]) for key, title in GROUPS.items() if key in groups]


def _clip_values(
    columns: Sequence[MetricColumn],
    rows: Sequence[_VideoRow],
    media: Mapping[str, GalleryMedia],
    frames: Iterable[FrameScores],
    preview_frames: int,
) -> dict[str, Any]:
    """What the section of clips needs."""
    scored = [column for column in columns if not column.info.of_set]
    shown: list[ScoredVideo] = [row for row in rows if row.clip is not None]
    if not scored or not shown:
        return {"clips": [], "data": None}
    cards = clip_cards(
        scored[0].label,
        higher_is_better=scored[0].higher_is_better,
        column=0,
        videos=shown,
        media=media,
    )
    numbers = {row.clip_id: row.clip for row in rows if row.clip is not None}
    labels = [(column.info, column.label, column.unit) for column in scored]
    data = clip_data(labels, shown, numbers, frames, preview_frames=preview_frames)
    return {"clips": cards, "data": data}

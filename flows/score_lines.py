"""An evaluation's table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from flows import console

if TYPE_CHECKING:
    from kpmask.records import MetricInfo, ScoreTable

SETTINGS: Final = {
    "reconstruction": "",
    "cross": "another identity's motion, {motion}: a source beside the driving video that moves it",
    "few_shot": "few-shot protocol: held-out frames from one frame of the same person, #FT = 0",
}
OF_A_CATALOG: Final = "a finished catalog, {motion}: results beside the videos that moved them"


def score_lines(scores: ScoreTable) -> list[str]:
    """The table, a row a metric and a column a method, and what the numbers are over.

    Beside a value stands the share of frames in which its estimator found something, and a star
    where it is the best of those that compare.
    """
    from kpmask.report.evaluation import method_rows
    from kpmask.report.metric_labels import counted

    by_method = method_rows(scores)
    methods = dict.fromkeys([s.method for s in scores.summaries] + [s.method for s in scores.sets])
    rows = []
    for place, info in enumerate(scores.metrics):
        head = f"{info.name} {'(up)' if info.higher_is_better else '(down)'}"
        rows.append([head, *(_cell_text(row.cells[place]) for row in by_method)])
    lines = [console.table(["", *methods], rows), ""]
    if any(cell.best for row in by_method for cell in row.cells):
        lines.append("* the better of what compares")
    if any(cell.coverage is not None for row in by_method for cell in row.cells):
        lines.append("% of frames in which the estimator found something, true and generated")
    lines += [*_protocol_lines(scores), *_estimator_lines(scores)]
    is_catalog = scores.setting == "cross" and not scores.dataset_id
    if setting := OF_A_CATALOG if is_catalog else SETTINGS[scores.setting]:
        lines.append(setting.format(motion=scores.motion))
    things = counted(scores.setting, scores.num_videos)
    lines.append(f"{scores.num_videos} {things}; {scores.num_failures} failures")
    if scores.perceptual:
        lines.append(f"trained against: {scores.perceptual}")
    lines.append(f"page: {scores.uri}/index.html")
    return lines


def _cell_text(cell: Any) -> str:  # noqa: ANN401 - a cell of the page's table
    """A value, its 95 % interval, its coverage: "0.0400* [0.0350, 0.0450] 98.5 %"."""
    from kpmask.report.page import figure

    if cell.value is None:
        return "-"
    parts = [f"{figure(cell.value)}{'*' if cell.best else ''}"]
    if cell.low is not None and cell.high is not None:
        parts.append(f"[{figure(cell.low)}, {figure(cell.high)}]")
    if cell.coverage is not None:
        parts.append(f"{100 * cell.coverage:.3g} %")
    return " ".join(parts)


def _protocol_lines(scores: ScoreTable) -> list[str]:
    """What the metrics' numbers are over: a line for those that agree."""
    from kpmask.report.evaluation import protocol_line

    names: dict[str, list[str]] = {}
    for info in scores.metrics:
        names.setdefault(protocol_line(info, scores.average), []).append(info.name)
    return [f"{', '.join(found)}: {line}" for line, found in names.items()]


def _estimator_lines(scores: ScoreTable) -> list[str]:
    """What finds faces and bodies, a line each: numbers of two estimators do not compare."""
    estimators: dict[str, MetricInfo] = {}
    for info in scores.metrics:
        if info.estimator:
            estimators.setdefault(info.estimator, info)
    return [
        f"by {name}, version {info.version.partition('+')[2]}, "
        f"weights {(info.weights_sha256 or 'none')[:16]}, {info.licence}"
        for name, info in estimators.items()
    ]

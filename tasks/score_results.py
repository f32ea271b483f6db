"""What an evaluation leaves in its store, written and read back: tables, summary and page.

The table of scores is written last: where it is, all is. A clip of an earlier run counts as scored
where its scores and its curves are there, made with the same settings.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kpmask.errors import StorageError
from kpmask.evaluate import paired_scores, summarise, video_scores
from kpmask.metrics import SetMetric
from kpmask.records import (
    ClipScores,
    Failure,
    FrameScores,
    Method,
    ScoreTable,
    SetScore,
    VideoScore,
    as_dict,
)
from kpmask.report import evaluation_page
from tasks.manifest import (
    iter_table,
    iter_table_if_any,
    read_table,
    read_table_metadata,
    write_json,
    write_table,
)
from tasks.score_plan import MEDIA, STAGE, ScorePlan, entry_of, is_preview
from tasks.score_worker import PREVIEW_FRAMES, curves_key, features_key, media_of
from tasks.storage import ObjectStore

SCORES: Final = "scores.parquet"
FRAMES: Final = "frames.parquet"
FAILURES: Final = "failures.parquet"
SUMMARY: Final = "summary.json"
PAGE: Final = "index.html"
JOURNAL: Final = "journal"
METHODS: Final[tuple[Method, ...]] = ("model", "copy", "codec")  # that sets are measured of
REMOVERS: Final = 16
CURVES_AT_ONCE: Final = 256  # in memory: one may be of a million frames


# --- what an earlier run left ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Earlier:
    """The scores of a finished evaluation with the same settings, and its values of the set."""

    scores: Mapping[str, ClipScores]
    sets: tuple[SetScore, ...] = ()


def earlier(store: ObjectStore, planned: ScorePlan) -> Earlier:
    """What is there already."""
    metadata = _metadata(store, SCORES)
    wanted = planned.settings_digest
    if {m.get("settings_digest") for m in (metadata, _metadata(store, FRAMES))} != {wanted}:
        return Earlier({})
    curves = pq.read_table(store.local(FRAMES), columns=["clip_id"])
    with_curves = set(curves.column("clip_id").unique().to_pylist())
    by_clip: dict[str, list[VideoScore]] = {}
    for row in read_table(store, SCORES, VideoScore):
        if row.clip_id in with_curves:
            by_clip.setdefault(row.clip_id, []).append(row)
    scores = {clip_id: _clip_scores(clip_id, rows) for clip_id, rows in by_clip.items()}
    for clip_id in json.loads(metadata.get("unscored", "[]")):
        scores[clip_id] = _clip_scores(clip_id, ())
    sets = json.loads(metadata.get("sets", "[]"))
    return Earlier(scores, tuple(SetScore(**values) for values in sets))


def _metadata(store: ObjectStore, key: str) -> Mapping[str, str]:
    """What a table says of itself; nothing where there is no such table."""
    try:
        return read_table_metadata(store, key)
    except StorageError as error:
        if error.code != "not_found":
            raise
        return {}


def _clip_scores(clip_id: str, rows: Sequence[VideoScore]) -> ClipScores:
    return ClipScores(
        clip_id=clip_id,
        name=rows[0].name if rows else "",
        metrics=tuple(row.metric for row in rows),
        methods=tuple(row.method for row in rows),
        values=tuple(row.value for row in rows),
        num_frames=tuple(row.num_frames for row in rows),
    )


# --- metrics of the whole set ----------------------------------------------------------------


def set_scores(
    store: ObjectStore, planned: ScorePlan, entries: Iterable[str]
) -> tuple[SetScore, ...]:
    """The values of metrics of sets, of each method, from the features that workers left.

    A metric for which too few videos are left has none.

    Args:
        entries: of each scored video, its name in the journal.
    """
    entries = list(entries)
    scores: list[SetScore] = []
    for metric in planned.set_metrics:
        features = _Features(store, metric.name, entries)
        if features.num_videos >= metric.min_videos:
            methods = [method for method in METHODS if features.has(method)]
            scores += [_set_score(metric, method, features) for method in methods]
    return tuple(scores)


def too_few(planned: ScorePlan, sets: Iterable[SetScore]) -> list[Failure]:
    """A failure for each metric of sets that has no value."""
    valued = {score.metric for score in sets}
    return [
        Failure(
            item=metric.name,
            stage=STAGE,
            code="dataset_too_small",
            cause=f"it takes {metric.min_videos} videos with a whole window, and fewer are left",
            retryable=False,
            attempts=1,
        )
        for metric in planned.set_metrics
        if metric.name not in valued
    ]


def _set_score(metric: SetMetric, method: Method, features: _Features) -> SetScore:
    return SetScore(
        metric=metric.name,
        method=method,
        value=metric.score(features.tables(method), features.tables("true")),
        num_videos=features.num_videos,
        num_windows=features.num_windows,
    )


class _Features:
    """The features of a metric in the store, a table at a time; videos without a window are out."""

    def __init__(self, store: ObjectStore, metric: str, entries: Sequence[str]) -> None:
        self._store = store
        self._metric = metric
        counts = {entry: len(self._table(entry, "true")) for entry in entries}
        self._counts = {entry: count for entry, count in counts.items() if count}
        self._entries = list(self._counts)
        self.num_windows = sum(counts.values())

    @property
    def num_videos(self) -> int:
        return len(self._entries)

    def has(self, method: Method) -> bool:
        return self._store.exists(features_key(self._entries[0], self._metric, method))

    def tables(self, side: str) -> Iterator[NDArray[np.float64]]:
        for entry, count in self._counts.items():
            table_ND = self._table(entry, side)
            # Of a copy there is one row.
            yield table_ND.repeat(count, 0) if side == "copy" else table_ND

    def _table(self, entry: str, side: str) -> NDArray[np.float64]:
        data = self._store.get(features_key(entry, self._metric, side))
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False), np.float64)


# --- publishing ------------------------------------------------------------------------------


def publish(
    store: ObjectStore,
    planned: ScorePlan,
    clips: Sequence[ClipScores],
    curves: Iterable[FrameScores],
    sets: Sequence[SetScore],
    failures: Sequence[Failure],
) -> ScoreTable:
    """Tables, summary and page; the scores last."""
    scores = video_scores(clips)
    failures = sorted(failures, key=lambda f: (f.item, f.stage, f.code))
    table = ScoreTable(
        uri=store.uri,
        settings_digest=planned.settings_digest,
        dataset_id=planned.dataset_id,
        weights_sha256=planned.weights_sha256,
        perceptual=planned.perceptual,
        num_videos=len(clips),
        num_failures=len(failures),
        metrics=planned.metrics,
        summaries=summarise(scores),
        paired=paired_scores(scores, planned.metrics),
        average=planned.average,
        setting=planned.setting,
        motion=planned.motion,
        sets=tuple(sets),
    )
    metadata = {"settings_digest": planned.settings_digest}
    # With the scores, since they belong to no other set: the summary is there before them.
    of_sets = json.dumps([as_dict(score) for score in sets], sort_keys=True)
    # They have no row to be known by; a video of one frame has none, and where all metrics are of
    # sets no video has one.
    unscored = json.dumps([clip.clip_id for clip in clips if not clip.metrics])
    write_table(store, FAILURES, failures, Failure, metadata=metadata)
    write_json(store, SUMMARY, table)
    write_table(store, FRAMES, curves, FrameScores, metadata=metadata, rows_at_once=CURVES_AT_ONCE)
    store.put(PAGE, scores_page(store, table, scores, failures).encode())
    known = {**metadata, "sets": of_sets, "unscored": unscored}
    write_table(store, SCORES, scores, VideoScore, metadata=known)
    return table


def all_curves(
    store: ObjectStore, clips: Sequence[ClipScores], entries: Mapping[str, str]
) -> Iterator[FrameScores]:
    """The curves of every clip, a clip at a time: first those of the finished table, then others.

    Args:
        entries: of the clips whose curves are in the journal, their names there.
    """
    names = {clip.clip_id: clip.name for clip in clips}
    if names.keys() - entries.keys():
        for row in iter_table(store, FRAMES, FrameScores, rows_at_once=CURVES_AT_ONCE):
            if row.clip_id in names and row.clip_id not in entries:
                yield dataclasses.replace(row, name=names[row.clip_id])
    for clip_id in names:
        if clip_id in entries:
            for row in read_table(store, curves_key(entries[clip_id]), FrameScores):
                yield dataclasses.replace(row, name=names[clip_id])


def remove_journal(store: ObjectStore) -> None:
    """Remove what only the run needed, entries first: an entry must find its curves."""
    for prefix in (f"{JOURNAL}/scores/", f"{JOURNAL}/"):
        _remove(store, [info.key for info in store.list(prefix)])


def remove_other_previews(store: ObjectStore, planned: ScorePlan) -> None:
    """Remove previews that runs with other settings left here."""
    own = f"{MEDIA}/{entry_of(planned.settings_digest, '')}"
    keys = [info.key for info in store.list(f"{MEDIA}/")]
    _remove(store, [key for key in keys if is_preview(key) and not key.startswith(own)])


def _remove(store: ObjectStore, keys: Sequence[str]) -> None:
    with ThreadPoolExecutor(REMOVERS) as pool:
        for _ in pool.map(store.delete, keys):
            pass


def scores_page(
    store: ObjectStore,
    table: ScoreTable,
    scores: Sequence[VideoScore],
    failures: Sequence[Failure],
    *,
    home: str | None = None,
) -> str:
    """The page of a finished evaluation; it refers to the previews beside it."""
    keys = {info.key for info in store.list(f"{MEDIA}/")}
    shown = {
        clip_id: media_of(entry_of(table.settings_digest, clip_id))
        for clip_id in {score.clip_id for score in scores}
    }
    media = {clip_id: files for clip_id, files in shown.items() if files.result in keys}
    curves = iter_table_if_any(store, FRAMES, FrameScores, rows_at_once=CURVES_AT_ONCE)
    return evaluation_page(
        title="Evaluation",
        table=table,
        scores=scores,
        failures=failures,
        media=media,
        frames=(row for row in curves if row.clip_id in media),
        preview_frames=PREVIEW_FRAMES,
        home=home,
    )

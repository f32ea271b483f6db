"""The page of a finished job, written again from its manifests.

What is at a URI is told by which manifest it has; each kind has one function that reads its
tables and returns the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from kpmask.data.dataset import CHANGES, FAILURES, MANIFEST, STATS
from kpmask.errors import StorageError
from kpmask.records import (
    AnimationRecord,
    CatalogManifest,
    ClipRecord,
    ComparedRow,
    ComparedRun,
    ComparedValue,
    Comparison,
    DatasetChanges,
    DatasetManifest,
    Failure,
    MetricInfo,
    PairedScore,
    RunManifest,
    ScoreSummary,
    ScoreTable,
    StepMetrics,
    ValidationScore,
    VideoScore,
)
from kpmask.report import DatasetSummary, dataset_page, preview_key
from kpmask.report.previews import PREVIEWS
from tasks import train_folder
from tasks.animate import gallery
from tasks.compare import page as compared_page
from tasks.evaluate import scores_page
from tasks.manifest import (
    iter_table,
    iter_table_if_any,
    read_json,
    read_table,
    read_table_if_any,
)
from tasks.storage import ObjectStore, open_store

PAGE: Final = "index.html"
SUMMARY: Final = "summary.json"
COMPARISON: Final = "comparison.json"


def rebuild_page(uri: str) -> str:
    """Write `index.html` of what a job made again; returns its URI.

    Raises:
        StorageError: `not_found`: nothing that kpmask made is there.
    """
    store = open_store(uri)
    for marker, page in PAGES.items():
        if store.exists(marker):
            store.put(PAGE, page(store).encode())
            return f"{store.uri.rstrip('/')}/{PAGE}"
    raise StorageError(
        "no dataset, run, catalog, evaluation or comparison is here",
        subject=uri,
        code="not_found",
        hint="give what a job got as --out",
    )


def _failures(store: ObjectStore) -> list[Failure]:
    return read_table_if_any(store, FAILURES, Failure) or []


def _dataset(store: ObjectStore) -> str:
    summary = DatasetSummary()
    for clip in iter_table(store, MANIFEST, ClipRecord):
        summary.add(clip)
    for failure in iter_table_if_any(store, FAILURES, Failure):
        summary.add_failure(failure)
    there = {info.key for info in store.list(f"{PREVIEWS}/")}
    previews = {clip.clip_id: preview_key(clip.clip_id) for clip in summary.shown}
    changes = store.exists(CHANGES)
    return dataset_page(
        title=PurePosixPath(store.uri).name,
        manifest=DatasetManifest(**read_json(store, STATS)),
        summary=summary,
        changes=DatasetChanges(**read_json(store, CHANGES)) if changes else None,
        previews={clip_id: key for clip_id, key in previews.items() if key in there},
    )


def _run(store: ObjectStore) -> str:
    done = store.exists(train_folder.MANIFEST)
    manifest = RunManifest(**read_json(store, train_folder.MANIFEST)) if done else None
    metrics = read_table_if_any(store, train_folder.METRICS, StepMetrics) or []
    scores = read_table_if_any(store, train_folder.VALIDATION, ValidationScore) or []
    return train_folder.page(store, manifest, metrics, scores)


def _scores(store: ObjectStore) -> str:
    scores = read_table(store, "scores.parquet", VideoScore)
    return scores_page(store, _score_table(read_json(store, SUMMARY)), scores, _failures(store))


def _score_table(values: Mapping[str, Any]) -> ScoreTable:
    parts = {
        "metrics": tuple(MetricInfo(**value) for value in values["metrics"]),
        "summaries": tuple(ScoreSummary(**value) for value in values["summaries"]),
        "paired": tuple(PairedScore(**value) for value in values.get("paired", ())),
    }
    return ScoreTable(**{**values, **parts})


def _comparison(store: ObjectStore) -> str:
    values = read_json(store, COMPARISON)
    rows = (
        {**row, "values": tuple(ComparedValue(**value) for value in row["values"])}
        for row in values["rows"]
    )
    parts = {
        "metrics": tuple(MetricInfo(**value) for value in values["metrics"]),
        "runs": tuple(ComparedRun(**value) for value in values["runs"]),
        "rows": tuple(ComparedRow(**row) for row in rows),
        "test_clips": tuple(values["test_clips"]),
    }
    return compared_page(store, Comparison(**{**values, **parts}))


def _catalog(store: ObjectStore) -> str:
    manifest = CatalogManifest(**read_json(store, SUMMARY))
    records = iter_table(store, MANIFEST, AnimationRecord)
    return gallery(store, manifest, records, iter_table_if_any(store, FAILURES, Failure))


# By a file that only this kind has; a catalog's come last, since others have such tables too.
PAGES: Final[Mapping[str, Callable[[ObjectStore], str]]] = {
    STATS: _dataset,
    train_folder.RUN: _run,
    COMPARISON: _comparison,
    "scores.parquet": _scores,
    SUMMARY: _catalog,
}

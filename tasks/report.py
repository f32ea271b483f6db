"""The page of a finished job, written again from its manifests; of a folder of jobs, all of them.

What is at a URI is told by which manifest it has; each kind has one function that reads its
tables and returns the page.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Final

from kpmask.data.dataset import CHANGES, FAILURES, MANIFEST, STATS
from kpmask.errors import DatasetError, KpmaskError, StorageError
from kpmask.records import (
    AnimationRecord,
    CatalogManifest,
    ClipRecord,
    Comparison,
    DatasetChanges,
    DatasetManifest,
    Failure,
    RunManifest,
    ScoreTable,
    StepMetrics,
    ValidationScore,
    VideoScore,
)
from kpmask.report import DatasetSummary, JobKind, dataset_page, overview_page, preview_key
from kpmask.report.previews import PREVIEWS
from kpmask.report.study import scores_page as study_scores_page
from kpmask.report.study import study_page
from kpmask.study import StudyScores, read_study
from tasks import study, train_folder
from tasks.animate import gallery
from tasks.compare import COMPARISON
from tasks.compare import page as compared_page
from tasks.evaluate import SCORES, scores_page
from tasks.manifest import (
    iter_table,
    iter_table_if_any,
    read_record,
    read_table,
    read_table_if_any,
)
from tasks.overview import OVERVIEW, SUMMARY, describe, find_jobs, kind_here, page_key
from tasks.storage import ObjectStore, open_store

log = logging.getLogger(__name__)


def rebuild_page(uri: str) -> str:
    """Write the page of what a job made again; returns its URI.

    Of a folder that holds several jobs, write each one's page, and `overview.html` over them.

    Raises:
        StorageError: `not_found`: nothing that kpmask made is there.
    """
    store = open_store(uri)
    here = store.uri.rstrip("/")
    kind = kind_here(store)
    if kind is not None:
        _rebuild(store, kind, None)
        return f"{here}/{page_key(kind)}"
    if not _overview(store):
        raise StorageError(
            "no dataset, run, catalog, evaluation, comparison or study is here",
            subject=uri,
            code="not_found",
            hint="give what a job got as --out, or a folder of such",
        )
    return f"{here}/{OVERVIEW}"


def _rebuild(store: ObjectStore, kind: JobKind, home: str | None) -> None:
    store.put(page_key(kind), PAGES[kind](store, home).encode())


def _overview(store: ObjectStore) -> bool:
    """Write every job's page and the one over them; whether there is any job."""
    for place in find_jobs(store):
        if place.kind not in PAGES:
            continue
        home = "../" * page_key(place.kind).count("/") + "../" * (place.folder.count("/") + 1)
        try:
            _rebuild(store.child(place.folder), place.kind, home + OVERVIEW)
        except KpmaskError as error:  # one that is damaged or not finished keeps what it has
            log.warning("the page of %s stays as it is: %s", place.folder, error)
    jobs = describe(store, find_jobs(store))
    if jobs:
        title = PurePosixPath(store.uri).name
        store.put(OVERVIEW, overview_page(title=title, jobs=jobs).encode())
    return bool(jobs)


def _failures(store: ObjectStore) -> list[Failure]:
    return read_table_if_any(store, FAILURES, Failure) or []


def _dataset(store: ObjectStore, home: str | None) -> str:
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
        manifest=read_record(store, STATS, DatasetManifest),
        summary=summary,
        changes=read_record(store, CHANGES, DatasetChanges) if changes else None,
        previews={clip_id: key for clip_id, key in previews.items() if key in there},
        home=home,
    )


def _run(store: ObjectStore, home: str | None) -> str:
    done = store.exists(train_folder.MANIFEST)
    manifest = read_record(store, train_folder.MANIFEST, RunManifest) if done else None
    metrics = read_table_if_any(store, train_folder.METRICS, StepMetrics) or []
    scores = read_table_if_any(store, train_folder.VALIDATION, ValidationScore) or []
    return train_folder.page(store, manifest, metrics, scores, home=home)


def _scores(store: ObjectStore, home: str | None) -> str:
    scores = read_table(store, SCORES, VideoScore)
    table = read_record(store, SUMMARY, ScoreTable)
    return scores_page(store, table, scores, _failures(store), home=home)


def _comparison(store: ObjectStore, home: str | None) -> str:
    return compared_page(store, read_record(store, COMPARISON, Comparison), home=home)


def _catalog(store: ObjectStore, home: str | None) -> str:
    manifest = read_record(store, SUMMARY, CatalogManifest)
    records = iter_table(store, MANIFEST, AnimationRecord)
    failures = iter_table_if_any(store, FAILURES, Failure)
    return gallery(store, manifest, records, failures, home=home)


def _study(store: ObjectStore, home: str | None) -> str:
    """Participants get this page: it leads to nothing that would tell who is who."""
    try:
        return study_page(read_study(store.get(study.KEY)))
    except ValueError as error:
        cause = f"no study's key, or changed: {error}"
        raise DatasetError(cause, subject=f"{store.uri}/{study.KEY}") from error


def _study_scores(store: ObjectStore, home: str | None) -> str:
    scores = read_record(store, SUMMARY, StudyScores)
    return study_scores_page(scores, _failures(store), home=home)


PAGES: Final[Mapping[JobKind, Callable[[ObjectStore, str | None], str]]] = {
    "dataset": _dataset,
    "run": _run,
    "study": _study,
    "study scores": _study_scores,
    "comparison": _comparison,
    "evaluation": _scores,
    "animations": _catalog,
}

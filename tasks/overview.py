"""What jobs left in a folder, however deep: found by the files that only they have.

A job's folder may hold others, as a comparison holds its runs; those are the job's own and are not
listed. Only names of objects and one small file of each job are read, so that it does not matter
how much is in them.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from kpmask.data.dataset import STATS
from kpmask.errors import KpmaskError
from kpmask.records import (
    CatalogManifest,
    Comparison,
    DatasetManifest,
    RunManifest,
    ScoreSummary,
    ScoreTable,
)
from kpmask.report import FoundJob, JobKind
from kpmask.report.gallery import POSTERS
from kpmask.report.metric_labels import metric_label
from kpmask.report.page import figure, num
from kpmask.report.previews import PREVIEWS
from kpmask.study import StudyManifest, StudyScores
from tasks import study, train_folder
from tasks.compare import COMPARISON
from tasks.evaluate import SCORES
from tasks.manifest import read_json, read_record
from tasks.storage import ObjectStore

log = logging.getLogger(__name__)

OVERVIEW: Final = "overview.html"
PAGE: Final = "index.html"
SUMMARY: Final = "summary.json"
STRIP: Final = "strip.png"

# By a file that only this kind has; a catalog's come last, since others have such a file too.
MARKERS: Final[Mapping[str, JobKind]] = {
    STATS: "dataset",
    train_folder.RUN: "run",
    study.STUDY: "study",
    study.SHARES: "study scores",
    COMPARISON: "comparison",
    SCORES: "evaluation",
    SUMMARY: "animations",
}
PAGES: Final[Mapping[JobKind, str]] = {"study": f"{study.PUBLIC}/{study.PAGE}"}
PICTURES: Final[Mapping[JobKind, str]] = {
    "dataset": PREVIEWS,
    "run": train_folder.SAMPLES,
    "animations": POSTERS,
    "evaluation": "media",
}


@dataclass(frozen=True, slots=True)
class JobPlace:
    """A folder that a job wrote to: its key prefix without a slash, and where its page goes."""

    kind: JobKind
    folder: str
    has_page: bool
    picture: str

    @property
    def page(self) -> str:
        return f"{self.folder}/{page_key(self.kind)}".lstrip("/")


def page_key(kind: JobKind) -> str:
    """Where a job's page is in its folder."""
    return PAGES.get(kind, PAGE)


def kind_here(store: ObjectStore) -> JobKind | None:
    """What job wrote to the store's root, if one did."""
    return next((kind for marker, kind in MARKERS.items() if store.exists(marker)), None)


def find_jobs(store: ObjectStore) -> list[JobPlace]:
    """The jobs below the store's root, front pages first, in the order of their folders."""
    markers: dict[str, set[str]] = defaultdict(set)
    pages: set[str] = set()
    pictures: dict[str, str] = {}
    for info in store.list():
        folder, _, name = info.key.rpartition("/")
        if name in MARKERS and folder:
            markers[folder].add(name)
        elif name == PAGE:
            pages.add(info.key)
        elif name == STRIP:
            pictures[folder] = info.key
        elif name.endswith((".jpg", ".png")) and folder.rpartition("/")[2] in PICTURES.values():
            # The last of a run's samples, the first of what has no order in time.
            later = folder.endswith(train_folder.SAMPLES)
            choose = max if later else min
            pictures[folder] = choose(pictures.get(folder, info.key), info.key)
    places = list(_places(markers, pages, pictures))
    return [*_front_pages(places, pages), *places]


def _places(
    markers: Mapping[str, set[str]], pages: set[str], pictures: Mapping[str, str]
) -> Iterator[JobPlace]:
    above = ""
    for folder in sorted(markers, key=lambda key: key.split("/")):
        if above and folder.startswith(f"{above}/"):
            continue
        above = folder
        kind = next(kind for marker, kind in MARKERS.items() if marker in markers[folder])
        place = f"{folder}/{PICTURES[kind]}" if kind in PICTURES else folder
        has_page = f"{folder}/{page_key(kind)}" in pages
        yield JobPlace(kind, folder, has_page, pictures.get(place, ""))


def _front_pages(places: Sequence[JobPlace], pages: set[str]) -> Iterator[JobPlace]:
    """Pages of folders that are no job's and have jobs in them, as a demonstration's is."""
    jobs = {place.folder for place in places}
    holding = {str(parent) for folder in jobs for parent in PurePosixPath(folder).parents} - jobs
    for folder in sorted(holding):
        place = JobPlace("front page", "" if folder == "." else folder, True, "")
        if place.page in pages:
            yield place


def describe(store: ObjectStore, places: Sequence[JobPlace]) -> list[FoundJob]:
    """What the overview tells of each job; nothing but its name where its file is damaged."""
    return [_found(store.child(place.folder), place) for place in places]


def _found(store: ObjectStore, place: JobPlace) -> FoundJob:
    page = place.page if place.has_page else ""
    if place.kind == "front page":
        return FoundJob(place.kind, place.folder or PAGE, page)
    try:
        facts, failures, going_on = FACTS[place.kind](store)
    except KpmaskError as error:
        log.warning("%s cannot be described: %s", place.folder, error)
        return FoundJob(place.kind, place.folder, page, ("It cannot be read.",))
    return FoundJob(place.kind, place.folder, page, facts, place.picture, failures, going_on)


# --- facts: a few words, failures, and whether it goes on -------------------------------------

_Told = tuple[tuple[str, ...], int, bool]


def _dataset(store: ObjectStore) -> _Told:
    found = read_record(store, STATS, DatasetManifest)
    clips = f"{num(found.num_train)} training and {num(found.num_test)} test clips"
    return (clips, f"{num(found.num_frames)} frames"), found.num_failures, False


def _run(store: ObjectStore) -> _Told:
    if not store.exists(train_folder.MANIFEST):
        return (f"Run {read_json(store, train_folder.RUN).get('run_id', '')}",), 0, True
    found = read_record(store, train_folder.MANIFEST, RunManifest)
    steps = f"{found.system}, {num(found.num_steps)} steps"
    return (steps, f"Last loss {figure(found.final_loss)}"), 0, False


def _animations(store: ObjectStore) -> _Told:
    found = read_record(store, SUMMARY, CatalogManifest)
    made = f"{num(found.num_items)} animations, {num(found.num_frames)} frames"
    return (made,), found.num_failures, False


def _evaluation(store: ObjectStore) -> _Told:
    if not store.exists(SUMMARY):
        return (), 0, True
    found = read_record(store, SUMMARY, ScoreTable)
    means = ", ".join(
        f"{metric_label(row.metric).label} {figure(row.mean)}" for row in _first_rows(found)
    )
    videos = f"{num(found.num_videos)} videos, {found.setting.replace('_', '-')}"
    return (videos, *((means,) if means else ())), found.num_failures, False


def _first_rows(table: ScoreTable) -> Iterator[ScoreSummary]:
    """The model's first three means."""
    return itertools.islice((row for row in table.summaries if row.method == "model"), 3)


def _comparison(store: ObjectStore) -> _Told:
    found = read_record(store, COMPARISON, Comparison)
    systems = dict.fromkeys(run.system for run in found.runs)
    clips = f"{num(len(systems))} systems on {num(len(found.test_clips))} test clips"
    return (clips, ", ".join(systems)), 0, found.num_runs_left > 0


def _study(store: ObjectStore) -> _Told:
    found = read_record(store, study.STUDY, StudyManifest)
    items = f"{num(found.num_items)} items, {num(found.num_repeats)} of them shown twice"
    return (items, ", ".join(found.methods)), found.num_failures, False


def _study_scores(store: ObjectStore) -> _Told:
    found = read_record(store, SUMMARY, StudyScores)
    answers = f"{num(found.num_participants)} participants, {num(found.num_answers)} answers"
    return (found.title, answers), found.num_failures, False


FACTS: Final[Mapping[JobKind, Callable[[ObjectStore], _Told]]] = {
    "dataset": _dataset,
    "run": _run,
    "animations": _animations,
    "evaluation": _evaluation,
    "comparison": _comparison,
    "study": _study,
    "study scores": _study_scores,
}

"""Folders of videos -> a study that people answer in a browser; their answers -> shares.

    key.json           what the blind names mean: for who made the study, not for who answers
    failures.parquet   items that could not be shown
    public/            what participants get: a page and its media, to be opened or served as it is
    study.json         written last

- Methods' videos are matched by their names without suffix, as `kpmask evaluate` matches two
  folders. An output of `kpmask animate` for a catalog counts by its manifest's names, and knows its
  images and driving videos itself.
- The same inputs and seed make the same study, byte for byte. A folder that holds another study is
  left alone: answers to it may be on their way.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kpmask.config import MediaLimits
from kpmask.data.layouts import IMAGE_SUFFIXES, find_sources
from kpmask.errors import ConfigError, ItemError, MediaError, RunFailed, StorageError
from kpmask.records import AnimationRecord, Failure, Progress, digest
from kpmask.report.study import scores_page, study_page
from kpmask.study import (
    MAX_ANSWERS_BYTES,
    Answer,
    AnswerError,
    MethodShare,
    Preference,
    Study,
    StudyItem,
    StudyManifest,
    StudyScores,
    check_methods,
    make_study,
    read_answers,
    read_study,
    score_answers,
    too_large,
)
from tasks import storage
from tasks.catalog import failure_of
from tasks.manifest import read_json, read_table, read_table_metadata, write_json, write_table
from tasks.storage import ObjectStore, absolute
from tasks.study_media import MEDIA, MatchedItem, make_item

OnProgress = Callable[[Progress], None]

PUBLIC: Final = "public"
PAGE: Final = "index.html"
KEY: Final = "key.json"
STUDY: Final = "study.json"
FAILURES: Final = "failures.parquet"
ANSWERS: Final = "answers.parquet"
SHARES: Final = "shares.parquet"
PREFERENCES: Final = "preferences.parquet"
SUMMARY: Final = "summary.json"
CATALOG: Final = "manifest.parquet"
STAGE: Final = "study"
ANSWERS_STAGE: Final = "answers"


@dataclass(frozen=True, slots=True)
class StudySettings:
    """What a study is to be of.

    Attributes:
        methods: name and folder of each, two or more.
        out: folder or `s3://`.
        driving: folder of the driving videos; None where every method is a catalog's output.
        source: folder of the images that were animated, where they are to be shown.
        num_items: how many to show, drawn by `seed`; None is all.
        max_s: what is longer is cut.
    """

    methods: tuple[tuple[str, str], ...]
    out: str
    driving: str | None = None
    source: str | None = None
    seed: int = 0
    num_items: int | None = None
    title: str = "Which video is better?"
    max_s: float = 20.0


# --- make ------------------------------------------------------------------------------------


def make(
    settings: StudySettings,
    *,
    limits: MediaLimits | None = None,
    on_progress: OnProgress | None = None,
) -> StudyManifest:
    """Write the study's page, media and key.

    Raises:
        ConfigError: methods that cannot be told apart, nothing to show, or `out` holds another
            study.
        StorageError: a store denies, lacks space or does not answer.
        RunFailed: code no_output: not one item could be shown.
    """
    names = [name for name, _ in settings.methods]
    check_methods(names, settings.title)
    matched, failures = _matched(settings)
    store = storage.open_store(settings.out)
    with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
        media = Path(folder) / MEDIA
        media.mkdir()
        items = []
        wanted = min(settings.num_items or len(matched), len(matched))
        for found in _made(matched, media, settings, limits or MediaLimits()):
            if isinstance(found, Failure):
                failures.append(found)
            else:
                items.append(found)
            if on_progress is not None:
                on_progress(Progress(STAGE, len(items), wanted, f"{len(failures)} failures"))
            if len(items) == wanted:
                break
        failures.sort(key=lambda failure: (failure.item, failure.code, failure.cause))
        if not items:
            if not store.exists(STUDY):
                write_table(store, FAILURES, failures, Failure)
            cause = f"no item could be shown; for one, {failures[0].item}: {failures[0].cause}"
            raise RunFailed(cause, code="no_output")
        study = make_study(settings.title, names, items)
        _check_free(store, study)
        return _publish(store, study, media, failures)


def _made(
    matched: Sequence[MatchedItem], media: Path, settings: StudySettings, limits: MediaLimits
) -> Iterator[StudyItem | Failure]:
    """The items in the order in which the seed draws them."""
    for item in sorted(matched, key=lambda item: digest([settings.seed, item.name])):
        try:
            yield make_item(item, media, seed=settings.seed, max_s=settings.max_s, limits=limits)
        except ItemError as error:
            yield failure_of(item.name, STAGE, error)


def _check_free(store: ObjectStore, study: Study) -> None:
    if not store.exists(STUDY):
        return
    if read_json(store, STUDY).get("study_id") != study.study_id:
        raise ConfigError(
            "another study is here, whose answers would be lost",
            subject=store.uri,
            hint="give another --out, or remove it",
        )


def _publish(
    store: ObjectStore, study: Study, media: Path, failures: Sequence[Failure]
) -> StudyManifest:
    """Media, page and key; then what an earlier run left of others; the manifest last."""
    shown = {
        key.removeprefix(f"{MEDIA}/")
        for item in study.items
        for key in (item.driving, item.source, *(f"{MEDIA}/{video}.mp4" for video in item.videos))
        if key
    }
    for name in sorted(shown):  # an item that failed half-way has left files that are not shown
        store.put_file(f"{PUBLIC}/{MEDIA}/{name}", media / name)
    for info in list(store.list(f"{PUBLIC}/{MEDIA}/")):
        if info.key.removeprefix(f"{PUBLIC}/{MEDIA}/") not in shown:
            store.delete(info.key)
    store.put(f"{PUBLIC}/{PAGE}", study_page(study).encode())
    write_table(store, FAILURES, failures, Failure)
    write_json(store, KEY, study)
    manifest = StudyManifest(
        uri=store.uri,
        page=f"{store.uri.rstrip('/')}/{PUBLIC}/{PAGE}",
        study_id=study.study_id,
        methods=study.methods,
        num_items=len(study.items),
        num_repeats=study.num_repeats,
        num_failures=len(failures),
    )
    write_json(store, STUDY, manifest)
    return manifest


# --- which videos belong together ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Made:
    """A method's folder: URIs by name, and of a catalog's output what they were made from.

    `inputs` are the digests of image and driving video; empty where nothing says them.
    """

    results: Mapping[str, str]
    drivings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)


def _matched(settings: StudySettings) -> tuple[list[MatchedItem], list[Failure]]:
    """Names that everything has, in alphabetic order, and a failure for each lack."""
    made = {method: _method_folder(uri) for method, uri in settings.methods}
    folders: dict[str, Mapping[str, str]] = {f"method {m}": f.results for m, f in made.items()}
    first = next(iter(made.values()))
    drivings, sources = first.drivings, first.sources
    if settings.driving is not None:
        drivings = folders["--driving"] = _files(settings.driving)
    elif not all(folder.inputs for folder in made.values()):
        raise ConfigError(
            "not every method is the output of a catalog, which would name the driving videos",
            subject="--driving",
            hint="give the folder of driving videos",
        )
    if settings.source is not None:
        sources = folders["--source"] = _files(settings.source, pictures=True)
    failures = []
    names = sorted(set().union(*folders.values()))
    for place, files in folders.items():
        for name in names:
            if name not in files:
                error = MediaError(f"{place} has no file of this name", code="not_found")
                failures.append(failure_of(name, STAGE, error))
    matched = []
    for name in names:
        if not all(name in files for files in folders.values()):
            continue
        if settings.driving is None and len({f.inputs[name] for f in made.values()}) > 1:
            cause = "the methods animated different images or driving videos under this name"
            error = MediaError(cause, code="inconsistent_frames")
            failures.append(failure_of(name, STAGE, error))
            continue
        results = {method: folder.results[name] for method, folder in made.items()}
        matched.append(MatchedItem(name, drivings[name], sources.get(name, ""), results))
    if not matched and not failures:
        raise ConfigError("no videos here", subject="--method", code="nothing_to_do")
    return matched, failures


def _method_folder(uri: str) -> _Made:
    """A method's videos by name: a catalog's output, or a plain folder.

    Raises:
        ConfigError: there is none.
    """
    store = storage.open_store(absolute(uri))
    if not _is_catalog(store):
        return _Made(_files(uri))
    records = read_table(store, CATALOG, AnimationRecord)
    return _Made(
        {record.name: f"{store.uri.rstrip('/')}/{record.key}" for record in records},
        {record.name: record.driving for record in records},
        {record.name: record.source for record in records},
        {record.name: (record.source_sha256, record.driving_sha256) for record in records},
    )


def _is_catalog(store: ObjectStore) -> bool:
    if not store.exists(CATALOG):
        return False
    return read_table_metadata(store, CATALOG).get("kpmask_record") == AnimationRecord.__name__


def _files(uri: str, *, pictures: bool = False) -> Mapping[str, str]:
    """The videos of a folder, or its pictures, URI by name.

    Raises:
        ConfigError: there is none.
    """
    uri = absolute(uri)
    keys = (info.key for info in storage.open_store(uri).list())
    found = find_sources(keys, suffixes=IMAGE_SUFFIXES if pictures else None)
    if not found:
        what = "pictures" if pictures else "videos"
        raise ConfigError(f"no {what} here", subject=uri, code="nothing_to_do")
    return {source.name: f"{uri.rstrip('/')}/{source.key}" for source in found}


# --- score -----------------------------------------------------------------------------------


def score(study_uri: str, answers: Sequence[str], out: str, *, seed: int = 0) -> StudyScores:
    """Count the answers to a study, and publish tables, summary and page.

    Args:
        study_uri: what `make` got as `out`.
        answers: files that the page gave out, or folders of them.
        seed: of the intervals' draws.

    Raises:
        ConfigError: there is no study, its key was changed, or no file of answers.
        StorageError: a store denies or does not answer; a given file is not there.
        RunFailed: code no_output: no file could be counted; `failures.parquet` says why.
    """
    study = _open_study(study_uri)
    store = storage.open_store(out)
    counted, failures = _read_all(study, answers)
    write_table(store, FAILURES, failures, Failure)
    if not counted:
        raise RunFailed(
            f"no answers could be counted; for one, {failures[0].item}: {failures[0].cause}",
            code="no_output",
        )
    scores = score_answers(study, counted, uri=store.uri, num_failures=len(failures), seed=seed)
    write_table(store, ANSWERS, counted, Answer)
    write_table(store, SHARES, scores.shares, MethodShare)
    write_table(store, PREFERENCES, scores.preferences, Preference)
    store.put(PAGE, scores_page(scores, failures).encode())
    write_json(store, SUMMARY, scores)
    return scores


def _open_study(uri: str) -> Study:
    try:
        return read_study(storage.open_store(uri).get(KEY))
    except StorageError as error:
        if error.code != "not_found":
            raise
        cause = f"no {KEY} is here"
        raise ConfigError(cause, subject=uri, hint="give what `study make` got as --out") from error
    except ValueError as error:
        raise ConfigError(f"{KEY} is no study's, or was changed", subject=uri) from error


def _read_all(study: Study, answers: Sequence[str]) -> tuple[list[Answer], list[Failure]]:
    """The answers of each participant once, and what could not be counted."""
    counted: list[Answer] = []
    failures: list[Failure] = []
    first_file: dict[str, str] = {}
    for label, store, key in _answer_files(answers):
        try:
            size_bytes = store.info(key).size_bytes
            if size_bytes > MAX_ANSWERS_BYTES:
                raise too_large(size_bytes)
            found = read_answers(store.get(key), study)
            earlier = first_file.setdefault(found[0].participant, label)
            if earlier != label:
                cause = f"the participant of {earlier}"
                raise AnswerError(cause, code="duplicate_participant")
            counted += found
        except AnswerError as error:
            failures.append(failure_of(label, ANSWERS_STAGE, error))
    return counted, failures


def _answer_files(answers: Sequence[str]) -> list[tuple[str, ObjectStore, str]]:
    """The files, each with a label, by label; of a folder all that are not hidden.

    Raises:
        ConfigError: there is none.
    """
    found: dict[str, tuple[str, ObjectStore, str]] = {}
    for uri in map(absolute, answers):
        if uri.endswith((".json", ".txt")) or ("://" not in uri and Path(uri).is_file()):
            store, key = storage.open_object(uri)
            found[uri] = (uri, store, key)
            continue
        store = storage.open_store(uri)
        for info in store.list():
            if not any(part.startswith(".") for part in info.key.split("/")):
                label = f"{uri.rstrip('/')}/{info.key}"
                found[label] = (label, store, info.key)
    if not found:
        raise ConfigError("no answers here", subject=", ".join(answers), code="nothing_to_do")
    return [found[label] for label in sorted(found)]

"""What a run of preprocess is to do: rows and files in, the tables of a plan out.

Planning a table of a million rows takes a minute, so a plan is kept in the user's cache by a digest
of all that it was made from: a run that was killed goes on without planning again.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Final

from kpmask.config import PreprocessJob
from kpmask.data.layouts import (
    VIDEO_SUFFIXES,
    MediaSource,
    assign_splits,
    find_sources,
    partition_of,
)
from kpmask.data.metadata import checked_name, leaking_rows
from kpmask.data.sources import identity_of, source_rows
from kpmask.errors import ConfigError, ItemError, StorageError
from kpmask.preprocess import failure_of
from kpmask.records import Partition, SourceRow, digest
from tasks.cache import user_cache
from tasks.sqlite_book import full_disks
from tasks.storage import ObjectInfo, ObjectStore, local_copy, open_store, os_errors
from tasks.workbook import Workbook

PLAN_VERSION: Final = 1  # of the tables
KEPT_PLANS: Final = 8


@contextmanager
def planned(job: PreprocessJob, folder: Path) -> Iterator[tuple[Workbook, ObjectStore]]:
    """The plan of a job, and the store of its raw videos.

    Args:
        folder: where the workbook lies.

    Raises:
        ConfigError: there is nothing to do, or the input is not what it should be.
        StorageError: a store does not answer.
    """
    path = folder / "run.sqlite"
    with full_disks(path):
        yield from _planned(job, path)


def _planned(job: PreprocessJob, path: Path) -> Iterator[tuple[Workbook, ObjectStore]]:
    if job.metadata is not None:
        raw = open_store(job.raw) if job.raw else open_store(job.out).child("raw")
        with os_errors(str(path)):
            shutil.copyfile(_table_plan(job), path)
        with Workbook(path) as book:
            book.set_files(_raw_videos(raw.list(), files_of(job)))
            yield book, raw
        return
    video_of = _video_of_camera if job.source_kind == "robonet" else str
    with Workbook(path, video_of=video_of) as book:
        book.create()
        yield book, _list_videos_into(book, job)


def files_of(job: PreprocessJob) -> frozenset[str]:
    """The suffixes of a job's raw videos."""
    return ROBONET_SUFFIXES if job.source_kind == "robonet" else VIDEO_SUFFIXES


ROBONET_SUFFIXES: Final = frozenset({".hdf5", ".h5"})


def _video_of_camera(video_id: str) -> str:
    """The trajectory's name, which may have a `#` itself, by that of one of its cameras."""
    return video_id.rpartition("#")[0]


# --- tables and annotations ------------------------------------------------------------------


def _table_plan(job: PreprocessJob) -> Path:
    """The plan of a job's annotations, made now or by an earlier run."""
    assert job.metadata is not None
    source = _local_annotations(job.metadata)
    name = source.name if Path(job.metadata).exists() else job.metadata.rpartition("/")[2]
    split = [sorted(job.clips.test_identities), job.clips.test_fraction]
    made_from = [PLAN_VERSION, job.source_kind, name, _content_of(source), split]
    folder = user_cache().folder.parent / "plans"
    path = folder / f"{digest(made_from)}.sqlite"
    with os_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.utime(path)
            return path
    temporary = folder / f".tmp-{secrets.token_hex(8)}.sqlite"
    try:
        with os_errors(str(folder)), _named(source, name) as named, full_disks(temporary):
            _make_plan(temporary, job, named)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _forget_old(folder, keep=path)
    return path


def _make_plan(path: Path, job: PreprocessJob, source: Path) -> None:
    with Workbook(path) as book:
        book.create()
        rows = source_rows(
            job.source_kind,
            source,
            test_identities=frozenset(job.clips.test_identities),
            test_fraction=job.clips.test_fraction,
        )
        book.add_rows(rows)
        book.check_rows(source.name)
        book.group_rows()


@contextmanager
def _named(source: Path, name: str) -> Iterator[Path]:
    """A file by its own name, which messages have, where it is a copy out of an object store."""
    if source.name == name:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
        link = Path(folder) / name
        link.symlink_to(source)
        yield link


def _local_annotations(reference: str) -> Path:
    """A local file or folder of annotations."""
    if "://" not in reference and Path(reference).is_dir():
        return Path(reference)
    try:
        return local_copy(reference)
    except StorageError as error:
        if error.code != "not_found":
            raise
        raise ConfigError("no such file", subject=reference) from error


def _content_of(path: Path) -> str:
    """A digest of a file's content, or of the names, sizes and times of a folder's files."""
    if not path.is_dir():
        with os_errors(str(path)), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    found = hashlib.sha256()
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            status = (Path(folder) / name).stat()
            found.update(f"{folder}/{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return found.hexdigest()


def _forget_old(folder: Path, *, keep: Path) -> None:
    """Remove the plans that were used longest ago."""
    plans = []
    for path in folder.glob("*.sqlite"):
        with contextlib.suppress(FileNotFoundError):  # another run forgets too
            plans.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(plans, reverse=True)[KEPT_PLANS:]:
        if path != keep:
            path.unlink(missing_ok=True)


def _raw_videos(
    found: Iterator[ObjectInfo], suffixes: frozenset[str]
) -> Iterator[tuple[str, ObjectInfo]]:
    """The raw videos of a store, by the name of the video."""
    for info in found:
        path = PurePosixPath(info.key)
        if len(path.parts) == 1 and path.suffix.lower() in suffixes:
            yield path.name.removesuffix(path.suffix), info


# --- videos without annotations --------------------------------------------------------------


def _list_videos_into(book: Workbook, job: PreprocessJob) -> ObjectStore:
    """Make an item of each video of a folder, a pattern or a prefix."""
    assert job.videos is not None
    raw, infos, empty = list_videos(job.videos)
    infos, empty = _without_own(raw, infos, empty, job)
    suffixes = ROBONET_SUFFIXES if job.source_kind == "robonet" else None
    sources = find_sources(infos, empty_folders=empty, suffixes=suffixes)
    if not sources:
        what = "RoboNet trajectory (.hdf5)" if suffixes else "video, GIF or folder of images"
        raise ConfigError(f"no {what} here", subject=job.videos, code="nothing_to_do")
    usable = []
    for source in sources:
        try:
            checked_name(source.name, what="the name")
            usable.append(source)
        except ItemError as error:
            book.add_failures([failure_of(source.key, "metadata", error)], planned=True)
    rows = _video_rows(usable, job)
    leaking = leaking_rows(list(rows.values()))
    for source in usable:
        row = rows[source.key]
        if row.line in leaking:
            failure = failure_of(source.key, "metadata", leaking[row.line])
            book.add_failures([failure], planned=True)
            continue
        files = [infos[key] for key in source.files]
        book.add_item(source.name, row, files, is_folder=source.is_folder)
    return raw


def _without_own(
    raw: ObjectStore, infos: dict[str, ObjectInfo], empty: list[str], job: PreprocessJob
) -> tuple[dict[str, ObjectInfo], list[str]]:
    """Less what lies in the dataset, whose previews and folders are pictures, too."""
    out = open_store(job.out).uri
    if out == raw.uri:
        raise ConfigError(
            "the dataset and its videos are in one folder", subject=job.out, hint="choose another"
        )
    if not out.startswith(f"{raw.uri}/"):
        return infos, empty
    own = out.removeprefix(f"{raw.uri}/")

    def is_own(key: str) -> bool:
        return f"{key}/".startswith(f"{own}/")

    return {k: v for k, v in infos.items() if not is_own(k)}, [k for k in empty if not is_own(k)]


def _video_rows(sources: Sequence[MediaSource], job: PreprocessJob) -> dict[str, SourceRow]:
    """A row for each whole video, by its key: in the split of its folder, or in a drawn one."""
    kind = job.source_kind
    identities = {s.key: identity_of(kind, s.own_name) for s in sources}
    tested = frozenset(job.clips.test_identities)
    free = [identities[s.key] for s in sources if s.partition is None]
    drawn = assign_splits(free, test_fraction=job.clips.test_fraction)

    def partition(source: MediaSource) -> Partition:
        name = identities[source.key]
        if tested:
            return partition_of(name, test_identities=tested, test_fraction=0.0)
        return source.partition or drawn[name]

    return {
        source.key: SourceRow(
            line=number,
            video_id=source.name,
            partition=partition(source),
            identity=identities[source.key],
        )
        for number, source in enumerate(sources)
    }


def list_videos(uri: str) -> tuple[ObjectStore, dict[str, ObjectInfo], list[str]]:
    """The store, its files by key, and its empty folders, of a folder, a pattern or one file."""
    if "://" in uri:
        store = open_store(uri)
        return store, {info.key: info for info in store.list()}, []
    path = Path(uri)
    if path.is_dir():
        matches, root = [path], path
    elif path.exists():
        matches, root = [path], path.parent
    else:
        root = _fixed_part(path)
        matches = sorted(root.glob(str(path.relative_to(root))))
    paths = {p for match in matches for p in [match, *match.rglob("*")]} - {root}
    keys = {str(p.relative_to(root)): p for p in paths}
    store = open_store(str(root))
    infos = {info.key: info for info in store.list() if info.key in keys}
    empty = [key for key, p in keys.items() if p.is_dir() and not _shown(p)]
    return store, infos, [key for key in empty if not key.startswith(".") and "/." not in key]


def _shown(folder: Path) -> bool:
    """Whether there is anything in a folder that is not hidden."""
    return any(not path.name.startswith(".") for path in folder.iterdir())


def _fixed_part(pattern: Path) -> Path:
    """The folder before the first part of a path with a wildcard in it."""
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)

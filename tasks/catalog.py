"""What a catalog asks for: rows, their inputs found and hashed, and the id of each result.

- An input is named by the digest of its content, so that files may move and be given twice, and a
  changed file makes a new result.
- A folder of images is one driving video. Its digest is that of its files' names and contents.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from kpmask import checkpoint, compose, provenance
from kpmask.animate import Transfer
from kpmask.config import AnimateJob
from kpmask.data import catalog
from kpmask.data.layouts import IMAGE_SUFFIXES, find_sources
from kpmask.errors import ConfigError, ItemError, MediaError, RowError, StorageError
from kpmask.models.base import AnimationSystem
from kpmask.records import AnimationItem, CatalogRow, Failure, digest
from tasks import storage
from tasks.storage import ObjectStore, absolute
from tasks.weights import local_weights

RESULT_VERSION: Final = 1  # raise it when the same inputs give another video
HASH_THREADS: Final = 8
ID_LENGTH: Final = 32
_WILDCARDS = "*?["


@dataclass(frozen=True, slots=True)
class CatalogPlan:
    """What is to be made. `items` are ordered by driving video, then source."""

    items: tuple[AnimationItem, ...]
    failures: tuple[Failure, ...]
    weights_sha256: str
    settings_digest: str


def plan_catalog(job: AnimateJob) -> CatalogPlan:
    """Read the catalog or match the globs, find and hash every input.

    Raises:
        ConfigError: there is nothing to do, a column is wrong, or the motion is not supported.
        CheckpointError: the weights cannot be read.
        StorageError: a store denies or does not answer.
    """
    provenance.identity(job.credentials)  # a certificate that cannot sign is refused at once
    loaded = checkpoint.load(local_weights(job.checkpoint))
    _check_motion(job, loaded.system)
    rows, failures = _rows(job)
    rows, unsupported = _supported(rows, loaded.system)
    hashes = _hashes({uri for row in rows for uri in (row.source, row.driving)})
    settings = settings_digest(job, loaded.sha256)
    items, broken = _items(rows, hashes, settings)
    return CatalogPlan(
        items=tuple(sorted(items, key=lambda i: (i.driving_sha256, i.source_sha256, i.item_id))),
        failures=(*failures, *unsupported, *broken),
        weights_sha256=loaded.sha256,
        settings_digest=settings,
    )


def settings_digest(job: AnimateJob, weights_sha256: str) -> str:
    """Of all that shapes every result of a job, but not of where it runs."""
    return digest(
        {
            "version": RESULT_VERSION,
            "weights": weights_sha256,
            "limits": job.limits.model_dump(mode="json"),
            "min_driving_frames": job.min_driving_frames,
            "compose": compose.VERSION,
            # What else of `output` there is, an item's own cells say.
            "crop_increase": job.output.crop_increase,
            "no_subject": job.output.no_subject,
            "feather": job.output.feather,
            "credentials": provenance.identity(job.credentials),
        }
    )


def failure_of(item: str, stage: str, error: ItemError) -> Failure:
    """The failure row of an item that an error ended."""
    return Failure(item, stage, error.code, error.cause, error.retryable, attempts=1)


# --- rows ------------------------------------------------------------------------------------


def _rows(job: AnimateJob) -> tuple[list[CatalogRow], list[Failure]]:
    defaults = catalog.RowDefaults(
        *(job.motion, job.adapt_scale, job.best_frame, job.audio),
        **job.output.delivery().delivery(),
    )
    if job.catalog is not None:
        uri = absolute(job.catalog)
        base = uri.rpartition("/")[0] or "/"
        return catalog.read_catalog(_catalog_file(uri), defaults, base=base)
    assert job.sources is not None and job.drivings is not None
    sources = matching(job.sources, folders=False)
    return catalog.grid_rows(sources, matching(job.drivings, folders=True), defaults), []


def _catalog_file(uri: str) -> Path:
    try:
        return storage.local_copy(uri)
    except StorageError as error:
        if error.code == "not_found" and "://" not in uri:
            return Path(uri)  # `read_catalog` says what is wrong with it
        raise


def _check_motion(job: AnimateJob, system: AnimationSystem[Any, Any]) -> None:
    """The job's own choice must be possible; in a catalog it is only what rows start from."""
    of_a_row = job.catalog is None
    Transfer(job.motion, of_a_row and job.adapt_scale, of_a_row and job.best_frame).check(system)


def _supported(
    rows: Sequence[CatalogRow], system: AnimationSystem[Any, Any]
) -> tuple[list[CatalogRow], list[Failure]]:
    """Rows whose motion the system has, and failures of the others."""
    good = [row for row in rows if row.motion in system.motions]
    names = ", ".join(sorted(system.motions))
    failures = [
        failure_of(
            row.name, catalog.STAGE, RowError(f"this checkpoint supports {names} motion only")
        )
        for row in rows
        if row.motion not in system.motions
    ]
    return good, failures


def _items(
    rows: Sequence[CatalogRow], hashes: dict[str, str | ItemError], settings: str
) -> tuple[list[AnimationItem], list[Failure]]:
    items: dict[str, AnimationItem] = {}
    failures = []
    for row in rows:
        try:
            item = _item(row, hashes, settings)
            if item.item_id in items:
                raise RowError(
                    f"the same result as {items[item.item_id].name}", code="duplicate_row"
                )
            items[item.item_id] = item
        except ItemError as error:
            failures.append(failure_of(row.name, catalog.STAGE, error))
    return list(items.values()), failures


def _item(row: CatalogRow, hashes: dict[str, str | ItemError], settings: str) -> AnimationItem:
    found = []
    for uri in (row.source, row.driving):
        sha256 = hashes[uri]
        if isinstance(sha256, ItemError):
            raise sha256
        found.append(sha256)
    wanted = {
        "source": found[0],
        "driving": found[1],
        "settings": settings,
        "motion": row.motion,
        "adapt_scale": row.adapt_scale,
        "best_frame": row.best_frame,
        "audio": row.audio,
        "delivery": row.delivery(),
        "finders": [compose.finder(row.crop), compose.finder(row.driving_crop)],
    }
    return AnimationItem(
        item_id=digest(wanted)[:ID_LENGTH],
        name=row.name,
        source=row.source,
        driving=row.driving,
        source_sha256=found[0],
        driving_sha256=found[1],
        motion=row.motion,
        adapt_scale=row.adapt_scale,
        best_frame=row.best_frame,
        audio=row.audio,
        **row.delivery(),
    )


# --- inputs ----------------------------------------------------------------------------------


def _hashes(uris: set[str]) -> dict[str, str | ItemError]:
    """The digest of each input, or why there is none.

    Raises:
        StorageError: it is the store that is at fault, not the input.
    """

    def hashed(uri: str) -> str | ItemError:
        try:
            with local_media(uri) as path:
                return content_digest(path)
        except ItemError as error:
            return error

    ordered = sorted(uris)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(ordered, pool.map(hashed, ordered), strict=True))


@contextmanager
def local_media(uri: str) -> Iterator[Path]:
    """A local file, or a local folder of images, with the content at `uri`; only to be read.

    Raises:
        MediaError: there is nothing (not_found).
        RowError: the reference makes no sense (bad_row, path_escape).
        StorageError: the store denies or does not answer.
    """
    with contextlib.ExitStack() as stack:
        try:
            store, key = storage.open_object(uri)
            path = _file(store, key) or stack.enter_context(_local_folder(store.child(key)))
        except ConfigError as error:  # a bucket without a key, say
            raise RowError(f"{uri}: {error.cause}", subject=uri) from error
        except StorageError as error:
            if error.code == "not_found":
                raise MediaError(f"{uri}: not found", subject=uri, code="not_found") from error
            if error.code == "path_escape":
                raise RowError(f"{uri}: {error.cause}", subject=uri, code=error.code) from error
            raise
        yield path


def _file(store: ObjectStore, key: str) -> Path | None:
    try:
        return store.local(key)
    except StorageError as error:
        if error.code != "not_found":
            raise
        return None


@contextmanager
def _local_folder(store: ObjectStore) -> Iterator[Path]:
    """The files directly in a folder, under one local folder.

    Raises:
        StorageError: not_found, when there are none.
    """
    if "://" not in store.uri:
        if not Path(store.uri).is_dir():
            raise StorageError("not found", subject=store.uri, code="not_found")
        yield Path(store.uri)
        return
    keys = [info.key for info in store.list() if "/" not in info.key]
    if not keys:
        raise StorageError("not found", subject=store.uri, code="not_found")
    with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
        for key in keys:
            (Path(folder) / key).symlink_to(store.local(key))
        yield Path(folder)


def content_digest(path: Path) -> str:
    """The SHA-256 of a file, or of a folder's files with their names."""
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")]
        return digest([(file.name, content_digest(file)) for file in files])
    with storage.os_errors(str(path)), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- globs -----------------------------------------------------------------------------------


def matching(pattern: str, *, folders: bool) -> list[str]:
    """What a glob, a file or a folder names, as absolute references in order.

    A glob matches part by part; `**` is any number of folders. A folder means the images in it,
    or with `folders` the videos: files, and deeper folders of images.
    """
    pattern = absolute(pattern)
    base, rest = _split_glob(pattern)
    if not rest:
        found = _itself(pattern) or _in_folder(base, folders=folders)
    elif "://" in base:
        found = _remote_matches(base, rest, folders=folders)
    else:
        found = _local_matches(Path(base), rest, folders=folders)
    return sorted({uri for uri in found if not PurePosixPath(uri).name.startswith(".")})


def _local_matches(base: Path, rest: str, *, folders: bool) -> list[str]:
    try:
        paths = list(base.glob(rest))
    except ValueError as error:  # `**` as a part of a name
        raise ConfigError(str(error), subject=rest) from error
    return [str(path) for path in paths if path.is_file() or (folders and path.is_dir())]


def _remote_matches(base: str, rest: str, *, folders: bool) -> list[str]:
    keys = {info.key for info in storage.open_store(base).list()}
    if folders:  # an object store has the folders that something lies in
        keys |= {str(parent) for key in keys for parent in PurePosixPath(key).parents} - {"."}
    patterns = rest.split("/")
    return [f"{base}/{key}" for key in keys if _matches(key.split("/"), patterns)]


def _split_glob(pattern: str) -> tuple[str, str]:
    """The folder before the first part with a wildcard, and the rest."""
    scheme, separator, path = pattern.rpartition("://")
    parts = path.rstrip("/").split("/")
    wild = next((i for i, part in enumerate(parts) if set(part) & set(_WILDCARDS)), len(parts))
    return scheme + separator + ("/".join(parts[:wild]) or "/"), "/".join(parts[wild:])


def _itself(uri: str) -> list[str]:
    if uri == "/" or ("://" in uri and "/" not in uri.partition("://")[2]):
        return []  # a root or a bucket is no object
    store, key = storage.open_object(uri)
    return [uri] if store.exists(key) else []


def _in_folder(uri: str, *, folders: bool) -> list[str]:
    keys = [info.key for info in storage.open_store(uri).list()]
    if folders:
        keys = [source.key for source in find_sources(keys)]
    else:
        suffixes = {key: PurePosixPath(key).suffix.lower() for key in keys if "/" not in key}
        keys = [key for key, suffix in suffixes.items() if suffix in IMAGE_SUFFIXES]
    return [f"{uri.rstrip('/')}/{key}" for key in keys]


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_matches(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    head = bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0])
    return head and _matches(parts[1:], patterns[1:])

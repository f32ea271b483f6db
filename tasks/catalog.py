"""What a catalog asks for: rows, their inputs found and hashed, and the id of each result.

- Rows, inputs and items are tables (`CatalogBook`), however many they are: memory is flat.
- An input is named by the digest of its content, so that files may move and be given twice, and a
  changed file makes a new result.
- A folder of images is one driving video. Its digest is that of its files' names and contents.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from kpmask import checkpoint, compose, provenance
from kpmask.animate import Transfer
from kpmask.config import AnimateJob, MediaLimits
from kpmask.data import catalog
from kpmask.errors import ItemError, MediaError, StorageError
from kpmask.media.probe import probe
from kpmask.models.base import AnimationSystem
from kpmask.records import AnimationItem, CatalogRow, Delivery, Failure, digest
from tasks import hashes, storage
from tasks.catalog_book import CatalogBook, Input
from tasks.globs import matching
from tasks.hashes import HashCache, Known
from tasks.inputs import ID_LENGTH, content_digest, item_errors, local_media
from tasks.outage import patiently
from tasks.sqlite_book import full_disks
from tasks.storage import absolute
from tasks.weights import local_weights

RESULT_VERSION: Final = 1  # raise it when the same inputs give another video
HASH_THREADS: Final = 8
HASHES_AHEAD: Final = 64  # that are begun before the first of them is taken
INPUTS_AT_ONCE: Final = 1000  # that go into the book

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class CatalogPlan:
    """What is to be made: the items of `book`, which is open for as long as the plan is."""

    book: CatalogBook
    weights_sha256: str
    settings_digest: str


@contextmanager
def planned_catalog(job: AnimateJob, folder: Path) -> Iterator[CatalogPlan]:
    """Read the catalog or match the globs, find and hash every input.

    Args:
        folder: where the book lies.

    Raises:
        ConfigError: there is nothing to do, a column is wrong, or the motion is not supported.
        CheckpointError: the weights cannot be read.
        StorageError: a store denies or does not answer, or there is no room for the book.
    """
    provenance.identity(job.credentials)  # a certificate that cannot sign is refused at once
    weights_sha256, motions = _weights(job)
    settings = settings_digest(job, weights_sha256)
    path = folder / "catalog.sqlite"
    with full_disks(path), CatalogBook(path) as book:
        book.add_rows(_rows(job))
        book.name_rows()
        book.refuse_motions(motions)
        _find_inputs(book, job)
        book.make_items(
            functools.partial(item_of, settings=settings),
            functools.partial(feature_ids, settings=settings),
        )
        yield CatalogPlan(book, weights_sha256, settings)


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
            "precision": job.precision,
        }
    )


def feature_id(
    kind: Literal["source", "driving"], sha256: str, delivery: Delivery, settings: str
) -> str:
    """Of the state of an image as it is cut, or of a driving video as it is cut and paced.

    Args:
        sha256: of the image or video.
        settings: digest of what shapes every state of a job, the weights among it.
    """
    view = delivery.crop if kind == "source" else delivery.driving_view
    return digest({"place": [kind, sha256, view], "settings": settings})[:ID_LENGTH]


def feature_ids(item: AnimationItem, settings: str) -> tuple[str, str]:
    """`feature_id` of an item's image and of its driving video."""
    return (
        feature_id("source", item.source_sha256, item, settings),
        feature_id("driving", item.driving_sha256, item, settings),
    )


def failure_of(item: str, stage: str, error: ItemError) -> Failure:
    """The failure row of an item that an error ended."""
    return Failure(item, stage, error.code, error.cause, error.retryable, attempts=1)


# --- rows ------------------------------------------------------------------------------------


def _rows(job: AnimateJob) -> Iterator[CatalogRow | Failure]:
    defaults = catalog.RowDefaults(
        *(job.motion, job.adapt_scale, job.best_frame, job.audio),
        **job.output.delivery().delivery(),
    )
    if job.catalog is not None:
        uri = absolute(job.catalog)
        base = uri.rpartition("/")[0] or "/"
        return catalog.iter_catalog(_catalog_file(uri), defaults, base=base)
    assert job.sources is not None and job.drivings is not None
    sources = matching(job.sources, folders=False)
    return catalog.iter_grid(sources, matching(job.drivings, folders=True), defaults)


def _catalog_file(uri: str) -> Path:
    try:
        return storage.local_copy(uri)
    except StorageError as error:
        if error.code == "not_found" and "://" not in uri:
            return Path(uri)  # `iter_catalog` says what is wrong with it
        raise


def _weights(job: AnimateJob) -> tuple[str, frozenset[str]]:
    """The digest of the weights, and the motions that their system has."""
    loaded = checkpoint.load(local_weights(job.checkpoint))
    _check_motion(job, loaded.system)
    return loaded.sha256, frozenset(loaded.system.motions)


def _check_motion(job: AnimateJob, system: AnimationSystem[Any, Any]) -> None:
    """The job's own choice must be possible; in a catalog it is only what rows start from."""
    of_a_row = job.catalog is None
    Transfer(job.motion, of_a_row and job.adapt_scale, of_a_row and job.best_frame).check(system)


def item_of(
    row: CatalogRow, source_sha256: str, driving_sha256: str, settings: str
) -> AnimationItem:
    """What a row asks for, whose id follows from that, the files' content and the settings."""
    wanted = {
        "source": source_sha256,
        "driving": driving_sha256,
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
        source_sha256=source_sha256,
        driving_sha256=driving_sha256,
        motion=row.motion,
        adapt_scale=row.adapt_scale,
        best_frame=row.best_frame,
        audio=row.audio,
        **row.delivery(),
    )


# --- inputs ----------------------------------------------------------------------------------


def _find_inputs(book: CatalogBook, job: AnimateJob) -> None:
    """Tell the book about all of its inputs. A store that is away is waited for: to look at many
    inputs takes hours.

    Raises:
        StorageError: it is the store that is at fault, not the input.
    """
    with hashes.user_hashes() as cache:

        def find(wanted: tuple[str, bool]) -> tuple[str, bool, Input | Failure]:
            uri, is_driving = wanted
            look = functools.partial(_find, uri, is_driving, job.limits, cache)
            try:
                return uri, is_driving, patiently(look, outage_s=job.cluster.outage_s)
            except ItemError as error:
                return uri, is_driving, failure_of(uri, catalog.STAGE, error)

        found = _in_threads(find, book.inputs())
        while batch := list(itertools.islice(found, INPUTS_AT_ONCE)):
            book.set_inputs(batch)


def _in_threads(call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What a function makes of some items, in their order; a few are under way at a time."""
    ahead: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(HASH_THREADS)
    try:
        for item in items:
            ahead.append(pool.submit(call, item))
            if len(ahead) >= HASHES_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _find(uri: str, is_driving: bool, limits: MediaLimits, cache: HashCache) -> Input:
    """What is known of an input: what was when it was read last, if it has not changed.

    Raises:
        ItemError, StorageError: as `local_media`.
    """
    with item_errors(uri):
        version = hashes.version(uri)
    known = cache.get(uri, version) if version else None
    if known is not None and not (is_driving and known.num_frames is None):
        return Input(known.sha256, known.num_frames or 0)
    with local_media(uri) as path:
        sha256 = known.sha256 if known else content_digest(path)
        num_frames = _num_frames(path, limits) if is_driving else None
    with item_errors(uri):
        unchanged = hashes.version(uri) == version
    if version and unchanged:
        cache.put(uri, version, Known(sha256, num_frames))
    return Input(sha256, num_frames or 0)


def _num_frames(path: Path, limits: MediaLimits) -> int:
    """What a video's header says, or a folder's files; 0 where it says nothing.

    It only tells which videos are best begun with, so that it may be wrong, and a file that cannot
    be read is left to those who read it.
    """
    try:
        return probe(path, limits).num_frames_from_header or 0
    except MediaError:
        return 0

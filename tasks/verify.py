"""A finished dataset looked at: what is in it, and whether it is whole.

Nothing is written. The manifest is streamed; each worker reads the clips of one shard, frame by
frame; what comes back is counts and what is wrong.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from kpmask.config import Cluster
from kpmask.data.dataset import FAILURES, MANIFEST, STATS
from kpmask.data.stored import (
    ClipCounts,
    DatasetInfo,
    TableCheck,
    by_shard,
    check_clip,
    image_format,
    in_shard,
    open_shard,
    stream_manifest,
)
from kpmask.errors import DatasetError, IntegrityError, ItemError, StorageError
from kpmask.preprocess import failure_of
from kpmask.records import (
    ClipRecord,
    DatasetChanges,
    DatasetManifest,
    Failure,
    Progress,
    as_dict,
)
from tasks.cluster import ray_session, run_items
from tasks.manifest import read_json, read_table_if_any
from tasks.publish import ListDigest
from tasks.storage import ObjectStore, absolute, open_store

CHANGES: Final = "changes.json"
CLIPS: Final = ("train/", "test/")
STAGE: Final = "verify"
MAX_NAMED: Final = 5

OnProgress = Callable[[Progress], None]


# --- opening ---------------------------------------------------------------------------------


def open_manifest(uri: str) -> tuple[ObjectStore, Path, DatasetManifest]:
    """The store of a finished dataset, its manifest as a local file, and its `stats.json`.

    Raises:
        DatasetError: there is none, or it is not readable.
        StorageError: the store does not answer.
    """
    store = open_store(uri)
    try:
        path = store.local(MANIFEST)
        stats = read_json(store, STATS)
    except StorageError as error:
        if error.code != "not_found":
            raise
        raise DatasetError(
            "there is no finished dataset here", subject=uri, hint="kpmask preprocess makes one"
        ) from error
    try:
        return store, path, DatasetManifest(**stats)
    except TypeError as error:
        raise DatasetError(f"its {STATS} is not that of a dataset: {error}", subject=uri) from error


# --- info ------------------------------------------------------------------------------------


def dataset_info(uri: str) -> DatasetInfo:
    """What a dataset is, by its tables and one of its images.

    Raises:
        DatasetError: there is none, or it is not readable.
        StorageError: the store does not answer.
    """
    store, manifest, stats = open_manifest(uri)
    counts = ClipCounts()
    found_format = ""
    for clip in stream_manifest(manifest):
        counts.add(clip)
        found_format = found_format or _format_of(clip, store)
    failures = Counter(f.code for f in read_table_if_any(store, FAILURES, Failure) or [])
    changes = _changes(store)
    return DatasetInfo(
        uri=store.uri,
        dataset_id=stats.dataset_id,
        settings_digest=stats.settings_digest,
        version=changes.version if changes else None,
        splits=counts.splits(),
        num_frames=(counts.shortest, counts.longest),
        size_bytes=sum(info.size_bytes for prefix in CLIPS for info in store.list(prefix)),
        image_format=found_format,
        fps=dict(counts.fps.most_common()),
        sizes_px=dict(counts.sizes_px.most_common()),
        failures=dict(failures.most_common()),
        changes=changes,
    )


def _format_of(clip: ClipRecord, store: ObjectStore) -> str:
    with contextlib.suppress(IntegrityError):  # `verify` says what is wrong with it
        return image_format(clip, store.local)
    return ""


def _changes(store: ObjectStore) -> DatasetChanges | None:
    """What the last run changed; None in datasets that were made before this was recorded."""
    try:
        return DatasetChanges(**read_json(store, CHANGES))
    except StorageError as error:
        if error.code != "not_found":
            raise
        return None
    except TypeError as error:
        raise DatasetError(f"its {CHANGES} is none: {error}", subject=store.uri) from error


# --- verify ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found.

    Attributes:
        num_checked: clips that are what their record says.
        num_hashed: those of them whose pixels have the checksum of their record. The others are
            JPEG, of which it is known that they decode, their size and their number.
        problems: a row each; none where the dataset is whole.
        leftovers: files beside the clips that no record names: a run was killed while it tidied
            up. They do no harm.
    """

    uri: str
    num_clips: int
    num_frames: int
    num_checked: int
    num_hashed: int
    problems: tuple[Failure, ...]
    leftovers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckedShard:
    """What a worker found in a shard."""

    num_frames: int
    num_checked: int
    num_hashed: int
    problems: tuple[Failure, ...]


class ShardChecker:
    """The worker: reads all clips of a shard."""

    def __init__(self, uri: str) -> None:
        self._fetch = open_store(uri).local

    def process(self, clips: Sequence[ClipRecord]) -> CheckedShard:
        """Check the clips of one shard.

        Raises:
            IntegrityError: the shard as a whole is missing or damaged.
            StorageError: the store does not answer.
        """
        if in_shard(clips[0]):
            open_shard(clips[0].shard, self._fetch)
        num_frames = num_checked = num_hashed = 0
        problems = []
        for clip in clips:
            try:
                checked = check_clip(clip, self._fetch)
            except IntegrityError as error:
                problems.append(failure_of(clip.name, STAGE, error))
                continue
            num_frames += checked.num_frames
            num_checked += 1
            num_hashed += checked.hashed
        return CheckedShard(num_frames, num_checked, num_hashed, tuple(problems))


def verify_dataset(
    uri: str, *, cluster: Cluster | None = None, on_progress: OnProgress | None = None
) -> Verified:
    """Hold every clip of a dataset against its record, and its tables against each other.

    Raises:
        DatasetError: there is none, or its manifest cannot be read.
        StorageError: the store does not answer.
    """
    uri = absolute(uri)  # workers may be elsewhere
    store, manifest, stats = open_manifest(uri)
    counts, shards, problems = _check_tables(store, manifest, stats)
    num_frames = num_checked = num_hashed = 0
    with ray_session():
        outcomes = run_items(
            by_shard(stream_manifest(manifest)),
            ShardChecker,
            (uri,),
            key=lambda clips: clips[0].shard,
            stage=STAGE,
            cluster=cluster or Cluster(),
            total=shards.total(),
            on_progress=on_progress,
        )
        for outcome in outcomes:
            if outcome.failure is not None:
                problems.append(_of_shard(outcome.failure, outcome.item))
            elif outcome.result is not None:
                num_frames += outcome.result.num_frames
                num_checked += outcome.result.num_checked
                num_hashed += outcome.result.num_hashed
                problems += outcome.result.problems
    return Verified(
        uri=store.uri,
        num_clips=sum(split.num_clips for split in counts.splits()),
        num_frames=num_frames,
        num_checked=num_checked,
        num_hashed=num_hashed,
        problems=tuple(sorted(problems, key=lambda problem: (problem.item, problem.code))),
        leftovers=tuple(shards.leftovers(store)),
    )


def _of_shard(failure: Failure, clips: Sequence[ClipRecord]) -> Failure:
    """A shard's failure, with what is lost by it."""
    if not in_shard(clips[0]):
        return replace(failure, item=clips[0].name)
    named = ", ".join(clip.name for clip in clips[:MAX_NAMED])
    more = f" and {len(clips) - MAX_NAMED} more" * (len(clips) > MAX_NAMED)
    return replace(failure, cause=f"{failure.cause}; its clips: {named}{more}")


class _Shards:
    """Where the clips of a manifest lie."""

    def __init__(self) -> None:
        self._frames: dict[str, int] = {}  # by shard; of a folder how many
        self._last = ""
        self._runs = 0

    def add(self, clip: ClipRecord) -> None:
        self._runs += clip.shard != self._last
        self._last = clip.shard
        self._frames[clip.shard] = 0 if in_shard(clip) else clip.num_frames

    def total(self) -> int:
        """How many groups `by_shard` gives."""
        return self._runs

    def leftovers(self, store: ObjectStore) -> Iterator[str]:
        """Files beside the clips that no record names, nor one of an older version that is kept."""
        kept = {
            clip.shard
            for info in store.list("versions/")
            for clip in stream_manifest(store.local(info.key))
        }
        for prefix in CLIPS:
            for info in store.list(prefix):
                folder, _, name = info.key.rpartition("/")
                number = name.removesuffix(".png")
                is_frame = number.isdecimal() and int(number) < self._frames.get(folder, 0)
                if info.key not in kept and info.key not in self._frames and not is_frame:
                    yield info.key


def _check_tables(
    store: ObjectStore, manifest: Path, stats: DatasetManifest
) -> tuple[ClipCounts, _Shards, list[Failure]]:
    """What the tables say, and in what they disagree."""
    counts, shards, table = ClipCounts(), _Shards(), TableCheck()
    problems: list[Failure] = []

    found_id = ListDigest()
    for clip in stream_manifest(manifest):
        counts.add(clip)
        shards.add(clip)
        problems += [failure_of(clip.name, STAGE, error) for error in table.add(clip)]
        found_id.add([clip.clip_id, clip.partition, clip.identity])
    problems += [failure_of(identity, STAGE, _leak()) for identity in table.leaks()]
    failures = read_table_if_any(store, FAILURES, Failure)
    found = {
        "dataset_id": found_id.hexdigest(),
        "num_train": counts.num_clips("train"),
        "num_test": counts.num_clips("test"),
        "num_frames": counts.num_frames,
        "num_failures": len(failures or []),
    }
    said = as_dict(stats)
    for name, value in found.items():
        if said[name] != value:
            cause = f"{name} is {said[name]!r}, and the tables give {value!r}"
            problems.append(failure_of(STATS, STAGE, IntegrityError(cause, code="wrong_stats")))
    if failures is None:
        error = IntegrityError("it is not there", code="missing_file")
        problems.append(failure_of(FAILURES, STAGE, error))
    return counts, shards, problems


def _leak() -> ItemError:
    return IntegrityError("this identity is in both splits", code="split_leak")

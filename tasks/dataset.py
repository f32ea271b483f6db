"""Datasets in an object store: opened for reading, and put together from finished clips.

- A shard's name digests the clips in it, so that a new dataset in the place of an old one leaves
  the old one readable until its manifest is replaced, a shard that is there already is not written
  again, and two runs that put the same dataset together do not hurt one another.
- With layout "folders" names are the original code's, so they cannot do that: an old manifest is
  removed first where a clip of its would change.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kpmask.config import Storage
from kpmask.data.dataset import MANIFEST, STATS, Dataset, read_manifest, with_holdout
from kpmask.data.layouts import frame_key
from kpmask.data.shards import Shard, ShardWriter, decode_frame
from kpmask.errors import DatasetError, StorageError
from kpmask.records import ClipRecord, digest
from kpmask.report import picture_uri
from tasks.manifest import read_json
from tasks.storage import ObjectStore, open_store, os_errors

NUM_THREADS = 4
NUM_THUMBNAILS = 240
THUMBNAIL_PX = 96

# A clip's bytes: a local shard and the row in it.
Locate = Callable[[str], tuple[Path, int]]


def open_dataset(uri: str, *, holdout_fraction: float = 0.0) -> Dataset:
    """The dataset at a URI. Shards that lie in S3 are fetched into the local cache when needed.

    Args:
        holdout_fraction: of the identities that are test clips where the dataset has none.

    Raises:
        DatasetError: there is none, or it is not readable.
        StorageError: the store does not answer.
    """
    store = open_store(uri)
    with _dataset_errors(uri):
        records = with_holdout(read_manifest(store.local(MANIFEST)), holdout_fraction)
        return Dataset(records, fetch=store.local)


def open_identified_dataset(uri: str, *, holdout_fraction: float = 0.0) -> tuple[Dataset, str]:
    """`open_dataset`, and the dataset's id, which is that of the whole.

    Raises:
        DatasetError, StorageError: as `open_dataset`.
    """
    with _dataset_errors(uri):
        stats = read_json(open_store(uri), STATS)
    if "dataset_id" not in stats:
        raise DatasetError(f"its {STATS} has no dataset_id", subject=uri)
    dataset = open_dataset(uri, holdout_fraction=holdout_fraction)
    return dataset, str(stats["dataset_id"])


@contextmanager
def _dataset_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        if error.code != "not_found":
            raise
        raise DatasetError(
            "there is no finished dataset here",
            subject=uri,
            hint="kpmask preprocess makes one",
        ) from error


def thumbnails(dataset: Dataset) -> dict[str, str]:
    """Small pictures of a dataset's first clips, by clip id, for its page."""
    return {
        clip.clip_id: _picture(dataset.read(clip, [clip.num_frames // 2])[0])
        for clip in dataset.records[:NUM_THUMBNAILS]
    }


@dataclass(frozen=True, slots=True)
class Assembled:
    """Clips in their places, by (partition, name), and small pictures of the first ones."""

    clips: list[ClipRecord]
    thumbnails: Mapping[str, str]


def assemble(
    store: ObjectStore,
    clips: Sequence[ClipRecord],
    *,
    storage: Storage,
    locate: Locate,
    in_place: Set[str],
    on_done: Callable[[int, int], None],
) -> Assembled:
    """Put finished clips into their shards or folders.

    Args:
        store: of the dataset.
        clips: in any order; where they say they lie does not matter.
        storage: the layout.
        locate: where a clip's bytes are, by its id; called from several threads.
        in_place: ids of clips that lie in their folders already (layout "folders").
        on_done: called with the number of clips in place, and of all.

    Raises:
        StorageError: code `not_found` where another run has removed what it is made from.
    """
    ordered = sorted(clips, key=lambda clip: (clip.partition, clip.name))
    shown = {clip.clip_id for clip in ordered[:NUM_THUMBNAILS]}
    put: Callable[[list[ClipRecord]], dict[str, str]]
    if storage.layout == "shards":
        groups = list(_shard_groups(ordered, storage.clips_per_shard))
        there = {info.key for prefix in ("train/", "test/") for info in store.list(prefix)}
        put = _PutShard(store, locate, shown, there)
    else:
        groups = [[replace(c, shard=f"{c.partition}/{c.name}", row=0)] for c in ordered]
        put = _PutFolder(store, locate, shown, in_place)
    thumbnails: dict[str, str] = {}
    num_done = 0
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for group, pictures in zip(groups, pool.map(put, groups), strict=True):
            thumbnails |= pictures
            num_done += len(group)
            on_done(num_done, len(ordered))
    return Assembled([clip for group in groups for clip in group], thumbnails)


def _shard_groups(ordered: Sequence[ClipRecord], size: int) -> Iterator[list[ClipRecord]]:
    """The clips of each shard, told where they will lie."""
    for partition in ("test", "train"):
        clips = [clip for clip in ordered if clip.partition == partition]
        for number, start in enumerate(range(0, len(clips), size)):
            group = clips[start : start + size]
            name = digest([clip.clip_id for clip in group])[:8]
            key = f"{partition}/shard-{number:05d}-{name}.arrow"
            yield [replace(clip, shard=key, row=row) for row, clip in enumerate(group)]


@dataclass(frozen=True)
class _PutShard:
    """Writes one shard; returns the pictures of the clips that are shown."""

    store: ObjectStore
    locate: Locate
    shown: Set[str]
    there: Set[str]

    def __call__(self, group: list[ClipRecord]) -> dict[str, str]:
        key = group[0].shard
        shown = [clip for clip in group if clip.clip_id in self.shown]
        if key in self.there:
            return _pictures(self.store.local(key), shown) if shown else {}
        with tempfile.TemporaryDirectory(prefix="kpmask-") as folder, os_errors(key):
            path = Path(folder) / "shard.arrow"
            with ShardWriter(path) as shard:
                for clip in group:
                    shard.copy(*self.locate(clip.clip_id))
            self.store.put_file(key, path)
            return _pictures(path, shown)


@dataclass(frozen=True)
class _PutFolder:
    """Writes one clip as a folder of images; returns its picture, if it is shown."""

    store: ObjectStore
    locate: Locate
    shown: Set[str]
    in_place: Set[str]

    def __call__(self, group: list[ClipRecord]) -> dict[str, str]:
        (clip,) = group
        if clip.clip_id not in self.in_place:
            self._put(clip)
        if clip.clip_id not in self.shown:
            return {}
        data = self.store.get(frame_key(clip.shard, clip.num_frames // 2))
        return {clip.clip_id: _picture(decode_frame(data))}

    def _put(self, clip: ClipRecord) -> None:
        path, row = self.locate(clip.clip_id)
        keys = set()
        for number, image in enumerate(Shard(path).encoded(row)):
            key = frame_key(clip.shard, number)
            keys.add(key)
            self.store.put(key, image)
        for info in list(self.store.list(f"{clip.shard}/")):
            if info.key not in keys:  # of an older, longer clip
                self.store.delete(info.key)


def _pictures(path: Path, clips: Sequence[ClipRecord]) -> dict[str, str]:
    """The middle frames of some clips of a shard."""
    shard = Shard(path)
    middle = {clip.clip_id: shard.read(clip.row, [clip.num_frames // 2])[0] for clip in clips}
    return {clip_id: _picture(frame_HWC) for clip_id, frame_HWC in middle.items()}


def _picture(frame_HWC: np.ndarray) -> str:
    return picture_uri(frame_HWC, width_px=THUMBNAIL_PX)

"""A finished dataset for its readers: clips by record, frames as arrays.

Where the bytes lie is the caller's business: `fetch` turns a key of the dataset into a local file
(the file itself for a folder, a cached download for an object store). Both layouts are read: a
record's `shard` is an Arrow file, or with layout "folders" the key of a folder of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from kpmask.data import shards
from kpmask.data.layouts import frame_key
from kpmask.errors import DatasetError
from kpmask.records import ClipRecord, Partition, from_table

MANIFEST = "manifest.parquet"
FAILURES = "failures.parquet"
STATS = "stats.json"
CHANGES = "changes.json"
VERSIONS = "versions.json"


class Dataset:
    """The clips of a dataset.

    Args:
        records: the clips of its manifest.
        fetch: the local file of a key; called at every read, so it should be cheap once it is
            there. It crosses to workers by pickle.
    """

    def __init__(self, records: Sequence[ClipRecord], *, fetch: Callable[[str], Path]) -> None:
        self.records = tuple(records)
        self._fetch = fetch

    @classmethod
    def from_folder(cls, root: Path) -> Dataset:
        """The dataset in a local folder.

        Raises:
            DatasetError: there is no manifest, or it is not one.
        """
        return cls(read_manifest(root / MANIFEST), fetch=root.joinpath)

    def partition(self, partition: Partition) -> list[ClipRecord]:
        """The clips of one split, in the manifest's order."""
        return [record for record in self.records if record.partition == partition]

    def read(self, record: ClipRecord, frames: shards.Frames = None) -> np.ndarray:
        """Frames of a clip, uint8 THWC RGB (all, or those of a slice or of a list of numbers).

        Raises:
            DatasetError: what is stored is not what the record says.
        """
        numbers = shards.frame_numbers(frames, record.num_frames)
        if _in_shard(record):
            return shards.read_clip(self._fetch(record.shard), record.row, numbers)
        return np.stack([shards.decode_frame(self._image(record, i)) for i in numbers])

    def read_encoded(self, record: ClipRecord, frames: shards.Frames = None) -> list[bytes]:
        """Frames of a clip as the stored PNG or JPEG files."""
        numbers = shards.frame_numbers(frames, record.num_frames)
        if _in_shard(record):
            return shards.read_encoded(self._fetch(record.shard), record.row, numbers)
        return [self._image(record, i) for i in numbers]

    def _image(self, record: ClipRecord, number: int) -> bytes:
        path = self._fetch(frame_key(record.shard, number))
        try:
            return path.read_bytes()
        except OSError as error:
            raise DatasetError(error.strerror or str(error), subject=record.name) from error


def version_key(version: int) -> str:
    """Where an older manifest is kept, whose shards are kept too."""
    return f"versions/{version:06d}.parquet"


def with_holdout(records: Sequence[ClipRecord], fraction: float) -> list[ClipRecord]:
    """The clips with `fraction` of the identities as test clips, if there are none yet.

    At least one identity and not all, for any fraction above 0. Which ones follows from a hash of
    their names alone; no frame is moved.
    """
    identities = {record.identity for record in records}
    tested = any(record.partition == "test" for record in records)
    if tested or fraction == 0 or len(identities) < 2:
        return list(records)
    ranked = sorted(identities, key=lambda name: hashlib.sha256(name.encode()).digest())
    count = min(max(round(fraction * len(ranked)), 1), len(ranked) - 1)
    held = set(ranked[:count])
    return [replace(r, partition="test" if r.identity in held else "train") for r in records]


def read_manifest(path: Path) -> list[ClipRecord]:
    """The clips of a manifest file.

    Raises:
        DatasetError: it is missing or not a manifest of clips.
    """
    try:
        return from_table(pa.parquet.read_table(path), ClipRecord)
    except FileNotFoundError as error:
        raise DatasetError(
            "no dataset here: manifest.parquet is missing",
            subject=str(path.parent),
            hint="kpmask preprocess writes one",
        ) from error
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise DatasetError(f"not a manifest of clips: {error}", subject=str(path)) from error


def _in_shard(record: ClipRecord) -> bool:
    return record.shard.endswith(".arrow")

"""The clips of a finished dataset as they lie there: streamed, counted, held against their records.

- A manifest is read in batches and a clip frame by frame, so memory grows with neither.
- What is read may be damaged or somebody else's: offsets are checked before they are followed, and
  a frame's size before its pixels are decoded.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from kpmask.data.layouts import frame_key
from kpmask.data.shards import Shard
from kpmask.errors import DatasetError, IntegrityError, MediaError, StorageError
from kpmask.media.images import decode_image
from kpmask.records import ClipRecord, DatasetChanges, Partition, from_table

BATCH_ROWS = 4096

# The local file of a key of the dataset.
Fetch = Callable[[str], Path]


# --- the manifest ----------------------------------------------------------------------------


def stream_manifest(path: Path) -> Iterator[ClipRecord]:
    """The clips of a manifest file in its order, a batch in memory at a time.

    Raises:
        DatasetError: it is not a manifest of clips.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            for batch in file.iter_batches(BATCH_ROWS):
                yield from from_table(pa.Table.from_batches([batch], schema), ClipRecord)
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise DatasetError(f"not a manifest of clips: {error}", subject=str(path)) from error


def by_shard(records: Iterable[ClipRecord]) -> Iterator[tuple[ClipRecord, ...]]:
    """Clips that follow each other and lie in one shard, together."""
    for _, group in itertools.groupby(records, key=lambda record: record.shard):
        yield tuple(group)


# --- clips -----------------------------------------------------------------------------------


def in_shard(record: ClipRecord) -> bool:
    """Whether a clip is a row of an Arrow file; else it is a folder of images."""
    return record.shard.endswith(".arrow")


def stored_images(record: ClipRecord, fetch: Fetch) -> Iterator[bytes]:
    """A clip's frames as the stored PNG or JPEG files, one at a time.

    Raises:
        IntegrityError: missing_file, damaged_file, wrong_row, wrong_length.
        StorageError: the store does not answer.
    """
    if in_shard(record):
        return _shard_images(record, _file(record.shard, fetch))
    return _folder_images(record, fetch)


def stored_frames(record: ClipRecord, fetch: Fetch) -> Iterator[tuple[str, np.ndarray]]:
    """Each frame of a clip: the format it is stored in, and uint8 HWC RGB.

    Raises:
        IntegrityError: as `stored_images`; wrong_size.
        StorageError: the store does not answer.
    """
    for number, data in enumerate(stored_images(record, fetch)):
        image_format, size_px = _header(data, number)
        if size_px != (record.width_px, record.height_px):
            raise IntegrityError(
                f"frame {number} is {size_px[0]}x{size_px[1]}, and the record says "
                f"{record.width_px}x{record.height_px}",
                code="wrong_size",
            )
        try:
            yield image_format, decode_image(data)
        except MediaError as error:
            raise IntegrityError(f"frame {number}: {error.cause}") from error


def _file(key: str, fetch: Fetch) -> Path:
    try:
        return fetch(key)
    except StorageError as error:
        if error.code not in {"not_found", "path_escape"}:
            raise
        raise IntegrityError(f"{key} is not there", code="missing_file") from error


def open_shard(key: str, fetch: Fetch) -> Shard:
    """A shard of the dataset.

    Raises:
        IntegrityError: missing_file, damaged_file.
        StorageError: the store does not answer.
    """
    try:
        return Shard(_file(key, fetch))
    except DatasetError as error:
        raise IntegrityError(error.cause) from error


def _shard_images(record: ClipRecord, path: Path) -> Iterator[bytes]:
    try:
        batch = Shard(path).batch(record.row)
        batch.validate(full=True)  # offsets that lead outside would crash the process
        clip_id, fps = batch.column("clip_id")[0].as_py(), batch.column("fps")[0].as_py()
        images = batch.column("frames")[0].values
    except (DatasetError, pa.ArrowInvalid, IndexError) as error:
        cause = error.cause if isinstance(error, DatasetError) else str(error)
        raise IntegrityError(f"{record.shard}: {cause}") from error
    if (clip_id, fps) != (record.clip_id, record.fps):
        raise IntegrityError(
            f"row {record.row} of {record.shard} is clip {clip_id} at {fps:g} fps, and the record "
            f"says {record.clip_id} at {record.fps:g}",
            code="wrong_row",
        )
    if len(images) != record.num_frames:
        raise IntegrityError(
            f"{len(images)} frames are stored, and the record says {record.num_frames}",
            code="wrong_length",
        )
    for image in images:
        yield image.as_py()


def _folder_images(record: ClipRecord, fetch: Fetch) -> Iterator[bytes]:
    for number in range(record.num_frames):
        yield _file(frame_key(record.shard, number), fetch).read_bytes()


def _header(data: bytes, number: int) -> tuple[str, tuple[int, int]]:
    """The format and size of an image, by its header."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            return str(image.format), image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise IntegrityError(f"frame {number} is not a picture: {error}") from error


@dataclass(frozen=True, slots=True)
class CheckedClip:
    """A clip that is what its record says. `hashed`: to the last bit."""

    num_frames: int
    hashed: bool


def check_clip(record: ClipRecord, fetch: Fetch) -> CheckedClip:
    """Read every frame of a clip and hold it against its record.

    A record's checksum is over the frames before they were encoded: PNG images give them back, so
    that it can be compared. Of JPEG images it is known that they decode, their size and number.

    Raises:
        IntegrityError: what is wrong first.
        StorageError: the store does not answer.
    """
    checksum = hashlib.sha256()
    num_frames, formats = 0, set()
    for image_format, frame_HWC in stored_frames(record, fetch):
        checksum.update(np.ascontiguousarray(frame_HWC).data)
        formats.add(image_format)
        num_frames += 1
    if num_frames == 0:
        raise IntegrityError("it has no frame", code="wrong_length")
    hashed = formats == {"PNG"}
    if hashed and checksum.hexdigest() != record.sha256:
        raise IntegrityError(
            f"its frames have the checksum {checksum.hexdigest()[:12]}…, and the record says "
            f"{record.sha256[:12]}…",
            code="wrong_frames",
        )
    return CheckedClip(num_frames, hashed)


def image_format(record: ClipRecord, fetch: Fetch) -> str:
    """The format of a clip's first image, `png` or `jpeg`; raises as `stored_images`."""
    return _header(next(iter(stored_images(record, fetch))), 0)[0].lower()


# --- counts ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """What one split holds."""

    partition: Partition
    num_clips: int
    num_identities: int
    num_videos: int
    num_frames: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What a dataset is. `version` and `changes` are None where no run has recorded them.

    Attributes:
        fps, sizes_px, failures: how many clips (failures) have each rate, size, code; the
            commonest first.
        num_frames: of the shortest clip and of the longest.
        size_bytes: of the clips, as they are stored.
    """

    uri: str
    dataset_id: str
    settings_digest: str
    version: int | None
    splits: tuple[SplitInfo, ...]
    num_frames: tuple[int, int]
    size_bytes: int
    image_format: str
    fps: dict[str, int]
    sizes_px: dict[str, int]
    failures: dict[str, int]
    changes: DatasetChanges | None


@dataclass(slots=True)
class _SplitCount:
    num_clips: int = 0
    num_frames: int = 0
    seconds: float = 0.0
    identities: set[str] = field(default_factory=set)
    videos: set[str] = field(default_factory=set)


class ClipCounts:
    """Counts over a stream of clips."""

    def __init__(self) -> None:
        self._splits: dict[Partition, _SplitCount] = defaultdict(_SplitCount)
        self.fps: Counter[str] = Counter()
        self.sizes_px: Counter[str] = Counter()
        self.shortest, self.longest = 0, 0

    def add(self, clip: ClipRecord) -> None:
        """Count a clip."""
        split = self._splits[clip.partition]
        self.shortest = min(self.shortest, clip.num_frames) if self.fps else clip.num_frames
        self.longest = max(self.longest, clip.num_frames)
        split.num_clips += 1
        split.num_frames += clip.num_frames
        split.seconds += clip.num_frames / clip.fps if clip.fps > 0 else 0.0
        split.identities.add(clip.identity)
        split.videos.add(clip.video_id)
        self.fps[f"{clip.fps:.6g}"] += 1
        self.sizes_px[f"{clip.width_px}x{clip.height_px}"] += 1

    def splits(self) -> tuple[SplitInfo, ...]:
        """The splits that have a clip."""
        return tuple(
            SplitInfo(
                partition=partition,
                num_clips=count.num_clips,
                num_identities=len(count.identities),
                num_videos=len(count.videos),
                num_frames=count.num_frames,
                seconds=count.seconds,
            )
            for partition, count in sorted(self._splits.items(), reverse=True)
        )

    def num_clips(self, partition: Partition) -> int:
        """How many clips a split has."""
        return self._splits[partition].num_clips if partition in self._splits else 0

    @property
    def num_frames(self) -> int:
        """Of all clips."""
        return sum(count.num_frames for count in self._splits.values())


class TableCheck:
    """What must hold across the clips of a manifest, told as they stream by."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._clip_ids: set[str] = set()
        self._identities: dict[Partition, set[str]] = defaultdict(set)

    def add(self, clip: ClipRecord) -> Iterator[IntegrityError]:
        """What a clip repeats of earlier ones."""
        if clip.name in self._names:
            yield IntegrityError("another clip has this name", code="duplicate_name")
        if clip.clip_id in self._clip_ids:
            yield IntegrityError(f"another clip has the id {clip.clip_id}", code="duplicate_clip")
        self._names.add(clip.name)
        self._clip_ids.add(clip.clip_id)
        self._identities[clip.partition].add(clip.identity)

    def leaks(self) -> list[str]:
        """Identities that are in both splits."""
        return sorted(self._identities["train"] & self._identities["test"])

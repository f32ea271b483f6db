"""Clip shards: Arrow IPC files, uncompressed, one row a clip, frames as encoded images.

- Columns: `clip_id` string, `fps` float64, `frames` list of binary (PNG or JPEG files).
- Every clip is a record batch of its own. So a clip is found through the file's footer and read
  from a memory map without touching its neighbours, a shard is written with one clip in memory
  at most, and a shard may be larger than 2 GiB.
- The bytes of a shard are a function of its clips: no times, no names.
"""

from __future__ import annotations

import functools
import io
import mmap
import operator
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from PIL import Image

from kpmask.errors import DatasetError

_FRAMES_TYPE = pa.list_(pa.field("image", pa.large_binary(), nullable=False))
_FIELDS: list[pa.Field[Any]] = [
    pa.field("clip_id", pa.string(), nullable=False),
    pa.field("fps", pa.float64(), nullable=False),
    pa.field("frames", _FRAMES_TYPE, nullable=False),
]
SCHEMA = pa.schema(_FIELDS, metadata={"kpmask_shard": "1"})

Frames = slice | Sequence[int] | None


class ShardWriter:
    """Writes a shard beside its place and moves it there on a clean exit; else leaves nothing.

    Used as a context manager:

        with ShardWriter(path) as shard:
            shard.add("clip id", 25.0, [png_bytes, ...])
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.num_clips = 0

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".tmp-", suffix=".arrow", dir=self._path.parent)
        os.close(descriptor)  # Arrow opens it by its name
        self._temporary = Path(name)
        self._file = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        return self

    def add(self, clip_id: str, fps: float, frames: Sequence[bytes]) -> int:
        """Append a clip of encoded images; returns its row."""
        images = pa.array(frames, pa.large_binary())
        return self._write(clip_id, fps, images)

    def add_file(self, clip_id: str, fps: float, path: Path, ends: Sequence[int]) -> int:
        """Append a clip whose encoded images lie end to end in a file; returns its row.

        The file is memory-mapped, never read as a whole. `ends` are the images' end offsets.
        """
        offsets = np.array([0, *ends], np.int64)
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if offsets[-1] else b""
        buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(data)]
        images = pa.Array.from_buffers(pa.large_binary(), len(ends), buffers)
        return self._write(clip_id, fps, images)

    def copy(self, path: Path, row: int) -> int:
        """Append a clip of another shard, unchanged; returns its row here."""
        self._writer.write_batch(Shard(path).batch(row))
        self.num_clips += 1
        return self.num_clips - 1

    def _write(self, clip_id: str, fps: float, images: pa.Array[Any]) -> int:
        if len(images) == 0:
            raise ValueError(f"clip {clip_id} has no frames")
        ends = pa.array([0, len(images)], pa.int32())
        frames = pa.ListArray.from_arrays(ends, images, type=_FRAMES_TYPE)
        columns: list[pa.Array[Any]] = [
            pa.array([clip_id], pa.string()),
            pa.array([fps], pa.float64()),
            frames,
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        self.num_clips += 1
        return self.num_clips - 1

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            self._writer.close()
            self._file.close()
            if error_type is None:
                self._temporary.chmod(0o644)
                self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


class Shard:
    """A memory-mapped shard. The file may be removed or replaced while it is open.

    Raises:
        DatasetError: not a shard; or from its methods, it has no such row or frame.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except (pa.ArrowInvalid, OSError) as error:
            raise DatasetError(f"not a readable shard: {error}", subject=str(path)) from error
        if not self._reader.schema.equals(SCHEMA):
            raise DatasetError("an Arrow file, but not of clips", subject=str(path))
        self.num_clips = self._reader.num_record_batches

    def batch(self, row: int) -> pa.RecordBatch:
        """A clip as it is stored."""
        if not 0 <= row < self.num_clips:
            raise DatasetError(f"no row {row} in {self.num_clips} clips", subject=str(self._path))
        try:
            return self._reader.get_batch(row)
        except (pa.ArrowInvalid, OSError) as error:
            raise DatasetError(f"row {row}: {error}", subject=str(self._path)) from error

    def _images(self, row: int) -> Any:  # noqa: ANN401 - an Arrow binary array
        return self.batch(row).column("frames")[0].values

    def num_frames(self, row: int) -> int:
        """How many frames a clip has."""
        return len(self._images(row))

    def clip_info(self, row: int) -> tuple[str, float]:
        """A clip's id and frame rate."""
        batch = self.batch(row)
        return str(batch.column("clip_id")[0].as_py()), float(batch.column("fps")[0].as_py())

    def encoded(self, row: int, frames: Frames = None) -> Iterator[bytes]:
        """A clip's frames as the encoded images that are stored, one at a time."""
        images = self._images(row)
        return (images[i].as_py() for i in frame_numbers(frames, len(images)))

    def read(self, row: int, frames: Frames = None) -> np.ndarray:
        """A clip's frames, uint8 THWC RGB."""
        return np.stack([decode_frame(data) for data in self.encoded(row, frames)])


def num_clips(path: Path) -> int:
    """How many clips a shard holds."""
    return _opened(path).num_clips


def num_frames(path: Path, row: int) -> int:
    """How many frames a clip has."""
    return _opened(path).num_frames(row)


def clip_info(path: Path, row: int) -> tuple[str, float]:
    """A clip's id and frame rate."""
    return _opened(path).clip_info(row)


def read_encoded(path: Path, row: int, frames: Frames = None) -> list[bytes]:
    """A clip's frames as the encoded images that are stored."""
    return list(_opened(path).encoded(row, frames))


def read_clip(path: Path, row: int, frames: Frames = None) -> np.ndarray:
    """A clip's frames, uint8 THWC RGB. Shards are kept open from call to call.

    Args:
        path: a local shard.
        row: the clip's row in it.
        frames: which ones, as a slice or as numbers (negative ones count from the end); None: all.

    Raises:
        DatasetError: not a shard, or it has no such row or frame.
    """
    return _opened(path).read(row, frames)


def decode_frame(data: bytes) -> np.ndarray:
    """An encoded image as uint8 HWC RGB.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise DatasetError(f"a stored frame cannot be read: {error}") from error


def frame_numbers(frames: Frames, count: int) -> Sequence[int]:
    """`frames` as numbers in [0, count).

    Raises:
        DatasetError: there is no such frame, or none is chosen.
    """
    if frames is None or isinstance(frames, slice):
        numbers: Sequence[int] = range(count)[frames or slice(None)]
    else:
        numbers = [operator.index(i) + (count if i < 0 else 0) for i in frames]
    if not numbers or min(numbers) < 0 or max(numbers) >= count:
        raise DatasetError(f"no frames {frames!r} in a clip of {count}")
    return numbers


def _opened(path: Path) -> Shard:
    try:
        state = path.stat()
    except OSError as error:
        raise DatasetError(error.strerror or str(error), subject=str(path)) from error
    return _open_shard(path, state.st_mtime_ns, state.st_size, state.st_ino)


@functools.lru_cache(maxsize=256)
def _open_shard(path: Path, *_version: int) -> Shard:
    return Shard(path)

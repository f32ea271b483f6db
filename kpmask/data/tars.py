"""WebDataset tars: one sample a clip, `<key>.json` with its record and then its media.

- The key is the clip's id: a key ends at the first dot of a file's name, and names have dots.
- Media are the frames as they are stored (`<key>.0000000.png`, ...) or a video (`<key>.mp4`).
- Equal clips give equal bytes: no times, no owners.
- Tars that are read are a stranger's. Members that are no plain files, or whose names lead
  elsewhere, are refused one by one; sizes are checked before anything is read; a tar that ends
  without its end mark is damaged, and the sample at the damage with it.
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self, TypeVar

from kpmask.config import MediaLimits
from kpmask.data.exchange import as_note, parse_note
from kpmask.data.layouts import IMAGE_SUFFIXES, SPLITS, VIDEO_SUFFIXES
from kpmask.errors import MediaError, RowError
from kpmask.media.encode import storage_error
from kpmask.records import ClipRecord, Failure, Partition

T = TypeVar("T")

BLOCK_BYTES = tarfile.BLOCKSIZE
MAX_JSON_BYTES = 2**20
# A member's name and attributes; tarfile reads them into memory before it looks at them.
MAX_HEADER_BYTES = 2**20
_CHUNK_BYTES = 2**20
_SPLIT = re.compile(r"(train|test)(?![a-zA-Z])")


# --- out -------------------------------------------------------------------------------------


class SampleTar:
    """Writes a tar of samples; used as a context manager. What an error leaves is no tar."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._tar = tarfile.open(self._path, "w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self._tar.close()
        elif self._tar.fileobj is not None:
            self._tar.fileobj.close()

    def add_note(self, record: ClipRecord) -> None:
        """Begin a sample with its record."""
        self.add(f"{record.clip_id}.json", note_bytes(record))

    def add(self, name: str, data: bytes) -> None:
        """Append a member."""
        self._append(name, len(data), io.BytesIO(data))

    def add_file(self, name: str, path: Path) -> None:
        """Append a member that is a file."""
        with path.open("rb") as file:
            self._append(name, path.stat().st_size, file)

    def _append(self, name: str, size_bytes: int, data: BinaryIO | io.BytesIO) -> None:
        member = tarfile.TarInfo(name)  # time 0, owner 0, no names
        member.size, member.mode = size_bytes, 0o644
        self._tar.addfile(member, data)


def note_bytes(record: ClipRecord) -> bytes:
    """A record as the JSON member of its sample."""
    text = json.dumps(as_note(record), sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode()


def member_bytes(size_bytes: int) -> int:
    """What a member of a size takes in a tar."""
    return BLOCK_BYTES * (1 + math.ceil(size_bytes / BLOCK_BYTES))


def plan_tars(
    samples: Iterable[tuple[T, int]], *, max_samples: int, max_bytes: int
) -> Iterator[list[T]]:
    """Samples with their sizes in tars, as full as the limits allow; a larger one is alone."""
    group: list[T] = []
    num_bytes = 0
    for sample, size_bytes in samples:
        if group and (len(group) == max_samples or num_bytes + size_bytes > max_bytes):
            yield group
            group, num_bytes = [], 0
        group.append(sample)
        num_bytes += size_bytes
    if group:
        yield group


def split_of(key: str) -> Partition | None:
    """The split of a tar by its folder, else by the beginning of its name."""
    path = PurePosixPath(key)
    if len(path.parts) > 1 and path.parts[0] in SPLITS:
        return SPLITS[path.parts[0]]
    match = _SPLIT.match(path.name)
    return SPLITS[match[1]] if match else None


# --- in --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sample:
    """A sample's members, unpacked: a video or picture, or a folder of pictures.

    `note` is its record, where its JSON is one of ours; `fps` what any JSON says.
    """

    key: str
    path: Path
    note: ClipRecord | None = None
    fps: float | None = None


@dataclass(slots=True)
class _Unpacking:
    """A sample whose members are being read. `refused` says why it cannot be one."""

    key: str
    folder: Path
    videos: list[Path] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    num_bytes: int = 0
    text: bytes | None = None
    refused: MediaError | RowError | None = None


def read_samples(
    path: Path, *, limits: MediaLimits, folder: Path, subject: str
) -> Iterator[Sample | Failure]:
    """The samples of a tar, one after the other, and what is refused.

    Args:
        path: the tar, not compressed.
        limits: `max_bytes` and `max_frames` hold for each sample.
        folder: where a sample is unpacked; emptied when the next one is asked for.
        subject: what failures call the tar.
    """
    foreign: Counter[str] = Counter()
    unpacking: _Unpacking | None = None
    try:
        with _opened(path) as tar:
            for member in _members(tar):
                refusal = _refusal(member)
                if refusal is not None:
                    yield _failure(f"{subject}:{member.name}", refusal)
                    continue
                if member.isdir():
                    continue
                key, suffix = _split_name(member.name)
                if not _wanted(suffix):
                    foreign[PurePosixPath(suffix).suffix or suffix] += 1
                    continue
                if unpacking is None or key != unpacking.key:
                    if unpacking is not None:
                        yield _finished(unpacking, subject)
                    unpacking = _Unpacking(key, _emptied(folder))
                _unpack(tar, member, suffix, unpacking, limits)
            _check_end(tar)
        if unpacking is not None:
            yield _finished(unpacking, subject)
    except (tarfile.TarError, MediaError, EOFError) as error:
        cause = error.cause if isinstance(error, MediaError) else str(error)
        lost = f", and its sample {unpacking.key!r} is lost" if unpacking else ""
        yield _failure(subject, MediaError(f"the tar is damaged: {cause}{lost}", code="truncated"))
    except OSError as error:
        raise storage_error(error, folder) from error
    for suffix, count in sorted(foreign.items()):
        cause = f"{count} files are neither pictures, videos nor JSON, and are passed over"
        yield _failure(f"{subject}:*{suffix}", MediaError(cause, code="foreign_file"))


class _Bounded(io.RawIOBase):
    """A file whose reads are bounded: a header says itself how much is to be read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= max(MAX_HEADER_BYTES, _CHUNK_BYTES):
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """The tar in a file, closed with it."""
    with _Bounded(path.open("rb")) as file:
        yield tarfile.open(fileobj=file, mode="r:", errorlevel=2)  # noqa: SIM115


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in the order of the file; none is remembered."""
    offset = -1
    while True:
        try:
            member = tar.next()
        except (ValueError, OverflowError, UnicodeError, RecursionError) as error:
            raise tarfile.ReadError(f"a header that cannot be read: {error}") from error
        if member is None:
            return
        if member.size < 0 or tar.offset <= offset:
            raise tarfile.ReadError("a size below 0")
        offset = tar.offset
        yield member
        tar.members = []  # type: ignore[attr-defined]


def _check_end(tar: tarfile.TarFile) -> None:
    """A tar ends with a block of zeros; tarfile itself takes any damage for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
        raise tarfile.ReadError(f"it breaks off at byte {tar.offset}")


def _refusal(member: tarfile.TarInfo) -> RowError | None:
    """Why a member is not read, whatever is in it."""
    name = member.name
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or ".." in parts or not name.isprintable():
        return RowError(f"the name {name[:80]!r} leads out of the tar", code="path_escape")
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "no plain file"
        return RowError(kind, code="path_escape")
    return None


def _split_name(name: str) -> tuple[str, str]:
    """A member's key and suffix: they part at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _wanted(suffix: str) -> bool:
    last = PurePosixPath(f"x{suffix}").suffix
    return suffix == ".json" or last in VIDEO_SUFFIXES or last in IMAGE_SUFFIXES


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _unpack(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    suffix: str,
    sample: _Unpacking,
    limits: MediaLimits,
) -> None:
    """Take a member into its sample, if the sample can still be one."""
    sample.num_bytes += member.size
    if sample.refused is not None:
        return
    videos = PurePosixPath(f"x{suffix}").suffix in VIDEO_SUFFIXES
    files = sample.videos if videos else sample.pictures
    target = sample.folder / f"frame{suffix}"
    sample.refused = _too_much(member, suffix, sample, len(files), limits)
    if sample.refused is not None:
        return
    if suffix == ".json":
        sample.text = _content(tar, member)
    elif target.exists():
        sample.refused = RowError(f"two files {suffix!r}", code="duplicate_name")
    else:
        _copy(tar, member, target)
        files.append(target)


def _too_much(
    member: tarfile.TarInfo, suffix: str, sample: _Unpacking, num_files: int, limits: MediaLimits
) -> MediaError | RowError | None:
    """Why a sample with this member in it would break a limit."""
    if suffix == ".json":
        if member.size <= MAX_JSON_BYTES:
            return None
        return MediaError(f"JSON of {member.size} bytes", code="too_large")
    if sample.num_bytes > limits.max_bytes:
        cause = f"{sample.num_bytes} bytes, and the limit is {limits.max_bytes}"
        return MediaError(cause, code="too_large")
    if num_files >= limits.max_frames:
        return MediaError(f"more than {limits.max_frames} pictures", code="frames_over_limit")
    if not re.fullmatch(r"[a-z0-9._-]{1,100}", suffix):
        return RowError(f"the suffix {suffix[:80]!r} is none", code="path_escape")
    return None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read(member.size)


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    file = tar.extractfile(member)
    assert file is not None
    with target.open("wb") as copy:
        left = member.size
        while left:
            data = file.read(min(left, _CHUNK_BYTES))
            if not data:
                raise tarfile.ReadError("unexpected end of data")
            copy.write(data)
            left -= len(data)


def _finished(sample: _Unpacking, subject: str) -> Sample | Failure:
    """A sample whose members are all there."""
    item = f"{subject}:{sample.key}"
    if sample.refused is not None:
        return _failure(item, sample.refused)
    if not sample.videos and not sample.pictures:
        return _failure(item, MediaError("neither a picture nor a video", code="not_media"))
    if len(sample.videos) > 1 or (sample.videos and sample.pictures):
        cause = f"{len(sample.videos)} videos and {len(sample.pictures)} pictures in one sample"
        return _failure(item, RowError(cause))
    stacked = len(sample.pictures) == 1 and sample.pictures[0].stem == "frame"
    path = (sample.videos or sample.pictures)[0] if sample.videos or stacked else sample.folder
    try:
        note, fps = _note(sample.text)
    except RowError as error:
        return _failure(item, error)
    return Sample(sample.key, path, note, fps)


def _note(text: bytes | None) -> tuple[ClipRecord | None, float | None]:
    """The record in a sample's JSON, if it is one of ours, and the rate that any JSON may say."""
    if text is None:
        return None, None
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise RowError("its JSON cannot be read") from None
    if not isinstance(values, dict):
        return None, None
    if {"clip_id", "sha256", "crop_px"} <= values.keys():
        return parse_note(values), None
    fps = values.get("fps")
    if isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps < 1e5:
        return None, float(fps)
    return None, None


def _failure(item: str, error: MediaError | RowError) -> Failure:
    return Failure(printable(item), "read", error.code, error.cause, error.retryable, 1)


def printable(text: str) -> str:
    """A stranger's text for a table: what cannot be printed is escaped, and it is bounded."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= 300 else f"{shown[:299]}…"

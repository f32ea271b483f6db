"""The small files of a folder, a zip or a tar (plain or packed), one after another.

- Annotations come as archives of a million small files: nothing is unpacked to disk, and memory
  does not grow with their number. (`zipfile` holds 700 bytes of each, a gigabyte for VoxCeleb 2, so
  the zip's list is read here as it goes.)
- Archives come from strangers: no path of theirs is ever opened, links are refused, and what may
  be unpacked is limited, of one file and of all.
- Folders are walked in the order of names, archives in their own.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kpmask.errors import ConfigError, RowError

MAX_UNPACKED_BYTES = 256 * 2**30
MAX_DEPTH = 16  # of folders in folders
_MAX_READ_BYTES = 64 * 2**20  # at once: a tar's header may ask for any number
_DAMAGE = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    ValueError,
    OverflowError,
)
_PACKED = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))

File = tuple[str, bytes | RowError]

# Of APPNOTE.TXT (the zip format): 4.3.16, 4.3.15, 4.3.14, 4.3.12, 4.3.7.
_ZIP_END = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR = struct.Struct("<4sLQL")
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")
_ZIP_ENTRY = struct.Struct("<4s6H3L5H2L")
_ZIP_LOCAL = struct.Struct("<4s5H3L2H")
_ZIP_UNKNOWN = 0xFFFFFFFF
_ZIP_ENCRYPTED, _ZIP_UTF8 = 0x1, 0x800


def small_files(path: Path, *, suffix: str, max_bytes: int) -> Iterator[File]:
    """The files with a suffix, in all folders: their path within (parts joined by `/`), and bytes.

    Hidden files are left out. A file that cannot be had comes with the reason in its bytes' place.

    Args:
        path: a folder or an archive.
        suffix: such as `.txt`.
        max_bytes: the most that one file may have.

    Raises:
        ConfigError: as the iteration goes: no such file, neither a folder nor an archive, a
            damaged archive, or one that unpacks to more than `MAX_UNPACKED_BYTES`.
    """
    try:
        if path.is_dir():
            found = _of_folder(path, "", suffix, max_bytes)
        elif not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError("neither a folder nor an archive", subject=str(path))
        else:
            found = _of_archive(path, suffix, max_bytes)
        yield from found
    except _DAMAGE as error:
        raise ConfigError(f"the archive is damaged: {error}", subject=str(path)) from error
    except OSError as error:
        raise ConfigError(error.strerror or str(error), subject=str(path)) from error


# --- folders ---------------------------------------------------------------------------------


def _of_folder(folder: Path, inner: str, suffix: str, max_bytes: int) -> Iterator[File]:
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        name = inner + entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            yield name, RowError("a link, which is not followed", code="path_escape")
        elif entry.is_dir(follow_symlinks=False):
            if name.count("/") >= MAX_DEPTH:
                yield name, RowError(f"more than {MAX_DEPTH} folders deep")
            else:
                yield from _of_folder(folder / entry.name, name + "/", suffix, max_bytes)
        elif entry.is_file(follow_symlinks=False) and name.endswith(suffix):
            yield name, _file_bytes(folder / entry.name, max_bytes)


def _file_bytes(path: Path, max_bytes: int) -> bytes | RowError:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        return RowError(error.strerror or str(error))
    return _too_large(max_bytes) if len(data) > max_bytes else data


def _too_large(max_bytes: int) -> RowError:
    return RowError(f"the file has more than {max_bytes} bytes")


# --- archives --------------------------------------------------------------------------------


def _of_archive(path: Path, suffix: str, max_bytes: int) -> Iterator[File]:
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            yield from _Zip(path, file, suffix, max_bytes).files()
            return
        for magic, opener in _PACKED:
            if head.startswith(magic):
                with opener(path, "rb") as unpacked:
                    yield from _of_tar(_Bounded(unpacked, path), suffix, max_bytes)
                return
        if head[257:262] != b"ustar":
            raise ConfigError("neither a folder nor a zip or tar archive", subject=str(path))
        yield from _of_tar(_Bounded(file, path), suffix, max_bytes)


def _plain(name: str) -> str:
    """A path in an archive without parts that mean nothing."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return ("/" if name.startswith("/") else "") + "/".join(parts)


def _wanted(name: str, suffix: str) -> bool:
    """Whether a file of an archive is of those asked for; `..` is, so that it is told."""
    hidden = any(part.startswith(".") and part != ".." for part in name.split("/"))
    return name.endswith(suffix) and not hidden


def _escapes(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


class _Bounded(io.RawIOBase):
    """A stream that refuses to be read in large pieces or without end."""

    def __init__(
        self, file: BinaryIO | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile, path: Path
    ) -> None:
        self._file = file
        self._path = path
        self.last = b""  # what was read last

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            raise ConfigError("the archive is damaged: a header too large", subject=str(self._path))
        self._check(self._file.tell() + size)
        self.last = self._file.read(size)
        return self.last

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._check(offset)
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, position: int) -> None:
        if position > MAX_UNPACKED_BYTES:
            raise ConfigError(
                f"the archive unpacks to more than {MAX_UNPACKED_BYTES} bytes",
                subject=str(self._path),
            )


def _of_tar(file: _Bounded, suffix: str, max_bytes: int) -> Iterator[File]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would hold all of them
            name = _plain(member.name)
            if not _wanted(name, suffix) or member.isdir():
                continue
            if _escapes(name) or not member.isreg() or member.issparse():
                yield name, RowError("no plain file within the archive", code="path_escape")
            elif member.size > max_bytes:
                yield name, _too_large(max_bytes)
            else:
                content = archive.extractfile(member)
                assert content is not None
                yield name, content.read()
        # A header that makes no sense looks to `tarfile` like the end, which is a block of zeros.
        if len(file.last) < tarfile.BLOCKSIZE or any(file.last):
            raise EOFError("it ends early")


class _Zip:
    """A zip archive, whose list of files is read as it goes."""

    def __init__(self, path: Path, file: BinaryIO, suffix: str, max_bytes: int) -> None:
        self._path = path
        self._file = file
        self._suffix = suffix
        self._max_bytes = max_bytes
        self._unpacked_bytes = 0

    def files(self) -> Iterator[File]:
        offset, count = self._list_place()
        with self._path.open("rb") as entries:
            entries.seek(offset)
            for _ in range(count):
                entry = _ZIP_ENTRY.unpack(entries.read(_ZIP_ENTRY.size))
                magic, _, _, flags, method, _, _, crc, packed, size = entry[:10]
                name_bytes, extra_bytes, comment_bytes, at = *entry[10:13], entry[16]
                if magic != b"PK\x01\x02":
                    raise ValueError("its list of files is broken")
                text = entries.read(name_bytes).decode("utf-8" if flags & _ZIP_UTF8 else "cp437")
                extra = entries.read(extra_bytes)
                entries.seek(comment_bytes, os.SEEK_CUR)
                name = _plain(text)
                if text.endswith("/") or not _wanted(name, self._suffix):
                    continue
                size, packed, at = _zip64(extra, size, packed, at)
                if _escapes(name):
                    yield name, RowError("no plain file within the archive", code="path_escape")
                elif max(size, packed) > self._max_bytes:
                    yield name, _too_large(self._max_bytes)
                elif flags & _ZIP_ENCRYPTED or method not in (0, 8):
                    yield name, RowError("encrypted, or packed by a method other than deflate")
                else:
                    yield name, self._content(at, packed, size, crc, deflated=method == 8)

    def _list_place(self) -> tuple[int, int]:
        """Where the list of files begins, and how many there are."""
        size_bytes = self._file.seek(0, os.SEEK_END)
        tail_at = max(0, size_bytes - 0xFFFF - _ZIP_END.size - _ZIP64_LOCATOR.size)
        self._file.seek(tail_at)
        tail = self._file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0:
            raise EOFError("it ends early")
        end = _ZIP_END.unpack_from(tail, at)
        count, offset = end[4], end[6]
        if at >= _ZIP64_LOCATOR.size:
            locator = _ZIP64_LOCATOR.unpack_from(tail, at - _ZIP64_LOCATOR.size)
            if locator[0] == b"PK\x06\x07":
                self._file.seek(locator[2])
                end64 = _ZIP64_END.unpack(self._file.read(_ZIP64_END.size))
                if end64[0] != b"PK\x06\x06":
                    raise ValueError("its end is broken")
                count, offset = end64[7], end64[9]
        return offset, count

    def _content(
        self, at: int, packed_bytes: int, size_bytes: int, crc: int, *, deflated: bool
    ) -> bytes | RowError:
        """One file's bytes; it has `max_bytes` at most, packed and unpacked."""
        self._file.seek(at)
        local = _ZIP_LOCAL.unpack(self._file.read(_ZIP_LOCAL.size))
        self._file.seek(at + _ZIP_LOCAL.size + local[9] + local[10])
        data = self._file.read(packed_bytes)
        if deflated:
            try:
                # One more than is said, so that more is seen.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size_bytes + 1)
            except zlib.error as error:
                return RowError(f"damaged in the archive: {error}")
        if local[0] != b"PK\x03\x04" or len(data) != size_bytes or zlib.crc32(data) != crc:
            return RowError("damaged in the archive: its checksum differs")
        self._unpacked_bytes += size_bytes
        if self._unpacked_bytes > MAX_UNPACKED_BYTES:
            raise ConfigError(
                f"the archive unpacks to more than {MAX_UNPACKED_BYTES} bytes",
                subject=str(self._path),
            )
        return data


def _zip64(extra: bytes, size: int, packed: int, at: int) -> tuple[int, int, int]:
    """An entry's numbers, with those that need 64 bits from its extra field."""
    values = [size, packed, at]
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            place = position + 4
            for index, value in enumerate(values):
                if value == _ZIP_UNKNOWN:
                    (values[index],) = struct.unpack_from("<Q", extra, place)
                    place += 8
        position += 4 + length
    return values[0], values[1], values[2]

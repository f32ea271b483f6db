"""Small files out of folders and archives, against `zipfile` and `tarfile`; and hostile ones."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from kpmask.data import archives
from kpmask.data.archives import small_files
from kpmask.errors import ConfigError, RowError

FILES = {
    "txt/b/v1/00001.txt": b"one",
    "txt/b/v1/00002.txt": b"",
    "txt/a/-v_2/00001.txt": b"three " * 900,
    "txt/a/\xe9/00001.txt": b"four",
    "txt/a/v/.hidden.txt": b"no",
    "__MACOSX/a/v/._00001.txt": b"no",
    "txt/a/v/other.csv": b"no",
}
WANTED = {n: d for n, d in FILES.items() if d != b"no"}


def read(path: Path, max_bytes: int = 10_000) -> list[tuple[str, bytes | RowError]]:
    return list(small_files(path, suffix=".txt", max_bytes=max_bytes))


def zipped(path: Path, method: int = zipfile.ZIP_DEFLATED, comment: bytes = b"") -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.comment = comment
        archive.mkdir("txt")
        for name, data in FILES.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, mode: str, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=tar_format) as archive:
        archive.addfile(_member("txt", tarfile.DIRTYPE))
        for name, data in FILES.items():
            member = _member(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_folder_comes_in_the_order_of_names(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert read(tmp_path) == sorted(WANTED.items())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("comment", [b"", b"about PK\x01\x02 " * 50])
def test_zip(tmp_path: Path, method: int, comment: bytes) -> None:
    path = zipped(tmp_path / "no-suffix", method, comment)
    assert read(path) == list(WANTED.items())


def test_zip_written_as_a_stream(tmp_path: Path) -> None:
    """Its local headers have no sizes."""

    class Pipe(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    (tmp_path / "a.zip").write_bytes(pipe.data)
    assert read(tmp_path / "a.zip") == list(WANTED.items())


def test_zip_of_many_files_in_flat_memory(tmp_path: Path) -> None:
    """More than 65,535 files need the 64-bit list."""
    num_files = 66_000
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for number in range(num_files):
            archive.writestr(f"p/v{number // 10}/{number:06d}.txt", b"%d" % number)
    files = small_files(tmp_path / "many.zip", suffix=".txt", max_bytes=100)
    tracemalloc.start()
    count = sum(data == b"%d" % number for number, (_, data) in enumerate(files))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == num_files
    assert peak_bytes < 2_000_000  # zipfile.ZipFile: 40 million


def test_numbers_of_64_bits_come_from_the_extra_field() -> None:
    unknown = 0xFFFFFFFF
    other = struct.pack("<2H4s", 0x5455, 4, b"time")
    extra = other + struct.pack("<2H2Q", 1, 16, 5_000_000_000, 6_000_000_000)
    assert archives._zip64(extra, unknown, 7, unknown) == (5_000_000_000, 7, 6_000_000_000)
    assert archives._zip64(b"", 1, 2, 3) == (1, 2, 3)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar(tmp_path: Path, mode: str, tar_format: int) -> None:
    assert read(tarred(tmp_path / "no-suffix", mode, tar_format)) == list(WANTED.items())


def test_nothing_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("FRAME")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "not-a-tar.gz").write_bytes(gzip.compress(b"FRAME" * 500))
    for name, cause in (
        ("text", "neither"),
        ("pipe", "neither"),
        ("none", "No such file"),
        ("not-a-tar.gz", "damaged"),
    ):
        with pytest.raises(ConfigError, match=cause):
            read(tmp_path / name)


def test_links_and_paths_out_of_the_archive_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("../../p/v/1.txt", "/etc/v/1.txt"):
            archive.addfile(_member(name))
        archive.addfile(_member("p/v/2.txt", tarfile.SYMTYPE, "/etc/passwd"))
        archive.addfile(_member("p/v/3.txt", tarfile.LNKTYPE, "/etc/passwd"))
        archive.addfile(_member("p/v/4.txt", tarfile.FIFOTYPE))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zip_archive:
        zip_archive.writestr("../../p/v/1.txt", b"")
        zip_archive.writestr("/etc/v/1.txt", b"")
    for name, count in (("a.tar", 5), ("a.zip", 2)):
        found = [data for _, data in read(tmp_path / name)]
        assert [d.code for d in found if isinstance(d, RowError)] == ["path_escape"] * count
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "up").symlink_to(tmp_path)
    (folder / "1.txt").symlink_to("/etc/passwd")
    found = [data for _, data in read(folder)]
    assert [d.code for d in found if isinstance(d, RowError)] == ["path_escape"] * 2


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/1.txt").write_bytes(bytes(10_001))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.txt", bytes(100_000_000))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=1) as tar:
        member = _member("1.txt")
        member.size = 100_000_000
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    for name in ("folder", "a.zip", "a.tar.gz"):
        tracemalloc.start()
        ((_, data),) = read(tmp_path / name)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert isinstance(data, RowError) and "more than 10000 bytes" in data.cause
        assert peak_bytes < 2_000_000


def test_zip_that_lies_about_a_size(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.txt", bytes(9_000_000))
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(struct.pack("<L", 9_000_000), b"\x05\0\0\0"))
    ((_, found),) = read(tmp_path / "a.zip", 100_000)
    assert isinstance(found, RowError) and "checksum" in found.cause


def test_archive_that_unpacks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 4_000)
    for path in (
        zipped(tmp_path / "a"),
        tarred(tmp_path / "b", "w"),
        tarred(tmp_path / "c", "w:gz"),
    ):
        with pytest.raises(ConfigError, match="unpacks to more"):
            read(path)


def test_header_that_asks_for_memory(tmp_path: Path) -> None:
    member = _member("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    member.size = 2**33
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(ConfigError, match="header too large"):
        read(tmp_path / "a.tar")


def test_cut_archives_say_so(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "a"), tarred(tmp_path / "b", "w"), tarred(tmp_path / "c", "w:gz")
    for path in whole:
        data = path.read_bytes()
        size = len(data.rstrip(b"\0"))
        for length in (size // 3, size // 2, size - 30):
            path.write_bytes(data[:length])
            with pytest.raises(ConfigError):
                read(path)


def test_mutated_archives_neither_crash_nor_hang(tmp_path: Path) -> None:
    rng = random.Random(3)
    for path in (
        zipped(tmp_path / "a"),
        tarred(tmp_path / "b", "w"),
        tarred(tmp_path / "c", "w:gz"),
        tarred(tmp_path / "d", "w:xz", tarfile.GNU_FORMAT),
    ):
        data = path.read_bytes().rstrip(b"\0") + bytes(1024)
        for _ in range(200):
            mutated = bytearray(data)
            for _ in range(rng.choice([1, 1, 4, 30])):
                mutated[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(mutated)
            try:
                for name, found in read(path):
                    assert isinstance(name, str) and isinstance(found, bytes | RowError)
            except ConfigError as error:
                assert error.subject == str(path)

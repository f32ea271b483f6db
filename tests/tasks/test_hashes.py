"""Digests kept between runs: what is taken for unchanged, and what trouble does."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kpmask.errors import StorageError
from tasks import hashes
from tasks.hashes import HashCache, Known, version
from tasks.storage import open_store


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files need not be old to be trusted: two writes of a test are further apart than a tick."""
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)


def rows_of(path: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(path) as db:
        found = db.execute("SELECT uri, sha256 FROM hash ORDER BY id").fetchall()
    db.close()
    return found


# --- the file --------------------------------------------------------------------------------


def test_what_was_found_is_found_by_another_run(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "hashes.sqlite"
    with HashCache(path) as cache:
        assert cache.get("/a", "1") is None
        cache.put("/a", "1", Known("aa", None))
        cache.put("/b", "1", Known("bb", 7))
        cache.put("/a", "2", Known("cc", 0))
    with HashCache(path) as cache:
        assert cache.get("/a", "1") is None
        assert cache.get("/a", "2") == Known("cc", 0)
        assert cache.get("/b", "1") == Known("bb", 7)
    assert rows_of(path) == [("/b", "bb"), ("/a", "cc")]


def test_the_rows_found_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "ROWS_BETWEEN_SWEEPS", 50)
    path = tmp_path / "hashes.sqlite"
    with HashCache(path, max_rows=10) as cache:
        for number in range(120):
            cache.put(f"/{number}", "1", Known(str(number), None))
        assert cache.get("/0", "1") is None
        assert cache.get("/119", "1") == Known("119", None)
        assert cache._db is not None
        assert cache._db.execute("SELECT COUNT(*) FROM hash").fetchone()[0] < 60
        cache.put("/111", "2", Known("anew", None))
    assert [uri for uri, _ in rows_of(path)] == [*(f"/{n}" for n in range(112, 120)), "/111"]


@pytest.mark.parametrize("damage", [b"", b"no table of ours " * 1000])
def test_a_damaged_file_is_told_and_done_without(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "hashes.sqlite"
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING), HashCache(path) as cache:
        cache.put("/a", "1", Known("aa", None))
        assert cache.get("/a", "1") == (None if damage else Known("aa", None))
    assert [record.getMessage().count(str(path)) for record in caplog.records] == [1] * bool(damage)


def test_a_file_that_is_damaged_meanwhile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "hashes.sqlite"
    with HashCache(path) as cache:
        with sqlite3.connect(path) as other:
            other.execute("DROP TABLE hash")
        other.close()
        assert cache.get("/a", "1") is None
        cache.put("/a", "1", Known("aa", None))
    assert len(caplog.records) == 1


def test_a_place_where_no_file_can_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    with HashCache(tmp_path / "cache" / "hashes.sqlite") as cache:
        cache.put("/a", "1", Known("aa", None))
        assert cache.get("/a", "1") is None
    assert "read again" in caplog.text


WRITER = """
import sys
from pathlib import Path
from tasks.hashes import HashCache, Known
with HashCache(Path(sys.argv[1])) as cache:
    for number in range(200):
        cache.put(f"/{sys.argv[2]}/{number}", "1", Known(f"{number}", None))
        assert cache.get(f"/{sys.argv[2]}/{number}", "1") is not None
"""


def test_processes_and_threads_share_the_file(tmp_path: Path) -> None:
    path = tmp_path / "hashes.sqlite"
    root = Path(__file__).parents[2]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(n)], cwd=root, stderr=subprocess.PIPE
        )
        for n in range(3)
    ]
    with HashCache(path) as cache, ThreadPoolExecutor(4) as pool:
        known = [(f"/threads/{n}", "1", Known(str(n), n)) for n in range(400)]
        list(pool.map(lambda entry: cache.put(*entry), known))
        assert [cache.get(uri, "1") for uri, _, _ in known] == [entry[2] for entry in known]
        for writer in writers:
            assert writer.communicate(timeout=60)[1] == b""
    assert len(rows_of(path)) == 3 * 200 + 400


# --- versions --------------------------------------------------------------------------------


def test_a_file_that_was_just_written_has_no_version(tmp_path: Path) -> None:
    """A second write within a tick of the file system's clock would look the same."""
    path = tmp_path / "a"
    path.write_bytes(b"1")
    assert version(str(path)) is None
    os.utime(path, (1, 1))  # that it says so is no proof
    assert version(str(path)) is None


def test_versions_of_files(settled: None, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1")
    first = version(str(path))
    assert first is not None
    assert version(path.as_uri()) == version(str(path)) == first
    status = path.stat()
    time.sleep(0.02)
    path.write_bytes(b"2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as tools do that copy times
    second = version(str(path))
    assert second not in {None, first}
    copy = tmp_path / "copy"
    shutil.copy2(path, copy)
    assert version(str(copy)) not in {None, second}
    copy.replace(path)
    assert version(str(path)) not in {None, first, second}
    assert version(str(tmp_path / "absent")) is None
    os.mkfifo(tmp_path / "pipe")
    assert version(str(tmp_path / "pipe")) is None


def test_versions_of_folders(settled: None, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(b"x")
    seen = [version(str(folder))]
    (folder / ".hidden").write_bytes(b"x")
    (folder / "deeper").mkdir()
    assert version(str(folder)) == seen[0]
    (folder / "2.png").rename(folder / "3.png")
    seen.append(version(str(folder)))
    time.sleep(0.02)
    (folder / "1.png").write_bytes(b"y")
    seen.append(version(str(folder)))
    (folder / "1.png").unlink()
    seen.append(version(str(folder)))
    assert None not in seen
    assert len(set(seen)) == len(seen)


def test_versions_of_objects(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3)
    store.put("a.png", b"1")
    seen = [version(f"{s3}/a.png")]
    assert version(f"{s3}/a.png") == seen[0]
    store.put("a.png", b"2")
    seen.append(version(f"{s3}/a.png"))
    store.put("frames/1.png", b"1")
    store.put("frames/deeper/1.png", b"1")
    seen.append(version(f"{s3}/frames"))
    store.put("frames/deeper/1.png", b"2")
    assert version(f"{s3}/frames") == seen[-1]
    store.put("frames/1.png", b"2")
    seen.append(version(f"{s3}/frames"))
    assert None not in seen
    assert len(set(seen)) == len(seen)
    assert version(f"{s3}/absent.png") is None
    with pytest.raises(StorageError):
        version("s3://no-such-bucket-here/a.png")
    # Another server's ETag of the same text means something else.
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert version(f"{s3}/a.png") not in {None, seen[1]}

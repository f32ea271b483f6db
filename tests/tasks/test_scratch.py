"""Folders for a while: removed at their end, or by the next process where theirs was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tasks.scratch import scratch_folder, sweep_scratch

HOLD = """
import time
from tasks.scratch import scratch_folder
with scratch_folder("test") as folder:
    (folder / "big").write_bytes(b"1")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_folder_of_a_killed_process_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert holder.stdout is not None
    left = Path(holder.stdout.readline().strip())
    sweep_scratch("test")
    assert (left / "big").exists()  # its process lives
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    sweep_scratch("other")
    assert left.exists()
    sweep_scratch("test")
    assert not left.exists()


def test_folder_goes_with_its_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError), scratch_folder("test") as folder:
        assert folder.parent == tmp_path and folder.is_dir()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []

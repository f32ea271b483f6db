"""Folders for a while. A killed process leaves its own behind; the next one sweeps them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kpmask.media.encode import storage_error
from tasks.machine import process_lives


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A folder that is this process's until the context ends; `purpose` is a word of its name.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        folder = tempfile.mkdtemp(prefix=f"kpmask-{purpose}-{os.getpid()}-")
    except OSError as error:
        raise storage_error(error, Path(tempfile.gettempdir())) from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_scratch(purpose: str) -> None:
    """Remove the folders of that purpose that killed processes of this user and machine left."""
    pattern = re.compile(rf"kpmask-{re.escape(purpose)}-(\d+)-")
    for folder in Path(tempfile.gettempdir()).glob(f"kpmask-{purpose}-*"):
        match = pattern.match(folder.name)
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            ours = match is not None and folder.lstat().st_uid == os.getuid()
            if match and ours and not process_lives(int(match[1]), started=""):
                shutil.rmtree(folder, ignore_errors=True)

"""The real weights of estimators, for tests: out of the user's cache, or else fetched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kpmask.errors import KpmaskError
from kpmask.estimators.weights import KNOWN, fetched_files, state
from tasks.weights_fetch import fetch_weights


def need_weights(name: str) -> None:
    """Have these weights in the tests' cache; skip the test where they cannot be had."""
    weights = KNOWN[name]
    if state(weights) == "absent":
        _copy_from_user(name)
    try:
        fetch_weights(name)
    except KpmaskError as error:
        pytest.skip(f"the weights of {name} are not to be had here: {error.cause}")


def _copy_from_user(name: str) -> None:
    """Take what the user has fetched; the tests' own cache is elsewhere."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kpmask"
    for path in fetched_files(KNOWN[name]):
        theirs = cache / path.relative_to(path.parents[2])
        if theirs.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(theirs, path)

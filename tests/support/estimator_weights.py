"""The real weights of estimators, for tests: out of the user's cache, or else fetched."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import pytest

from kpmask.errors import KpmaskError
from kpmask.estimators.weights import KNOWN, fetched_files, state
from tasks import weights_fetch

FETCH_TIMEOUT_S = 240.0  # a network that hangs skips the tests, and does not time them out


def need_weights(name: str) -> None:
    """Have these weights in the tests' cache; skip the test where they cannot be had."""
    if (why_not := _why_not(name)) is not None:
        pytest.skip(f"the weights of {name} are not to be had here: {why_not}")


@functools.cache
def _why_not(name: str) -> str | None:
    """None once they are here; tried once, however many tests need them."""
    if state(KNOWN[name]) == "absent":
        _copy_from_user(name)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weights_fetch, "CLIENT_TIMEOUT_S", FETCH_TIMEOUT_S)
        try:
            weights_fetch.fetch_weights(name)
        except KpmaskError as error:
            return error.cause
    return None


def _copy_from_user(name: str) -> None:
    """Take what the user has fetched; the tests' own cache is elsewhere."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kpmask"
    for path in fetched_files(KNOWN[name]):
        theirs = cache / path.relative_to(path.parents[2])
        if theirs.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(theirs, path)

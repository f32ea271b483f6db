"""Weights that a job names: bundled ones by name, others by path or URI.

A name goes to the workers as it is, and each finds the file in its own installation, which may be
elsewhere than here.
"""

from __future__ import annotations

import os
from pathlib import Path

from kpmask import bundled
from kpmask.errors import StorageError
from tasks import storage


def reference(weights: str) -> str:
    """A name, path or URI that means the same in every process.

    Raises:
        CheckpointError: no such bundled weights, or not the file that was released.
    """
    if not bundled.is_name(weights):
        return storage.absolute(weights)
    path = bundled.locate(weights)
    # A folder of one's own is known here alone; the package's weights have their name everywhere.
    return str(path.absolute()) if os.environ.get(bundled.VARIABLE) else weights


def local_weights(weights: str) -> Path:
    """A local file of the weights that a job names: not to be written to.

    Raises:
        CheckpointError: no such bundled weights, or not the file that was released.
        StorageError: there is no such file, or its store denies or does not answer.
    """
    if bundled.is_name(weights):
        return bundled.locate(weights)
    try:
        return storage.local_copy(storage.absolute(weights))
    except StorageError as error:
        if error.code != "not_found":
            raise
        raise StorageError(
            error.cause, subject=error.subject, code=error.code, hint=bundled.names_hint()
        ) from error

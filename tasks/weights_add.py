"""Weights that the user brings: into the cache, under their digest.

What decides which file is the one is a small file of its own that is written last: whoever is
killed in between leaves what was before. Nothing of a file is run or read as a pickle here, and
nothing is downloaded but by `fetch_own`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kpmask import pretrained
from kpmask.errors import CheckpointError, ConfigError
from kpmask.estimators import check_weights
from kpmask.estimators.weights import (
    KNOWN,
    OWN,
    OwnWeights,
    own_file,
    own_folder,
    own_state,
    pin_file,
    pinned_sha256,
)
from kpmask.pretrained import PublishedFile
from tasks.storage import os_errors

_CHUNK_BYTES = 2**20


def add_weights(name: str, file: Path, *, replace: bool = False) -> None:
    """Copy a file of the user's into the cache, where estimators find it.

    Args:
        name: one of `OWN`.
        replace: take it though another file was added before. Numbers that were made with that
            one do not compare with new ones.

    Raises:
        ConfigError: there are no such weights or no such file.
        CheckpointError: it is longer than such weights are, or its digest is not the published
            one, or not that of the file that was added before, or it is of another network.
            Nothing of it is kept.
        StorageError: the file cannot be read, or the cache cannot be written.
    """
    weights = _own(name)
    if not file.is_file():
        raise ConfigError("no such file", subject=str(file))
    with os_errors(str(own_folder(weights))), alone(own_folder(weights)) as workplace:
        _add(weights, file, workplace, replace=replace)


def fetch_own(name: str) -> None:
    """Fetch weights from where they were published, unless they are here; as `add_weights`.

    A download that broke off is continued by the next call.

    Raises:
        ConfigError: nothing of this name can be fetched; the hint says how to add it.
        CheckpointError: code weights_unavailable: it cannot be had, which a later call may; or
            what came is not what was published.
        StorageError: the cache cannot be written.
    """
    weights = _own(name)
    if weights.published is None:
        raise ConfigError(
            f"cannot be fetched ({weights.terms}: {weights.source})",
            subject=name,
            hint=f"get it from there, then kpmask weights add {name} FILE",
        )
    if own_state(weights) == "added":
        return
    folder = own_folder(weights)
    with os_errors(str(folder)), alone(folder) as workplace:
        if own_state(weights) == "added":
            return
        path = _downloaded(weights.name, weights.published, folder / ".download")
        # What is damaged here is mended by what was published.
        _add(weights, path, workplace, replace=True)
        shutil.rmtree(path.parent, ignore_errors=True)


def _downloaded(name: str, published: PublishedFile, folder: Path) -> Path:
    try:
        return pretrained.fetch(published, folder)
    except CheckpointError as error:
        raise CheckpointError(
            error.cause,
            subject=error.subject,
            code=error.code,
            hint=f"fetch it on another machine, then kpmask weights add {name} FILE",
            retryable=error.retryable,
        ) from error


@contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """An empty folder within `folder`, for one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    workplace = folder / ".fetching"
    with (folder / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when the process dies
        shutil.rmtree(workplace, ignore_errors=True)  # of one that was killed
        workplace.mkdir()
        try:
            yield workplace
        finally:
            shutil.rmtree(workplace, ignore_errors=True)


def _own(name: str) -> OwnWeights:
    if (weights := OWN.get(name)) is not None:
        return weights
    if name in KNOWN:
        raise ConfigError(
            "comes out of a package and is not added",
            subject=name,
            hint=f"kpmask weights fetch {name} [--archive FILE]",
        )
    raise ConfigError("no weights of this name", subject=name, hint=f"one of {', '.join(OWN)}")


def _add(weights: OwnWeights, file: Path, workplace: Path, *, replace: bool) -> None:
    part = workplace / weights.file_name
    sha256 = _copied(file, part, weights)
    _admit(weights, sha256, file, replace=replace)
    _check(weights, part, file)
    path = own_file(weights, sha256)
    path.parent.mkdir(exist_ok=True)
    part.replace(path)
    _pin(weights, sha256, workplace)
    _forget_others(weights, path.parent)


def _copied(file: Path, part: Path, weights: OwnWeights) -> str:
    """Copy a file, no further than it may be long; its SHA-256."""
    digest, size_bytes = hashlib.sha256(), 0
    with file.open("rb") as source, part.open("wb") as out:
        while chunk := source.read(_CHUNK_BYTES):
            size_bytes += len(chunk)
            if size_bytes > weights.max_bytes:
                raise CheckpointError(
                    f"is longer than {weights.max_bytes} bytes, so it is not {weights.name}",
                    subject=str(file),
                )
            digest.update(chunk)
            out.write(chunk)
    if not size_bytes:
        raise CheckpointError("is empty", subject=str(file))
    return digest.hexdigest()


def _admit(weights: OwnWeights, sha256: str, file: Path, *, replace: bool) -> None:
    prefixes = weights.sha256_prefixes
    if prefixes and not sha256.startswith(prefixes):
        raise CheckpointError(
            f"is not what was published: SHA-256 {sha256[:16]}... does not begin with "
            f"{' or '.join(prefixes)}",
            subject=str(file),
        )
    if replace:  # also where what says which was added cannot be read
        return
    before = pinned_sha256(weights)
    if before not in (None, sha256):
        raise CheckpointError(
            f"is not the file that was added before: SHA-256 {sha256[:16]}..., not "
            f"{str(before)[:16]}...",
            subject=str(file),
            hint=f"kpmask weights add {weights.name} FILE --replace; older numbers do not "
            "compare with new ones then",
        )


def _check(weights: OwnWeights, part: Path, file: Path) -> None:
    try:
        check_weights(weights.name, part)
    except CheckpointError as error:
        cause = f"is not of the network of {weights.name}: {error.cause}"
        raise CheckpointError(cause, subject=str(file), hint=weights.source) from error


def _pin(weights: OwnWeights, sha256: str, workplace: Path) -> None:
    part = workplace / "pin"
    part.write_text(json.dumps({"sha256": sha256}) + "\n", encoding="utf-8")
    part.replace(pin_file(weights))


def _forget_others(weights: OwnWeights, keep: Path) -> None:
    """Remove files that were replaced. A process that has one of them open keeps reading it."""
    for folder in own_folder(weights).iterdir():
        if folder.is_dir() and folder != keep and not folder.name.startswith("."):
            shutil.rmtree(folder, ignore_errors=True)

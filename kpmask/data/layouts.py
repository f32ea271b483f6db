"""The layout of the original research code, read and written.

    train/, test/     the splits
      <name>.mp4|.gif   a clip as a video
      <name>/           a clip as a folder of images, sorted by name (`0000000.png`, ...)
      <name>.png        a clip as one image, its square frames side by side

A name begins with the identity, up to the first `#`. A folder without `train/` and `test/` is read
by the same rules: images directly in it are stacked frames, images in a deeper folder are one clip.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from kpmask.records import Partition

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
    | {".ogv", ".3gp", ".gif"}
)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
SPLITS: Mapping[str, Partition] = {"train": "train", "test": "test"}


@dataclass(frozen=True, slots=True)
class MediaSource:
    """A video of a folder: one file, or a folder of images.

    Attributes:
        key: the file or folder, relative to the root.
        name: unique among the sources of a root; one plain file name.
        partition: the split whose folder it lies in, if any.
        files: the files that belong to it, relative to the root, sorted by name.
    """

    key: str
    name: str
    partition: Partition | None
    files: tuple[str, ...]

    @property
    def own_name(self) -> str:
        """The file's or folder's name, without folders above and suffix; not unique."""
        return PurePosixPath(self.key).name if self.is_folder else _stem(self.key)

    @property
    def identity(self) -> str:
        """The part of the file's name before any `#`."""
        return identity_of(self.own_name)

    @property
    def is_folder(self) -> bool:
        return self.files != (self.key,)


def identity_of(name: str) -> str:
    """Who is in a clip, by its name: the part before `#`."""
    return name.split("#")[0]


def frame_key(folder: str, number: int) -> str:
    """Where frame `number` of a clip lies in the layout of folders."""
    return f"{folder}/{number:07d}.png"


def find_sources(
    keys: Iterable[str],
    *,
    empty_folders: Iterable[str] = (),
    suffixes: Collection[str] | None = None,
) -> list[MediaSource]:
    """The videos among the files of a root, sorted by key.

    Hidden files and files that are neither videos nor images are left out.

    Args:
        keys: paths of files, relative to the root, parts joined by `/`.
        empty_folders: folders without a visible file; each is a source without files, so that it
            can be reported.
        suffixes: the only files that count, each one source; None: videos and images.
    """
    if suffixes is not None:
        keys = [key for key in keys if PurePosixPath(key).suffix.lower() in suffixes]
        empty_folders = ()
    folders: dict[str, list[str]] = defaultdict(list)
    found: dict[str, tuple[str, ...]] = {folder: () for folder in empty_folders}
    for key in sorted(keys):
        path = PurePosixPath(key)
        if any(part.startswith(".") for part in path.parts):
            continue
        suffix = path.suffix.lower()
        deep = len(path.parts) > (2 if path.parts[0] in SPLITS else 1)
        if suffix in IMAGE_SUFFIXES and deep:
            folders[str(path.parent)].append(key)
        elif suffixes is not None or suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            found[key] = (key,)
    found |= {folder: tuple(files) for folder, files in folders.items()}
    names = _unique_names(found)
    return [
        MediaSource(key, names[key], SPLITS.get(PurePosixPath(key).parts[0]), files)
        for key, files in sorted(found.items())
    ]


def assign_splits(identities: Sequence[str], *, test_fraction: float) -> dict[str, Partition]:
    """A split for each identity, by a hash of its name.

    The share of `test` is `test_fraction` on average, and adding an identity moves no other one,
    but for two cases: where all would be tested on, the one with the highest hash is trained on;
    where none would, and there are two or more, the one with the lowest is tested on.
    """
    share = {name: _share(name) for name in identities}
    tested = {name for name, value in share.items() if value < test_fraction}
    ranked = sorted(share, key=lambda name: (share[name], name))
    if tested and len(tested) == len(ranked):
        tested.discard(ranked[-1])
    if not tested and len(ranked) > 1 and test_fraction > 0:
        tested.add(ranked[0])
    return {name: "test" if name in tested else "train" for name in ranked}


def partition_of(
    identity: str, *, test_identities: Collection[str] = (), test_fraction: float
) -> Partition:
    """The split of one identity, whoever the others are.

    With `test_identities` those are tested on and all others trained on. Without, the split is the
    hash's, as `assign_splits` has it less its two exceptions: they need all names at once.

    Args:
        identity: whose.
        test_identities: best a set.
        test_fraction: in [0, 1]; without effect where identities are named.
    """
    if test_identities:
        return "test" if identity in test_identities else "train"
    return "test" if _share(identity) < test_fraction else "train"


def _share(name: str) -> float:
    """A number in [0, 1) by a hash of a name."""
    name_digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(name_digest[:8]) / 2**64


def _stem(key: str) -> str:
    return PurePosixPath(key).name.removesuffix(PurePosixPath(key).suffix)


def _unique_names(found: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """A plain name for each source: without folders or suffix where that is unique."""
    names: dict[str, str] = {}
    by_stem: dict[str, list[str]] = defaultdict(list)
    for key, files in found.items():
        by_stem[_stem(key) if files == (key,) else PurePosixPath(key).name].append(key)
    for stem, keys in by_stem.items():
        for key in keys:
            names[key] = stem if len(keys) == 1 else key.replace("/", "__")
    return names

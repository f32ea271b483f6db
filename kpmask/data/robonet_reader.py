"""The part of `kpmask.data.robonet` that opens HDF5 files: a process of its own for each file.

HDF5's library neither ends nor survives on every damaged file, so it is kept where it can be
stopped. The process takes the videos' and pictures' bytes out, as they are, and decodes nothing:

    python -m kpmask.data.robonet_reader FILE FOLDER SETTINGS

    FOLDER/cam0.raw/0000000    a video's bytes, or each picture's
    stdout                     a line of JSON (`Taken` or `Refused`) for each camera, or the file

- Nothing is unpickled: attributes are read where they are short texts, and only those needed.
- Soft and external links, external and virtual datasets (which would make the library open other
  files) are refused, and so are filters other than HDF5's own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from kpmask.errors import ItemError, MediaError, RowError

MAX_CAMERAS = 64
MAX_PICTURES = 100_000
_MAX_TEXT_BYTES = 1024
_MAX_SHOWN_CHARS = 80
_BASE_MEMORY_BYTES = 4 * 2**30  # of addresses, most of which the libraries never touch
# Deflate, shuffle, checksum, szip, n-bit, scale-offset and h5py's LZF: all others are plug-ins.
_FILTERS = frozenset({1, 2, 3, 4, 5, 6, 32000})
_NUMBER = re.compile(r"(\d{1,9})$", re.ASCII)


@dataclass(frozen=True, slots=True)
class Settings:
    """What to take: of which robots (in small letters; none: all), of which cameras (None: all)."""

    robots: tuple[str, ...]
    cameras: tuple[int, ...] | None
    max_bytes: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Taken:
    """A camera whose bytes are in its folder. `whole`: a video; else pictures, by number."""

    camera: int
    bgr: bool
    whole: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """Why there is nothing of a camera, or of the file (camera None).

    `errno` is not 0 where what was taken cannot be written.
    """

    camera: int | None
    kind: Literal["media", "row"]
    code: str
    cause: str
    errno: int = 0


def read(path: Path, folder: Path, settings: Settings) -> Iterator[Taken | Refused]:
    """Take the cameras' bytes out of a trajectory."""
    try:
        with _Trajectory(path, settings) as trajectory:
            trajectory.check_robot()
            for number in trajectory.cameras():
                try:
                    yield trajectory.take(number, folder / f"cam{number}.raw")
                except ItemError as error:
                    yield _refused(number, error)
    except ItemError as error:
        yield _refused(None, error)


def _refused(camera: int | None, error: ItemError) -> Refused:
    kind: Literal["media", "row"] = "row" if isinstance(error, RowError) else "media"
    return Refused(camera, kind, error.code, error.cause)


@contextmanager
def _reading() -> Iterator[None]:
    """What h5py raises where a file is damaged is nearly any exception."""
    try:
        yield
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        AttributeError,
        MemoryError,
    ) as error:
        raise MediaError(
            f"the HDF5 file cannot be read: {_shown(str(error))}", code="container_unreadable"
        ) from error


class _Trajectory:
    """An opened HDF5 file."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._settings = settings
        self._taken_bytes = 0
        with _reading():
            self._file = h5py.File(path, "r", locking=False)

    def __enter__(self) -> _Trajectory:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check_robot(self) -> None:
        """Refuse the file of another robot."""
        if not self._settings.robots:
            return
        robot = self._text("robot", self._places(None))
        if robot is None:
            raise RowError("it does not say which robot's it is")
        if robot.casefold() not in self._settings.robots:
            raise RowError(f"of the robot {_shown(robot)}", code="filtered")

    def cameras(self) -> list[int]:
        """The numbers of the cameras that are there and wanted."""
        env = self._group(self._file, "env")
        wanted = self._settings.cameras
        numbers = range(MAX_CAMERAS) if wanted is None else wanted
        with _reading():
            found = [number for number in numbers if f"cam{number}_video" in env]
        if not found:
            raise RowError("no camera in it that is wanted", code="filtered")
        return found

    def take(self, number: int, folder: Path) -> Taken:
        """Write one camera's bytes."""
        bgr = self._is_bgr(number)
        camera = self._camera(number)
        node = self._child(camera, "frames")
        whole = isinstance(node, h5py.Dataset)
        folder.mkdir()
        for index, dataset in enumerate([node] if whole else self._pictures(camera, node)):
            (folder / f"{index:07d}").write_bytes(self._bytes(dataset))
        return Taken(number, bgr, whole)

    def _pictures(self, camera: Any, node: Any) -> Iterator[Any]:  # noqa: ANN401 - no types
        """The datasets of a camera's pictures, by the numbers that their names end with."""
        group = camera if node is None else self._group(camera, "frames")
        with _reading():
            count = len(group)
            if count > MAX_PICTURES:
                raise MediaError(f"{count} pictures in a camera", code="frames_over_limit")
            names = sorted((int(m[1]), name) for name in group if (m := _NUMBER.search(name)))
        if not names:
            raise MediaError("no picture in a camera", code="no_frames")
        for _, name in names:
            yield self._child(group, name)

    def _bytes(self, dataset: Any) -> memoryview:  # noqa: ANN401 - h5py has no types
        """The bytes of a dataset that holds a file."""
        with _reading():
            if not isinstance(dataset, h5py.Dataset):
                raise RowError("a camera's frames are no dataset")
            if dataset.is_virtual or dataset.external:
                raise RowError("its frames are in other files", code="path_escape")
            plist = dataset.id.get_create_plist()
            filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
            if not filters <= _FILTERS:
                raise RowError("its frames are packed by a filter that is not HDF5's own")
            if dataset.dtype.kind not in "ui" or dataset.dtype.itemsize != 1 or dataset.ndim != 1:
                raise RowError("its frames are not the bytes of a video or a picture")
            self._taken_bytes += dataset.size
            most = max(self._taken_bytes, *(dataset.chunks or (0,)))
            if most > self._settings.max_bytes:
                raise MediaError(
                    f"{most} bytes, and the limit is {self._settings.max_bytes}", code="too_large"
                )
            return np.ascontiguousarray(dataset[()]).data

    def _is_bgr(self, number: int) -> bool:
        """Whether a camera's pictures have blue first."""
        order = self._text("image_format", self._places(number)) or "RGB"
        if order.upper() not in {"RGB", "BGR"}:
            raise RowError(f"its image_format is {_shown(order)}, neither RGB nor BGR")
        return order.upper() == "BGR"

    def _camera(self, number: int) -> Any:  # noqa: ANN401 - h5py has no types
        return self._group(self._group(self._file, "env"), f"cam{number}_video")

    def _places(self, number: int | None) -> list[Any]:
        """Where an attribute may be, the nearest place first."""
        nodes = [] if number is None else [self._camera(number)]
        nodes += [self._child(self._file, name) for name in ("env", "metadata")]
        return [*(node for node in nodes if node is not None), self._file]

    def _text(self, name: str, places: list[Any]) -> str | None:
        """The first attribute of a name: a text, or refused."""
        for place in places:
            with _reading():
                if name not in place.attrs:
                    continue
                attribute = place.attrs.get_id(name)
                text = h5py.check_string_dtype(attribute.dtype)
                if text is None or attribute.shape not in ((), (1,)):
                    raise RowError(f"its attribute {name} is not a text")
                if (text.length or 0) > _MAX_TEXT_BYTES:
                    raise RowError(f"its attribute {name} is too long a text")
                value = np.asarray(place.attrs[name]).reshape(-1)[0]
            decoded = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
            return decoded.strip("\0 ")[:_MAX_TEXT_BYTES]
        return None

    def _group(self, parent: Any, name: str) -> Any:  # noqa: ANN401 - h5py has no types
        node = self._child(parent, name)
        if not isinstance(node, h5py.Group):
            raise RowError(f"no group {name} in it, as a trajectory has")
        return node

    def _child(self, parent: Any, name: str) -> Any:  # noqa: ANN401 - h5py has no types
        """What a group holds under a name, if anything."""
        with _reading():
            link = parent.get(name, getlink=True)
            if link is None:
                return None
            if not isinstance(link, h5py.HardLink):
                raise RowError(f"{_shown(name)} in it is a link elsewhere", code="path_escape")
            return parent[name]


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…")


def main(path: str, folder: str, settings_json: str) -> None:
    """What the process does."""
    given = json.loads(settings_json)
    cameras = None if given["cameras"] is None else tuple(given["cameras"])
    settings = Settings(tuple(given["robots"]), cameras, given["max_bytes"], given["timeout_s"])
    # Whoever started this process stops it, too; but may be stopped itself.
    seconds = math.ceil(settings.timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    if sys.platform == "linux":
        most = _BASE_MEMORY_BYTES + 3 * settings.max_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    results = read(Path(path), Path(folder), settings)
    try:
        for result in results:
            sys.stdout.write(json.dumps(dataclasses.asdict(result)) + "\n")
            sys.stdout.flush()
    except OSError as error:  # h5py's are told already: this is of a write
        refused = Refused(None, "media", "not_media", str(error), error.errno or 0)
        sys.stdout.write(json.dumps(dataclasses.asdict(refused)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

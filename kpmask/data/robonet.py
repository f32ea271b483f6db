"""RoboNet's trajectories: HDF5 files of one run of a robot, with a video of each camera.

    env/cam0_video/frames     a video file's bytes (uint8); or a group of pictures' bytes
    env/cam0_video/frame0...  or the pictures beside each other
    attributes                robot, image_format (RGB or BGR): of the camera, env, metadata or root

What is not of a wanted robot is `filtered`. A camera becomes a folder of PNG files: a whole number
of clips (`num_frames`), and red first whatever the file has. A file is opened in a process of its
own, `kpmask.data.robonet_reader`, which says what is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kpmask
from kpmask.config import MediaLimits, RoboNet
from kpmask.data.layouts import frame_key
from kpmask.data.metadata import checked_name
from kpmask.errors import ItemError, MediaError, RowError
from kpmask.media.decode import frames
from kpmask.media.encode import storage_error
from kpmask.media.images import encode_png, read_image
from kpmask.records import Failure

_MAGIC = b"\x89HDF\r\n\x1a\n"
_READER = "kpmask.data.robonet_reader"
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")


@dataclass(frozen=True, slots=True)
class CameraVideo:
    """A camera's video as a folder of pictures; `name` is the trajectory's, `#` and the camera."""

    name: str
    path: Path


def camera_videos(
    path: Path, folder: Path, *, settings: RoboNet, limits: MediaLimits
) -> Iterator[CameraVideo | Failure]:
    """The videos of a trajectory, one after another, and why one cannot be had.

    Args:
        path: an HDF5 file; its name is the trajectory's.
        folder: where the pictures go; it is there, and the caller removes it.
        settings: which robots and cameras, and how many frames.
        limits: for the pictures; `timeout_s` is for taking all of them out of the file.

    Raises:
        StorageError: the pictures cannot be written.
    """
    name = path.stem
    try:
        checked_name(name, what="the file's name")
        _check_file(path, settings)
        pictures = _Pictures(folder, settings, limits)
        for found in _read(path, folder, settings, limits):
            camera = name if found["camera"] is None else f"{name}#cam{found['camera']}"
            try:
                yield CameraVideo(camera, pictures.write(found))
            except ItemError as error:
                yield _failure(camera, error)
    except ItemError as error:
        yield _failure(name, error)


def _check_file(path: Path, settings: RoboNet) -> None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise MediaError("not a regular file", code="not_media")
        with path.open("rb") as file:
            head = file.read(len(_MAGIC))
    except OSError as error:
        raise MediaError(error.strerror or str(error), code="not_found") from error
    if head != _MAGIC:
        raise MediaError("not an HDF5 file", code="not_media")
    if status.st_size > settings.max_bytes:
        raise MediaError(
            f"{status.st_size} bytes, and the limit is {settings.max_bytes}", code="too_large"
        )


def _read(
    path: Path, folder: Path, settings: RoboNet, limits: MediaLimits
) -> Iterator[dict[str, Any]]:
    """What the reader process tells of each camera.

    Raises:
        MediaError: it did not come to its end; after what it told before.
    """
    wanted = {
        "robots": [robot.casefold() for robot in settings.robots],
        "cameras": settings.cameras,
        "max_bytes": settings.max_bytes,
        "timeout_s": limits.timeout_s,
    }
    argv = [sys.executable, "-P", "-m", _READER, str(path.absolute()), str(folder.absolute())]
    error: MediaError | None = None
    try:
        done = subprocess.run(  # noqa: S603 - a list, of our own making
            [*argv, json.dumps(wanted)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limits.timeout_s,
            check=False,
            env=_environment(),
        )
        told = done.stdout
        if done.returncode:
            error = MediaError(_death(done), code="container_unreadable")
    except subprocess.TimeoutExpired as expired:
        told = expired.stdout or b""
        error = MediaError(
            f"reading the HDF5 file took more than {limits.timeout_s:g} s",
            code="container_unreadable",
        )
    lines = told.split(b"\n")[:-1]  # what has no end was cut off
    yield from map(json.loads, lines)
    if error is not None:
        raise error


def _environment() -> dict[str, str]:
    """For a process that reads strangers' files: no credentials, no plug-ins of HDF5's."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    root = Path(kpmask.__file__).parents[1]
    return {
        **kept,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "HDF5_PLUGIN_PRELOAD": "::",
    }


def _death(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        return f"the HDF5 library died of it (signal {-done.returncode})"
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
    return f"the HDF5 file cannot be read: {last}"


class _Pictures:
    """Writes cameras as folders of PNG files, up to `max_bytes` of them all together."""

    def __init__(self, folder: Path, settings: RoboNet, limits: MediaLimits) -> None:
        self._folder = folder
        self._settings = settings
        self._limits = limits
        self._written_bytes = 0

    def write(self, found: dict[str, Any]) -> Path:
        """The folder of a camera that the reader tells of.

        Raises:
            ItemError: what the reader refused, or what is wrong with the pictures.
            StorageError: they cannot be written.
        """
        if "cause" in found:
            if found["errno"]:
                raise storage_error(OSError(found["errno"], found["cause"]), self._folder)
            error_type = RowError if found["kind"] == "row" else MediaError
            raise error_type(found["cause"], code=found["code"])
        order = self._settings.channels
        bgr = found["bgr"] if order == "file" else order == "bgr"
        name = f"cam{found['camera']}"
        raw = self._folder / f"{name}.raw"
        count = 0
        try:
            (self._folder / name).mkdir()
            for image_HWC in self._decoded(raw, whole=found["whole"]):
                data = encode_png(np.ascontiguousarray(image_HWC[..., ::-1]) if bgr else image_HWC)
                self._count(len(data))
                (self._folder / frame_key(name, count)).write_bytes(data)
                count += 1
            self._shorten(name, count)
            shutil.rmtree(raw)
        except OSError as error:
            raise storage_error(error, self._folder / name) from error
        return self._folder / name

    def _decoded(self, raw: Path, *, whole: bool) -> Iterator[NDArray[np.uint8]]:
        if whole:
            for frame in frames(raw / "0000000", self._limits):
                yield frame.rgb_HWC
            return
        for path in sorted(raw.iterdir()):
            yield read_image(path, self._limits)

    def _count(self, size_bytes: int) -> None:
        self._written_bytes += size_bytes
        if self._written_bytes > self._settings.max_bytes:
            raise MediaError(
                f"its pictures have more than {self._settings.max_bytes} bytes", code="too_large"
            )

    def _shorten(self, camera: str, count: int) -> None:
        """Remove the pictures behind the last whole clip."""
        clip = self._settings.num_frames
        if clip is None:
            return
        if count < clip:
            raise MediaError(f"{count} frames, under {clip}", code="too_short")
        for number in range(count - count % clip, count):
            (self._folder / frame_key(camera, number)).unlink()


def _failure(item: str, error: ItemError) -> Failure:
    return Failure(
        item=item.encode("utf-8", "backslashreplace").decode(),
        stage="source",
        code=error.code,
        cause=error.cause,
        retryable=False,
        attempts=1,
    )

"""VoxCeleb's own annotations: `person/video/utterance.txt`, in a folder or an archive.

    Identity  : \tid10001
    Reference : \t1zcIwhmdeo4
    ...
    FRAME \tX \tY \tW \tH
    005467 \t220 \t61 \t120 \t120

- A file is one utterance: lines of `FRAME X Y W H` behind a header, of seven lines as published.
  Frame numbers are at 25 frames a second. Boxes are in pixels of a 360-line frame (version 1) or
  fractions of the frame's sides (version 2).
- The published rule makes tubes of them: a tube begins at a box, and ends where a box overlaps it
  with an IoU under 0.25 or after 1024 frames; its box is the union. It ends at a missing frame,
  too, since nothing says where the face was in between. (The published code detects faces anew
  and takes in each frame the one nearest to the annotated box; here it is the annotated box.)
- A tube becomes a `SourceRow`. Its reference frame is 1,000,000 x 1,000,000 for fractions, and
  0 x 360 for version 1: as wide as the video's own aspect ratio makes it.
- Whose name is no plain one, or what is not such a file, is a `Failure`. A file with bad lines
  keeps its good ones and is one failure, by its first bad line.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kpmask.data.archives import small_files
from kpmask.data.crop import Box, Size, contains
from kpmask.data.layouts import partition_of
from kpmask.data.metadata import checked_identity, shown
from kpmask.errors import ConfigError, RowError
from kpmask.records import Failure, Partition, SourceRow

FPS = 25.0
MIN_IOU = 0.25
MAX_TUBE_FRAMES = 1024
MAX_FILE_BYTES = 4 * 2**20  # an hour has 90,000 lines, of 30 bytes or so
_COLUMNS = ["FRAME", "X", "Y", "W", "H"]
_MAX_HEADER_LINES = 32


@dataclass(frozen=True, slots=True)
class _Version:
    """How a version writes a box: `scale` makes whole numbers of its own, of `max_value` at most
    without their sign.
    """

    scale: int
    max_value: float
    ref_size_px: Size
    other: str


_VERSIONS = {
    1: _Version(1, 4096.0, (0, 360), "fractions are version 2's"),
    2: _Version(1_000_000, 4.0, (1_000_000, 1_000_000), "pixels are version 1's"),
}


@dataclass(frozen=True, slots=True)
class Tube:
    """Frames [start_frame, end_frame) in which a face stays about where it was."""

    start_frame: int
    end_frame: int
    bbox: Box


def iter_voxceleb(
    path: Path,
    *,
    version: Literal[1, 2],
    test_identities: Collection[str] = (),
    test_fraction: float = 0.1,
) -> Iterator[SourceRow | Failure]:
    """A row for each tube, and a failure for what cannot be read, in one pass.

    The split is by person; `line` counts the rows.

    Args:
        path: the folder above the persons' (or one above that), or a zip or tar of it.
        version: of VoxCeleb.
        test_identities: see `partition_of`.
        test_fraction: see `partition_of`.

    Raises:
        ConfigError: as `small_files`; or there is no such annotation.
    """
    tested = frozenset(test_identities)

    def partition(identity: str) -> Partition:
        return partition_of(identity, test_identities=tested, test_fraction=test_fraction)

    num_files = 0
    numbers = itertools.count(1)
    for name, data in small_files(path, suffix=".txt", max_bytes=MAX_FILE_BYTES):
        if name.count("/") < 2 and not isinstance(data, RowError):
            continue  # a list or a note beside the persons
        num_files += 1
        if isinstance(data, RowError):
            yield _failure(name, data)
        else:
            yield from _rows(name, data, version, partition, numbers)
    if num_files == 0:
        raise ConfigError(
            "no annotation here",
            subject=str(path),
            code="nothing_to_do",
            hint="person/video/utterance.txt is wanted, in a folder, zip or tar",
        )


def _rows(
    name: str,
    data: bytes,
    version: Literal[1, 2],
    partition: Callable[[str], Partition],
    numbers: Iterator[int],
) -> Iterator[SourceRow | Failure]:
    """What one utterance gives."""
    person, video = name.split("/")[-3:-1]
    try:
        identity = checked_identity(video, person)
        boxes, problem = read_boxes(data, version=version)
    except RowError as error:
        yield _failure(name, error)
        return
    if problem is not None:
        yield _failure(name, problem[1], line=problem[0])
    for tube in tubes(boxes):
        yield SourceRow(
            line=next(numbers),
            video_id=video,
            partition=partition(identity),
            identity=identity,
            start_frame=tube.start_frame,
            end_frame=tube.end_frame,
            bbox_px=tube.bbox,
            ref_fps=FPS,
            ref_size_px=_VERSIONS[version].ref_size_px,
            person_id=person,
        )


def read_boxes(
    data: bytes, *, version: Literal[1, 2]
) -> tuple[list[tuple[int, Box]], tuple[int, RowError] | None]:
    """The boxes of an utterance by frame, in rising order; and its first bad line, if any.

    Raises:
        RowError: it is no such file, or has no good line.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise RowError("not UTF-8 text") from None
    start = next((i for i, line in enumerate(lines[:_MAX_HEADER_LINES]) if _is_head(line)), None)
    if start is None:
        raise RowError("no line FRAME X Y W H, as VoxCeleb's annotations have it")
    boxes: list[tuple[int, Box]] = []
    bad: list[tuple[int, RowError]] = []
    num_bad = 0
    last_frame = -1
    for number, line in enumerate(lines[start + 1 :], start + 2):
        cells = line.split()
        if not cells:
            continue
        try:
            frame = _frame(cells, after=last_frame)
            boxes.append((frame, _box(cells, _VERSIONS[version])))
            last_frame = frame
        except RowError as error:
            num_bad += 1
            bad = bad or [(number, error)]
    if not boxes:
        raise bad[0][1] if bad else RowError("no frame in it")
    if num_bad > 1:
        number, first = bad[0]
        return boxes, (number, RowError(f"{first.cause}; and {num_bad - 1} more bad lines"))
    return boxes, bad[0] if bad else None


def tubes(boxes: Iterable[tuple[int, Box]]) -> Iterator[Tube]:
    """Tubes of an utterance's boxes, by frame number in rising order; see the module."""
    first: Box | None = None
    start = end = 0
    union: Box = (0, 0, 0, 0)
    for frame, box in boxes:
        if first is not None:
            if frame == end and frame - start < MAX_TUBE_FRAMES and iou(first, box) >= MIN_IOU:
                end = frame + 1
                if not contains(union, box):
                    union = _union(union, box)
                continue
            yield Tube(start, end, union)
        first = union = box
        start, end = frame, frame + 1
    if first is not None:
        yield Tube(start, end, union)


def iou(one: Box, other: Box) -> float:
    """How much two boxes overlap, in [0, 1]: the area of both over that of either."""
    if one == other:
        return 1.0
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return both / (areas - both)


def _union(one: Box, other: Box) -> Box:
    return (
        min(one[0], other[0]),
        min(one[1], other[1]),
        max(one[2], other[2]),
        max(one[3], other[3]),
    )


def _is_head(line: str) -> bool:
    return line.split() == _COLUMNS


def _frame(cells: list[str], *, after: int) -> int:
    text = cells[0]
    if len(cells) != len(_COLUMNS):
        raise RowError(f"{len(cells)} values, where FRAME X Y W H are wanted")
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise RowError(f"{shown(text)} is not a frame number")
    if int(text) <= after:
        raise RowError(f"frame {int(text)} comes behind frame {after}")
    return int(text)


def _box(cells: list[str], version: _Version) -> Box:
    try:
        x, y, width, height = map(float, cells[1:])
    except ValueError:
        raise RowError(f"{shown(' '.join(cells[1:]))} is not a box") from None
    most = version.max_value
    if not (-most <= x <= most and -most <= y <= most and width <= most and height <= most):
        raise RowError(f"the box {x:g} {y:g} {width:g} {height:g} is out of range; {version.other}")
    scale = version.scale
    left, top = round(x * scale), round(y * scale)
    right, bottom = round((x + width) * scale), round((y + height) * scale)
    if right <= left or bottom <= top:
        raise RowError(f"the box {x:g} {y:g} {width:g} {height:g} has no area; {version.other}")
    return left, top, right, bottom


def _failure(name: str, error: RowError, *, line: int | None = None) -> Failure:
    item = name.encode("utf-8", "backslashreplace").decode()
    return Failure(
        item=item if line is None else f"{item}:{line}",
        stage="metadata",
        code=error.code,
        cause=error.cause,
        retryable=False,
        attempts=1,
    )

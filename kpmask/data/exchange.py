"""Clips out of a dataset and into one: as media files, and as rows that say the rest about them.

- Three forms: `folders` (the original code's folders of PNG frames), `mp4` (a video a clip) and
  `webdataset` (tars, see `kpmask.data.tars`).
- A clip's row has all of its record but where it lies, so that a dataset comes back as it was:
  with an id of its own only where its frames are others.
- What is read is a stranger's: every frame is decoded and encoded anew, and a row is believed
  only where it can be a clip's.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpmask.config import MediaLimits, Storage
from kpmask.data.crop import Box, centre_square
from kpmask.data.metadata import checked_name
from kpmask.data.quality import ClipMeter
from kpmask.data.stored import Fetch, stored_frames
from kpmask.errors import ConfigError, IntegrityError, MediaError, RowError
from kpmask.media.decode import frames
from kpmask.media.encode import encode, storage_error
from kpmask.media.images import encode_jpeg, encode_png
from kpmask.media.lossless import encode_lossless
from kpmask.media.probe import probe
from kpmask.records import ClipRecord, Failure, Partition, VideoProbe, as_dict, digest

METADATA = "metadata.csv"
EXPORT = "export.json"
MAX_NUMBER = 2**53
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_CLIP_ID = re.compile(r"[0-9a-f]{16,64}")
_PLACE = frozenset({"shard", "row"})  # where a clip lies: the only fields that do not travel
# What a note says of a clip whatever its frames are by now.
_TOLD = (
    *("partition", "identity", "video_id", "fps", "start_s", "end_s", "crop_px", "clamped"),
    "num_frames_lost",
)
# What it says about the frames themselves, and what holds as long as they are the same.
_MEASURED = ("sharpness", "brightness", "motion", "overlay", "look")


# --- rows ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExportedClip:
    """A clip's media as exported.

    Attributes:
        key: the clip's `clip_key`.
        file: the file or folder, relative to the export; for `webdataset` the tar.
        num_files, size_bytes: of the clip's own files; for `webdataset` its members in the tar.
        psnr_db: how near the media are to the clip; None where they are the same.
    """

    key: str
    file: str
    num_files: int
    size_bytes: int
    psnr_db: float | None


_EXPORTED = ("num_files", "size_bytes", "psnr_db")
COLUMNS = (
    "file",
    *(f.name for f in dataclasses.fields(ClipRecord) if f.name not in _PLACE),
    *_EXPORTED,
)


_KEY = ("clip_id", "sha256", "name", "partition", "identity")


def clip_key(record: ClipRecord) -> str:
    """What a clip and all that its media are called shape: its id alone does not say the name."""
    return _key(*(getattr(record, name) for name in _KEY))


def _key(*values: str) -> str:
    return digest(values)[:32]


def as_note(record: ClipRecord) -> dict[str, Any]:
    """All of a record but where the clip lies, as JSON values."""
    return {k: v for k, v in as_dict(record).items() if k not in _PLACE}


def write_rows(path: Path, rows: Iterable[tuple[ClipRecord, ExportedClip]]) -> None:
    """Write an export's table, row by row."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for record, exported in rows:
            values = as_note(record) | as_dict(exported)
            del values["key"]
            values["crop_px"] = "-".join(map(str, record.crop_px))
            values["clamped"] = str(record.clamped).lower()
            writer.writerow(values)


def read_exported(path: Path) -> Iterator[ExportedClip]:
    """What an export of ours wrote, row by row; rows that make no sense are passed over."""
    with path.open(encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            try:
                psnr = cells["psnr_db"]
                yield ExportedClip(
                    key=_key(*(cells[name] for name in _KEY)),
                    file=cells["file"],
                    num_files=int(cells["num_files"]),
                    size_bytes=int(cells["size_bytes"]),
                    psnr_db=float(psnr) if psnr else None,
                )
            except (KeyError, TypeError, ValueError):
                continue  # somebody edited it: the clip is written again


def read_rows(path: Path) -> Iterator[tuple[str, ClipRecord] | Failure]:
    """The media files that a table is about, and their clips.

    A row that can be no clip's is a `Failure`; its media can still be imported by their name.

    Raises:
        ConfigError: it is not a CSV text with the columns of one.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            missing = sorted({"file", *_required()} - set(reader.fieldnames or ()))
            if missing:
                raise ConfigError(f"column missing: {', '.join(missing)}", subject=path.name)
            for cells in reader:
                try:
                    yield str(cells["file"]), parse_note(cells)
                except RowError as error:
                    item = f"{METADATA}:{reader.line_num}"
                    yield Failure(item, "metadata", error.code, error.cause, False, 1)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"not a CSV table: {error}", subject=path.name) from error


def _required() -> set[str]:
    fields = dataclasses.fields(ClipRecord)
    return {f.name for f in fields if f.default is dataclasses.MISSING} - _PLACE


def parse_note(values: Mapping[str, Any]) -> ClipRecord:
    """A record from the cells of a table or from JSON, not yet in a shard.

    Raises:
        RowError: it can be no clip's.
    """
    parsed: dict[str, Any] = {"shard": "", "row": 0}
    for field in dataclasses.fields(ClipRecord):
        if field.name in _PLACE:
            continue
        value = values.get(field.name)
        if value is None or value == "":
            if field.default is dataclasses.MISSING:
                raise RowError(f"{field.name} is missing")
            continue
        parsed[field.name] = _parsed(field.name, str(field.type), value)
    record = ClipRecord(**parsed)
    _check_note(record)
    return record


def _parsed(name: str, kind: str, value: Any) -> Any:  # noqa: ANN401 - a cell or JSON value
    try:
        if kind == "bool":
            return {"true": True, "false": False}[str(value).lower()]
        if kind == "int":
            return _number(name, int(str(value)))
        if kind == "float":
            return _number(name, float(str(value)))
        if kind.startswith("tuple"):
            parts = value.split("-") if isinstance(value, str) else list(value)
            left, top, right, bottom = (_number(name, int(part)) for part in parts)
            return left, top, right, bottom
    except (ValueError, TypeError, KeyError):
        raise RowError(f"{name} {str(value)[:80]!r} is not what it should be") from None
    return str(value)


def _number(name: str, value: Any) -> Any:  # noqa: ANN401 - an int or a float
    if not math.isfinite(value) or abs(value) > MAX_NUMBER:
        raise RowError(f"{name} is out of range")
    return value


def _check_note(record: ClipRecord) -> None:
    for what in ("name", "identity", "video_id"):
        checked_name(getattr(record, what), what=what)
    if record.partition not in ("train", "test"):
        raise RowError(f"partition {record.partition[:80]!r} is neither train nor test")
    if not _CLIP_ID.fullmatch(record.clip_id) or not _CHECKSUM.fullmatch(record.sha256):
        raise RowError("clip_id or sha256 is none")
    if not 0 < record.fps < 1e5 or min(record.num_frames, record.width_px, record.height_px) < 1:
        raise RowError("fps, num_frames, width_px and height_px are above 0")
    if record.num_frames_lost < 0 or not record.start_s <= record.end_s:
        raise RowError("num_frames_lost or the span cannot be")
    if len(record.look) > 4096 or not record.look.isascii():
        raise RowError("look is no hash")


# --- out -------------------------------------------------------------------------------------


def checked_frames(record: ClipRecord, fetch: Fetch) -> Iterator[NDArray[np.uint8]]:
    """A clip's frames, uint8 HWC RGB; after the last, PNG ones are held against the checksum.

    Raises:
        IntegrityError: the clip is not what its record says.
        StorageError: the store does not answer.
    """
    checksum = hashlib.sha256()
    formats = set()
    for image_format, frame_HWC in stored_frames(record, fetch):
        checksum.update(np.ascontiguousarray(frame_HWC).data)
        formats.add(image_format)
        yield frame_HWC
    if formats == {"PNG"} and checksum.hexdigest() != record.sha256:
        raise IntegrityError("its frames are not those of the record", code="wrong_frames")


def write_video(path: Path, record: ClipRecord, fetch: Fetch, *, crf: int | None) -> float | None:
    """Write a clip as an MP4 file and read it back.

    Args:
        crf: x264's quality, 0 to 51, with colours at half the resolution (4:2:0), as browsers
            want it; None: in RGB without loss.

    Returns:
        The peak signal-to-noise ratio in dB over all frames; None where no pixel differs.

    Raises:
        IntegrityError: the clip is not what its record says.
        MediaError: encode_failed.
        StorageError: the store does not answer, or no space.
    """
    if crf is None:
        encode_lossless(path, checked_frames(record, fetch), fps=record.fps)
    else:
        encode(path, checked_frames(record, fetch), fps=record.fps, crf=crf)
    wanted = (frame_HWC for _, frame_HWC in stored_frames(record, fetch))
    box = (0, 0, record.width_px, record.height_px)  # an odd side was padded
    found = (f.rgb_HWC for f in frames(path, _OWN_LIMITS, crop_px=box))
    psnr_db = psnr(wanted, found)
    if crf is None and psnr_db is not None:
        raise MediaError("what was written is not lossless", code="encode_failed")
    return psnr_db


# Of files that were just written from a dataset of the user's own.
_OWN_LIMITS = MediaLimits(max_side_px=2**15, min_side_px=1, max_frames=2**31, max_bytes=2**50)


def psnr(wanted: Iterable[NDArray[np.uint8]], found: Iterable[NDArray[np.uint8]]) -> float | None:
    """The peak signal-to-noise ratio of uint8 frames in dB, over all of them; None: the same.

    Raises:
        MediaError: encode_failed: not as many frames, or of another size.
    """
    error, count = 0, 0
    for wanted_HWC, found_HWC in itertools.zip_longest(wanted, found):
        if wanted_HWC is None or found_HWC is None or wanted_HWC.shape != found_HWC.shape:
            raise MediaError("what was written has other frames", code="encode_failed")
        difference_HWC = wanted_HWC.astype(np.int32) - found_HWC
        error += int(np.square(difference_HWC).sum(dtype=np.int64))
        count += wanted_HWC.size
    return 10 * math.log10(255**2 * count / error) if error else None


# --- in --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """How clips come in.

    Attributes:
        size_px: cut to the centre square and scaled to this side; None: kept as they are.
        fps: of folders of images that do not say it.
        storage: the image format.
        limits: of what is read.
    """

    size_px: int | None
    fps: float
    storage: Storage
    limits: MediaLimits


@dataclass(frozen=True, slots=True)
class ClipSource:
    """A clip to be imported: its media here, and what is said about it.

    Attributes:
        path: a video, a folder of pictures, or a picture of square frames side by side.
        name, identity: by the name of the file, where there is no note.
        partition: by the folder that it lies in; None: to be drawn.
        note: its record where it came from.
        fps: of pictures, where no note says it.
    """

    path: Path
    name: str
    identity: str
    partition: Partition | None
    note: ClipRecord | None
    fps: float | None = None


@dataclass(frozen=True, slots=True)
class ImportedClip:
    """A clip as imported: encoded images end to end in a file, image i ending at `ends[i]`.

    `record` has the split "train" where `has_split` is false.
    """

    record: ClipRecord
    has_split: bool
    ends: tuple[int, ...]


def import_clip(source: ClipSource, *, settings: ImportSettings, images: Path) -> ImportedClip:
    """Read a clip's media whole; its images are written to the file `images`.

    Raises:
        MediaError: the media cannot be read to their end, or break a limit.
        IntegrityError: wrong_length, wrong_size: they are not those of the note.
        RowError: the name is none.
        StorageError: the images cannot be written.
    """
    note = source.note
    name = checked_name(note.name if note else source.name, what="the name")
    facts = probe(source.path, settings.limits, fps=source.fps or settings.fps)
    crop_px, size_px = _geometry(facts, note, settings)
    read = frames(source.path, settings.limits, crop_px=crop_px, size_px=size_px, fps=facts.fps)
    spool = _Spool(settings.storage)
    try:
        with images.open("wb") as file:
            for frame in read:
                file.write(spool.taken(frame.rgb_HWC))
    except OSError as error:
        raise storage_error(error, images) from error
    num_frames = len(spool.ends)
    _check_length(num_frames, note)
    measures = spool.meter.measures()
    made = ClipRecord(
        clip_id="",
        name=name,
        partition=source.partition or "train",
        identity=note.identity if note else checked_name(source.identity, what="the identity"),
        video_id=name,
        shard="",
        row=0,
        num_frames=num_frames,
        fps=facts.fps,
        width_px=spool.shape[1],
        height_px=spool.shape[0],
        start_s=0.0,
        end_s=num_frames / facts.fps,
        crop_px=crop_px or (0, 0, facts.width_px, facts.height_px),
        clamped=False,
        num_frames_lost=0,
        sha256=spool.checksum.hexdigest(),
        **{what: getattr(measures, what) for what in _MEASURED},
    )
    if note is not None:
        made = dataclasses.replace(made, **{what: getattr(note, what) for what in _TOLD})
    record = _identified(made, note, settings.storage)
    return ImportedClip(record, bool(note or source.partition), tuple(spool.ends))


class _Spool:
    """A clip's frames as they are read: encoded, and measured."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.checksum = hashlib.sha256()
        self.meter = ClipMeter()
        self.ends: list[int] = []
        self.shape: tuple[int, ...] = ()

    def taken(self, frame_HWC: NDArray[np.uint8]) -> bytes:
        """The next frame as an image."""
        self.checksum.update(np.ascontiguousarray(frame_HWC).data)
        self.meter.add(frame_HWC)
        self.shape = frame_HWC.shape
        data = _encoded(frame_HWC, self._storage)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(data))
        return data


def _geometry(
    facts: VideoProbe, note: ClipRecord | None, settings: ImportSettings
) -> tuple[Box | None, tuple[int, int] | None]:
    """Which part of a source's frames is the clip, and its size; None: all, and as it is."""
    found_px = (facts.width_px, facts.height_px)
    wanted_px = found_px
    crop_px: Box | None = None
    if note is not None and (note.width_px, note.height_px) != found_px:
        wanted_px = (note.width_px, note.height_px)
        if tuple(side + side % 2 for side in wanted_px) != found_px:  # as 4:2:0 pads odd sides
            raise IntegrityError(
                f"the frames are {found_px[0]}x{found_px[1]}, and its row says "
                f"{wanted_px[0]}x{wanted_px[1]}",
                code="wrong_size",
            )
        crop_px = (0, 0, *wanted_px)
    side_px = settings.size_px
    if side_px is None or wanted_px == (side_px, side_px):
        return crop_px, None
    return centre_square(wanted_px), (side_px, side_px)


def _check_length(num_frames: int, note: ClipRecord | None) -> None:
    if num_frames == 0:
        raise MediaError("not one frame", code="no_frames")
    if note is not None and note.num_frames != num_frames:
        raise IntegrityError(
            f"{num_frames} frames, and its row says {note.num_frames}", code="wrong_length"
        )


def _identified(made: ClipRecord, note: ClipRecord | None, storage: Storage) -> ClipRecord:
    """A clip with its id: the one that it had, where it is still the same one."""
    if note is not None and note.sha256 == made.sha256 and storage.image_format == "png":
        measured = {name: getattr(note, name) for name in _MEASURED}
        return dataclasses.replace(made, clip_id=note.clip_id, **measured)
    quality = storage.jpeg_quality if storage.image_format == "jpeg" else None
    what = ["import", made.name, made.sha256, storage.image_format, quality]
    return dataclasses.replace(made, clip_id=digest(what)[:32])


def _encoded(frame_HWC: NDArray[np.uint8], storage: Storage) -> bytes:
    if storage.image_format == "jpeg":
        return encode_jpeg(frame_HWC, quality=storage.jpeg_quality)
    return encode_png(frame_HWC)

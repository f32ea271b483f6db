"""A finished catalog as an evaluation takes it: its results beside what they were made from.

- Nothing but what the manifest names is read: results by their keys in the catalog's own store,
  images and driving videos by the rules for a catalog's rows. Each must have the content that the
  manifest says; what has another, or is gone, is a failure.
- How an image and a video were cut is no column of the manifest, but a result's id digests it. So
  the few ways that there are, are tried, and frames are compared with what the model saw or not at
  all. A box of the image's cannot be tried.
- Scored are plain squares: what was put back into the whole image, or stands beside its video, and
  GIFs and pictures are failures.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, get_args

import numpy as np
from numpy.typing import NDArray

from kpmask import provenance
from kpmask.animate import fit_square
from kpmask.compose import cut, source_crop
from kpmask.config import (
    CROP_RULES,
    AnimateJob,
    Credentials,
    EvaluateJob,
    MediaLimits,
    Output,
    validated,
)
from kpmask.data.catalog import resolve
from kpmask.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    IntegrityError,
    ItemError,
    RowError,
    StorageError,
)
from kpmask.media import images
from kpmask.optimize import Wanted
from kpmask.records import (
    SOUNDLESS,
    SUFFIXES,
    AnimationItem,
    AnimationRecord,
    CatalogManifest,
    CatalogRow,
    Delivery,
    Failure,
    Motion,
    OutputFormat,
    digest,
    parse_box,
)
from tasks import storage
from tasks.animate import FAILURES, MANIFEST, SUMMARY
from tasks.catalog import failure_of, item_of, settings_digest
from tasks.inputs import ID_LENGTH, content_digest, item_errors, local_media
from tasks.manifest import read_record, read_table, read_table_if_any, read_table_metadata
from tasks.storage import ObjectStore, absolute

Frame = NDArray[np.uint8]  # HWC RGB

# What a driving video's frames are called in the manifest: see `Delivery.driving_view`.
_VIEW: Final = re.compile(r"(?:-([a-z]+|\d+-\d+-\d+-\d+))?(?:-(\d+\.\d+)fps)?", re.ASCII)
_OF_SIGNER: Final = "signingCredential."  # problems that say nothing of the content


@dataclass(frozen=True, slots=True)
class Animation:
    """A result of a catalog; `clip_id` digests its content and all that shaped it.

    `sha256` is that of the file without credentials. `item` has what it was made from, and how.
    """

    clip_id: str
    name: str
    key: str
    sha256: str
    is_signed: bool
    item: AnimationItem


@dataclass(frozen=True, slots=True)
class FinishedCatalog:
    """What of a catalog is to be scored, what cannot be, and what drew it."""

    animations: tuple[Animation, ...]
    failures: tuple[Failure, ...]
    motion: Motion
    weights_sha256: str


# --- what is to be scored --------------------------------------------------------------------


def finished_catalog(job: EvaluateJob, *, stage: str) -> FinishedCatalog:
    """What a job's catalog holds; no result, image or video is opened.

    What the catalog itself failed to make is among the failures.

    Raises:
        ConfigError: there is no finished catalog; the scores would take its place; it has results
            of both motions, and the job does not say which count.
        DatasetError: what is there is no catalog's.
        StorageError: the store denies or does not answer.
    """
    assert job.catalog is not None
    store = storage.open_store(absolute(job.catalog))
    if storage.open_store(absolute(job.out)).uri == store.uri:
        raise ConfigError("the catalog is here, and has files of the same names", subject="out")
    try:
        records = read_table(store, MANIFEST, AnimationRecord)
        settings = read_table_metadata(store, MANIFEST).get("settings_digest", "")
        summary = read_record(store, SUMMARY, CatalogManifest)
    except StorageError as error:
        if error.code != "not_found":
            raise
        cause = f"no finished catalog is here: it lacks {MANIFEST} or {SUMMARY}"
        raise ConfigError(cause, subject=job.catalog, code="nothing_to_do") from error
    motion = _motion(records, job)
    rows = _Rows(store, settings, summary.weights_sha256, job.limits)
    animations = []
    failures = read_table_if_any(store, FAILURES, Failure) or []
    for record in [record for record in records if record.motion == motion][: job.max_clips]:
        try:
            animations.append(rows.animation(record))
        except ItemError as error:
            failures.append(failure_of(record.name, stage, error))
    return FinishedCatalog(tuple(animations), tuple(failures), motion, summary.weights_sha256)


def _motion(records: Sequence[AnimationRecord], job: EvaluateJob) -> Motion:
    """The one motion whose results are scored: numbers of the two do not compare."""
    there: set[Motion] = {record.motion for record in records}
    if strange := there - set(get_args(Motion)):
        raise DatasetError(f"{strange.pop()[:100]!r} is no motion", subject=job.catalog or "")
    if job.setting.motion is not None:
        there &= {job.setting.motion}
    if len(there) > 1:
        raise ConfigError(
            "the catalog has results of both motions, whose numbers do not compare",
            subject="setting.motion",
            hint="--motion absolute, or --motion relative",
        )
    if not there:
        wanted = f"no result by {job.setting.motion} motion" if job.setting.motion else "no result"
        raise ConfigError(
            f"the catalog has {wanted}", subject=job.catalog or "", code="nothing_to_do"
        )
    return there.pop()


class _Rows:
    """Makes of the manifest's rows what is to be scored."""

    def __init__(
        self, store: ObjectStore, settings: str, weights_sha256: str, limits: MediaLimits
    ) -> None:
        self._base = store.uri
        self._settings = settings
        self._is_usual = settings in _usual_settings(weights_sha256, limits)
        self._sizes = {info.key: info.size_bytes for info in store.list()}

    def animation(self, record: AnimationRecord) -> Animation:
        """Raises ItemError where a row makes no sense, its result is gone, or is not scored."""
        self._check_result(record)
        found = self._made_as(record)
        if found.paste_back or found.side_by_side:
            raise RowError("more than what the model drew is in it: it was pasted or set beside")
        if not (self._is_usual or all(map(_is_given, (found.crop, found.driving_crop)))):
            raise RowError("its crop was found by settings that are not the usual ones")
        return Animation(
            clip_id=digest([record.item_id, record.sha256])[:ID_LENGTH],
            name=record.name,
            key=record.key,
            sha256=record.sha256,
            is_signed=record.credentials != provenance.NONE,
            item=found,
        )

    def _check_result(self, record: AnimationRecord) -> None:
        with item_errors(record.key):
            storage.check_key(record.key)
        size_bytes = self._sizes.get(record.key)
        if size_bytes is None:
            raise IntegrityError(f"{record.key} is not in the catalog", code="missing_file")
        if size_bytes != record.size_bytes:
            raise IntegrityError(
                f"{record.key} has {size_bytes} bytes, and {record.size_bytes} in the manifest",
                code="wrong_size",
            )

    def _made_as(self, record: AnimationRecord) -> AnimationItem:
        """The item that has the record's id."""
        for row in _possible_rows(record, self._base):
            try:
                item = item_of(row, record.source_sha256, record.driving_sha256, self._settings)
            except (ConfigError, CheckpointError):
                continue  # its detector is not here, and could not find the crop again
            if item.item_id == record.item_id:
                return item
        raise RowError(
            "how it was cut cannot be told from its id: out of a box, by a detector that is not "
            "here, or by another version of kpmask"
        )


def _possible_rows(record: AnimationRecord, base: str) -> Iterator[CatalogRow]:
    """The rows of a catalog that a record may be of, the usual ones first."""
    form = _format(record.key)
    viewed = _viewed(record.driving_view)
    transfers = (False, True) if record.motion == "relative" else (False,)
    source, driving = (resolve(reference, base) for reference in (record.source, record.driving))
    for crop, composed, beside, adapt_scale, best_frame, audio in itertools.product(
        CROP_RULES["crop"], (False, True), (False, True), transfers, transfers, (False, True)
    ):
        yield CatalogRow(
            line=0,
            name=record.name,
            source=source,
            driving=driving,
            motion=record.motion,
            adapt_scale=adapt_scale,
            best_frame=best_frame,
            audio=audio,
            crop=crop,
            driving_crop=viewed.driving_crop,
            format=form,
            fps=viewed.fps,
            paste_back=composed,
            side_by_side=beside,
        )


def _format(key: str) -> OutputFormat:
    form = next((form for form, suffix in SUFFIXES.items() if key.endswith(suffix)), None)
    if form is None or form in SOUNDLESS:
        raise RowError(f"a result is scored as an .mp4 or .webm, and this is {key[-100:]!r}")
    return form


def _viewed(view: str) -> Delivery:
    """How a driving video was cut and paced, by the part of a file's name that says so."""
    parts = _VIEW.fullmatch(view)
    try:
        if parts is None:
            raise RowError(f"{view[:100]!r} says nothing of a driving video")
        crop, fps = parts[1] or "centre", None if parts[2] is None else float(parts[2])
        return validated(Output, {"driving_crop": crop, "fps": fps}).delivery()
    except ConfigError as error:
        raise RowError(error.cause) from error


def _is_given(rule: str) -> bool:
    """Whether a crop does not have to be found."""
    return rule == "centre" or parse_box(rule) is not None


def _usual_settings(weights_sha256: str, limits: MediaLimits) -> set[str]:
    """The digests of settings under which a crop is found as here."""
    jobs = (
        AnimateJob(
            checkpoint="",
            out="",
            catalog="",
            limits=limits,
            precision=precision,
            credentials=Credentials(enabled=enabled),
        )
        for precision in get_args(Wanted)
        for enabled in (False, True)
    )
    return {settings_digest(job, weights_sha256) for job in jobs}


# --- frames ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    """How images and videos are read: as `kpmask animate` reads them by default.

    A driving video of a single frame counts: whether it was long enough was asked before.
    """

    limits: MediaLimits
    min_driving_frames: int = 1
    output: Output = field(default_factory=Output)


def checked_result(store: ObjectStore, animation: Animation) -> Path:
    """A result as a local file.

    Raises:
        ItemError: it is gone, or has another content than the manifest says.
        StorageError: the store denies or does not answer.
    """
    with item_errors(animation.key):
        path = store.local(animation.key)
        is_inside = animation.is_signed and provenance.carries(path)
    if not (_is_as_signed(path, animation) if is_inside else _has(path, animation.sha256)):
        raise IntegrityError(f"{animation.key} is not what the manifest says")
    return path


def _has(path: Path, sha256: str) -> bool:
    return content_digest(path) == sha256


def _is_as_signed(path: Path, animation: Animation) -> bool:
    """Whether a file is as it was signed, about this image and video: what it was without its
    credentials, which the manifest's digest is of, cannot be told any more.
    """
    found = provenance.read_credentials(path)
    if found is None or not all(problem.startswith(_OF_SIGNER) for problem in found.problems):
        return False
    wanted = (animation.item.source_sha256, animation.item.driving_sha256)
    claim = provenance.Claim("", *wanted).ingredients()
    said = dict(found.ingredients)
    return all(said.get(title) == f"sha256:{sha}" for title, sha in claim.items() if sha)


@contextmanager
def original(uri: str, sha256: str) -> Iterator[Path]:
    """An image or driving video, if it still is what was animated.

    Raises:
        ItemError: as `local_media`, or it has another content.
        StorageError: the store denies or does not answer.
    """
    with local_media(uri) as path:
        if not _has(path, sha256):
            raise IntegrityError(f"{uri} is not what was animated: it has changed")
        yield path


def animated_image(path: Path, delivery: Delivery, reading: Reading, *, side_px: int) -> Frame:
    """What was animated of an image, uint8 HWC of `side_px` a side; raises MediaError."""
    image_HWC = images.read_image(path, reading.limits)
    crop_px = source_crop(image_HWC, delivery.crop, reading.output, reading.limits)
    return fit_square(cut(image_HWC, crop_px), side_px)

"""A dataset written as media files: folders of frames, videos, or WebDataset tars.

    <out>/{train,test}/<name>/0000000.png    folders
    <out>/{train,test}/<name>.mp4            mp4
    <out>/{train,test}-000000.tar            webdataset
    <out>/metadata.csv                       a row a clip: all that the media do not say
    <out>/failures.parquet                   what could not be exported, where there is any
    <out>/export.json                        what it is; written last
    <out>/.work/                             of a run in progress

- An item is a shard of the dataset, so that each is fetched once; what a worker finished is in a
  journal. A rerun writes what is not there whole, by the files' number and size, and removes what
  an export of ours wrote and the dataset no longer has. Other files are left alone.
- Tars are filled by the sizes of their samples, which are found first.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from kpmask.config import ExportJob
from kpmask.data.dataset import FAILURES
from kpmask.data.exchange import (
    EXPORT,
    METADATA,
    ExportedClip,
    checked_frames,
    clip_key,
    read_exported,
    write_rows,
    write_video,
)
from kpmask.data.layouts import SPLITS, frame_key
from kpmask.data.metadata import checked_name
from kpmask.data.stored import by_shard, stored_images, stream_manifest
from kpmask.data.tars import SampleTar, member_bytes, note_bytes, plan_tars
from kpmask.errors import ItemError, RunFailed
from kpmask.media.images import encode_png
from kpmask.preprocess import failure_of
from kpmask.records import ClipRecord, DatasetManifest, Failure, Progress, as_dict, digest
from tasks.cluster import ray_session, run_items
from tasks.lease import Lease, lease
from tasks.manifest import Journal, check_failures, read_json, write_json, write_table
from tasks.storage import absolute, open_store, os_errors
from tasks.verify import open_manifest

log = logging.getLogger(__name__)

WORK: Final = ".work"
LEASE: Final = ".state/lease"
STAGE: Final = "export"
EXPORT_VERSION: Final = 1  # of what is written
PUT_THREADS: Final = 8
PNG: Final = b"\x89PNG"
# A file or folder that an export may have written: no other is removed.
_MEDIA: Final = re.compile(r"(train|test)(/[^/]+|-\d{6}\.tar)")
_FRAME: Final = re.compile(r"\d{7}\.png")

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class ExportManifest:
    """What a finished export holds; its `export.json`.

    Attributes:
        lossless: every frame comes back bit by bit.
        min_psnr_db: of the video that is least like its clip; None where all are the same.
        num_files, size_bytes: of the media.
    """

    uri: str
    form: str
    dataset_id: str
    settings_digest: str
    lossless: bool
    min_psnr_db: float | None
    num_train: int
    num_test: int
    num_frames: int
    num_files: int
    size_bytes: int
    num_failures: int


def export_dataset(
    job: ExportJob, *, on_progress: OnProgress | None = None, dry_run: bool = False
) -> ExportManifest:
    """Export a dataset, or complete an export.

    Args:
        on_progress: called as shards are done.
        dry_run: only count: nothing is written.

    Raises:
        DatasetError: there is no dataset, or its manifest cannot be read.
        RunFailed: too many clips failed.
        StorageError: a store does not answer.
    """
    report = on_progress or (lambda progress: None)
    job = job.model_copy(update={"data": absolute(job.data), "out": absolute(job.out)})
    _, path, stats = open_manifest(job.data)
    run = _Export(job, path, stats, report)
    if dry_run:
        return run.planned()
    with lease(open_store(job.out), LEASE, on_wait=log.warning) as held:
        return run.run(held)


def media_key(clip: ClipRecord, form: str) -> str:
    """The file or folder of a clip, in the forms that have one for each."""
    return f"{clip.partition}/{clip.name}" + (".mp4" if form == "mp4" else "")


# --- workers ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExportItem:
    """Clips of one shard, or those of one tar, which is then `file`."""

    clips: tuple[ClipRecord, ...]
    file: str = ""

    @property
    def item_id(self) -> str:
        return digest([self.file, [clip_key(clip) for clip in self.clips]])[:32]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What became of an item; `clips` and `failures` are JSON lists of records."""

    item_id: str
    clips: str
    failures: str

    def exported(self) -> list[ExportedClip]:
        return [ExportedClip(**values) for values in json.loads(self.clips)]

    def failure_records(self) -> list[Failure]:
        return [Failure(**values) for values in json.loads(self.failures)]


class ClipExporter:
    """The worker: writes the media of clips; of those that go into tars, finds their size."""

    def __init__(self, job: ExportJob, work: str) -> None:
        self._job = job
        self._work = work
        self._fetch = open_store(job.data).local
        self._out = open_store(job.out)

    def process(self, item: ExportItem) -> ExportResult:
        """Write the clips of one shard.

        Raises:
            StorageError: a store does not answer.
        """
        done, failures = [], []
        for clip in item.clips:
            try:
                checked_name(clip.name, what="the name")
                done.append(self._export(clip))
            except ItemError as error:
                failures.append(failure_of(clip.name, STAGE, error))
        return ExportResult(
            item.item_id,
            json.dumps([as_dict(clip) for clip in done]),
            json.dumps([as_dict(failure) for failure in failures]),
        )

    def _export(self, clip: ClipRecord) -> ExportedClip:
        if self._job.form == "folders":
            return self._folder(clip)
        if self._job.form == "mp4":
            return self._video(clip, media_key(clip, "mp4"))
        if self._job.media == "mp4":
            made = self._video(clip, work_key(self._work, clip))
            return replace(made, num_files=2, size_bytes=_sample_bytes(clip, [made.size_bytes]))
        sizes = [len(image) for image in stored_images(clip, self._fetch)]
        return ExportedClip(clip_key(clip), "", 1 + len(sizes), _sample_bytes(clip, sizes), None)

    def _video(self, clip: ClipRecord, key: str) -> ExportedClip:
        crf = None if self._job.lossless else self._job.crf
        with tempfile.TemporaryDirectory(prefix="kpmask-") as folder, os_errors(key):
            path = Path(folder) / "clip.mp4"
            psnr_db = write_video(path, clip, self._fetch, crf=crf)
            self._out.put_file(key, path)
            return ExportedClip(clip_key(clip), key, 1, path.stat().st_size, psnr_db)

    def _folder(self, clip: ClipRecord) -> ExportedClip:
        key = media_key(clip, "folders")
        size_bytes = num_files = 0
        images = enumerate(self._png_images(clip))
        with ThreadPoolExecutor(PUT_THREADS) as pool:
            while some := list(islice(images, 4 * PUT_THREADS)):
                for size in pool.map(lambda image: self._put(key, *image), some):
                    size_bytes += size
                    num_files += 1
        for info in list(self._out.list(f"{key}/")):  # of an older, longer clip
            name = info.key.rpartition("/")[2]
            if _FRAME.fullmatch(name) and int(name[:7]) >= num_files:
                self._out.delete(info.key)
        return ExportedClip(clip_key(clip), key, num_files, size_bytes, None)

    def _put(self, key: str, number: int, image: bytes) -> int:
        self._out.put(frame_key(key, number), image)
        return len(image)

    def _png_images(self, clip: ClipRecord) -> Iterator[bytes]:
        """The clip's images as they are stored, or as PNG where they are not."""
        images = stored_images(clip, self._fetch)
        first = next(images)
        if not first.startswith(PNG):
            return (encode_png(frame_HWC) for frame_HWC in checked_frames(clip, self._fetch))
        return chain([first], images)


def work_key(work: str, clip: ClipRecord) -> str:
    """Where a video waits to be put into a tar."""
    return f"{work}/media/{clip_key(clip)}.mp4"


def _sample_bytes(clip: ClipRecord, sizes: Iterable[int]) -> int:
    """What a clip takes in a tar."""
    return sum(member_bytes(size) for size in (len(note_bytes(clip)), *sizes))


class TarWriter:
    """The worker: writes one tar."""

    def __init__(self, job: ExportJob, work: str) -> None:
        self._job = job
        self._work = work
        self._fetch = open_store(job.data).local
        self._out = open_store(job.out)

    def process(self, item: ExportItem) -> ExportResult:
        """Write a tar; the result is about the tar itself, as one file.

        Raises:
            IntegrityError: a clip is no longer what it was when its size was found.
            StorageError: a store does not answer.
        """
        with tempfile.TemporaryDirectory(prefix="kpmask-") as folder, os_errors(item.file):
            path = Path(folder) / "samples.tar"
            with SampleTar(path) as tar:
                for clip in item.clips:
                    tar.add_note(clip)
                    self._add_media(tar, clip)
            self._out.put_file(item.file, path)
            made = ExportedClip(item.item_id, item.file, 1, path.stat().st_size, None)
        return ExportResult(item.item_id, json.dumps([as_dict(made)]), "[]")

    def _add_media(self, tar: SampleTar, clip: ClipRecord) -> None:
        if self._job.media == "mp4":
            tar.add_file(f"{clip.clip_id}.mp4", self._out.local(work_key(self._work, clip)))
            return
        for number, image in enumerate(stored_images(clip, self._fetch)):
            suffix = "png" if image.startswith(PNG) else "jpg"
            tar.add(f"{clip.clip_id}.{number:07d}.{suffix}", image)


# --- the run ---------------------------------------------------------------------------------


class _Export:
    """One go at an export."""

    def __init__(
        self, job: ExportJob, manifest: Path, stats: DatasetManifest, report: OnProgress
    ) -> None:
        self._job = job
        self._manifest = manifest
        self._dataset_id = stats.dataset_id
        self._report = report
        self._out = open_store(job.out)
        apart = {"data", "out", "partition", "cluster", "max_failed_fraction"}
        shaping = job.model_dump(mode="json", exclude=apart)
        self._settings_digest = digest([EXPORT_VERSION, shaping])
        self._work = f"{WORK}/{self._settings_digest[:16]}"
        self._failures: list[Failure] = []

    def planned(self) -> ExportManifest:
        """What is asked for."""
        return self._summary({clip_key(clip): _NONE for clip in self._clips()})

    def run(self, held: Lease) -> ExportManifest:
        """Export what is not there whole, while the lease is held."""
        self._held = held
        said, before = self._before()
        tars = {tar.file: tar for tar in _tars(said)}
        if self._job.form == "webdataset":
            done, tars = self._export_tars(before, tars)
            files = {tar.file for tar in tars.values()}
        else:
            done, tars = self._export_media(before), {}
            files = {exported.file for exported in done.values()}
        num_clips = sum(1 for _ in self._clips())
        check_failures(self._failures, num_clips, self._job.max_failed_fraction)
        if not done:
            raise RunFailed("not one clip to export", code="no_output")
        manifest = self._summary(done, tars)
        if said != self._described(manifest, tars) or not self._out.exists(EXPORT):
            self._publish(manifest, done, tars, files)
        self._tidy()
        return manifest

    def _clips(self) -> Iterator[ClipRecord]:
        """The clips that are asked for."""
        wanted = self._job.partition
        for clip in stream_manifest(self._manifest):
            if wanted is None or clip.partition == wanted:
                yield clip

    # --- what there is

    def _before(self) -> tuple[dict[str, Any] | None, dict[str, ExportedClip]]:
        """The export as it is, if it is whole, and what these settings wrote, by key."""
        said: dict[str, Any] | None = None
        if self._out.exists(EXPORT):
            said = read_json(self._out, EXPORT)
        mine = said is not None and said.get("settings_digest") == self._settings_digest
        if not mine and not self._out.exists(self._marker):
            return said, {}
        rows = read_exported(self._out.local(METADATA)) if self._out.exists(METADATA) else ()
        return said, {exported.key: exported for exported in rows}

    @property
    def _marker(self) -> str:
        """Says, once `export.json` is taken back, that the table is of these settings."""
        return f"{self._work}/before"

    def _take_back(self) -> None:
        """From here on, until it is whole again, there is no export."""
        if self._out.exists(EXPORT):
            if read_json(self._out, EXPORT).get("settings_digest") == self._settings_digest:
                self._out.put(self._marker, b"")
            self._out.delete(EXPORT)

    def _there(self) -> dict[str, tuple[int, int]]:
        """How many files, and bytes, each file or folder of a clip has."""
        found: dict[str, tuple[int, int]] = {}
        for split in SPLITS:
            for info in self._out.list(split):
                is_frame = _FRAME.fullmatch(info.key.rpartition("/")[2])
                key = info.key.rpartition("/")[0] if is_frame else info.key
                count, size_bytes = found.get(key, (0, 0))
                found[key] = (count + 1, size_bytes + info.size_bytes)
        return found

    # --- the stages

    def _export_media(self, before: dict[str, ExportedClip]) -> dict[str, ExportedClip]:
        """A file or folder for each clip; by key."""
        journal = self._journal("clips")
        there = self._there()
        done = {
            exported.key: exported
            for exported in chain(before.values(), *(r.exported() for r in _results(journal)))
            if there.get(exported.file) == (exported.num_files, exported.size_bytes)
        }
        wanted = {clip_key(clip) for clip in self._clips()}
        done = {key: exported for key, exported in done.items() if key in wanted}
        self._export_clips(journal, done, lambda clip: clip_key(clip) not in done)
        return done

    def _export_tars(
        self, before: dict[str, ExportedClip], tars: dict[str, ExportedClip]
    ) -> tuple[dict[str, ExportedClip], dict[str, ExportedClip]]:
        """The tars; the samples by key, and the tars by file."""
        journal = self._journal("clips")
        done = before | {e.key: e for r in _results(journal) for e in r.exported()}
        done = {key: done[key] for key in map(clip_key, self._clips()) if key in done}
        self._export_clips(journal, done, lambda clip: clip_key(clip) not in done)
        there = self._there()
        written = {e.file: e for r in _results(self._journal("tars")) for e in r.exported()}
        whole, todo = {}, []
        for item in self._planned_tars(done):
            made = (tars | written).get(item.file)
            if made and made.key == item.item_id and there.get(item.file) == (1, made.size_bytes):
                whole[item.file] = made
            else:
                todo.append(item)
            done |= {clip_key(c): replace(done[clip_key(c)], file=item.file) for c in item.clips}
        if self._job.media == "mp4":
            lacking = {clip_key(clip) for item in todo for clip in item.clips}
            lacking -= {Path(info.key).stem for info in self._out.list(f"{self._work}/media/")}
            again: dict[str, ExportedClip] = {}
            self._export_clips(journal, again, lambda clip: clip_key(clip) in lacking)
        for result in self._worked_on(todo, TarWriter, self._journal("tars"), "tars"):
            whole |= {tar.file: tar for tar in result.exported()}
        return {k: e for k, e in done.items() if e.file in whole}, whole

    def _planned_tars(self, done: dict[str, ExportedClip]) -> Iterator[ExportItem]:
        for split in SPLITS:
            sized = (
                (clip, done[clip_key(clip)].size_bytes)
                for clip in self._clips()
                if clip.partition == split and clip_key(clip) in done
            )
            groups = plan_tars(
                sized, max_samples=self._job.max_samples, max_bytes=self._job.max_tar_bytes
            )
            for number, clips in enumerate(groups):
                yield ExportItem(tuple(clips), f"{split}-{number:06d}.tar")

    def _export_clips(
        self,
        journal: Journal[ExportResult],
        done: dict[str, ExportedClip],
        wanted: Callable[[ClipRecord], bool],
    ) -> None:
        """Export the clips that are wanted, and add them to `done`."""
        groups = (tuple(filter(wanted, group)) for group in by_shard(self._clips()))
        items = [ExportItem(clips) for clips in groups if clips]
        for result in self._worked_on(items, ClipExporter, journal, STAGE):
            done |= {exported.key: exported for exported in result.exported()}

    def _journal(self, stage: str) -> Journal[ExportResult]:
        return Journal(self._out, f"{self._work}/{stage}", ExportResult)

    def _worked_on(
        self,
        items: Sequence[ExportItem],
        worker: type[ClipExporter | TarWriter],
        journal: Journal[ExportResult],
        stage: str,
    ) -> Iterator[ExportResult]:
        """The results of items, each in the journal first."""
        if not items:
            return
        self._take_back()
        with ray_session():
            outcomes = run_items(
                items,
                worker,
                (self._job, self._work),
                key=lambda item: item.file or item.clips[0].shard,
                stage=stage,
                cluster=self._job.cluster,
                on_progress=self._report,
            )
            for outcome in outcomes:
                self._held.check()
                if outcome.failure is not None:
                    names = [clip.name for clip in outcome.item.clips]
                    self._failures += [replace(outcome.failure, item=name) for name in names]
                elif outcome.result is not None:
                    self._failures += outcome.result.failure_records()
                    journal.add(outcome.item.item_id, outcome.result)
                    yield outcome.result

    # --- publishing

    def _summary(
        self, done: Mapping[str, ExportedClip], tars: Mapping[str, ExportedClip] | None = None
    ) -> ExportManifest:
        count: Counter[str] = Counter()
        for clip in self._clips():
            if clip_key(clip) in done:
                count[clip.partition] += 1
                count["frames"] += clip.num_frames
        found = [e.psnr_db for e in done.values() if e.psnr_db is not None]
        media = (tars or done).values()
        return ExportManifest(
            uri=self._out.uri,
            form=self._job.form,
            dataset_id=self._dataset_id,
            settings_digest=self._settings_digest,
            lossless=not found,
            min_psnr_db=min(found, default=None),
            num_train=count["train"],
            num_test=count["test"],
            num_frames=count["frames"],
            num_files=sum(file.num_files for file in media),
            size_bytes=sum(file.size_bytes for file in media),
            num_failures=len(self._failures),
        )

    def _described(
        self, manifest: ExportManifest, tars: Mapping[str, ExportedClip]
    ) -> dict[str, Any]:
        """The content of `export.json`."""
        listed = [as_dict(tar) for _, tar in sorted(tars.items())]
        return as_dict(manifest) | ({"tars": listed} if listed else {})

    def _publish(
        self,
        manifest: ExportManifest,
        done: Mapping[str, ExportedClip],
        tars: Mapping[str, ExportedClip],
        files: Set[str],
    ) -> None:
        """Write the tables over those that there may be; then `export.json`."""
        self._held.check()
        self._take_back()
        self._remove_old(files)
        with tempfile.TemporaryDirectory(prefix="kpmask-") as folder, os_errors(METADATA):
            path = Path(folder) / METADATA
            rows = ((c, done[clip_key(c)]) for c in self._clips() if clip_key(c) in done)
            write_rows(path, rows)
            self._out.put_file(METADATA, path)
        if self._failures:
            write_table(self._out, FAILURES, self._failures, Failure)
        else:
            self._out.delete(FAILURES)
        write_json(self._out, EXPORT, self._described(manifest, tars))

    def _remove_old(self, files: Set[str]) -> None:
        """Remove what the table of an older export names and this one does not have."""
        if not self._out.exists(METADATA):
            return
        named = {exported.file for exported in read_exported(self._out.local(METADATA))}
        for file in sorted(named - files):
            if not _MEDIA.fullmatch(file):
                continue
            if file.endswith((".mp4", ".tar")):
                self._out.delete(file)
            for info in list(self._out.list(f"{file}/")):
                if _FRAME.fullmatch(info.key.rpartition("/")[2]):
                    self._out.delete(info.key)

    def _tidy(self) -> None:
        """Remove what was needed on the way."""
        for info in list(self._out.list(f"{WORK}/")):
            self._out.delete(info.key)


_NONE: Final = ExportedClip("", "", 0, 0, None)


def _results(journal: Journal[ExportResult]) -> Iterable[ExportResult]:
    return journal.done().values()


def _tars(said: Mapping[str, Any] | None) -> Iterator[ExportedClip]:
    """The tars of the export as it is."""
    for values in (said or {}).get("tars", ()):
        yield ExportedClip(**values)

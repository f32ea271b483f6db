"""The preprocess job: raw videos in, a dataset of clips out.

    <out>/{train,test}/shard-*.arrow   clips (or folders of images with layout "folders")
    <out>/manifest.parquet             ClipRecord for each; written last: without it there is none
    <out>/failures.parquet             what could not be had, and why
    <out>/videos.parquet               which raw videos were read, and what became of each
    <out>/stats.json                   DatasetManifest
    <out>/index.html                   contact sheet
    <out>/.work/                       of a run in progress: finished clips and its journal

- One item is one raw video, cut in one pass by a Ray worker. Driver and workers pass records; clips
  go from the worker to the store.
- A rerun does what is missing: videos that the journal or `videos.parquet` says are done, with the
  same rows, settings and files, are not read again; neither are those whose failure no retry can
  help. With nothing new it changes nothing.
- Raw videos lie in `raw`, else in `raw/` under the dataset; downloads are kept there.
"""

from __future__ import annotations

import glob
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from kpmask.config import PreprocessJob
from kpmask.data.dataset import FAILURES, MANIFEST, STATS
from kpmask.data.layouts import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaSource,
    assign_splits,
    find_sources,
)
from kpmask.data.metadata import checked_name, leaking_rows, raw_stem, read_metadata
from kpmask.errors import ConfigError, ItemError, RunFailed, StorageError
from kpmask.preprocess import CODE_VERSION, failure_of, row_name
from kpmask.records import ClipRecord, DatasetManifest, Failure, Progress, SourceRow, digest
from kpmask.report import dataset_page
from tasks.clip_worker import (
    PARTS,
    ClipCutter,
    VideoItem,
    VideoResult,
    part_key,
    state_of,
    video_result,
)
from tasks.cluster import ray_session, run_items
from tasks.dataset import NUM_THUMBNAILS, assemble
from tasks.manifest import (
    Journal,
    check_failures,
    read_json,
    read_table_if_any,
    read_table_metadata,
    write_json,
    write_table,
)
from tasks.storage import ObjectInfo, ObjectStore, absolute, local_copy, open_store

log = logging.getLogger(__name__)

VIDEOS: Final = "videos.parquet"
PAGE: Final = "index.html"
WORK: Final = ".work"
MAX_ROUNDS: Final = 3

OnProgress = Callable[[Progress], None]


def preprocess(
    job: PreprocessJob, *, on_progress: OnProgress | None = None, dry_run: bool = False
) -> DatasetManifest:
    """Make or complete a dataset.

    Args:
        job: what to do.
        on_progress: called as videos are cut and clips put in place.
        dry_run: only read the tables and list the files: the counts returned are of the clips that
            are asked for, and nothing is written.

    Raises:
        ConfigError: the input is missing or not what it should be.
        RunFailed: too many items failed, or none is usable.
        StorageError: a store does not answer.
    """
    report = on_progress or (lambda progress: None)
    job = job.model_copy(update={"out": absolute(job.out)})  # workers may be elsewhere
    out = open_store(job.out)
    out.exists(MANIFEST)  # a store that denies or is not there says so before any work
    inputs = read_inputs(job)
    if dry_run:
        return _planned(job, out, inputs)
    for last in (False,) * (MAX_ROUNDS - 1) + (True,):
        try:
            return _Run(job, out, inputs, report).run()
        except StorageError as error:
            # A run beside this one has published the dataset and removed what both were made from.
            if error.code != "not_found" or last:
                raise
            log.info("starting over, since %s is gone", error.subject)
    raise AssertionError("unreachable")


# --- inputs ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a job asks for: videos with their rows, and the rows that make no sense."""

    raw: ObjectStore
    items: list[VideoItem]
    failures: list[Failure]


def read_inputs(job: PreprocessJob) -> Inputs:
    """Read the table or list the videos.

    Raises:
        ConfigError: there is nothing to do, or the table is not one.
    """
    if job.storage.layout == "folders" and job.storage.image_format != "png":
        raise ConfigError(
            "layout folders, the original code's, holds PNG images only",
            subject="storage.image_format",
        )
    return _table_inputs(job) if job.metadata is not None else _video_inputs(job)


def _table_inputs(job: PreprocessJob) -> Inputs:
    assert job.metadata is not None
    try:
        rows, failures = read_metadata(local_copy(job.metadata))
    except StorageError as error:
        if error.code != "not_found":
            raise
        raise ConfigError("no such file", subject=job.metadata) from error
    raw = open_store(job.raw) if job.raw else open_store(job.out).child("raw")
    files: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in raw.list():
        path = PurePosixPath(info.key)
        if len(path.parts) == 1 and path.suffix.lower() in VIDEO_SUFFIXES:
            files[path.name.removesuffix(path.suffix)].append(info)
    by_video: dict[str, list[SourceRow]] = defaultdict(list)
    for row in rows:
        by_video[raw_stem(row.video_id)].append(row)
    items = []
    for name, of_video in sorted(by_video.items()):
        found = sorted(files.get(name, []), key=lambda info: info.key)[:1]
        items.append(
            VideoItem(
                name=name,
                rows=tuple(of_video),
                keys=tuple(info.key for info in found),
                is_folder=False,
                url=next((row.url for row in of_video if row.url), None),
                state=state_of(found),
            )
        )
    return Inputs(raw, items, failures)


def _video_inputs(job: PreprocessJob) -> Inputs:
    assert job.videos is not None
    raw, infos, empty = _list_videos(job.videos)
    sources = find_sources(infos, empty_folders=empty)
    if not sources:
        raise ConfigError(
            "no video, GIF or folder of images here", subject=job.videos, code="nothing_to_do"
        )
    failures: list[Failure] = []
    usable = []
    for source in sources:
        try:
            checked_name(source.name, what="the name")
            usable.append(source)
        except ItemError as error:
            failures.append(failure_of(source.key, "metadata", error))
    rows = _rows_of(usable, job.clips.test_fraction)
    leaking = leaking_rows(list(rows.values()))
    items = []
    for source in usable:
        row = rows[source.key]
        if row.line in leaking:
            failures.append(failure_of(source.key, "metadata", leaking[row.line]))
            continue
        items.append(
            VideoItem(
                name=source.name,
                rows=(row,),
                keys=source.files,
                is_folder=source.is_folder,
                url=None,
                state=state_of([infos[key] for key in source.files]),
            )
        )
    return Inputs(raw, items, failures)


def _rows_of(sources: Sequence[MediaSource], test_fraction: float) -> dict[str, SourceRow]:
    """A row for each whole video, by its key: in the split of its folder, or in a drawn one."""
    free = [source.identity for source in sources if source.partition is None]
    drawn = assign_splits(free, test_fraction=test_fraction)
    return {
        source.key: SourceRow(
            line=number,
            video_id=source.name,
            partition=source.partition or drawn[source.identity],
            identity=source.identity,
        )
        for number, source in enumerate(sources)
    }


def _list_videos(uri: str) -> tuple[ObjectStore, dict[str, ObjectInfo], list[str]]:
    """The store, its files by key, and its empty folders, of a folder, a pattern or one file."""
    if "://" in uri:
        store = open_store(uri)
        return store, {info.key: info for info in store.list()}, []
    path = Path(uri)
    if path.is_dir():
        matches, root = [path], path
    elif path.exists():
        matches, root = [path], path.parent
    else:
        root = _fixed_part(path)
        matches = sorted(root.glob(str(path.relative_to(root))))
    paths = {p for match in matches for p in [match, *match.rglob("*")]} - {root}
    keys = {str(p.relative_to(root)): p for p in paths}
    store = open_store(str(root))
    infos = {info.key: info for info in store.list() if info.key in keys}
    empty = [key for key, p in keys.items() if p.is_dir() and not _shown(p)]
    return store, infos, [key for key in empty if not key.startswith(".") and "/." not in key]


def _shown(folder: Path) -> bool:
    """Whether there is anything in a folder that is not hidden."""
    return any(not path.name.startswith(".") for path in folder.iterdir())


def _fixed_part(pattern: Path) -> Path:
    """The folder before the first part of a path with a wildcard in it."""
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _planned(job: PreprocessJob, out: ObjectStore, inputs: Inputs) -> DatasetManifest:
    rows = [row for item in inputs.items for row in item.rows]
    return DatasetManifest(
        uri=out.uri,
        dataset_id="",
        settings_digest=settings_digest(job),
        num_train=sum(row.partition == "train" for row in rows),
        num_test=sum(row.partition == "test" for row in rows),
        num_frames=0,
        num_failures=len(inputs.failures),
    )


# --- the run ---------------------------------------------------------------------------------


def settings_digest(job: PreprocessJob) -> str:
    """A digest of the settings that shape a dataset."""
    return digest(
        {
            "clips": job.clips.digest(),
            "storage": job.storage.digest(),
            "limits": job.limits.digest(),
            "version": CODE_VERSION,
        }
    )


def _cut_digest(job: PreprocessJob) -> str:
    """A digest of the settings that shape what becomes of one video."""
    clips = job.clips.model_dump(mode="json", exclude={"test_fraction"})
    images = job.storage.model_dump(mode="json", include={"image_format", "jpeg_quality"})
    return digest([CODE_VERSION, clips, images, job.limits.digest(), job.download.enabled])[:16]


class _Run:
    """One go at a dataset."""

    def __init__(
        self, job: PreprocessJob, out: ObjectStore, inputs: Inputs, report: OnProgress
    ) -> None:
        self._job = job
        self._out = out
        self._inputs = inputs
        self._report = report
        self._cut_digest = _cut_digest(job)
        self._work = f"{WORK}/{self._cut_digest}"
        self._journal = Journal(out, f"{self._work}/journal", VideoResult)
        before = read_table_if_any(out, MANIFEST, ClipRecord) or []
        self._before = {clip.clip_id: clip for clip in before}

    def run(self) -> DatasetManifest:
        results = self._finished()
        todo = [item for item in self._inputs.items if item.item_id not in results]
        if todo:
            results |= self._cut(todo)
        ordered = [results[item.item_id] for item in self._inputs.items]
        clips = [clip for result in ordered for clip in result.clip_records()]
        failures = self._failures(ordered)
        self._check(clips, failures)
        same = self._published(clips, failures)
        manifest = same or self._publish(clips, failures, ordered)
        self._tidy()
        return manifest

    # --- what is done

    def _finished(self) -> dict[str, VideoResult]:
        """Results of earlier runs that still hold, by item id."""
        known = {**self._ledger(), **self._journal.done()}
        parts, there = self._parts(), self._there()
        finished = {}
        for item in self._inputs.items:
            result = known.get(item.item_id)
            if (
                result is not None
                and result.state == item.state
                and not any(failure.retryable for failure in result.failure_records())
                and all(c.clip_id in parts or self._usable(c, there) for c in result.clip_records())
            ):
                finished[item.item_id] = result
        return finished

    def _ledger(self) -> dict[str, VideoResult]:
        """The results that the dataset as it is was made from, if its clips were cut alike."""
        try:
            metadata = read_table_metadata(self._out, VIDEOS)
        except StorageError as error:
            if error.code == "not_found":
                return {}
            raise
        if metadata.get("cut_digest") != self._cut_digest:
            return {}
        results = read_table_if_any(self._out, VIDEOS, VideoResult) or []
        return {result.item_id: result for result in results}

    def _parts(self) -> set[str]:
        """Ids of the clips that are finished and wait."""
        return {PurePosixPath(info.key).stem for info in self._out.list(f"{self._work}/{PARTS}/")}

    def _there(self) -> set[str]:
        """The shards, or folders of clips, that the dataset as it is has."""
        keys = {info.key for prefix in ("train/", "test/") for info in self._out.list(prefix)}
        return keys | {str(PurePosixPath(key).parent) for key in keys}

    def _usable(self, clip: ClipRecord, there: set[str]) -> bool:
        """Whether the dataset as it is has a clip where the new one can take it from."""
        old = self._before.get(clip.clip_id)
        if old is None or old.shard not in there:
            return False
        return old.shard.endswith(".arrow") or self._in_place(clip, old)

    def _in_place(self, clip: ClipRecord, old: ClipRecord) -> bool:
        folders = self._job.storage.layout == "folders"
        return folders and old.shard == f"{clip.partition}/{clip.name}"

    # --- cutting

    def _cut(self, todo: list[VideoItem]) -> dict[str, VideoResult]:
        done: dict[str, VideoResult] = {}
        with ray_session():
            outcomes = run_items(
                todo,
                ClipCutter,
                (self._job, self._inputs.raw.uri, self._work),
                key=lambda item: item.name,
                stage="preprocess",
                cluster=self._job.cluster,
                on_progress=self._report,
            )
            for outcome in outcomes:
                item = outcome.item
                if outcome.result is not None:
                    self._journal.add(item.item_id, outcome.result)
                    done[item.item_id] = outcome.result
                else:
                    assert outcome.failure is not None
                    done[item.item_id] = _given_up(item, outcome.failure)
        return done

    def _failures(self, results: Sequence[VideoResult]) -> list[Failure]:
        found = [failure for result in results for failure in result.failure_records()]
        return sorted(
            [*self._inputs.failures, *found], key=lambda f: (f.item, f.stage, f.code, f.cause)
        )

    def _check(self, clips: Sequence[ClipRecord], failures: Sequence[Failure]) -> None:
        """End the run where too little is left of what was asked for.

        Raises:
            RunFailed: `no_output`, `too_many_failures`.
        """
        kept = {clip.name for clip in clips}
        if self._job.videos is not None:
            kept |= {clip.video_id for clip in clips}
        lost = [f for f in failures if f.code != "duplicate_row" and f.item not in kept]
        try:
            if not clips:
                first = f"; for one, {lost[0].item}: {lost[0].cause}" if lost else ""
                raise RunFailed(f"not one clip: {len(lost)} items failed{first}", code="no_output")
            check_failures(lost, len(clips) + len(lost), self._job.max_failed_fraction)
        except RunFailed:
            if not self._before:  # beside an older dataset they would say they are its own
                write_table(self._out, FAILURES, failures, Failure)
            raise

    # --- publishing

    def _content(self, clips: Sequence[ClipRecord], failures: Sequence[Failure]) -> str:
        """A digest of all that a dataset's files are made from."""
        what = sorted([c.clip_id, c.name, c.partition, c.identity, c.video_id] for c in clips)
        return digest([what, [[f.item, f.stage, f.code, f.cause] for f in failures]])

    def _published(
        self, clips: Sequence[ClipRecord], failures: Sequence[Failure]
    ) -> DatasetManifest | None:
        """The dataset as it is, if it is already what it should become."""
        if not self._before or not all(self._out.exists(key) for key in (STATS, FAILURES, PAGE)):
            return None
        metadata = read_table_metadata(self._out, MANIFEST)
        wanted = {"settings_digest": settings_digest(self._job)}
        wanted["content"] = self._content(clips, failures)
        if any(metadata.get(key) != value for key, value in wanted.items()):
            return None
        manifest = DatasetManifest(**read_json(self._out, STATS))
        return manifest if manifest.uri == self._out.uri else None

    def _publish(
        self,
        clips: Sequence[ClipRecord],
        failures: Sequence[Failure],
        results: Sequence[VideoResult],
    ) -> DatasetManifest:
        if self._job.storage.layout == "folders":
            self._make_way(clips)
        assembled = assemble(
            self._out,
            clips,
            storage=self._job.storage,
            locate=self._locate(),
            in_place={
                clip.clip_id
                for clip in clips
                if (old := self._before.get(clip.clip_id)) and self._in_place(clip, old)
            },
            on_done=lambda done, total: self._report(Progress("shards", done, total)),
        )
        manifest = DatasetManifest(
            uri=self._out.uri,
            dataset_id=digest([[c.clip_id, c.partition, c.identity] for c in assembled.clips]),
            settings_digest=settings_digest(self._job),
            num_train=sum(clip.partition == "train" for clip in clips),
            num_test=sum(clip.partition == "test" for clip in clips),
            num_frames=sum(clip.num_frames for clip in clips),
            num_failures=len(failures),
        )
        metadata = {
            "settings_digest": manifest.settings_digest,
            "dataset_id": manifest.dataset_id,
            "content": self._content(clips, failures),
        }
        page = dataset_page(
            title=PurePosixPath(self._out.uri).name,
            manifest=manifest,
            clips=assembled.clips,
            failures=failures,
            thumbnails=assembled.thumbnails,
            limit=NUM_THUMBNAILS,
        )
        write_table(self._out, FAILURES, failures, Failure, metadata=metadata)
        cut = {"cut_digest": self._cut_digest}
        write_table(self._out, VIDEOS, results, VideoResult, metadata=cut)
        self._out.put(PAGE, page.encode())
        write_json(self._out, STATS, manifest)
        write_table(self._out, MANIFEST, assembled.clips, ClipRecord, metadata=metadata)
        self._remove_old(assembled.clips)
        return manifest

    def _locate(self) -> Callable[[str], tuple[Path, int]]:
        """Where the images of a clip are: in a part of this run, or in the dataset before it."""
        parts = self._parts()

        def locate(clip_id: str) -> tuple[Path, int]:
            old = self._before.get(clip_id)
            if clip_id in parts or old is None or not old.shard.endswith(".arrow"):
                return self._out.local(part_key(self._work, clip_id)), 0
            return self._out.local(old.shard), old.row

        return locate

    def _make_way(self, clips: Sequence[ClipRecord]) -> None:
        """Take back a manifest whose folders are about to change."""
        ids = {f"{clip.partition}/{clip.name}": clip.clip_id for clip in clips}
        if any(ids.get(old.shard) != old.clip_id for old in self._before.values()):
            self._out.delete(MANIFEST)

    def _remove_old(self, clips: Sequence[ClipRecord]) -> None:
        """Remove the images of the dataset before, as far as this one does not use them."""
        for key in sorted({c.shard for c in self._before.values()} - {c.shard for c in clips}):
            if key.endswith(".arrow"):
                self._out.delete(key)
                continue
            for info in list(self._out.list(f"{key}/")):
                if PurePosixPath(info.key).suffix in IMAGE_SUFFIXES:
                    self._out.delete(info.key)

    def _tidy(self) -> None:
        """Remove what was needed on the way, now that the manifest is out."""
        for info in list(self._out.list(f"{WORK}/")):
            self._out.delete(info.key)


def _given_up(item: VideoItem, failure: Failure) -> VideoResult:
    """The result of a video whose worker died, took too long or has a bug: a rerun tries again."""
    failures = [
        Failure(
            item=row_name(row),
            stage=failure.stage,
            code=failure.code,
            cause=failure.cause,
            retryable=True,
            attempts=failure.attempts,
        )
        for row in item.rows
    ]
    return video_result(item, failures=failures)

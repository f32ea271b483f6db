"""The preprocess job: raw videos in, a dataset of clips out.

    <out>/{train,test}/shard-*.arrow   clips (or folders of images with layout "folders")
    <out>/manifest.parquet             ClipRecord for each; written last: without it there is none
    <out>/failures.parquet             what could not be had, and why
    <out>/videos.parquet               which raw videos were read, and what became of each
    <out>/stats.json  changes.json  versions.json    what there is, and what the last run changed
    <out>/index.html  previews/        the page
    <out>/.work/                       of a run in progress: finished clips and results
    <out>/.state/                      across runs: who works here, what is to be tried again when

Stages, each a pool of Ray workers with its own resources: download, cut (one item is one raw
video, cut in one pass), shards, previews. What passes between them are keys and records;
back-pressure is that a stage has one item in flight for each worker, and that few downloads are
ahead of the cutting.

- A rerun does what is missing: videos whose results are in the journal of a run that was ended,
  or in `videos.parquet`, of the same rows, settings and files, are not read again; neither are
  those whose failure no retry can help, or whose next try is not due. With nothing new it changes
  nothing.
- Memory does not grow with the number of rows, videos or clips: tables lie in a `Workbook`.
- Raw videos lie in `raw`, else in `raw/` under the dataset; downloads are kept there.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Final, TypeVar

from kpmask.config import PreprocessJob
from kpmask.data.dataset import FAILURES, MANIFEST
from kpmask.data.detectors import require_detector
from kpmask.data.duplicates import look_distances, near_duplicates
from kpmask.data.quality import MEASURES_VERSION
from kpmask.errors import ConfigError, QualityError, RunFailed, StorageError, WorkerError
from kpmask.preprocess import CODE_VERSION, failure_of
from kpmask.records import (
    ClipRecord,
    DatasetChanges,
    DatasetManifest,
    Failure,
    Progress,
    digest,
)
from tasks.clip_worker import (
    PARTS,
    ClipCutter,
    VideoResult,
    encoded_result,
    given_up,
    listed_results,
    put_result,
    read_result,
    result_key,
)
from tasks.cluster import Worker, ray_session, run_items
from tasks.fetching import fetched_ahead
from tasks.lease import Lease, lease
from tasks.manifest import (
    check_counts,
    iter_table,
    iter_table_if_any,
    read_json,
    read_table_metadata,
    write_json,
    write_table,
)
from tasks.plan import planned
from tasks.publish import Content, ListDigest, complete, publish, published, remove_old
from tasks.retries import Retries
from tasks.scratch import scratch_folder, sweep_scratch
from tasks.shard_worker import (
    Place,
    Placer,
    PreviewBatch,
    PreviewedClip,
    Previewer,
    folders_of,
    shards_of,
)
from tasks.storage import ObjectStore, absolute, open_store
from tasks.workbook import VideoItem, Workbook

log = logging.getLogger(__name__)

VIDEOS: Final = "videos.parquet"
WORK: Final = ".work"
COUNTS: Final = ".work/changes.json"
FOLDERS: Final = ".work/folders.parquet"
GONE: Final = "gone:"  # before the id of a clip whose folder may hold another one by now
LEASE: Final = ".state/lease"
MAX_ROUNDS: Final = 3
PREVIEWS_AT_ONCE: Final = 16
READ_THREADS: Final = 16
READ_BATCH: Final = 1000

S = TypeVar("S")

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
        RunFailed: too many items failed, none is usable, or another run took this one's place.
        StorageError: a store does not answer.
    """
    if not dry_run:
        return preprocess_with_changes(job, on_progress=on_progress)[0]
    job, out = _checked(job)
    with (
        scratch_folder("plan") as folder,
        planned(job, folder) as (book, _),
    ):
        return _planned(job, out, book)


def preprocess_with_changes(
    job: PreprocessJob, *, on_progress: OnProgress | None = None
) -> tuple[DatasetManifest, DatasetChanges]:
    """`preprocess`, and what it changed; raises the same."""
    report = on_progress or (lambda progress: None)
    job, out = _checked(job)
    sweep_scratch("plan")
    with scratch_folder("plan") as folder:
        report(Progress("plan", 0, 1))
        with planned(job, folder) as (book, raw):
            report(Progress("plan", 1, 1))
            with lease(out, LEASE, on_wait=log.warning) as held:
                return _Run(job, out, raw, book, held, report).run()


def _checked(job: PreprocessJob) -> tuple[PreprocessJob, ObjectStore]:
    """The job with its output made absolute, for workers may be elsewhere; and its store."""
    if job.storage.layout == "folders" and job.storage.image_format != "png":
        raise ConfigError(
            "layout folders, the original code's, holds PNG images only",
            subject="storage.image_format",
        )
    require_detector(job.subject.detector)
    job = job.model_copy(update={"out": absolute(job.out)})
    out = open_store(job.out)
    out.exists(MANIFEST)  # a store that denies or is not there says so before any work
    return job, out


def _planned(job: PreprocessJob, out: ObjectStore, book: Workbook) -> DatasetManifest:
    counts = book.counts()
    return DatasetManifest(
        uri=out.uri,
        dataset_id="",
        settings_digest=settings_digest(job),
        num_train=counts.get("train", 0),
        num_test=counts.get("test", 0),
        num_frames=0,
        num_failures=counts["failures"],
    )


def settings_digest(job: PreprocessJob) -> str:
    """A digest of the settings that shape a dataset."""
    parts = [job.clips, job.storage, job.limits, job.subject, job.quality, job.robonet]
    return digest([CODE_VERSION, job.source_kind, *(part.digest() for part in parts)])


def cut_digest(job: PreprocessJob) -> str:
    """A digest of the settings that shape what becomes of one video."""
    clips = job.clips.model_dump(mode="json", exclude={"test_fraction", "test_identities"})
    images = job.storage.model_dump(mode="json", include={"image_format", "jpeg_quality"})
    quality = job.quality.model_dump(mode="json", exclude={"duplicates", "max_hash_bits"})
    quality["version"] = MEASURES_VERSION
    parts = [part.digest() for part in (job.limits, job.subject, job.robonet)]
    return digest([CODE_VERSION, clips, images, quality, job.download.enabled, parts])[:16]


class _Run:
    """One go at a dataset."""

    def __init__(
        self,
        job: PreprocessJob,
        out: ObjectStore,
        raw: ObjectStore,
        book: Workbook,
        held: Lease,
        report: OnProgress,
    ) -> None:
        self._job, self._out, self._raw, self._book = job, out, raw, book
        self._held = held
        self._report = report
        self._cut_digest = cut_digest(job)
        self._work = f"{WORK}/{self._cut_digest}"
        self._retries = Retries(
            out,
            backoff_s=job.retry.backoff_s,
            max_backoff_s=job.retry.max_backoff_s,
            max_attempts=job.retry.max_attempts,
        )
        self._settings_digest = settings_digest(job)
        self._is_whole = True  # the dataset as it is
        self._num_retried = 0
        self._waiting: set[str] = set()  # ids of the items whose next try is not due
        self._tried: set[str] = set()  # of those that failed in this run, for a passing reason
        self._sessions = ExitStack()
        self._has_ray = False

    def run(self) -> tuple[DatasetManifest, DatasetChanges]:
        with self._sessions:
            self._out.sweep()
            complete(self._out)
            self._begin()
            for _ in range(MAX_ROUNDS):
                self._cut()
                self._collect()
                if not self._cut_again():
                    break
            else:
                raise StorageError("clips vanish as they are made", subject=self._out.uri)
            self._check()
            content = self._content()
            done = self._published(content)
            if done is None:
                done = self._publish(content)
            elif any(True for _ in self._out.list(f"{WORK}/")):
                # A run was killed at its end; or what was cut again is what it was.
                self._set_places()
                self._write_ledger()
                remove_old(self._out, self._publishable(content, counts={}))
        self._tidy()
        return done

    def _start_ray(self) -> None:
        """Ray for the rest of the run, once there is work for it."""
        if not self._has_ray:
            self._sessions.enter_context(ray_session())
            self._has_ray = True

    def _cut_again(self) -> bool:
        """Whether clips are gone that results promise; those results are forgotten."""
        gone = self._book.redo_homeless()
        for item, state, retry in gone:
            self._out.delete(result_key(self._work, item, state, retryable=retry))
        return self._book.num_todo() > 0

    # --- what is done

    def _begin(self) -> None:
        """Take stock: the dataset as it is, and the results that there are."""
        book, out = self._book, self._out
        book.begin()
        if out.exists(MANIFEST):
            failures = iter_table_if_any(out, FAILURES, Failure)
            book.add_before(iter_table(out, MANIFEST, ClipRecord), failures)
        else:  # failures are of a run that came to nothing
            book.add_before(iter_table_if_any(out, FOLDERS, ClipRecord), [])
        keys = (info.key for split in ("train/", "test/") for info in out.list(split))
        there = {key if key.endswith(".arrow") else key.rpartition("/")[0] for key in keys}
        gone = [key for key in book.before_shards() if key not in there]
        book.lose_shards(gone)
        self._is_whole = not gone
        book.set_earlier(self._ledger(), place="ledger")

    def _ledger(self) -> Iterator[tuple[str, str, bool]]:
        """The results that the dataset as it is was made from, if its clips were cut alike."""
        try:
            metadata = read_table_metadata(self._out, VIDEOS)
        except StorageError as error:
            if error.code == "not_found":
                return
            raise
        if metadata.get("cut_digest") == self._cut_digest:
            for result in iter_table(self._out, VIDEOS, VideoResult):
                yield result.item_id, result.state, result.retryable

    def _choose(self) -> None:
        """Find what is done, in the journal or in the ledger, and what has to wait."""
        book = self._book
        book.set_earlier(listed_results(self._out, self._work), place="journal")
        book.choose()
        again = set(book.retryable()) - self._tried
        self._waiting = {item for item in again if not self._retries.due(item)}
        self._num_retried += len(again) - len(self._waiting)
        if self._waiting or self._tried:
            book.choose(waiting=self._waiting | self._tried)

    # --- cutting

    def _cut(self) -> None:
        self._choose()
        todo = self._book.num_todo()
        if not todo:
            return
        self._start_ray()
        try:
            self._cut_items(todo)
        finally:
            self._retries.save()
        # What failed for a passing reason in this run has its result now.
        self._book.set_earlier(listed_results(self._out, self._work), place="journal")
        self._book.choose(waiting=self._waiting)
        self._tried |= set(self._book.retryable())
        self._book.choose(waiting=self._waiting | self._tried)
        lacking = self._book.num_todo()
        if lacking:
            raise StorageError(f"{lacking} results are gone", subject=self._out.uri)

    def _cut_items(self, todo: int) -> None:
        counter = _Counter("preprocess", todo, self._report)

        def lost(item: VideoItem, failure: Failure) -> None:
            by_worker = failure.stage == "download" and failure.code in WorkerError.codes
            if by_worker:
                put_result(self._out, self._work, given_up(item, failure))
            if failure.retryable or by_worker:
                self._retries.failed(item.item_id, failure.code)
            else:
                self._retries.done(item.item_id)
            counter.add(failed=True)

        work = (self._job, self._raw.uri, self._work)
        with fetched_ahead(self._book.todo(), todo, *work, on_lost=lost) as items:
            outcomes = run_items(
                items,
                ClipCutter,
                work,
                key=lambda item: item.name,
                stage="preprocess",
                cluster=self._job.cluster,
                total=todo,
            )
            for outcome in outcomes:
                self._held.check()
                if outcome.failure is not None:
                    put_result(self._out, self._work, given_up(outcome.item, outcome.failure))
                    self._retries.failed(outcome.item.item_id, outcome.failure.code)
                else:
                    self._retries.done(outcome.item.item_id)
                counter.add(failed=not outcome.result)

    # --- collecting

    def _collect(self) -> None:
        """Put the chosen results into the workbook, and find what repeats."""
        book = self._book
        book.clear_results()
        book.add_results(self._results())
        book.place_clips(
            (info.key for info in self._out.list(f"{self._work}/{PARTS}/")),
            as_folders=self._job.storage.layout == "folders",
        )
        book.index_clips()
        book.refuse_names()
        if self._job.quality.duplicates == "drop":
            self._mark_repeats()

    def _results(self) -> Iterator[tuple[str, str, Sequence[ClipRecord], Sequence[Failure]]]:
        for result in self._chosen_results():
            stored = encoded_result(result.placeless())
            yield result.item_id, stored, result.clip_records(), result.failure_records()

    def _chosen_results(self) -> Iterator[VideoResult]:
        book = self._book
        for result in iter_table_if_any(self._out, VIDEOS, VideoResult):
            if book.is_chosen(result.item_id, "ledger"):
                yield result
        chosen = book.chosen()
        with ThreadPoolExecutor(READ_THREADS) as pool:
            while batch := list(itertools.islice(chosen, READ_BATCH)):
                yield from pool.map(self._read_result, batch)

    def _read_result(self, chosen: tuple[str, str, bool]) -> VideoResult:
        item, state, retry = chosen
        return read_result(self._out.get(result_key(self._work, item, state, retryable=retry)))

    def _mark_repeats(self) -> None:
        """Reject clips that repeat one before them: test clips come first, then by name."""
        book = self._book
        book.mark_repeats()
        for name, twin in book.twins():
            book.add_failures([_repeat(name, twin, "duplicate", 0.0)])
        found = near_duplicates(book.looks(), max_bits=self._job.quality.max_hash_bits)
        pairs = [(later, first) for later, first in enumerate(found) if first >= 0]
        clips = book.clips_at(position for pair in pairs for position in pair)
        for later, first in pairs:
            (name, look), (twin, look_of_twin) = clips[later], clips[first]
            bits = max(look_distances(look, look_of_twin))
            book.add_failures([_repeat(name, twin, "near_duplicate", bits)])
        book.mark_twins({clips[later][0]: clips[first][0] for later, first in pairs})

    def _check(self) -> None:
        """End the run where too little is left of what was asked for.

        Raises:
            RunFailed: `no_output`, `too_many_failures`.
        """
        book = self._book
        counts, first = book.lost(by_video=self._job.videos is not None)
        kept = book.num_clips()
        try:
            if not kept:
                why = f"; for one, {first.item}: {first.cause}" if first else ""
                raise RunFailed(
                    f"not one clip: {counts.total()} items failed{why}", code="no_output"
                )
            check_counts(counts, first, kept + counts.total(), self._job.max_failed_fraction)
        except RunFailed:
            if not self._out.exists(MANIFEST):  # beside a dataset they would say they are its own
                write_table(self._out, FAILURES, book.failures(), Failure)
            raise

    # --- publishing

    def _content(self) -> str:
        """A digest of all that a dataset's files are made from."""
        what = ListDigest()
        for clip in self._book.clips():
            what.add([clip.clip_id, clip.name, clip.partition, clip.identity, clip.video_id])
        for failure in self._book.failures():
            what.add([failure.item, failure.stage, failure.code, failure.cause])
        return what.hexdigest()

    def _published(self, content: str) -> tuple[DatasetManifest, DatasetChanges] | None:
        """The dataset as it is, if it is already what it should become."""
        if not self._is_whole:
            return None
        found = published(self._out, content=content, settings_digest=self._settings_digest)
        if found is None:
            return None
        manifest, changes = found
        return manifest, replace(changes, retried=self._num_retried, waiting=len(self._waiting))

    def _publish(self, content: str) -> tuple[DatasetManifest, DatasetChanges]:
        counts = self._counts(content)
        what = self._publishable(content, counts)
        self._place(set(what.folders_before))
        self._held.check()
        self._write_ledger()
        return publish(self._out, what, draw_previews=self._draw_previews)

    def _publishable(self, content: str, counts: Mapping[str, int]) -> Content:
        book = self._book
        return Content(
            clips=book.clips,
            failures=book.failures,
            settings_digest=self._settings_digest,
            changes=counts,
            metadata={"content": content},
            keep_versions=self._job.storage.keep_versions,
            folders_before=[
                *(key for key in book.before_shards() if not key.endswith(".arrow")),
                *self._folders_noted(),
            ],
        )

    def _counts(self, content: str) -> dict[str, int]:
        """What changes. Noted by the first run that comes here: one after it, should this one be
        killed, may find the half of it done.
        """
        of = digest([content, self._settings_digest])
        try:
            noted = read_json(self._out, COUNTS)
        except StorageError as error:
            if error.code != "not_found":
                raise
            noted = {}
        if noted.get("of") == of:
            return dict(noted["counts"])
        counts = self._book.changes()
        counts |= {"retried": self._num_retried, "waiting": len(self._waiting)}
        write_json(self._out, COUNTS, {"of": of, "counts": counts})
        return counts

    def _write_ledger(self) -> None:
        write_table(
            self._out,
            VIDEOS,
            (read_result(data) for data in self._book.results()),
            VideoResult,
            metadata={"cut_digest": self._cut_digest},
        )

    def _place(self, folders: set[str]) -> None:
        """Put the clips into their shards or folders, as far as they are not there."""
        self._set_places()
        book, as_folders = self._book, self._job.storage.layout == "folders"
        if as_folders and book.changes_folders():  # no reader may take them for what they were
            self._note_folders()
            self._out.delete(MANIFEST)
        there = {i.key for part in ("train", "test") for i in self._out.list(f"{part}/shard-")}

        def lacks(place: Place) -> bool:
            if as_folders:
                return place.clips[0].source != place.key or place.key not in folders
            return place.key not in there

        total = sum(len(place.clips) for place in self._places() if lacks(place))
        counter = _Counter("shards", total, self._report)
        for place in self._run_stage(filter(lacks, self._places()), Placer, "shards", total):
            counter.add(count=len(place.clips))

    def _folders_noted(self) -> list[str]:
        noted = iter_table_if_any(self._out, FOLDERS, ClipRecord)
        return [clip.shard for clip in noted if not clip.shard.endswith(".arrow")]

    def _note_folders(self) -> None:
        """Note which folders stay as they are, for the run after this one, should it be killed."""
        key = MANIFEST if self._out.exists(MANIFEST) else FOLDERS

        def noted() -> Iterator[ClipRecord]:
            for clip in iter_table(self._out, key, ClipRecord):
                stays = clip.shard.endswith(".arrow") or clip.clip_id.startswith(GONE)
                stays = stays or self._book.keeps_folder(clip.clip_id, clip.shard)
                yield clip if stays else replace(clip, clip_id=GONE + clip.clip_id)

        write_table(self._out, FOLDERS, noted(), ClipRecord)

    def _set_places(self) -> None:
        self._book.set_places(
            (clip.clip_id, place.key, row)
            for place in self._places()
            for row, clip in enumerate(place.clips)
        )

    def _places(self) -> Iterator[Place]:
        if self._job.storage.layout == "folders":
            return folders_of(self._book.sources())
        size = self._job.storage.clips_per_shard
        return shards_of(self._book.sources(), clips_per_shard=size)

    def _draw_previews(self, clips: Sequence[PreviewedClip]) -> None:
        batches = [
            PreviewBatch(tuple(clips[start : start + PREVIEWS_AT_ONCE]))
            for start in range(0, len(clips), PREVIEWS_AT_ONCE)
        ]
        counter = _Counter("previews", len(clips), self._report)
        for batch in self._run_stage(batches, Previewer, "previews", len(batches)):
            counter.add(count=len(batch.clips))

    def _run_stage(
        self, items: Iterable[S], worker: type[Worker[S, None]], stage: str, total: int
    ) -> Iterator[S]:
        """Items of a stage that must all succeed, as they are done."""
        if not total:
            return
        self._start_ray()
        cluster = self._job.cluster
        args = (self._out.uri, self._job.storage.layout == "folders")
        for outcome in run_items(
            items, worker, args, key=str, stage=stage, cluster=cluster, total=total
        ):
            self._held.check()
            if outcome.failure is not None:
                raise RunFailed(
                    f"{stage}: {outcome.failure.cause}", subject=self._out.uri, code="no_output"
                )
            yield outcome.item

    def _tidy(self) -> None:
        """Remove what was needed on the way, now that the manifest is out."""
        keys = iter([info.key for info in self._out.list(f"{WORK}/")])
        with ThreadPoolExecutor(READ_THREADS) as pool:
            while batch := list(
                itertools.islice(keys, READ_BATCH)
            ):  # a pool holds what it is given
                list(pool.map(self._out.delete, batch))


def _repeat(name: str, twin: str, code: str, bits: float) -> Failure:
    how = "has the frames of" if code == "duplicate" else f"looks like ({bits:.1f} bits apart)"
    return failure_of(name, "quality", QualityError(f"{how} {twin}", code=code, value=bits))


class _Counter:
    """Progress of a stage."""

    def __init__(self, stage: str, total: int, report: OnProgress) -> None:
        self._stage, self._total, self._report = stage, total, report
        self._done = self._failed = 0

    def add(self, *, count: int = 1, failed: bool = False) -> None:
        self._done += count
        self._failed += failed
        message = f"{self._failed} failed" if self._failed else ""
        self._report(Progress(self._stage, self._done, self._total, message))

"""A dataset made of clips that are media files already: an export of ours, or somebody else's.

- An item is a video, a folder of frames, or a tar of samples. A worker decodes each clip whole and
  puts its frames, encoded anew, into a part file of the item; parts become shards as they do for
  `preprocess`, and the same tables and page are published, the manifest last.
- What is known of a clip comes with it (`metadata.csv`, or JSON in a tar); of others' the name says
  the identity, up to the first `#`, and the folder or tar the split.
- What outgrows memory (records of all clips, what repeats) is in a SQLite file that is thrown away.
- A killed import goes on where it was; one whose source has not changed does nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

from kpmask.config import ImportJob
from kpmask.data.dataset import FAILURES, MANIFEST, STATS
from kpmask.data.exchange import (
    EXPORT,
    METADATA,
    ClipSource,
    ImportedClip,
    ImportSettings,
    import_clip,
    read_rows,
)
from kpmask.data.layouts import (
    IMAGE_SUFFIXES,
    SPLITS,
    VIDEO_SUFFIXES,
    MediaSource,
    assign_splits,
    find_sources,
    identity_of,
)
from kpmask.data.shards import ShardWriter
from kpmask.data.tars import Sample, printable, read_samples, split_of
from kpmask.errors import ConfigError, ItemError, MediaError, RowError, RunFailed, StorageError
from kpmask.preprocess import failure_of
from kpmask.records import (
    ClipRecord,
    DatasetManifest,
    Failure,
    Partition,
    Progress,
    as_dict,
    digest,
)
from tasks.cluster import ray_session, run_items
from tasks.lease import Lease, lease
from tasks.manifest import (
    check_failures,
    iter_table_if_any,
    read_json,
    write_json,
    write_table,
)
from tasks.preprocess import LEASE
from tasks.publish import Content, publish
from tasks.shard_worker import Placer, folders_of, shards_of
from tasks.storage import LocalStore, ObjectInfo, ObjectStore, absolute, open_store, os_errors

log = logging.getLogger(__name__)

IMPORT: Final = "import.json"
WORK: Final = ".work"
STAGE: Final = "read"
IMPORT_VERSION: Final = 1  # of what is made
# What lies in an export beside the media.
_TABLES: Final = frozenset({METADATA, EXPORT, FAILURES})
# Of a failure that is about a file in passing: it costs no clip.
_PASSED_OVER: Final = "foreign_file"
READ_THREADS: Final = 8

R = TypeVar("R")

OnProgress = Callable[[Progress], None]


def import_dataset(
    job: ImportJob, *, on_progress: OnProgress | None = None, dry_run: bool = False
) -> DatasetManifest:
    """Make a dataset of media files.

    Args:
        on_progress: called as items are read.
        dry_run: only list what there is: the counts are of the clips or tars that are found, and
            nothing is written.

    Raises:
        ConfigError: there is nothing to import, or another dataset is in the way.
        RunFailed: too many items failed, or none is usable.
        StorageError: a store does not answer.
    """
    report = on_progress or (lambda progress: None)
    job = job.model_copy(update={"source": absolute(job.source), "out": absolute(job.out)})
    inputs = read_inputs(job)
    if dry_run:
        return _planned(job, inputs)
    with (
        tempfile.TemporaryDirectory(prefix="kpmask-import-") as folder,
        lease(open_store(job.out), LEASE, on_wait=log.warning) as held,
    ):
        return _Import(job, inputs, Path(folder), report, held).run()


# --- inputs ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImportItem:
    """A clip to be imported, or a tar of clips.

    Attributes:
        key: of the file, folder or tar in the source.
        files: of a clip's media; for a tar itself.
        state: a digest of the files' sizes and versions.
        note: the clip's record where it came from, where that is known.
    """

    key: str
    name: str
    identity: str
    partition: Partition | None
    files: tuple[str, ...]
    is_folder: bool
    state: str
    note: ClipRecord | None = None

    @property
    def item_id(self) -> str:
        note = None if self.note is None else as_dict(self.note)
        return digest([self.key, self.name, self.partition, self.state, note])[:32]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What there is to import, and the files that cannot be."""

    items: list[ImportItem]
    failures: list[Failure]
    state: str


def read_inputs(job: ImportJob) -> Inputs:
    """List a source.

    Raises:
        ConfigError: there is nothing of the form in it, or its table is none.
        StorageError: the store does not answer.
    """
    store = open_store(job.source)
    infos = {info.key: info for info in store.list() if not _hidden(info.key)}
    state = digest([[i.key, i.size_bytes, i.etag] for i in infos.values()])
    media = {key: info for key, info in infos.items() if key not in _TABLES}
    if job.form == "webdataset":
        items, failures = _tars(media)
    else:
        notes, failures = _notes(store) if METADATA in infos else ({}, [])
        items, foreign = _media(media, notes, videos=job.form == "mp4")
        failures += foreign
    if not items:
        raise ConfigError(
            f"nothing of the form {job.form} is here", subject=job.source, code="nothing_to_do"
        )
    return Inputs(items, failures, state)


def _hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def _notes(store: ObjectStore) -> tuple[dict[str, ClipRecord], list[Failure]]:
    notes, failures = {}, []
    for row in read_rows(store.local(METADATA)):
        if isinstance(row, Failure):
            failures.append(row)
        else:
            notes[row[0]] = row[1]
    return notes, failures


def _media(
    infos: Mapping[str, ObjectInfo], notes: Mapping[str, ClipRecord], *, videos: bool
) -> tuple[list[ImportItem], list[Failure]]:
    suffixes = VIDEO_SUFFIXES if videos else IMAGE_SUFFIXES
    own = [key for key in infos if PurePosixPath(key).suffix.lower() in suffixes]
    items = [_item(source, infos, notes) for source in find_sources(own)]
    cause = "no video" if videos else "no picture"
    foreign = [
        failure_of(printable(key), STAGE, MediaError(f"{cause}: passed over", code=_PASSED_OVER))
        for key in sorted(infos.keys() - set(own))
    ]
    return items, foreign


def _item(
    source: MediaSource, infos: Mapping[str, ObjectInfo], notes: Mapping[str, ClipRecord]
) -> ImportItem:
    return ImportItem(
        key=source.key,
        name=source.name,
        identity=source.identity,
        partition=source.partition,
        files=source.files,
        is_folder=source.is_folder,
        state=_state([infos[key] for key in source.files]),
        note=notes.get(source.key),
    )


def _tars(infos: Mapping[str, ObjectInfo]) -> tuple[list[ImportItem], list[Failure]]:
    items, failures = [], []
    for key, info in infos.items():
        if not key.lower().endswith(".tar"):
            packed = key.lower().endswith((".tgz", ".gz", ".zst", ".bz2", ".xz"))
            cause = "a compressed tar: unpack it to .tar first" if packed else "no tar: passed over"
            error = MediaError(cause, code=_PASSED_OVER)
            failures.append(failure_of(printable(key), STAGE, error))
            continue
        state = _state([info])
        items.append(ImportItem(key, key, "", split_of(key), (key,), False, state))
    return items, failures


def _state(infos: Sequence[ObjectInfo]) -> str:
    return digest([[i.key, i.size_bytes, i.etag] for i in infos])[:32]


def _planned(job: ImportJob, inputs: Inputs) -> DatasetManifest:
    found = Counter(item.partition for item in inputs.items)
    return DatasetManifest(
        uri=open_store(job.out).uri,
        dataset_id="",
        settings_digest=_settings_digest(job),
        num_train=found["train"] + found[None],
        num_test=found["test"],
        num_frames=0,
        num_failures=len(inputs.failures),
    )


def _settings_digest(job: ImportJob) -> str:
    """A digest of the settings that shape the dataset."""
    apart = {"source", "out", "cluster", "max_failed_fraction"}
    return digest([IMPORT_VERSION, job.model_dump(mode="json", exclude=apart)])


# --- the worker ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What became of an item: JSON lists of [record, has split] and of failures.

    The images of clip i are row i of the item's part.
    """

    item_id: str
    clips: str
    failures: str

    def imported(self) -> Iterator[tuple[ClipRecord, bool]]:
        for values, has_split in json.loads(self.clips):
            values["crop_px"] = tuple(values["crop_px"])
            yield ClipRecord(**values), has_split

    def failure_records(self) -> list[Failure]:
        return [Failure(**values) for values in json.loads(self.failures)]


def part_key(work: str, item_id: str) -> str:
    """Where the clips of an item wait to become part of shards."""
    return f"{work}/parts/{item_id}.arrow"


def result_key(work: str, item_id: str) -> str:
    """Where it is kept what became of an item, for this run and those after it."""
    return f"{work}/results/{item_id}.json"


class ClipImporter:
    """The worker: reads the clips of one item."""

    def __init__(self, job: ImportJob, work: str) -> None:
        self._job = job
        self._work = work
        self._source = open_store(job.source)
        self._out = open_store(job.out)
        self._settings = ImportSettings(
            size_px=job.size_px, fps=job.fps, storage=job.storage, limits=job.limits
        )

    def process(self, item: ImportItem) -> None:
        """Read an item; put its clips into its part, and then what became of it beside.

        Raises:
            StorageError: a store does not answer.
        """
        clips: list[tuple[dict[str, Any], bool]] = []
        failures: list[Failure] = []
        with tempfile.TemporaryDirectory(prefix="kpmask-import-") as name, os_errors(item.key):
            folder = Path(name)
            part = folder / "part.arrow"
            with ShardWriter(part) as shard:
                for subject, found in self._sources(item, folder):
                    if isinstance(found, Failure):
                        failures.append(found)
                        continue
                    try:
                        made = self._add(shard, found, folder / "images")
                    except ItemError as error:
                        failures.append(failure_of(printable(subject), STAGE, error))
                        continue
                    clips.append((as_dict(made.record), made.has_split))
            if clips:
                self._out.put_file(part_key(self._work, item.item_id), part)
        told = json.dumps([as_dict(failure) for failure in failures])
        result = as_dict(ImportResult(item.item_id, json.dumps(clips), told))
        self._out.put(result_key(self._work, item.item_id), json.dumps(result).encode())

    def _add(self, shard: ShardWriter, source: ClipSource, images: Path) -> ImportedClip:
        made = import_clip(source, settings=self._settings, images=images)
        shard.add_file(made.record.clip_id, made.record.fps, images, made.ends)
        return made

    def _sources(
        self, item: ImportItem, folder: Path
    ) -> Iterator[tuple[str, ClipSource | Failure]]:
        """The clips of an item and what failures call them, each valid until the next."""
        try:
            paths = [self._local(key) for key in item.files]
        except ItemError as error:
            yield item.key, failure_of(printable(item.key), STAGE, error)
            return
        if self._job.form == "webdataset":
            yield from self._samples(item, paths[0], folder / "sample")
            return
        path = _linked(paths, folder / "frames") if item.is_folder else paths[0]
        yield item.key, ClipSource(path, item.name, item.identity, item.partition, item.note)

    def _samples(
        self, item: ImportItem, path: Path, folder: Path
    ) -> Iterator[tuple[str, ClipSource | Failure]]:
        limits = self._job.limits
        for sample in read_samples(path, limits=limits, folder=folder, subject=item.key):
            if isinstance(sample, Failure):
                yield item.key, sample
                continue
            yield f"{item.key}:{sample.key}", _of_sample(sample, item.partition)

    def _local(self, key: str) -> Path:
        """A file of the source, which must not be a link out of it."""
        try:
            path = self._source.local(key)
        except StorageError as error:
            if error.code != "not_found":
                raise
            raise MediaError("it was listed and is gone", code="not_found") from error
        if isinstance(self._source, LocalStore):
            root = self._source.root
            if not path.resolve().is_relative_to(root):
                raise RowError("a link that leads out of the source", code="path_escape")
        return path


def _linked(paths: Sequence[Path], folder: Path) -> Path:
    """A folder that has these files, by their own names."""
    folder.mkdir()
    for path in paths:
        (folder / path.name).symlink_to(path)
    return folder


def _of_sample(sample: Sample, partition: Partition | None) -> ClipSource:
    name = sample.key.replace("/", "__")
    identity = identity_of(PurePosixPath(sample.key).name)
    return ClipSource(sample.path, name, identity, partition, sample.note, sample.fps)


# --- the book --------------------------------------------------------------------------------


_SETTLE: Final = """
CREATE INDEX clip_by_identity ON clip (identity, part);
CREATE INDEX clip_by_name ON clip (name);
CREATE INDEX clip_by_id ON clip (clip_id);
-- An identity of which some clips have a split: the rest go with them.
UPDATE clip SET part = (SELECT min(other.part) FROM clip AS other
                        WHERE other.identity = clip.identity) WHERE part IS NULL;
"""


class _Book:
    """The clips of an import, in a file on this machine's disk."""

    def __init__(self, path: Path) -> None:
        self._sql = sqlite3.connect(path, isolation_level=None)
        self._sql.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE clip (number INTEGER PRIMARY KEY, clip_id TEXT, name TEXT, part TEXT,
                               identity TEXT, source TEXT, row INT, shard TEXT, place INT,
                               data TEXT);
            CREATE TABLE failure (item TEXT, stage TEXT, code TEXT, cause TEXT, data TEXT);
            """
        )

    def close(self) -> None:
        self._sql.close()

    def add(self, result: ImportResult, source: str) -> None:
        """The clips and failures of an item."""
        rows = (
            (c.clip_id, c.name, c.partition if known else None, c.identity, source, row, _json(c))
            for row, (c, known) in enumerate(result.imported())
        )
        names = "clip_id, name, part, identity, source, row, data"
        self._sql.execute("BEGIN")
        self._sql.executemany(f"INSERT INTO clip ({names}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)  # noqa: S608
        self._sql.execute("COMMIT")
        self.add_failures(result.failure_records())

    def add_failures(self, failures: Iterable[Failure]) -> None:
        rows = ((f.item, f.stage, f.code, f.cause, _json(f)) for f in failures)
        self._sql.execute("BEGIN")
        self._sql.executemany("INSERT INTO failure VALUES (?, ?, ?, ?, ?)", rows)
        self._sql.execute("COMMIT")

    def settle(self, test_fraction: float) -> None:
        """Draw the splits that lack, and refuse what cannot stand beside the rest."""
        free = [
            row[0]
            for row in self._sql.execute(
                "SELECT DISTINCT identity FROM clip WHERE part IS NULL "
                "AND identity NOT IN (SELECT identity FROM clip WHERE part IS NOT NULL)"
            )
        ]
        drawn = assign_splits(free, test_fraction=test_fraction)
        self._sql.executescript(_SETTLE)
        self._sql.executemany(
            "UPDATE clip SET part = ? WHERE identity = ? AND part IS NULL",
            ((part, identity) for identity, part in drawn.items()),
        )
        self._refuse(
            "part = 'train' AND identity IN (SELECT identity FROM clip WHERE part = 'test')",
            RowError("its identity is in both splits; kept in test only"),
        )
        for column, cause in (
            ("name", "a clip before it has this name"),
            ("clip_id", "a clip before it is the same"),
        ):
            first = f"SELECT min(number) FROM clip GROUP BY {column}"  # noqa: S608
            self._refuse(f"number NOT IN ({first})", RowError(cause, code="duplicate_name"))

    def _refuse(self, where: str, error: RowError) -> None:
        names = [row[0] for row in self._sql.execute(f"SELECT name FROM clip WHERE {where}")]  # noqa: S608
        self._sql.execute(f"DELETE FROM clip WHERE {where}")  # noqa: S608
        self.add_failures(failure_of(name, STAGE, error) for name in names)

    def sources(self) -> Iterator[tuple[str, str, str, str, int]]:
        """(split, clip id, name, part file, row in it) by split and name."""
        yield from self._sql.execute(
            "SELECT part, clip_id, name, source, row FROM clip ORDER BY part, name"
        )

    def place(self, clip_id: str, shard: str, row: int) -> None:
        """Say where a clip will lie."""
        self._sql.execute(
            "UPDATE clip SET shard = ?, place = ? WHERE clip_id = ?", (shard, row, clip_id)
        )

    def clips(self) -> Iterator[ClipRecord]:
        """The clips in their places, by split and name."""
        query = "SELECT data, part, shard, place FROM clip ORDER BY part, name"
        for data, part, shard, row in self._sql.execute(query):
            values = json.loads(data)
            values |= {"crop_px": tuple(values["crop_px"]), "partition": part}
            yield ClipRecord(**(values | {"shard": shard or "", "row": row or 0}))

    def failures(self) -> Iterator[Failure]:
        """All failures, sorted."""
        query = "SELECT data FROM failure ORDER BY item, stage, code, cause"
        for (data,) in self._sql.execute(query):
            yield Failure(**json.loads(data))

    def num_clips(self) -> int:
        return int(self._sql.execute("SELECT count(*) FROM clip").fetchone()[0])


def _json(record: Any) -> str:  # noqa: ANN401 - any record
    return json.dumps(dataclasses.asdict(record), sort_keys=True)


# --- the run ---------------------------------------------------------------------------------


class _Import:
    """One go at an import."""

    def __init__(
        self, job: ImportJob, inputs: Inputs, folder: Path, report: OnProgress, held: Lease
    ) -> None:
        self._job = job
        self._held = held
        self._inputs = inputs
        self._report = report
        self._out = open_store(job.out)
        self._folder = folder
        self._settings_digest = _settings_digest(job)
        self._work = f"{WORK}/import-{self._settings_digest[:16]}"
        self._mark = {
            "source": open_store(job.source).uri,
            "state": inputs.state,
            "settings_digest": self._settings_digest,
        }

    def run(self) -> DatasetManifest:
        same = self._there()
        if same is not None:
            return same
        book = _Book(self._folder / "import.sqlite")
        try:
            with ray_session():
                self._read(book)
                book.add_failures(self._inputs.failures)
                book.settle(self._job.test_fraction)
                self._check(book)
                manifest = self._publish(book)
        finally:
            book.close()
        write_json(self._out, IMPORT, self._mark)
        for info in list(self._out.list(f"{self._work}/")):
            self._out.delete(info.key)
        return manifest

    def _there(self) -> DatasetManifest | None:
        """The dataset that there is, if it is what this import makes.

        Raises:
            ConfigError: there is one of another origin, which would be lost.
        """
        said = read_json(self._out, IMPORT) if self._out.exists(IMPORT) else None
        if self._out.exists(MANIFEST):
            if said is None or said.get("source") != self._mark["source"]:
                raise ConfigError(
                    f"there is a dataset already that was not imported from {self._job.source}",
                    subject=self._job.out,
                    hint="give another --out",
                )
            if said == self._mark:
                return DatasetManifest(**read_json(self._out, STATS))
        write_json(self._out, IMPORT, self._mark | {"state": ""})
        return None

    def _read(self, book: _Book) -> None:
        """Read the items, as far as an earlier run has not; book what becomes of them."""
        prefix = result_key(self._work, "").removesuffix(".json")
        done = {PurePosixPath(info.key).stem for info in self._out.list(prefix)}
        todo = [item for item in self._inputs.items if item.item_id not in done]
        outcomes = run_items(
            todo,
            ClipImporter,
            (self._job, self._work),
            key=lambda item: item.key,
            stage="import",
            cluster=self._job.cluster,
            on_progress=self._report,
        )
        lost = set()
        for outcome in outcomes:
            self._held.check()
            if outcome.failure is not None:
                book.add_failures([outcome.failure])
                lost.add(outcome.item.item_id)
        ids = (i.item_id for i in self._inputs.items if i.item_id not in lost)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            while some := list(islice(ids, 64 * READ_THREADS)):
                # In the order of the items: of equal names the first one stays.
                for result in pool.map(self._result, some):
                    book.add(result, part_key(self._work, result.item_id))

    def _result(self, item_id: str) -> ImportResult:
        return ImportResult(**json.loads(self._out.get(result_key(self._work, item_id))))

    def _check(self, book: _Book) -> None:
        """End the run where too little is left of what was asked for.

        Raises:
            RunFailed: `no_output`, `too_many_failures`.
        """
        kept = book.num_clips()
        # A row that is none costs its clip nothing but what the row says.
        lost = [f for f in book.failures() if f.code != _PASSED_OVER and f.stage != "metadata"]
        try:
            if not kept:
                why = f"; for one, {lost[0].item}: {lost[0].cause}" if lost else ""
                raise RunFailed(f"not one clip: {len(lost)} items failed{why}", code="no_output")
            check_failures(lost, kept + len(lost), self._job.max_failed_fraction)
        except RunFailed:
            if not self._out.exists(MANIFEST):  # beside a dataset they would say they are its own
                write_table(self._out, FAILURES, book.failures(), Failure)
            raise

    # --- publishing

    def _publish(self, book: _Book) -> DatasetManifest:
        storage = self._job.storage
        changes = self._changes(book)
        old = {clip.shard for clip in self._old(MANIFEST, ClipRecord)}
        if storage.layout == "folders":  # of the same names, whose content may change
            self._out.delete(MANIFEST)
        self._place(book)
        self._held.check()
        manifest, _ = publish(
            self._out,
            Content(
                clips=book.clips,
                failures=book.failures,
                settings_digest=self._settings_digest,
                changes=changes,
                keep_versions=storage.keep_versions,
                folders_before=sorted(key for key in old if not key.endswith(".arrow")),
            ),
        )
        return manifest

    def _place(self, book: _Book) -> None:
        """Put the clips into their shards or folders, as far as they are not there.

        Raises:
            RunFailed: one could not be written.
        """
        storage = self._job.storage
        as_folders = storage.layout == "folders"
        places = list(
            folders_of(book.sources())
            if as_folders
            else shards_of(book.sources(), clips_per_shard=storage.clips_per_shard)
        )
        for place in places:
            for row, clip in enumerate(place.clips):
                book.place(clip.clip_id, place.key, row)
        there = {info.key for split in SPLITS for info in self._out.list(f"{split}/shard-")}
        outcomes = run_items(
            [place for place in places if place.key not in there],
            Placer,
            (self._out.uri, as_folders),
            key=lambda place: place.key,
            stage="shards",
            cluster=self._job.cluster,
            on_progress=self._report,
        )
        for outcome in outcomes:
            if outcome.failure is not None:
                cause = f"{outcome.failure.item}: {outcome.failure.cause}"
                raise RunFailed(cause, code="no_output")

    def _changes(self, book: _Book) -> dict[str, int]:
        """What is new in comparison with the dataset that there is, if any."""
        before = {c.clip_id: c.video_id for c in self._old(MANIFEST, ClipRecord)}
        now = {clip.clip_id: clip.video_id for clip in book.clips()}
        failed_before = {(f.item, f.code) for f in self._old(FAILURES, Failure)}
        failed_now = {(f.item, f.code) for f in book.failures()}
        videos_before, videos_now = set(before.values()), set(now.values())
        return {
            "clips_added": len(now.keys() - before.keys()),
            "clips_removed": len(before.keys() - now.keys()),
            "clips_kept": len(now.keys() & before.keys()),
            "videos_added": len(videos_now - videos_before),
            "videos_removed": len(videos_before - videos_now),
            "failures_new": len(failed_now - failed_before),
            "failures_gone": len(failed_before - failed_now),
            "retried": 0,
            "waiting": 0,
        }

    def _old(self, key: str, record_type: type[R]) -> Iterator[R]:
        """The records of a table of the dataset that there is."""
        return iter_table_if_any(self._out, key, record_type)

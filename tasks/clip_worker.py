"""One raw video to clips, in a worker process.

In: the rows about a video and where it lies. Out: its clips as one part file in the store, and its
result beside it, which a run finds again whoever dies. Nothing of a video goes back to the driver.

Two stages, each with its own resources: `Fetcher` waits for servers, `ClipCutter` decodes, crops
and encodes. (Decoding and encoding are one stage, because frames between them would cross
processes: a 256 px frame takes 0.2 MB, more than all its coded forms.)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Final

from kpmask.config import PreprocessJob
from kpmask.data.shards import ShardWriter
from kpmask.errors import DownloadError, ItemError, RowError, StorageError
from kpmask.media.encode import storage_error
from kpmask.media.probe import probe
from kpmask.preprocess import (
    CutClip,
    CutSettings,
    cut_clips,
    cuts_whole,
    failure_of,
    plan_clips,
    row_name,
)
from kpmask.records import ClipRecord, Failure, SourceRow, as_dict, digest
from tasks.cache import user_cache
from tasks.download import fetch, video_url
from tasks.plan import ROBONET_SUFFIXES
from tasks.scratch import scratch_folder, sweep_scratch
from tasks.storage import ObjectStore, open_store
from tasks.workbook import NO_STATE, VideoItem, state_of

PARTS: Final = "parts"
RESULTS: Final = "results"
_RESULT: Final = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{16}|none)\.(done|retry)\.json")


# --- results ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VideoResult:
    """What became of a video; a row of the dataset's `videos.parquet`.

    `clips` and `failures` are JSON lists of records; where a clip's images are in a part file,
    `shard` and `row` say so. `state` is that of the files that were read.
    """

    item_id: str
    name: str
    key: str
    sha256: str
    state: str
    clips: str
    failures: str
    retryable: bool = False

    def clip_records(self) -> list[ClipRecord]:
        clips: list[dict[str, Any]] = json.loads(self.clips)
        return [ClipRecord(**(clip | {"crop_px": tuple(clip["crop_px"])})) for clip in clips]

    def failure_records(self) -> list[Failure]:
        return [Failure(**failure) for failure in json.loads(self.failures)]

    def placeless(self) -> VideoResult:
        """The result as the dataset keeps it: where images waited is nothing to later runs."""
        clips = [as_dict(replace(clip, shard="", row=0)) for clip in self.clip_records()]
        return replace(self, clips=_json(clips))


def video_result(
    item: VideoItem,
    *,
    clips: Sequence[ClipRecord] = (),
    failures: Sequence[Failure] = (),
    sha256: str = "",
) -> VideoResult:
    """A result from its records."""
    return VideoResult(
        item_id=item.item_id,
        name=item.name,
        key=item.keys[0] if item.keys else "",
        sha256=sha256,
        state=item.state,
        clips=_json([as_dict(clip) for clip in clips]),
        failures=_json([as_dict(failure) for failure in failures]),
        retryable=any(failure.retryable for failure in failures),
    )


def _json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def part_key(work: str, name: str) -> str:
    """Where the images of a video's clips wait to become part of shards."""
    return f"{work}/{PARTS}/{name}.arrow"


def put_result(store: ObjectStore, work: str, result: VideoResult) -> None:
    """Keep a result for this run and the ones after it."""
    key = result_key(work, result.item_id, result.state, retryable=result.retryable)
    store.put(key, encoded_result(result).encode())


def result_key(work: str, item_id: str, state: str, *, retryable: bool) -> str:
    """Where a result is kept. The key says what a listing must tell: of which files it is, and
    whether a retry may help.
    """
    kind = "retry" if retryable else "done"
    return f"{work}/{RESULTS}/{item_id}.{state or 'none'}.{kind}.json"


def listed_results(store: ObjectStore, work: str) -> Iterator[tuple[str, str, bool]]:
    """(item id, state, whether a retry may help) of the results that are kept."""
    for info in store.list(f"{work}/{RESULTS}/"):
        match = _RESULT.fullmatch(PurePosixPath(info.key).name)
        if match:
            yield match[1], NO_STATE if match[2] == "none" else match[2], match[3] == "retry"


def encoded_result(result: VideoResult) -> str:
    """A result as it is kept."""
    return _json(as_dict(result))


def read_result(data: bytes | str) -> VideoResult:
    """A result as it was kept."""
    return VideoResult(**json.loads(data))


def given_up(item: VideoItem, failure: Failure) -> VideoResult:
    """The result of a video whose worker died, took too long or has a bug: a rerun tries again."""
    failures = [replace(failure, item=row_name(row), retryable=True) for row in item.rows]
    return video_result(item, failures=failures)


def _failed(item: VideoItem, stage: str, error: ItemError) -> VideoResult:
    return video_result(item, failures=[failure_of(row_name(r), stage, error) for r in item.rows])


# --- fetching --------------------------------------------------------------------------------


class Fetcher:
    """The worker that downloads a video into the raw store.

    Args:
        job: the settings.
        raw_uri: the store of raw videos.
        work: the prefix, in the dataset's store, of what is unfinished.
    """

    def __init__(self, job: PreprocessJob, raw_uri: str, work: str) -> None:
        self._job = job
        self._raw = open_store(raw_uri)
        self._out = open_store(job.out)
        self._work = work

    def process(self, item: VideoItem) -> VideoItem | Failure:
        """The item with its file; or why it could not be had, which is then kept as its result.

        Raises:
            StorageError: the stores do not answer.
        """
        try:
            return self._fetched(item)
        except ItemError as error:
            stage = "download" if isinstance(error, DownloadError) else "read"
            put_result(self._out, self._work, _failed(item, stage, error))
            return failure_of(item.name, stage, error)

    def _fetched(self, item: VideoItem) -> VideoItem:
        settings = self._job.download
        url = item.url or video_url(item.name, download=settings)
        folder = _download_folder(self._raw)
        path = fetch(item.name, url, download=settings, limits=self._job.limits, folder=folder)
        key = path.name
        self._raw.put_file(key, path, if_absent=True)
        path.unlink(missing_ok=True)
        state = state_of([self._raw.info(key)])
        return replace(item, keys=(key,), state=state, fetched=True)


# --- cutting ---------------------------------------------------------------------------------


class ClipCutter:
    """The worker that cuts a video.

    Args:
        job: the settings.
        raw_uri: the store of raw videos.
        work: the prefix, in the dataset's store, of what is unfinished.
    """

    def __init__(self, job: PreprocessJob, raw_uri: str, work: str) -> None:
        self._job = job
        self._raw = open_store(raw_uri)
        self._out = open_store(job.out)
        self._work = work
        sweep_scratch("cut")

    def process(self, item: VideoItem) -> bool:
        """Cut a video and keep its result; whether all of it could be had.

        Raises:
            StorageError: the stores do not answer.
        """
        with scratch_folder("cut") as folder:
            try:
                result = self._cut(item, folder)
            except ItemError as error:
                result = _failed(item, "read", error)
        put_result(self._out, self._work, result)
        if item.fetched and not self._job.download.keep:
            self._raw.delete(item.keys[0])
        return not json.loads(result.failures)

    def _cut(self, item: VideoItem, folder: Path) -> VideoResult:
        path = self._found(item, folder)
        sha256 = _sha256(path)
        failures: list[Failure] = []
        # With the state of the files in its name: no result finds another one's images there.
        key = part_key(self._work, f"{item.item_id}.{item.state or 'none'}")
        with _Part(folder / "part.arrow", key) as part:
            for rows, video in self._views(item, path, folder, failures):
                try:
                    self._cut_view(rows, video, sha256, folder, part, failures)
                except ItemError as error:
                    failures += [failure_of(row_name(row), "read", error) for row in rows]
        if part.clips:
            self._out.put_file(part.key, part.path)
        return video_result(item, clips=part.clips, failures=failures, sha256=sha256)

    def _views(
        self, item: VideoItem, path: Path, folder: Path, failures: list[Failure]
    ) -> Iterator[tuple[tuple[SourceRow, ...], Path]]:
        """The videos in a file, with what is wanted of each: one, but for a robot's cameras."""
        if path.suffix.lower() not in ROBONET_SUFFIXES:
            yield item.rows, path
            return
        from kpmask.data.robonet import camera_videos  # HDF5's library, for those who need it

        (row,) = item.rows
        for camera in camera_videos(
            path, folder, settings=self._job.robonet, limits=self._job.limits
        ):
            # The item's name is unique; two trajectories in different folders may share theirs,
            # and one out of an object store has the name of a file in the cache.
            if isinstance(camera, Failure):
                failed = item.name + camera.item.removeprefix(path.stem)
                failures.append(replace(camera, item=failed))
                continue
            name = f"{item.name}#{camera.name.rpartition('#')[2]}"
            yield (replace(row, video_id=name),), camera.path

    def _cut_view(
        self,
        rows: tuple[SourceRow, ...],
        path: Path,
        sha256: str,
        folder: Path,
        part: _Part,
        failures: list[Failure],
    ) -> None:
        job = self._job
        facts = probe(path, job.limits)
        plans, refused = plan_clips(
            rows,
            facts,
            sha256,
            path=path,
            clips=job.clips,
            storage=job.storage,
            subject=job.subject,
            limits=job.limits,
        )
        failures += refused
        settings = CutSettings(
            clips=job.clips,
            storage=job.storage,
            limits=job.limits,
            quality=job.quality,
            whole=cuts_whole(rows, job.subject),
        )
        for result in cut_clips(path, plans, facts, settings=settings, folder=folder):
            if isinstance(result, Failure):
                failures.append(result)
                continue
            part.add(result.record(), result.path, result.ends)
            if result.damage is not None:
                failures.append(_loss(result))

    # --- finding the video

    def _found(self, item: VideoItem, folder: Path) -> Path:
        """The video as a local file or folder."""
        if item.is_folder:
            frames = folder / "frames"
            frames.mkdir()
            for key in item.keys:
                (frames / PurePosixPath(key).name).symlink_to(self._local(key))
            return frames
        if item.keys:
            return self._local(item.keys[0])
        raise RowError(
            f"no raw video {item.name!r} in {self._raw.uri}, and downloads are off",
            code="missing_raw",
        )

    def _local(self, key: str) -> Path:
        try:
            return self._raw.local(key)
        except StorageError as error:
            if error.code != "not_found":
                raise
            raise RowError(
                f"{key} was listed in {self._raw.uri} and is gone", code="missing_raw"
            ) from error


class _Part:
    """The part file of a video: opened with its first clip."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self.clips: list[ClipRecord] = []
        self._writer: ShardWriter | None = None
        self._files = ExitStack()

    def __enter__(self) -> _Part:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._errors():
            self._files.__exit__(kind, error, trace)

    def add(self, clip: ClipRecord, images: Path, ends: Sequence[int]) -> None:
        """Take in a clip; the file of its images is removed."""
        with self._errors():
            if self._writer is None:
                self._writer = self._files.enter_context(ShardWriter(self.path))
            row = self._writer.add_file(clip.clip_id, clip.fps, images, ends)
        images.unlink()
        self.clips.append(replace(clip, shard=self.key, row=row))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(error, self.path) from error


def _loss(clip: CutClip) -> Failure:
    """What a clip that was kept lost to damage: reported beside it."""
    assert clip.damage is not None
    kept = f"kept {len(clip.ends)} frames, lost {clip.num_frames_lost}"
    failure = failure_of(clip.plan.name, "cut", clip.damage)
    return replace(failure, cause=f"{failure.cause}; {kept}")


def _sha256(path: Path) -> str:
    """The checksum of a file, or of the names and contents of a folder's files."""
    if path.is_dir():
        parts = [[file.name, _sha256(file)] for file in sorted(path.iterdir())]
        return digest(parts)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_folder(raw: ObjectStore) -> Path:
    """Where downloads into a store are on their way, in this user's cache on this machine."""
    return user_cache().folder.parent / "downloads" / digest(raw.uri)[:16]

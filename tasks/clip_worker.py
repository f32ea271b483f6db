"""One raw video to clips, in a worker process.

In: the rows about a video and where it lies. Out: its clips as small part files in the store, and
their records. Nothing of a video but records goes back to the driver.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from kpmask.config import PreprocessJob
from kpmask.data.shards import ShardWriter
from kpmask.errors import DownloadError, ItemError, RowError, StorageError
from kpmask.media.encode import storage_error
from kpmask.media.probe import probe
from kpmask.preprocess import CutClip, CutSettings, cut_clips, failure_of, plan_clips, row_name
from kpmask.records import ClipRecord, Failure, SourceRow, as_dict, digest
from tasks.cache import user_cache
from tasks.download import fetch, video_url
from tasks.storage import ObjectInfo, ObjectStore, open_store

PARTS: Final = "parts"
_FOLDER: Final = re.compile(r"kpmask-cut-(\d+)-")


@dataclass(frozen=True, slots=True)
class VideoItem:
    """A video to be cut.

    Attributes:
        name: of the raw video, a plain name.
        rows: what is wanted of it.
        keys: its files in the raw store; none where it must be downloaded.
        is_folder: the files are the frames of one clip, and not one video.
        url: where it can be had, where the table says so.
        state: a digest of the files' sizes and versions.
    """

    name: str
    rows: tuple[SourceRow, ...]
    keys: tuple[str, ...]
    is_folder: bool
    url: str | None
    state: str

    @property
    def item_id(self) -> str:
        """A digest of what is wanted of the video."""
        rows = [as_dict(replace(row, line=0)) for row in self.rows]
        return digest([self.name, rows, self.url, self.is_folder])[:32]


@dataclass(frozen=True, slots=True)
class VideoResult:
    """What became of a video; a row of the dataset's `videos.parquet`.

    `clips` and `failures` are JSON lists of records. `state` is that of the files that were read.
    """

    item_id: str
    name: str
    key: str
    sha256: str
    state: str
    clips: str
    failures: str

    def clip_records(self) -> list[ClipRecord]:
        clips: list[dict[str, Any]] = json.loads(self.clips)
        return [ClipRecord(**(clip | {"crop_px": tuple(clip["crop_px"])})) for clip in clips]

    def failure_records(self) -> list[Failure]:
        return [Failure(**failure) for failure in json.loads(self.failures)]


def video_result(
    item: VideoItem,
    *,
    clips: Sequence[ClipRecord] = (),
    failures: Sequence[Failure] = (),
    key: str = "",
    sha256: str = "",
    state: str | None = None,
) -> VideoResult:
    """A result from its records."""
    return VideoResult(
        item_id=item.item_id,
        name=item.name,
        key=key or (item.keys[0] if item.keys else ""),
        sha256=sha256,
        state=item.state if state is None else state,
        clips=_json([as_dict(clip) for clip in clips]),
        failures=_json([as_dict(failure) for failure in failures]),
    )


def _json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def state_of(files: Sequence[ObjectInfo]) -> str:
    """A digest that changes when one of the files does; empty for none."""
    return digest([[f.key, f.size_bytes, f.etag] for f in files])[:16] if files else ""


def part_key(work: str, clip_id: str) -> str:
    """Where a finished clip waits to become part of a shard."""
    return f"{work}/{PARTS}/{clip_id}.arrow"


class ClipCutter:
    """The worker.

    Args:
        job: the settings.
        raw_uri: the store of raw videos, where downloads are put too.
        work: the prefix, in the dataset's store, of what is unfinished.
    """

    def __init__(self, job: PreprocessJob, raw_uri: str, work: str) -> None:
        self._job = job
        self._raw = open_store(raw_uri)
        self._out = open_store(job.out)
        self._work = work
        _sweep_folders()

    def process(self, item: VideoItem) -> VideoResult:
        """Cut a video.

        Raises:
            StorageError: the stores do not answer.
        """
        with _own_folder() as folder:
            try:
                item, path = self._find(item, folder)
                facts = probe(path, self._job.limits)
            except ItemError as error:
                return video_result(item, failures=_for_each_row(item, "read", error))
            sha256 = _sha256(path)
            plans, failures = plan_clips(
                item.rows, facts, sha256, clips=self._job.clips, storage=self._job.storage
            )
            settings = CutSettings(
                clips=self._job.clips,
                storage=self._job.storage,
                limits=self._job.limits,
                whole=item.rows[0].start_frame is None,
            )
            records = []
            for result in cut_clips(path, plans, facts, settings=settings, folder=folder):
                if isinstance(result, Failure):
                    failures.append(result)
                    continue
                records.append(self._stored(result, folder))
                failures += _losses(result)
        return video_result(item, clips=records, failures=failures, sha256=sha256)

    def _stored(self, clip: CutClip, folder: Path) -> ClipRecord:
        """Put a clip's part file into the store and remove its images here."""
        record = clip.record()
        part = folder / "part.arrow"
        try:
            with ShardWriter(part) as shard:
                shard.add_file(record.clip_id, record.fps, clip.path, clip.ends)
        except OSError as error:
            raise storage_error(error, part) from error
        self._out.put_file(part_key(self._work, record.clip_id), part)
        part.unlink()
        clip.path.unlink()
        return record

    # --- finding the video

    def _find(self, item: VideoItem, folder: Path) -> tuple[VideoItem, Path]:
        """The video as a local file or folder; downloaded first if need be."""
        if item.is_folder:
            return item, self._frames_folder(item, folder)
        if item.keys:
            return item, self._local(item.keys[0])
        if not self._job.download.enabled:
            raise RowError(
                f"no raw video {item.name!r} in {self._raw.uri}, and downloads are off",
                code="missing_raw",
            )
        return self._downloaded(item)

    def _local(self, key: str) -> Path:
        try:
            return self._raw.local(key)
        except StorageError as error:
            if error.code != "not_found":
                raise
            raise RowError(
                f"{key} was listed in {self._raw.uri} and is gone", code="missing_raw"
            ) from error

    def _frames_folder(self, item: VideoItem, folder: Path) -> Path:
        frames = folder / "frames"
        frames.mkdir()
        for key in item.keys:
            (frames / PurePosixPath(key).name).symlink_to(self._local(key))
        return frames

    def _downloaded(self, item: VideoItem) -> tuple[VideoItem, Path]:
        """Fetch the video and keep it in the raw store."""
        settings = self._job.download
        url = item.url or video_url(item.name, download=settings)
        folder = _download_folder(self._raw)
        path = fetch(item.name, url, download=settings, limits=self._job.limits, folder=folder)
        key = path.name
        self._raw.put_file(key, path, if_absent=True)
        path.unlink(missing_ok=True)
        state = state_of([self._raw.info(key)])
        return replace(item, keys=(key,), state=state), self._raw.local(key)


def _losses(clip: CutClip) -> list[Failure]:
    """What a clip that was kept lost to damage: reported beside it."""
    if clip.damage is None:
        return []
    kept = f"kept {len(clip.ends)} frames, lost {clip.num_frames_lost}"
    failure = failure_of(clip.plan.name, "cut", clip.damage)
    return [replace(failure, cause=f"{failure.cause}; {kept}")]


def _for_each_row(item: VideoItem, stage: str, error: ItemError) -> list[Failure]:
    stage = "download" if isinstance(error, DownloadError) else stage
    return [failure_of(row_name(row), stage, error) for row in item.rows]


def _sha256(path: Path) -> str:
    """The checksum of a file, or of the names and contents of a folder's files."""
    if path.is_dir():
        parts = [[file.name, _sha256(file)] for file in sorted(path.iterdir())]
        return digest(parts)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- folders of our own ----------------------------------------------------------------------


def _download_folder(raw: ObjectStore) -> Path:
    """Where downloads into a store are on their way, in this user's cache on this machine."""
    return user_cache().folder.parent / "downloads" / digest(raw.uri)[:16]


@contextmanager
def _own_folder() -> Iterator[Path]:
    try:
        folder = tempfile.mkdtemp(prefix=f"kpmask-cut-{os.getpid()}-")
    except OSError as error:
        raise storage_error(error, Path(tempfile.gettempdir())) from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep_folders() -> None:
    """Remove what killed workers of this user and machine left."""
    for folder in Path(tempfile.gettempdir()).glob("kpmask-cut-*"):
        match = _FOLDER.match(folder.name)
        with contextlib.suppress(FileNotFoundError):  # another worker sweeps too
            if match and folder.lstat().st_uid == os.getuid() and not _runs(int(match[1])):
                shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

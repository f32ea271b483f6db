"""A picture of a few clips of a dataset, those that a run added first: what its report shows.

It is made of the strips that lie beside the page, a few kB each; where a clip has none, of its
frames, from few shards, for a shard that lies in S3 is fetched whole.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from kpmask.data.dataset import MANIFEST, Dataset
from kpmask.errors import KpmaskError, StorageError
from kpmask.records import ClipRecord
from kpmask.report.counting import Sample, place
from kpmask.report.previews import PREVIEW_PX, PREVIEWS, contact_sheet, preview_key
from tasks.manifest import iter_table
from tasks.storage import ObjectStore, open_store

log = logging.getLogger(__name__)

NUM_CLIPS: Final = 24
NUM_COLUMNS: Final = 8
MAX_SHARDS: Final = 2  # that are read for clips without a strip
BATCH_ROWS: Final = 50_000


@dataclass(frozen=True, slots=True)
class Sheet:
    """A JPEG of one frame of each of `num_shown` clips; `num_new` clips are the run's own."""

    jpeg: bytes
    num_shown: int
    num_new: int


class KnownClips:
    """Which clips a dataset has before a run; 8 bytes a clip."""

    def __init__(self, clip_ids: Iterable[str] = ()) -> None:
        self._keys = np.unique(np.fromiter(map(place, clip_ids), np.uint64))

    def __contains__(self, clip_id: str) -> bool:
        key = np.uint64(place(clip_id))
        at = int(np.searchsorted(self._keys, key))
        return at < len(self._keys) and bool(self._keys[at] == key)

    def __len__(self) -> int:
        return len(self._keys)


def known_clips(uri: str) -> KnownClips:
    """The clips of the dataset that is at `uri` now; none where there is no readable one.

    Raises:
        StorageError: the store does not answer.
    """
    try:
        path = open_store(uri).local(MANIFEST)
    except StorageError as error:
        if error.code != "not_found":
            raise
        return KnownClips()
    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=BATCH_ROWS, columns=["clip_id"])
            return KnownClips(str(name) for batch in batches for name in batch.column(0))
    except (ValueError, OSError, KeyError) as error:  # preprocess says what is wrong with it
        log.warning("which clips are new cannot be told: %s", error)
        return KnownClips()


def sheet_of(uri: str, *, before: KnownClips) -> Sheet | None:
    """A sheet of the clips that were added since `before`, or where none was, of all clips.

    None where it cannot be drawn: a report goes without.
    """
    try:
        return _sheet(open_store(uri), before)
    except KpmaskError as error:
        log.warning("no contact sheet: %s", error)
        return None


def _sheet(store: ObjectStore, before: KnownClips) -> Sheet | None:
    with_strip = {info.key for info in store.list(f"{PREVIEWS}/")}
    new, old = _Choice(with_strip), _Choice(with_strip)
    for clip in iter_table(store, MANIFEST, ClipRecord):
        (old if clip.clip_id in before else new).offer(clip)
    chosen = new.clips() or old.clips()
    frames = [frame for clip in chosen if (frame := _frame(store, clip, with_strip)) is not None]
    if not frames:
        return None
    columns = min(NUM_COLUMNS, len(frames))
    jpeg = contact_sheet(frames, columns=columns, width_px=columns * PREVIEW_PX)
    return Sheet(jpeg, len(frames), new.num_offered)


class _Choice:
    """A stable sample of clips: those with a strip, else those of the first few shards."""

    def __init__(self, with_strip: set[str]) -> None:
        self._with_strip = with_strip
        self._drawn: Sample[ClipRecord] = Sample(NUM_CLIPS)
        self._others: Sample[ClipRecord] = Sample(NUM_CLIPS)
        self._shards: set[str] = set()
        self.num_offered = 0

    def offer(self, clip: ClipRecord) -> None:
        self.num_offered += 1
        at = place(clip.clip_id)
        if preview_key(clip.clip_id) in self._with_strip:
            self._drawn.offer(at, clip)
        elif clip.shard in self._shards or len(self._shards) < MAX_SHARDS:
            self._shards.add(clip.shard)
            self._others.offer(at, clip)

    def clips(self) -> list[ClipRecord]:
        """At most NUM_CLIPS, by name."""
        found = [*self._drawn, *self._others][:NUM_CLIPS]
        return sorted(found, key=lambda clip: (clip.partition, clip.name))


def _frame(store: ObjectStore, clip: ClipRecord, with_strip: set[str]) -> np.ndarray | None:
    """The frame in the middle, uint8 HWC RGB, from the strip if there is one."""
    key = preview_key(clip.clip_id)
    try:
        if key in with_strip:
            return _middle_of_strip(store.get(key))
        middle = clip.num_frames // 2
        (frame_HWC,) = Dataset([clip], fetch=store.local).read(clip, [middle])
        return np.asarray(frame_HWC)
    except (KpmaskError, OSError, ValueError) as error:
        log.warning("%s is not on the contact sheet: %s", clip.name, error)
        return None


def _middle_of_strip(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as strip:
        left = strip.width // PREVIEW_PX // 2 * PREVIEW_PX
        return np.asarray(strip.convert("RGB").crop((left, 0, left + PREVIEW_PX, strip.height)))

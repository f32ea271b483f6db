"""Putting finished clips into their places, and pictures of some beside, in worker processes.

- A shard's name digests the clips in it, and where one shard ends and the next begins follows from
  the ids of the clips alone. So a new dataset in the place of an old one leaves the old one
  readable until its manifest is replaced, a new clip makes one new shard and not all those after
  it, and what is there already is not written again.
- With layout "folders" names are the original code's, so they cannot do that: an old manifest is
  removed first where a clip of its would change.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kpmask.data.layouts import frame_key
from kpmask.data.shards import Shard, ShardWriter, decode_frame
from kpmask.records import digest
from kpmask.report.previews import preview_frame_numbers, preview_key, preview_strip
from tasks.storage import open_store, os_errors


@dataclass(frozen=True, slots=True)
class PlacedClip:
    """A clip's images: row `row` of the part or older shard `source`."""

    clip_id: str
    source: str
    row: int


@dataclass(frozen=True, slots=True)
class Place:
    """A shard, or the folder of one clip, and what belongs into it; `split` is which split's."""

    key: str
    split: str
    clips: tuple[PlacedClip, ...]


def shards_of(
    found: Iterable[tuple[str, str, str, str, int]], *, clips_per_shard: int
) -> Iterator[Place]:
    """The shards of clips given as (split, clip id, name, source, row), by split and name.

    A shard has at most `clips_per_shard` clips, and ends with each clip whose id says so, which one
    in so many does: what a new clip changes ends with the next of those, whatever is before and
    behind them. (If such clips ended a shard only once it is half full, shards would be fuller by a
    tenth, and a change would go on for as long as they miss each other.)
    """
    group: list[PlacedClip] = []
    split_of_group = ""
    for split, clip_id, _, source, row in found:
        if group and (split != split_of_group or len(group) >= clips_per_shard):
            yield _shard(split_of_group, group)
            group = []
        split_of_group = split
        group.append(PlacedClip(clip_id, source, row))
        if int(clip_id[:8], 16) % clips_per_shard == 0:
            yield _shard(split, group)
            group = []
    if group:
        yield _shard(split_of_group, group)


def _shard(split: str, group: Sequence[PlacedClip]) -> Place:
    name = digest([clip.clip_id for clip in group])[:16]
    return Place(f"{split}/shard-{name}.arrow", split, tuple(group))


def folders_of(found: Iterable[tuple[str, str, str, str, int]]) -> Iterator[Place]:
    """The folders of clips given as for `shards_of`, one each."""
    for split, clip_id, name, source, row in found:
        yield Place(f"{split}/{name}", split, (PlacedClip(clip_id, source, row),))


class Placer:
    """The worker: writes one shard, or one folder."""

    def __init__(self, uri: str, as_folders: bool) -> None:
        self._store = open_store(uri)
        self._folders = as_folders

    def process(self, place: Place) -> None:
        """Write it.

        Raises:
            StorageError: code `not_found` where what it is made from is gone.
        """
        if self._folders:
            self._put_folder(place)
        else:
            self._put_shard(place)

    def _put_shard(self, place: Place) -> None:
        with tempfile.TemporaryDirectory(prefix="kpmask-") as folder, os_errors(place.key):
            path = Path(folder) / "shard.arrow"
            with ShardWriter(path) as shard:
                for clip in place.clips:
                    shard.copy(self._store.local(clip.source), clip.row)
            self._store.put_file(place.key, path)

    def _put_folder(self, place: Place) -> None:
        (clip,) = place.clips
        keys = set()
        for number, image in enumerate(Shard(self._store.local(clip.source)).encoded(clip.row)):
            key = frame_key(place.key, number)
            keys.add(key)
            self._store.put(key, image)
        for info in list(self._store.list(f"{place.key}/")):
            if info.key not in keys:  # of an older, longer clip
                self._store.delete(info.key)


@dataclass(frozen=True, slots=True)
class PreviewedClip:
    """A clip of a finished dataset of which a strip of pictures is wanted."""

    clip_id: str
    shard: str
    row: int
    num_frames: int


@dataclass(frozen=True, slots=True)
class PreviewBatch:
    """Some of those clips: one takes a few milliseconds."""

    clips: tuple[PreviewedClip, ...]


class Previewer:
    """The worker that draws strips of a few frames of a clip."""

    def __init__(self, uri: str, as_folders: bool) -> None:
        self._store = open_store(uri)
        del as_folders  # a clip says itself where it lies

    def process(self, batch: PreviewBatch) -> None:
        """Draw the strips.

        Raises:
            StorageError: the store does not answer.
        """
        for clip in batch.clips:
            numbers = preview_frame_numbers(clip.num_frames)
            frames_THWC = self._frames(clip, numbers)
            self._store.put(preview_key(clip.clip_id), preview_strip(frames_THWC))

    def _frames(self, clip: PreviewedClip, numbers: Sequence[int]) -> np.ndarray:
        if clip.shard.endswith(".arrow"):
            return Shard(self._store.local(clip.shard)).read(clip.row, numbers)
        images = [self._store.get(frame_key(clip.shard, number)) for number in numbers]
        return np.stack([decode_frame(image) for image in images])

"""Where clips lie: what one more video changes of the shards, and what it leaves alone."""

from __future__ import annotations

import hashlib
import random
import statistics
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from kpmask.data.shards import Shard, ShardWriter
from kpmask.errors import StorageError
from kpmask.media.images import encode_png
from tasks.shard_worker import (
    Place,
    PlacedClip,
    Placer,
    PreviewBatch,
    PreviewedClip,
    Previewer,
    folders_of,
    shards_of,
)
from tasks.storage import open_store

Row = tuple[str, str, str, str, int]  # split, clip id, name, source, row


def clip_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def videos(count: int, seed: int, *, most: int = 13) -> dict[str, list[Row]]:
    """Videos of 1 to `most` clips each, in either split, by name."""
    rng = random.Random(seed)
    found = {}
    for _ in range(count):
        name = f"{rng.getrandbits(40):010x}"
        split = "test" if rng.random() < 0.1 else "train"
        clips = [f"{name}#{i:06d}" for i in range(rng.randint(1, most))]
        found[name] = [(split, clip_id(f"{seed}{clip}"), clip, "part", 0) for clip in clips]
    return found


def placed(found: Iterable[Sequence[Row]], clips_per_shard: int) -> list[Place]:
    rows = sorted((row for rows in found for row in rows), key=lambda row: (row[0], row[2]))
    return list(shards_of(rows, clips_per_shard=clips_per_shard))


@pytest.mark.parametrize("clips_per_shard", [1, 2, 3, 7, 64])
def test_every_clip_is_in_one_shard_in_order(clips_per_shard: int) -> None:
    found = videos(80, seed=clips_per_shard)
    places = placed(found.values(), clips_per_shard)
    rows = sorted((row for rows in found.values() for row in rows), key=lambda r: (r[0], r[2]))
    assert [c.clip_id for p in places for c in p.clips] == [row[1] for row in rows]
    assert max(len(p.clips) for p in places) <= clips_per_shard
    assert len({p.key for p in places}) == len(places)
    split = {row[1]: row[0] for row in rows}
    for place in places:
        assert {split[clip.clip_id] for clip in place.clips} == {place.split}
        assert place.key.startswith(f"{place.split}/shard-") and place.key.endswith(".arrow")


def reach(ids: Sequence[str], new: set[str], clips_per_shard: int) -> set[str]:
    """The clips of a split from the last end of a shard before the new ones to the first behind."""
    ends = [int(name[:8], 16) % clips_per_shard == 0 for name in ids]
    places = [i for i, name in enumerate(ids) if name in new]
    if not places:
        return set()
    first, last = places[0], places[-1] + 1
    while first > 0 and not ends[first - 1]:
        first -= 1
    while last < len(ids) and not ends[last]:
        last += 1
    return set(ids[first : last + 1])


@pytest.mark.parametrize("clips_per_shard", [2, 4, 8, 64])
def test_a_video_changes_the_shards_about_it_only(clips_per_shard: int) -> None:
    for seed in range(25):
        found = videos(200, seed, most=7)
        name = random.Random(seed).choice(sorted(found))
        new = {row[1] for row in found[name]}
        old = [rows for other, rows in found.items() if other != name]
        few = {place.key: place for place in placed(old, clips_per_shard)}
        more = {place.key: place for place in placed(found.values(), clips_per_shard)}
        allowed: set[str] = set()
        for split in ("train", "test"):
            places = [place for place in more.values() if place.split == split]
            ids = [clip.clip_id for place in places for clip in place.clips]
            allowed |= reach(ids, new, clips_per_shard)
        for key in few.keys() ^ more.keys():
            assert {clip.clip_id for clip in (few | more)[key].clips} <= allowed


def test_a_video_rewrites_two_files_on_average() -> None:
    changed = []
    for seed in range(40):
        found = videos(400, seed)
        name = random.Random(seed).choice(sorted(found))
        more = {p.key for p in placed(found.values(), 64)}
        few = {p.key for p in placed((v for n, v in found.items() if n != name), 64)}
        changed.append(max(len(more - few), len(few - more)))
    assert statistics.mean(changed) < 2.5
    assert max(changed) <= 7


def test_shards_are_two_thirds_full() -> None:
    places = placed(videos(3000, seed=1).values(), 64)
    assert 0.58 < statistics.mean(len(p.clips) for p in places) / 64 < 0.72


def test_the_key_is_of_the_clips_alone() -> None:
    """Not of where their images are now: a rerun from shards has the names of one from parts."""
    rows = videos(30, seed=3).values()
    moved = [[(s, i, n, "train/shard-0.arrow", 9) for s, i, n, _, _ in row] for row in rows]
    assert [p.key for p in placed(rows, 8)] == [p.key for p in placed(moved, 8)]


def test_no_clips_no_shards() -> None:
    assert placed([], 4) == []


def test_folders_hold_a_clip_each() -> None:
    rows: list[Row] = [("train", "1", "a#b", "part", 3), ("test", "2", "c", "part", 0)]
    assert [(p.key, p.split, p.clips) for p in folders_of(rows)] == [
        ("train/a#b", "train", (PlacedClip("1", "part", 3),)),
        ("test/c", "test", (PlacedClip("2", "part", 0),)),
    ]


# --- the workers -----------------------------------------------------------------------------


def images(count: int, seed: int) -> list[bytes]:
    frames_THWC = np.random.default_rng(seed).integers(0, 255, (count, 32, 32, 3), np.uint8)
    return [encode_png(frame) for frame in frames_THWC]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A store with two part files of two clips each, of 3, 4, 5 and 6 frames."""
    root = tmp_path / "out"
    (root / ".work").mkdir(parents=True)
    for part in range(2):
        with ShardWriter(root / f".work/{part}.arrow") as shard:
            for row in range(2):
                number = 2 * part + row
                shard.add(f"c{number}", float(Fraction(24)), images(3 + number, number))
    return root


def test_a_shard_takes_its_clips_from_everywhere(parts: Path) -> None:
    clips = (PlacedClip("c3", ".work/1.arrow", 1), PlacedClip("c0", ".work/0.arrow", 0))
    place = Place("train/shard-00.arrow", "train", clips)
    Placer(str(parts), False).process(place)
    shard = Shard(parts / place.key)
    assert [list(shard.encoded(row)) for row in (0, 1)] == [images(6, 3), images(3, 0)]
    once = (parts / place.key).read_bytes()
    Placer(str(parts), False).process(place)
    assert (parts / place.key).read_bytes() == once


def test_a_folder_is_overwritten_whole(parts: Path) -> None:
    """A shorter clip of the same name leaves no frame of the longer one."""
    for number, part, row in ((3, 1, 1), (0, 0, 0)):
        place = Place("test/x", "test", (PlacedClip(f"c{number}", f".work/{part}.arrow", row),))
        Placer(str(parts), True).process(place)
        found = [path.read_bytes() for path in sorted((parts / "test/x").iterdir())]
        assert found == images(3 + number, number)


def test_what_is_gone_is_the_stores_error(parts: Path) -> None:
    place = Place("train/shard-1.arrow", "train", (PlacedClip("x", ".work/9.arrow", 0),))
    with pytest.raises(StorageError) as gone:
        Placer(str(parts), False).process(place)
    assert gone.value.code == "not_found"
    assert not (parts / place.key).exists()


def test_previews_of_shards_and_folders_are_the_same(parts: Path) -> None:
    store = open_store(str(parts))
    strips = []
    for as_folders in (False, True):
        key = "train/folder" if as_folders else "train/shard-2.arrow"
        clips = (PlacedClip("c2", ".work/1.arrow", 0),)
        Placer(str(parts), as_folders).process(Place(key, "train", clips))
        preview = PreviewedClip("c2", key, 0, num_frames=5)
        Previewer(str(parts), as_folders).process(PreviewBatch((preview,)))
        strips.append(store.get("previews/c2.jpg"))
        store.delete("previews/c2.jpg")
    assert strips[0] == strips[1] and strips[0].startswith(b"\xff\xd8")

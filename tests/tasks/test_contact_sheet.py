"""The picture of a run's new clips: which are shown, from what, and that it never ends a run."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kpmask.data.dataset import MANIFEST
from kpmask.data.shards import ShardWriter
from kpmask.media.images import encode_png
from kpmask.records import ClipRecord
from kpmask.report.previews import preview_key, preview_strip
from tasks.contact_sheet import MAX_SHARDS, NUM_CLIPS, KnownClips, known_clips, sheet_of
from tasks.manifest import write_table
from tasks.storage import open_store

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def clip(number: int, shard: str = "train/shard-0.arrow", row: int = 0) -> ClipRecord:
    return ClipRecord(
        clip_id=f"{number:032x}",
        name=f"clip {number:03d}",
        partition="train",
        identity="p",
        video_id="v",
        shard=shard,
        row=row,
        num_frames=3,
        fps=25.0,
        width_px=32,
        height_px=32,
        start_s=0.0,
        end_s=0.12,
        crop_px=(0, 0, 32, 32),
        clamped=False,
        num_frames_lost=0,
        sha256="",
    )


def put_strip(root: Path, record: ClipRecord, colours: list[tuple[int, int, int]]) -> None:
    frames_THWC = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in colours])
    open_store(str(root)).put(preview_key(record.clip_id), preview_strip(frames_THWC))


def put_shard(root: Path, key: str, colours: list[tuple[int, int, int]]) -> None:
    """A clip a row, whose middle frame alone has the colour."""
    (root / key).parent.mkdir(exist_ok=True)
    with ShardWriter(root / key) as shard:
        for colour in colours:
            frames = [np.full((32, 32, 3), c, np.uint8) for c in ((0, 0, 0), colour, (0, 0, 0))]
            shard.add("clip", 25.0, [encode_png(frame) for frame in frames])


def put_manifest(root: Path, records: list[ClipRecord]) -> None:
    write_table(open_store(str(root)), MANIFEST, records, ClipRecord)


def cells(jpeg: bytes) -> list[tuple[int, ...]]:
    """The colours in the middles of the sheet's cells, to the nearest 100, black ones left out."""
    with Image.open(io.BytesIO(jpeg)) as image:
        pixels_HWC = np.asarray(image)[48::96, 48::96]
    colours = [tuple(int(v) for v in np.round(p / 100) * 100) for p in pixels_HWC.reshape(-1, 3)]
    return [colour for colour in colours if any(colour)]


def test_new_clips_come_alone_from_their_strips(tmp_path: Path) -> None:
    old, new, newer = clip(1), clip(2), clip(3)
    put_manifest(tmp_path, [old])
    before = known_clips(str(tmp_path))
    assert len(before) == 1
    put_manifest(tmp_path, [old, new, newer])
    for record, colour in ((old, RED), (new, GREEN), (newer, BLUE)):
        put_strip(tmp_path, record, [(0, 0, 0), colour, (0, 0, 0)])
    sheet = sheet_of(str(tmp_path), before=before)
    assert sheet is not None
    assert (sheet.num_shown, sheet.num_new) == (2, 2)
    assert cells(sheet.jpeg) == [GREEN, BLUE]


def test_where_nothing_is_new_all_clips_are_shown(tmp_path: Path) -> None:
    records = [clip(number) for number in range(100)]
    put_manifest(tmp_path, records)
    for record in records:
        put_strip(tmp_path, record, [RED])
    sheet = sheet_of(str(tmp_path), before=known_clips(str(tmp_path)))
    assert sheet is not None
    assert (sheet.num_shown, sheet.num_new) == (NUM_CLIPS, 0)
    assert cells(sheet.jpeg) == [RED] * NUM_CLIPS


def test_clips_without_a_strip_come_from_few_shards(tmp_path: Path) -> None:
    records = []
    for shard in range(2 * MAX_SHARDS):
        key = f"train/shard-{shard}.arrow"
        put_shard(tmp_path, key, [RED, GREEN])
        records += [clip(2 * shard + row, key, row) for row in range(2)]
    put_manifest(tmp_path, records)
    sheet = sheet_of(str(tmp_path), before=KnownClips())
    assert sheet is not None
    assert cells(sheet.jpeg) == [RED, GREEN] * MAX_SHARDS
    assert sheet.num_new == len(records)


def test_what_is_broken_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, broken, gone = clip(1), clip(2), clip(3, "train/shard-gone.arrow")
    put_manifest(tmp_path, [good, broken, gone])
    put_strip(tmp_path, good, [GREEN])
    open_store(str(tmp_path)).put(preview_key(broken.clip_id), b"no picture")
    with caplog.at_level(logging.WARNING):
        sheet = sheet_of(str(tmp_path), before=KnownClips())
    assert sheet is not None
    assert cells(sheet.jpeg) == [GREEN]
    assert "clip 002 is not on the contact sheet" in caplog.text
    assert "clip 003 is not on the contact sheet" in caplog.text


def test_no_dataset_has_no_sheet_and_no_clips(tmp_path: Path) -> None:
    assert sheet_of(str(tmp_path / "none"), before=KnownClips()) is None
    assert len(known_clips(str(tmp_path / "none"))) == 0
    open_store(str(tmp_path)).put(MANIFEST, b"no table")
    assert sheet_of(str(tmp_path), before=KnownClips()) is None
    assert len(known_clips(str(tmp_path))) == 0
    put_manifest(tmp_path, [])
    assert sheet_of(str(tmp_path), before=KnownClips()) is None


def test_known_clips_are_those_and_no_others() -> None:
    ids = [clip(number).clip_id for number in range(0, 2000, 2)]
    known = KnownClips([*ids, *ids])
    assert len(known) == 1000
    assert all(clip_id in known for clip_id in ids)
    assert not any(clip(number).clip_id in known for number in range(1, 2000, 2))
    assert "" not in KnownClips()


def test_the_sheet_fits_into_a_report(tmp_path: Path) -> None:
    """Noise is what a JPEG has most bytes of."""
    rng = np.random.default_rng(0)
    records = [replace(clip(number), num_frames=8) for number in range(NUM_CLIPS)]
    put_manifest(tmp_path, records)
    for record in records:
        strip = preview_strip(rng.integers(0, 255, (8, 96, 96, 3), np.uint8))
        open_store(str(tmp_path)).put(preview_key(record.clip_id), strip)
    sheet = sheet_of(str(tmp_path), before=KnownClips())
    assert sheet is not None
    assert len(sheet.jpeg) * 4 / 3 < 200_000

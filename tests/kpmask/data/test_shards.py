"""Shards and the dataset reader: what is written is what is read, in both layouts."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from kpmask.data import shards
from kpmask.data.dataset import MANIFEST, Dataset
from kpmask.data.layouts import frame_key
from kpmask.errors import DatasetError
from kpmask.media.images import encode_png
from kpmask.records import ClipRecord, to_table


def png(frame_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, format="PNG")
    return buffer.getvalue()


def clip(seed: int, num_frames: int) -> np.ndarray:
    shape = (num_frames, 8, 8, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


CLIPS = [clip(0, 5), clip(1, 1), clip(2, 3)]


def write(path: Path) -> Path:
    with shards.ShardWriter(path) as shard:
        for i, frames in enumerate(CLIPS):
            assert shard.add(f"clip{i}", 25.0 + i, [png(frame) for frame in frames]) == i
    return path


def record(i: int, shard: str, row: int) -> ClipRecord:
    return ClipRecord(
        clip_id=f"clip{i}",
        name=f"name{i}",
        partition="train" if i else "test",
        identity="id",
        video_id="v",
        shard=shard,
        row=row,
        num_frames=len(CLIPS[i]),
        fps=25.0,
        width_px=8,
        height_px=8,
        start_s=0.0,
        end_s=1.0,
        crop_px=(0, 0, 8, 8),
        clamped=False,
        num_frames_lost=0,
        sha256="",
    )


def test_frames_come_back(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "shard.arrow")
    assert shards.num_clips(path) == 3
    for row, frames in enumerate(CLIPS):
        assert shards.num_frames(path, row) == len(frames)
        assert shards.clip_info(path, row) == (f"clip{row}", 25.0 + row)
        np.testing.assert_array_equal(shards.read_clip(path, row), frames)
    np.testing.assert_array_equal(shards.read_clip(path, 0, [3, 0, -1]), CLIPS[0][[3, 0, -1]])
    np.testing.assert_array_equal(shards.read_clip(path, 0, slice(1, None, 2)), CLIPS[0][1::2])
    assert [p.name for p in path.parent.iterdir()] == ["shard.arrow"]


def test_equal_clips_make_equal_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1.arrow"), write(tmp_path / "2.arrow")
    assert first.read_bytes() == second.read_bytes()


def test_spooled_and_copied_clips_equal_added_ones(tmp_path: Path) -> None:
    images = [[png(frame) for frame in frames] for frames in CLIPS]
    with shards.ShardWriter(tmp_path / "spooled.arrow") as shard:
        for i, encoded in enumerate(images):
            spool = tmp_path / f"{i}.spool"
            spool.write_bytes(b"".join(encoded))
            shard.add_file(f"clip{i}", 25.0 + i, spool, np.cumsum([len(e) for e in encoded]))
    with shards.ShardWriter(tmp_path / "copied.arrow") as shard:
        for i in range(3):
            shard.copy(tmp_path / "spooled.arrow", i)
    expected = write(tmp_path / "added.arrow").read_bytes()
    assert (tmp_path / "spooled.arrow").read_bytes() == expected
    assert (tmp_path / "copied.arrow").read_bytes() == expected


def test_another_arrow_reader_reads_them(tmp_path: Path) -> None:
    table = pyarrow.ipc.open_file(write(tmp_path / "s.arrow")).read_all()
    assert table.column_names == ["clip_id", "fps", "frames"]
    assert [len(frames) for frames in table["frames"].to_pylist()] == [5, 1, 3]


def test_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), shards.ShardWriter(tmp_path / "s.arrow") as shard:
        shard.add("clip", 25.0, [b"x"])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no frames"), shards.ShardWriter(tmp_path / "s") as shard:
        shard.add("clip", 25.0, [])


def test_what_is_not_there_is_a_dataset_error(tmp_path: Path) -> None:
    path = write(tmp_path / "s.arrow")
    with pytest.raises(DatasetError, match="no row 3"):
        shards.read_clip(path, 3)
    with pytest.raises(DatasetError, match="in a clip of 5"):
        shards.read_clip(path, 0, [5])
    with pytest.raises(DatasetError, match="in a clip of 5"):
        shards.read_clip(path, 0, slice(5, None))
    with pytest.raises(DatasetError, match="No such file"):
        shards.read_clip(tmp_path / "none.arrow", 0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match="not a readable shard"):
        shards.read_clip(path, 0)
    with shards.ShardWriter(tmp_path / "bad.arrow") as shard:
        shard.add("clip", 25.0, [b"not an image"])
    with pytest.raises(DatasetError, match="cannot be read"):
        shards.read_clip(tmp_path / "bad.arrow", 0)


def test_replaced_shard_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "s.arrow")
    assert shards.num_clips(path) == 3
    with shards.ShardWriter(path) as shard:
        shard.add("other", 1.0, [png(CLIPS[0][0])])
    assert shards.num_clips(path) == 1


def test_dataset_reads_shards_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "train" / "shard.arrow")
    for number, frame in enumerate(CLIPS[2]):
        path = tmp_path / frame_key("train/name2", number)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(frame))
    records = [
        record(0, "train/shard.arrow", 0),
        record(1, "train/shard.arrow", 1),
        record(2, "train/name2", 0),
    ]
    pyarrow.parquet.write_table(to_table(records, ClipRecord), tmp_path / MANIFEST)
    dataset = pickle.loads(pickle.dumps(Dataset.from_folder(tmp_path)))
    assert dataset.records == tuple(records)
    assert [r.name for r in dataset.partition("train")] == ["name1", "name2"]
    for i, clip_record in enumerate(dataset.records):
        np.testing.assert_array_equal(dataset.read(clip_record), CLIPS[i])
        np.testing.assert_array_equal(dataset.read(clip_record, [-1]), CLIPS[i][-1:])
        assert dataset.read_encoded(clip_record) == [png(frame) for frame in CLIPS[i]]


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no dataset here"):
        Dataset.from_folder(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="not a manifest"):
        Dataset.from_folder(tmp_path)
    write(tmp_path / "s.arrow")
    broken = Dataset([record(2, "train/name2", 0)], fetch=tmp_path.joinpath)
    with pytest.raises(DatasetError, match="No such file"):
        broken.read(broken.records[0])


def test_no_file_stays_open(tmp_path: Path) -> None:
    """A worker writes shards by the ten thousand."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(20):
        with shards.ShardWriter(tmp_path / f"{number}.arrow") as shard:
            shard.add("clip", 25.0, [encode_png(np.zeros((8, 8, 3), np.uint8))])
    assert len(list(Path("/proc/self/fd").iterdir())) <= before

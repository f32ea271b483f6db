"""Rows of exported clips, videos without loss, and clips held against their records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import av
import numpy as np
import pytest

from kpmask.config import MediaLimits, Storage
from kpmask.data.exchange import (
    ClipSource,
    ExportedClip,
    ImportSettings,
    clip_key,
    import_clip,
    parse_note,
    psnr,
    read_exported,
    read_rows,
    write_rows,
    write_video,
)
from kpmask.data.shards import ShardWriter
from kpmask.data.stored import by_shard, check_clip, stored_images
from kpmask.errors import ConfigError, IntegrityError, MediaError, RowError
from kpmask.media.images import decode_image, encode_jpeg, encode_png
from kpmask.media.lossless import encode_lossless
from kpmask.records import ClipRecord, Failure


def noise(count: int = 5, height: int = 34, width: int = 33) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, height, width, 3), np.uint8)


def record(frames_THWC: np.ndarray, **values: object) -> ClipRecord:
    made = ClipRecord(
        clip_id="0123456789abcdef" * 2,
        name='ann#a "b", c.d#000000#000005',
        partition="test",
        identity="ann",
        video_id="c.d",
        shard="test/shard-1.arrow",
        row=0,
        num_frames=len(frames_THWC),
        fps=30000 / 1001,
        width_px=frames_THWC.shape[2],
        height_px=frames_THWC.shape[1],
        start_s=1 / 3,
        end_s=0.5,
        crop_px=(1, 2, 34, 36),
        clamped=True,
        num_frames_lost=2,
        sha256=hashlib.sha256(frames_THWC.tobytes()).hexdigest(),
        motion=0.125,
        look="00ff",
    )
    return replace(made, **values)


@pytest.fixture
def clip(tmp_path: Path) -> ClipRecord:
    frames_THWC = noise()
    made = record(frames_THWC)
    put(tmp_path, made, [encode_png(frame) for frame in frames_THWC])
    return made


def put(root: Path, clip: ClipRecord, images: list[bytes]) -> None:
    with ShardWriter(root / clip.shard) as shard:
        shard.add(clip.clip_id, clip.fps, images)


# --- rows ------------------------------------------------------------------------------------


def test_rows_come_back_to_the_last_bit(clip: ClipRecord, tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    exported = ExportedClip(clip_key(clip), f"test/{clip.name}.mp4", 1, 99, 41.25)
    write_rows(path, [(clip, exported)])
    assert list(read_rows(path)) == [(exported.file, replace(clip, shard="", row=0))]
    assert list(read_exported(path)) == [exported]


def test_clips_of_other_names_have_other_keys(clip: ClipRecord) -> None:
    for name in ("name", "partition", "identity", "sha256", "clip_id"):
        assert clip_key(replace(clip, **{name: "x"})) != clip_key(clip)
    assert clip_key(replace(clip, shard="elsewhere", row=3)) == clip_key(clip)


BAD_VALUES = [
    ("name", "a/b", "path_escape"),
    ("name", ".hidden", "path_escape"),
    ("identity", "a\nb", "path_escape"),
    ("video_id", "", "bad_row"),
    ("partition", "val", "bad_row"),
    ("fps", "inf", "bad_row"),
    ("fps", "0", "bad_row"),
    ("num_frames", "1e3", "bad_row"),
    ("num_frames", "-1", "bad_row"),
    ("width_px", str(10**30), "bad_row"),
    ("crop_px", "1-2-3", "bad_row"),
    ("crop_px", [1, 2, 3, "x"], "bad_row"),
    ("clamped", "perhaps", "bad_row"),
    ("clip_id", "../../x", "bad_row"),
    ("sha256", "A" * 64, "bad_row"),
    ("end_s", "0", "bad_row"),
    ("num_frames_lost", "-1", "bad_row"),
    ("look", "x" * 5000, "bad_row"),
    ("start_s", {"a": 1}, "bad_row"),
]


@pytest.mark.parametrize(("name", "value", "code"), BAD_VALUES, ids=lambda v: str(v)[:12])
def test_a_row_that_is_no_clip(clip: ClipRecord, name: str, value: object, code: str) -> None:
    good = asdict(clip)
    assert parse_note(good) == replace(clip, shard="", row=0)
    with pytest.raises(RowError) as caught:
        parse_note(good | {name: value})
    assert caught.value.code == code
    assert name in caught.value.cause or code == "bad_row"


def test_a_table_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    for text in ("", "file,name\n", "\0\0", "file\n" + '"' * 5):
        path.write_text(text)
        with pytest.raises(ConfigError):
            list(read_rows(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        list(read_rows(path))


# --- media -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47)])
def test_lossless_videos_give_every_bit_back(tmp_path: Path, height: int, width: int) -> None:
    frames_THWC = noise(6, height, width)
    path = tmp_path / "a.mp4"
    assert encode_lossless(path, frames_THWC, fps=30000 / 1001).num_frames == 6
    again = tmp_path / "b.mp4"
    encode_lossless(again, frames_THWC, fps=30000 / 1001)
    assert path.read_bytes() == again.read_bytes()
    with av.open(str(path)) as file:
        assert file.streams.video[0].average_rate == pytest.approx(30000 / 1001)
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert np.array_equal(found, frames_THWC)


def test_nothing_to_encode(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no frame"):
        encode_lossless(tmp_path / "a.mp4", [], fps=25.0)
    assert list(tmp_path.iterdir()) == []


def test_psnr_is_the_textbooks() -> None:
    a, b = noise(), noise()[::-1]
    wanted = 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))
    assert psnr(a, b) == pytest.approx(wanted)
    assert psnr(a, a) is None
    with pytest.raises(MediaError):
        psnr(a, a[:-1])


def test_a_clip_with_other_frames_is_not_exported(clip: ClipRecord, tmp_path: Path) -> None:
    fetch = tmp_path.joinpath
    assert write_video(tmp_path / "a.mp4", clip, fetch, crf=None) is None
    other = replace(clip, sha256="0" * 64)
    for crf in (None, 20):
        with pytest.raises(IntegrityError) as caught:
            write_video(tmp_path / "b.mp4", other, fetch, crf=crf)
        assert caught.value.code == "wrong_frames"
    assert not (tmp_path / "b.mp4").exists()


def test_a_clip_comes_in_as_it_went_out(clip: ClipRecord, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", clip, tmp_path.joinpath, crf=None)
    settings = ImportSettings(None, 25.0, Storage(), MediaLimits())
    source = ClipSource(tmp_path / "a.mp4", "a", "a", "train", clip)
    made = import_clip(source, settings=settings, images=tmp_path / "images")
    assert replace(made.record, shard=clip.shard) == clip
    data = (tmp_path / "images").read_bytes()
    pieces = np.split(np.frombuffer(data, np.uint8), made.ends[:-1])
    found = np.stack([decode_image(piece.tobytes()) for piece in pieces])
    assert np.array_equal(found, noise())
    # Alone, it is a clip by its name, with values of its own.
    alone = import_clip(replace(source, note=None), settings=settings, images=tmp_path / "images")
    assert (alone.record.name, alone.record.sha256) == ("a", clip.sha256)
    assert alone.record.clip_id != clip.clip_id and alone.record.motion != clip.motion
    assert alone.record.end_s == pytest.approx(5 * 1001 / 30000)
    # As JPEG, or scaled, it is another clip of the same name.
    for other in (
        replace(settings, storage=Storage(image_format="jpeg")),
        replace(settings, size_px=32),
    ):
        changed = import_clip(source, settings=other, images=tmp_path / "images").record
        assert (changed.name, changed.crop_px) == (clip.name, clip.crop_px)
        assert changed.clip_id not in {clip.clip_id, alone.record.clip_id}


# --- stored ----------------------------------------------------------------------------------


def test_a_clip_is_what_its_record_says(clip: ClipRecord, tmp_path: Path) -> None:
    checked = check_clip(clip, tmp_path.joinpath)
    assert (checked.num_frames, checked.hashed) == (5, True)
    put(tmp_path, clip, [encode_jpeg(frame) for frame in noise()])
    checked = check_clip(clip, tmp_path.joinpath)
    assert (checked.num_frames, checked.hashed) == (5, False)


def wrong(clip: ClipRecord, root: Path) -> str:
    with pytest.raises(IntegrityError) as caught:
        check_clip(clip, root.joinpath)
    return caught.value.code


def test_a_clip_that_is_not_what_its_record_says(clip: ClipRecord, tmp_path: Path) -> None:
    assert wrong(replace(clip, row=1), tmp_path) == "damaged_file"
    assert wrong(replace(clip, clip_id="f" * 32), tmp_path) == "wrong_row"
    assert wrong(replace(clip, fps=25.0), tmp_path) == "wrong_row"
    assert wrong(replace(clip, num_frames=4), tmp_path) == "wrong_length"
    assert wrong(replace(clip, width_px=34), tmp_path) == "wrong_size"
    assert wrong(replace(clip, sha256="0" * 64), tmp_path) == "wrong_frames"
    images = [encode_png(frame) for frame in noise()]
    for bad in (b"", b"no picture", images[2][:-40]):
        put(tmp_path, clip, [*images[:2], bad, *images[3:]])
        assert wrong(clip, tmp_path) == "damaged_file"


def test_a_frame_that_says_it_is_huge_is_not_decoded(clip: ClipRecord, tmp_path: Path) -> None:
    image = bytearray(encode_png(noise()[0]))
    image[16:24] = (60_000).to_bytes(4, "big") * 2  # IHDR's width and height; its CRC is wrong, too
    put(tmp_path, clip, [bytes(image)] * 5)
    assert wrong(clip, tmp_path) in {"damaged_file", "wrong_size"}


def test_offsets_that_lead_outside_are_refused(clip: ClipRecord, tmp_path: Path) -> None:
    """The offsets of a shard's images lie in its body, where any bit may have flipped."""
    path = tmp_path / clip.shard
    whole = path.read_bytes()
    sizes = [len(image) for image in stored_images(clip, tmp_path.joinpath)]
    offsets = np.cumsum([0, *sizes]).astype("<i8").tobytes()
    at = whole.index(offsets)
    for number, value in ((3, 2**40), (5, 2**62), (2, -5)):
        broken = bytearray(whole)
        broken[at + 8 * number : at + 8 * number + 8] = value.to_bytes(8, "little", signed=True)
        path.write_bytes(broken)
        assert wrong(clip, tmp_path) == "damaged_file"


def test_clips_of_a_shard_are_together() -> None:
    def clips() -> Iterator[ClipRecord]:
        for shard in ("a", "a", "b", "a"):
            yield record(noise(1), shard=shard)

    assert [len(group) for group in by_shard(clips())] == [2, 1, 1]


def test_rows_of_a_table_that_make_no_sense_are_failures(clip: ClipRecord, tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    exported = ExportedClip(clip_key(clip), "test/x.mp4", 1, 99, None)
    write_rows(path, [(clip, exported), (replace(clip, name="a/b"), exported), (clip, exported)])
    found = list(read_rows(path))
    assert [isinstance(row, Failure) for row in found] == [False, True, False]
    assert isinstance(found[1], Failure) and found[1].item == "metadata.csv:3"

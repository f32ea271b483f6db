"""VoxCeleb's annotations: what a file says, and the tubes, against the slow rule."""

from __future__ import annotations

import random
import shutil
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Literal

import pytest

from kpmask.config import Clips
from kpmask.data.crop import Box, crop_box, scale_box
from kpmask.data.metadata import clip_name
from kpmask.data.voxceleb import MAX_TUBE_FRAMES, iou, iter_voxceleb, read_boxes, tubes
from kpmask.errors import ConfigError, RowError
from kpmask.records import Failure, SourceRow

HEAD = (
    "Identity  : \tid10001\nReference : \t1zcIwhmdeo4\nOffset    : \t1\n"
    "FV Conf   : \t17.747\t(1)\nASD Conf  : \t4.168\n\nFRAME \tX \tY \tW \tH \n"
)


def utterance(*lines: str, head: str = HEAD) -> bytes:
    return (head + "".join(f"{line}\n" for line in lines)).encode()


def still(start: int, count: int, box: str = "220 \t61 \t120 \t120 ") -> list[str]:
    return [f"{start + i:06d} \t{box}" for i in range(count)]


def write(root: Path, name: str, data: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)


def everything(path: Path, version: Literal[1, 2] = 1) -> tuple[list[SourceRow], list[Failure]]:
    found = list(iter_voxceleb(path, version=version))
    rows = [r for r in found if isinstance(r, SourceRow)]
    return rows, [f for f in found if isinstance(f, Failure)]


def test_version_1_is_in_pixels_of_360_lines(tmp_path: Path) -> None:
    write(tmp_path, "txt/id10001/-zcIwhmdeo4/00001.txt", utterance(*still(5467, 70)))
    (row,), failures = everything(tmp_path)
    assert failures == []
    assert row == SourceRow(
        line=1,
        video_id="-zcIwhmdeo4",
        partition=row.partition,
        identity="id10001",
        start_frame=5467,
        end_frame=5537,
        bbox_px=(220, 61, 340, 181),
        ref_fps=25.0,
        ref_size_px=(0, 360),
        person_id="id10001",
    )
    name = clip_name(row, start_frame=row.start_frame, end_frame=row.end_frame)
    assert name == "id10001#-zcIwhmdeo4#005467#005537"
    assert row.bbox_px is not None and row.ref_size_px is not None
    assert scale_box(row.bbox_px, from_px=row.ref_size_px, to_px=(1280, 720)) == (
        440,
        122,
        680,
        362,
    )


def test_version_2_is_in_fractions(tmp_path: Path) -> None:
    lines = still(0, 3, "0.344 \t0.211 \t0.129 \t0.229 ")
    write(tmp_path, "id00012/21Uxsk56VDQ/00001.txt", utterance(*lines))
    (row,), failures = everything(tmp_path, 2)
    assert (failures, row.start_frame, row.end_frame) == ([], 0, 3)
    assert row.bbox_px == (344_000, 211_000, 473_000, 440_000)
    assert row.ref_size_px is not None
    assert scale_box(row.bbox_px, from_px=row.ref_size_px, to_px=(1920, 1080)) == tuple(
        int(Fraction(text) * side)
        for text, side in (("0.344", 1920), ("0.211", 1080), ("0.473", 1920), ("0.440", 1080))
    )
    got, _ = crop_box(
        row.bbox_px,
        ref_size_px=row.ref_size_px,
        frame_px=(1920, 1080),
        clips=Clips(increase=0.1, min_box_px=200),
    )
    assert got[2] - got[0] == pytest.approx(1.2 * 0.129 * 1920, abs=3)


def test_header_may_differ_and_lines_end_as_they_like() -> None:
    head = "\ufeffIdentity  : \tA.J._Buckley\r\n\r\nFRAME \tX \tY \tW \tH \r\n"
    boxes, problem = read_boxes(utterance("1 1 2 3 4\r", "", "2\t1\t2\t3\t4", head=head), version=1)
    assert (boxes, problem) == ([(1, (1, 2, 4, 6)), (2, (1, 2, 4, 6))], None)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("000003 \t220 \t61 \t120 ", "4 values, where FRAME X Y W H"),
        ("000003 \t220 \t61 \t120 \t120 \t5", "6 values"),
        ("x \t220 \t61 \t120 \t120", "'x' is not a frame number"),
        ("-3 \t220 \t61 \t120 \t120", "'-3' is not a frame number"),
        ("³ \t220 \t61 \t120 \t120", "not a frame number"),
        ("99999999999999 \t220 \t61 \t120 \t120", "not a frame number"),
        ("000002 \t220 \t61 \t120 \t120", "frame 2 comes behind frame 2"),
        ("000003 \t220 \t61 \tx \t120", "is not a box"),
        ("000003 \t220 \t61 \tnan \t120", "out of range"),
        ("000003 \tinf \t61 \t120 \t120", "out of range"),
        ("000003 \t220 \t61 \t0 \t120", "no area"),
        ("000003 \t220 \t61 \t-7 \t120", "no area"),
    ],
)
def test_bad_line_costs_itself_and_is_told_once(tmp_path: Path, line: str, cause: str) -> None:
    data = utterance(*still(1, 2), line, line, *still(4, 2))
    write(tmp_path, "id1/v/1.txt", data)
    rows, (failure,) = everything(tmp_path)
    assert [(r.start_frame, r.end_frame) for r in rows] == [(1, 3), (4, 6)]
    assert (failure.item, failure.code, failure.stage) == ("id1/v/1.txt:10", "bad_row", "metadata")
    assert cause in failure.cause and failure.cause.endswith("; and 1 more bad lines")


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "no line FRAME X Y W H"),
        (b"FRAME X Y\n1 2 3\n", "no line FRAME X Y W H"),
        (HEAD.encode(), "no frame in it"),
        (b"\xff\xfe" + "FRAME".encode("utf-16-le"), "not UTF-8"),
        (b"\0" * 1000, "no line FRAME"),
        (b"\n" * 40 + HEAD.encode() + b"1 1 1 1 1", "no line FRAME"),
        (utterance("1 0.1 0.1 0.2 0.2"), "no area; fractions are version 2's"),
        (b" " * (5 * 2**20), "more than"),
    ],
)
def test_file_that_is_none_is_a_failure(tmp_path: Path, data: bytes, cause: str) -> None:
    write(tmp_path, "id1/v/1.txt", data)
    rows, (failure,) = everything(tmp_path)
    assert (rows, failure.item) == ([], "id1/v/1.txt")
    assert cause in failure.cause


def test_pixels_are_no_fractions() -> None:
    with pytest.raises(RowError, match="out of range; pixels are version 1's"):
        read_boxes(utterance(*still(1, 3)), version=2)


@pytest.mark.parametrize("name", ["id1/a\nb/1.txt", "id1/" + "v" * 200 + "/1.txt", "a\\b/v/1.txt"])
def test_name_that_is_not_plain(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, utterance(*still(1, 3)))
    rows, (failure,) = everything(tmp_path)
    assert rows == []
    assert failure.code == ("bad_row" if "vvv" in name else "path_escape")


def test_name_that_is_not_text_has_a_failure_that_can_be_stored(tmp_path: Path) -> None:
    folder = tmp_path / "id1" / b"\xff".decode("utf-8", "surrogateescape")
    folder.mkdir(parents=True)
    (folder / "1.txt").write_bytes(utterance(*still(1, 3)))
    _, (failure,) = everything(tmp_path)
    failure.item.encode()
    failure.cause.encode()


def test_tube_ends_where_the_face_has_moved_away() -> None:
    """A box of 100 that moves right by 1 a frame: IoU with the first is (100-d) / (100+d)."""
    boxes = [(n, (n, 0, n + 100, 100)) for n in range(130)]
    found = list(tubes(boxes))
    # (100 - d) / (100 + d) >= 1/4 up to d = 60
    assert [(t.start_frame, t.end_frame) for t in found] == [(0, 61), (61, 122), (122, 130)]
    assert found[0].bbox == (0, 0, 160, 100)


def test_tube_ends_after_1024_frames_and_at_a_missing_one() -> None:
    boxes = [(n, (0, 0, 9, 9)) for n in range(2500) if n != 1500]
    ends = [(t.start_frame, t.end_frame) for t in tubes(boxes)]
    assert ends == [(0, 1024), (1024, 1500), (1501, 2500)]


def test_tubes_against_the_slow_rule() -> None:
    rng = random.Random(11)
    for _ in range(60):
        boxes, frame, x, y = [], rng.randrange(50), 500.0, 500.0
        for _ in range(rng.randrange(1, 300)):
            frame += 1 if rng.random() < 0.98 else rng.randrange(2, 9)
            x, y = x + rng.gauss(0, 12), y + rng.gauss(0, 12)
            side = rng.randrange(80, 140)
            boxes.append((frame, (int(x), int(y), int(x) + side, int(y) + side)))
        found = [(t.start_frame, t.end_frame, t.bbox) for t in tubes(boxes)]
        assert found == slow_tubes(boxes)


def slow_tubes(boxes: list[tuple[int, Box]]) -> list[tuple[int, int, Box]]:
    """All boxes that can be added to the first one, then the same with the rest."""
    if not boxes:
        return []
    count = 1
    while (
        count < min(len(boxes), MAX_TUBE_FRAMES)
        and boxes[count][0] == boxes[count - 1][0] + 1
        and slow_iou(boxes[0][1], boxes[count][1]) >= 0.25
    ):
        count += 1
    lefts, tops, rights, bottoms = zip(*(box for _, box in boxes[:count]), strict=True)
    union = (min(lefts), min(tops), max(rights), max(bottoms))
    return [(boxes[0][0], boxes[count - 1][0] + 1, union), *slow_tubes(boxes[count:])]


def slow_iou(one: Box, other: Box) -> float:
    """By counting rows and columns."""
    xs = len(set(range(one[0], one[2])) & set(range(other[0], other[2])))
    ys = len(set(range(one[1], one[3])) & set(range(other[1], other[3])))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return xs * ys / (areas - xs * ys)


def test_iou() -> None:
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 2, 2), (2, 0, 4, 2)) == 0
    assert iou((-5, -5, 5, 5), (-5, -5, 5, 5)) == 1


def test_folder_zip_and_tar_say_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "txt"
    for person in range(3):
        for video in range(2):
            for number in range(1, 4):
                write(
                    folder,
                    f"id{person}/v{video}/{number:05d}.txt",
                    utterance(*still(number * 300, 64 + person)),
                )
    write(folder, "README.txt", b"about")
    expected = everything(folder)
    assert len(expected[0]) == 18 and expected[1] == []
    assert [row.line for row in expected[0]] == list(range(1, 19))
    for kind in ("zip", "tar", "gztar"):
        archive = shutil.make_archive(str(tmp_path / kind), kind, tmp_path, "txt")
        rows, failures = everything(Path(archive))
        assert sorted(map(_key, rows)) == sorted(map(_key, expected[0]))
        assert failures == []


def _key(row: SourceRow) -> tuple[object, ...]:
    return (row.identity, row.video_id, row.start_frame, row.end_frame, row.partition)


def test_splits_are_by_person(tmp_path: Path) -> None:
    for person in range(40):
        write(tmp_path, f"id{person}/v/1.txt", utterance(*still(1, 2)))
    named = list(iter_voxceleb(tmp_path, version=1, test_identities=["id3", "id5"]))
    tested = {r.identity for r in named if isinstance(r, SourceRow) and r.partition == "test"}
    assert tested == {"id3", "id5"}
    drawn = list(iter_voxceleb(tmp_path, version=1, test_fraction=0.5))
    assert 8 < sum(isinstance(r, SourceRow) and r.partition == "test" for r in drawn) < 32


def test_nothing_there(tmp_path: Path) -> None:
    write(tmp_path, "README.txt", b"about")
    with pytest.raises(ConfigError, match="no annotation here") as raised:
        everything(tmp_path)
    assert raised.value.code == "nothing_to_do"
    with zipfile.ZipFile(tmp_path / "a.zip", "w"):
        pass
    with pytest.raises(ConfigError, match="no annotation here"):
        everything(tmp_path / "a.zip")

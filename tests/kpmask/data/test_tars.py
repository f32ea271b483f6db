"""WebDataset tars: what is written, and what strangers write."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kpmask.config import MediaLimits
from kpmask.data.tars import (
    Sample,
    SampleTar,
    member_bytes,
    plan_tars,
    printable,
    read_samples,
    split_of,
)
from kpmask.records import Failure

LIMITS = MediaLimits(max_bytes=100_000, max_frames=20)


def picture(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 48, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def member(name: str, content: bytes = b"", **values: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in values.items():
        setattr(info, key, value)
    return info, content


def write(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def read(path: Path, limits: MediaLimits = LIMITS) -> tuple[list[str], dict[str, str]]:
    """The samples' keys, and the codes of what is refused by its item."""
    samples, codes = [], {}
    folder = path.parent / "unpacked"
    for found in read_samples(path, limits=limits, folder=folder, subject="t.tar"):
        if isinstance(found, Failure):
            codes[found.item] = found.code
        else:
            samples.append(found.key)
            inside = folder.resolve()
            assert found.path.resolve().is_relative_to(inside)
    return samples, codes


GOOD = [member("good.0.png", picture()), member("good.1.png", picture(9))]


HOSTILE: dict[str, tuple[tarfile.TarInfo, str]] = {
    "parent": (member("../evil.0.png", picture())[0], "path_escape"),
    "absolute": (member("/tmp/evil.0.png", picture())[0], "path_escape"),
    "inner": (member("a/../../evil.0.png", picture())[0], "path_escape"),
    "backslash": (member("..\\evil.0.png", picture())[0], "path_escape"),
    "control": (member("e\x1bvil.0.png", picture())[0], "path_escape"),
    "symlink": (member("evil.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")[0], "path_escape"),
    "hardlink": (member("evil.png", type=tarfile.LNKTYPE, linkname="good.0.png")[0], "path_escape"),
    "device": (member("evil.png", type=tarfile.CHRTYPE)[0], "path_escape"),
    "pipe": (member("evil.png", type=tarfile.FIFOTYPE)[0], "path_escape"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused_one_by_one(name: str, tmp_path: Path) -> None:
    info, code = HOSTILE[name]
    path = write(tmp_path / "t.tar", [(info, picture()[: info.size]), *GOOD])
    before = sorted(p for p in tmp_path.rglob("*"))
    samples, codes = read(path)
    assert samples == ["good"]
    assert codes == {printable(f"t.tar:{info.name}"): code}
    assert sorted(p for p in tmp_path.iterdir() if p.name != "unpacked") == before


def test_what_is_no_media_is_counted_by_suffix(tmp_path: Path) -> None:
    foreign = [member(f"s{i}.{end}", b"x") for i in range(5) for end in ("txt", "cls")]
    samples, codes = read(write(tmp_path / "t.tar", [*foreign, member("x", b"x"), *GOOD]))
    assert samples == ["good"]
    assert codes == {f"t.tar:*{end}": "foreign_file" for end in (".txt", ".cls", "")}


BAD_SAMPLES: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "many bytes": ([member(f"s.{i}.png", b"x" * 30_000) for i in range(4)], "too_large"),
    "many frames": ([member(f"s.{i:02}.png", b"x") for i in range(21)], "frames_over_limit"),
    "long json": (
        [member("s.json", b" " * (2**20 + 1)), member("s.0.png", picture())],
        "too_large",
    ),
    "bad json": ([member("s.json", b"{"), member("s.0.png", picture())], "bad_row"),
    "deep json": ([member("s.json", b"[" * 90_000), member("s.0.png", picture())], "bad_row"),
    "two videos": ([member("s.mp4", b"x"), member("s.b.mp4", b"x")], "bad_row"),
    "mixed": ([member("s.mp4", b"x"), member("s.0.png", b"x")], "bad_row"),
    "twice": ([member("s.0.png", b"x"), member("s.0.png", b"x")], "duplicate_name"),
    "odd suffix": ([member("s.a b.png", b"x")], "path_escape"),
    "only json": ([member("s.json", b"{}")], "not_media"),
    "half a record": (
        [
            member("s.json", json.dumps({"clip_id": "x", "sha256": "y", "crop_px": 3}).encode()),
            member("s.0.png", picture()),
        ],
        "bad_row",
    ),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_bad_sample_costs_no_other(name: str, tmp_path: Path) -> None:
    members, code = BAD_SAMPLES[name]
    samples, codes = read(write(tmp_path / "t.tar", [*members, *GOOD]))
    assert samples == ["good"]
    assert codes == {"t.tar:s": code}


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    """A member that says that it is a terabyte, and is a hole."""
    headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "bomb.0.png",
        "GNU.sparse.realsize": str(2**40),
    }
    sparse = member("x", b"0\n".ljust(512, b"\0"), pax_headers=headers)
    samples, codes = read(write(tmp_path / "t.tar", [sparse, *GOOD]))
    assert samples == ["good"]
    assert codes == {"t.tar:bomb.0.png": "path_escape"}


def test_a_long_header_is_not_read_into_memory(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.tar", [*GOOD, member("s.0.png", pax_headers={"comment": "x" * 2**22})]
    )
    samples, codes = read(path)
    assert (samples, codes) == ([], {"t.tar": "truncated"})  # what stands before it is doubtful


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """At whatever byte a tar is cut, the samples before are whole, and the cut is told."""
    three = [member(f"{key}.{i}.png", picture(i)) for key in ("a", "b", "c") for i in range(2)]
    whole = write(tmp_path / "whole.tar", three).read_bytes()
    end = 12 * 512 if len(picture()) <= 512 else len(whole.rstrip(b"\0"))
    path = tmp_path / "t.tar"
    for cut in range(0, end, 256):
        path.write_bytes(whole[:cut])
        samples, codes = read(path)
        assert samples == ["a", "b", "c"][: len(samples)] and len(samples) < 3
        assert codes == {"t.tar": "truncated"}
    path.write_bytes(whole)
    assert read(path) == (["a", "b", "c"], {})


def test_noise_is_an_outcome_and_no_crash(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = write(tmp_path / "whole.tar", [*GOOD, *BAD_SAMPLES["bad json"][0]]).read_bytes()
    path = tmp_path / "t.tar"
    for _ in range(150):
        data = np.frombuffer(whole, np.uint8).copy()
        at = rng.integers(0, 512 * 8, 6)
        data[at] = rng.integers(0, 256, 6)
        path.write_bytes(data.tobytes())
        samples, codes = read(path)
        assert samples or codes


def test_members_are_told_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    sizes = [0, 1, 511, 512, 513, 5000]
    with SampleTar(path) as tar:
        for i, size in enumerate(sizes):
            tar.add(f"k.{i}.png", b"x" * size)
    with tarfile.open(path) as tar:
        offsets = [info.offset for info in tar.getmembers()]
        end = tar.offset
    assert np.diff([*offsets, end]).tolist() == [member_bytes(size) for size in sizes]


def test_an_error_leaves_no_tar_that_looks_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with pytest.raises(RuntimeError), SampleTar(path) as tar:
        tar.add("k.0.png", picture())
        raise RuntimeError
    assert read(path)[1] == {"t.tar": "truncated"}


def test_tars_are_filled_up_to_their_limits() -> None:
    sized = [(name, size) for name, size in zip("abcdefg", [4, 4, 4, 99, 1, 1, 1], strict=True)]
    by: Callable[[int, int], list[str]] = lambda n, b: [  # noqa: E731
        "".join(group) for group in plan_tars(sized, max_samples=n, max_bytes=b)
    ]
    assert by(9, 9) == ["ab", "c", "d", "efg"]
    assert by(2, 999) == ["ab", "cd", "ef", "g"]
    assert by(1, 1) == list("abcdefg")
    assert list(plan_tars([], max_samples=1, max_bytes=1)) == []


def test_splits_of_tars() -> None:
    names = ["train-000000.tar", "test_3.tar", "train/x.tar", "test/train-1.tar", "train.tar"]
    assert [split_of(name) for name in names] == ["train", "test", "train", "test", "train"]
    assert [split_of(n) for n in ("training-1.tar", "x.tar", "val/train.tar")] == [
        None,
        None,
        "train",
    ]


def test_a_single_picture_is_a_row_of_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar", [member("s.png", picture()), member("f.0.png", picture())])
    found = read_samples(path, limits=LIMITS, folder=tmp_path / "u", subject="t")
    kinds = [sample.path.is_dir() for sample in found if isinstance(sample, Sample)]
    assert kinds == [False, True]

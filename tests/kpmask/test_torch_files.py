"""Files of other people's weights: attacks are not run, and damage is named."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from kpmask.errors import CheckpointError
from kpmask.torch_files import read_torch_file, tensors_of


class Attack:
    """A pickle that writes a file when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Attack(mark)))
    torch.save({"generator": Attack(mark)}, tmp_path / "zip.pth")
    torch.save(
        {"generator": Attack(mark)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )
    for name in ("plain.pth", "zip.pth", "old.pth"):
        with pytest.raises(CheckpointError, match="never executed"):
            read_torch_file(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_damaged_files(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.arange(50), "n": 3}, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    assert torch.equal(read_torch_file(path)["a"], torch.arange(50))
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randint(0, len(whole) - 1, (60,), generator=generator).tolist()
    for cut in [0, 1, 2, *cuts]:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            read_torch_file(path)
    for place in cuts:  # whatever comes of a changed byte, nothing else escapes
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read_torch_file(path)
        except CheckpointError as error:
            assert error.subject == str(path)


def repacked(
    path: Path, out: Path, *, compression: int = zipfile.ZIP_STORED, times: int = 1
) -> None:
    """The file's parts in another archive, listed so many times."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.filelist += target.filelist * (times - 1)


def test_what_is_larger_inside_than_outside_is_not_read(tmp_path: Path) -> None:
    path, again, bomb, repeated = (tmp_path / name for name in ("a", "b", "c", "d"))
    torch.save({"a": torch.zeros(2**20)}, path)
    repacked(path, again)
    assert len(read_torch_file(again)["a"]) == 2**20
    repacked(path, bomb, compression=zipfile.ZIP_DEFLATED)
    repacked(path, repeated, times=3)
    assert bomb.stat().st_size < 2**14
    for file in (bomb, repeated):
        with pytest.raises(CheckpointError, match="bytes, more than it has") as caught:
            read_torch_file(file)
        assert caught.value.subject == str(file)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, device="meta"),
        torch.zeros(1).expand(10**12),
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(2, dtype=torch.complex64),
    ],
    ids=["without data", "repeated", "sparse", "complex"],
)
def test_tensors_hold_what_they_say(tmp_path: Path, value: torch.Tensor) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"good": torch.ones(3), "odd": value}, path)
    with pytest.raises(CheckpointError, match="odd is no plain tensor"):
        tensors_of(read_torch_file(path), path)
    torch.save({"good": torch.ones(3), "shared": torch.arange(9)[2::3]}, path)
    assert tensors_of(read_torch_file(path), path)["shared"].tolist() == [2, 5, 8]
    for document in ([torch.ones(1)], {1: torch.ones(1)}, {"a": 1}):
        with pytest.raises(CheckpointError, match="part is not a dictionary of tensors"):
            tensors_of(document, path, what="part")

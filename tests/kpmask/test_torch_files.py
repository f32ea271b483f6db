"""Files of other people's weights: attacks are not run, and damage is named."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from kpmask.errors import CheckpointError
from kpmask.torch_files import read_torch_file


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

"""Files of `torch.save`, read without running what is in them."""

from __future__ import annotations

import errno
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kpmask.errors import CheckpointError

# What the reader raises at bytes that are not its own.
_NOT_TENSORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
    AssertionError,
    struct.error,
)


def read_torch_file(path: Path) -> Any:  # noqa: ANN401 - whatever was saved
    """The tensors and plain values of a `torch.save` file, new or old format, on the CPU.

    Raises:
        CheckpointError: it cannot be read, is not such a file, would run code, or would take more
            memory than it has bytes.
    """
    try:
        _refuse_larger_inside(path)
        with warnings.catch_warnings():
            # That the file's pickle protocol is not the usual one: it is read or refused.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *_NOT_TENSORS) as error:
        # The archive reader seeks before the beginning of a file that ends early.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise CheckpointError(
                error.strerror or str(error), subject=str(path), code="weights_unavailable"
            ) from error
        raise CheckpointError(
            "not a file of tensors alone", subject=str(path), hint="a pickle is never executed"
        ) from error


def _refuse_larger_inside(path: Path) -> None:
    """Let a file pass whose parts are no larger than it is: torch saves them as they are.

    A few megabytes that are compressed, or are listed many times, could fill any memory.

    Raises:
        CheckpointError: they are. OSError, ValueError: it cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return  # of the old format, which has neither
    try:
        with zipfile.ZipFile(path) as archive:
            inside_bytes = sum(part.file_size for part in archive.infolist())
    # The second is zipfile's word for a kind of archive that it does not know.
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(str(error)) from error
    if inside_bytes > path.stat().st_size:
        raise CheckpointError(f"holds {inside_bytes} bytes, more than it has", subject=str(path))


def tensors_of(section: object, path: Path, *, what: str = "") -> dict[str, Tensor]:
    """A file's dictionary of tensors, each of which holds all the numbers that it says.

    Args:
        section: of what was read from the file.
        what: it is called in an error; the file itself by default.

    Raises:
        CheckpointError: it is none; or a tensor is sparse, quantised, complex, without data, or
            repeats what is stored: a network of its shape could be of any size.
    """
    if not isinstance(section, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in section.items()
    ):
        raise CheckpointError(
            f"{f'{what} is ' if what else ''}not a dictionary of tensors", subject=str(path)
        )
    for key, value in section.items():
        if not _is_whole(value):
            raise CheckpointError(f"{key} is no plain tensor", subject=str(path))
    return dict(section)


def _is_whole(value: Tensor) -> bool:
    if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()

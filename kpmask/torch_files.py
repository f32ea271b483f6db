"""Files of `torch.save`, read without running what is in them."""

from __future__ import annotations

import errno
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import torch

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
        CheckpointError: it cannot be read, is not such a file, or would run code.
    """
    try:
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

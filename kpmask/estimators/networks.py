"""Networks that metrics look through: their weights are read strictly, and never trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kpmask.errors import CheckpointError
from kpmask.torch_files import read_torch_file, tensors_of

Network = TypeVar("Network", bound=nn.Module)

# Pixels that go through a network at once: its first maps have tens of numbers for each.
_AT_ONCE_PX: Final = 2**22
_COUNTER: Final = ".num_batches_tracked"  # of batch norms; only training reads it, not all files


def network_device() -> torch.device:
    """A GPU where this process has one: what Ray gave it, or the machine's first."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def frozen(network: Network) -> Network:
    """The network itself, in eval mode and without gradients."""
    network.requires_grad_(False)
    network.eval()
    return network


def load_weights(
    network: nn.Module, path: Path, *, unread: tuple[str, ...] = (), prefix: str = ""
) -> None:
    """Fill the network from a file of tensors that has each of its keys.

    Args:
        unread: how the keys of layers begin that the network leaves out.
        prefix: what comes before some or all keys in the file, beside "module.", which torch's
            DataParallel puts there.

    Raises:
        CheckpointError: it cannot be read, is not of this network, or holds what is no number; it
            says which keys.
    """
    tensors = {
        key: value
        for key, value in _tensors(path, prefix).items()
        if not key.endswith(_COUNTER) and not key.startswith(unread)
    }
    wanted = {k: v for k, v in network.state_dict().items() if not k.endswith(_COUNTER)}
    if different := sorted(wanted.keys() ^ tensors.keys()):
        key = different[0]
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        relation = "has no" if key in wanted else "has an unexpected"
        raise CheckpointError(f"{relation} {key}{more}", subject=str(path))
    for key, value in wanted.items():
        if tensors[key].shape != value.shape:
            raise CheckpointError(
                f"{key} is {list(tensors[key].shape)}, not {list(value.shape)}", subject=str(path)
            )
        if not torch.isfinite(tensors[key]).all():
            # It would find nothing in any frame, and say nothing of why.
            raise CheckpointError(f"{key} has values that are no numbers", subject=str(path))
    network.load_state_dict(tensors, strict=False)  # the counters are not in it


def _tensors(path: Path, prefix: str) -> Mapping[str, Tensor]:
    found = tensors_of(_read(path), path)
    return {k.removeprefix("module.").removeprefix(prefix): v for k, v in found.items()}


def _read(path: Path) -> object:
    """What is in a file of torch or of safetensors, by its first bytes: it was given a name."""
    try:
        with path.open("rb") as file:
            begin = file.read(9)
    except OSError as error:
        raise CheckpointError(
            error.strerror or str(error), subject=str(path), code="weights_unavailable"
        ) from error
    if begin[8:] != b"{":
        return read_torch_file(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError("not a file of safetensors", subject=str(path)) from error


@contextmanager
def whole_floats() -> Iterator[None]:
    """Convolutions in float32 on a GPU too, whose default rounds to 10 bits: a score would be
    another than on a CPU in its fourth digit."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def at_once(image_NCHW: Tensor) -> int:
    """How many images to send through a network together.

    On a CPU one: what is computed of it fits into its caches.
    """
    if image_NCHW.device.type == "cpu":
        return 1
    return max(1, _AT_ONCE_PX // (image_NCHW.shape[-2] * image_NCHW.shape[-1]))

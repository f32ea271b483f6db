"""Checkpoints of a training in progress, in our own storage.

    checkpoints/<phase>-step-000200/
        model.safetensors   all weights of the phase's system
        state.pt            the trainer's state: tensors and plain data, loadable as weights only
        checkpoint.json     what it is, and both files' SHA-256; written last

A checkpoint without its checkpoint.json does not exist: it was interrupted and is removed by the
next one. The newest whose files have their checksums is the one to go on from, so that a damaged
file costs the steps since the one before.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kpmask.errors import StorageError
from tasks.storage import ObjectStore

log = logging.getLogger(__name__)

FOLDER: Final = "checkpoints"
KEEP: Final = 2


@dataclass(frozen=True)
class TrainingCheckpoint:
    """Where a training was: after `step` steps of phase number `phase_index`."""

    phase_index: int
    phase: str
    step: int
    weights: Mapping[str, Tensor]
    trainer: Mapping[str, Any]


def publish(store: ObjectStore, checkpoint: TrainingCheckpoint) -> None:
    """Store a checkpoint whole or not at all, then remove all but the newest `KEEP`."""
    folder = f"{FOLDER}/{checkpoint.phase}-step-{checkpoint.step:06d}"
    store.delete(f"{folder}/checkpoint.json")  # one that is replaced ends to exist first
    weights = {key: value.contiguous().cpu() for key, value in checkpoint.weights.items()}
    files = {
        "model.safetensors": safetensors.torch.save(weights),
        "state.pt": _torch_bytes(dict(checkpoint.trainer)),
    }
    for name, data in files.items():
        store.put(f"{folder}/{name}", data)
    marker = {
        "phase_index": checkpoint.phase_index,
        "phase": checkpoint.phase,
        "step": checkpoint.step,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    store.put(f"{folder}/checkpoint.json", json.dumps(marker, indent=2).encode())
    _prune(store)


def newest(store: ObjectStore) -> TrainingCheckpoint | None:
    """The newest whole checkpoint, or None."""
    for folder, marker in sorted(_markers(store), key=_age, reverse=True):
        try:
            return _read(store, folder, marker)
        except (_DamagedError, StorageError) as error:
            if isinstance(error, StorageError) and error.code != "not_found":
                raise
            log.warning("checkpoint %s is damaged (%s): taking the one before", folder, error)
    return None


class _DamagedError(Exception):
    """A file of a checkpoint is not the one that was written."""


def _age(entry: tuple[str, dict[str, Any]]) -> tuple[int, int]:
    return entry[1]["phase_index"], entry[1]["step"]


def _markers(store: ObjectStore) -> Iterator[tuple[str, dict[str, Any]]]:
    """Folder and description of every checkpoint that exists."""
    for info in store.list(f"{FOLDER}/"):
        folder, _, name = info.key.rpartition("/")
        if name != "checkpoint.json":
            continue
        try:
            marker = json.loads(store.get(info.key))
            _age((folder, marker))
        except (json.JSONDecodeError, KeyError, TypeError):
            log.warning("%s is damaged: passing it over", info.key)
            continue
        yield folder, marker


def _read(store: ObjectStore, folder: str, marker: dict[str, Any]) -> TrainingCheckpoint:
    files = {}
    for name in ("model.safetensors", "state.pt"):
        files[name] = store.get(f"{folder}/{name}")
        if hashlib.sha256(files[name]).hexdigest() != marker["sha256"][name]:
            raise _DamagedError(f"{name} has another checksum")
    try:
        weights = safetensors.torch.load(files["model.safetensors"])
        trainer = torch.load(
            io.BytesIO(files["state.pt"]), weights_only=True, map_location=torch.device("cpu")
        )
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise _DamagedError(str(error)) from error
    return TrainingCheckpoint(
        marker["phase_index"], marker["phase"], marker["step"], weights, trainer
    )


def _prune(store: ObjectStore) -> None:
    """Remove all but the newest checkpoints; of each, what says that it exists goes first."""
    kept = sorted(_markers(store), key=_age, reverse=True)[:KEEP]
    names = {folder for folder, _ in kept}
    keys = [info.key for info in store.list(f"{FOLDER}/")]
    gone = [key for key in keys if key.rpartition("/")[0] not in names]
    for key in sorted(gone, key=lambda key: not key.endswith("checkpoint.json")):
        store.delete(key)


def _torch_bytes(value: Any) -> bytes:  # noqa: ANN401 - tensors and plain data
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()

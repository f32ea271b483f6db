"""Weights with their settings in one safetensors file.

- The file's metadata holds the format's version, the model's settings and free information (how
  the weights came to be), as JSON. Nothing in it is ever executed.
- A file is checked against its own settings before any weight is used: every tensor there, none
  left over, the right shapes, finite numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kpmask.errors import CheckpointError, ConfigError
from kpmask.model_config import AnyModel, ModelConfig, Part
from kpmask.models import build_system
from kpmask.models.base import AnimationSystem

FORMAT = "kpmask-1"
MAX_LISTED = 6
MAX_RELEASE_BYTES = 12_000_000
_OF_THE_RUN = frozenset({"run_id", "settings_digest"})  # mean nothing elsewhere
_MODEL: TypeAdapter[AnyModel] = TypeAdapter(ModelConfig)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint in memory.

    Attributes:
        config: the model's settings. system: the model, in eval mode, on the CPU.
        info: what was saved beside it. sha256: of the file, in hex.
    """

    config: AnyModel
    system: AnimationSystem[Any, Any]
    info: dict[str, Any]
    sha256: str


def save(
    path: Path,
    system: AnimationSystem[Any, Any],
    info: Mapping[str, Any],
    *,
    half: bool = False,
    max_bytes: int | None = None,
) -> str:
    """Write a system's weights and settings, whole or not at all; the file's SHA-256 in hex.

    Args:
        path: the file to write or replace. system: on any device.
        info: JSON values to keep beside the weights.
        half: parameters in float16, which makes the file half as long; `load` brings them back to
            float32. Buffers stay as they are: batch statistics may be too small or too large.
        max_bytes: refuse to write anything longer.

    Raises:
        CheckpointError: float16 cannot hold a parameter, or the file would be too long.
    """
    document = {
        "format": FORMAT,
        "config": system.config.model_dump(mode="json"),
        "info": dict(info),
    }
    # One entry: the library writes several in random order, and equal weights must be equal bytes.
    metadata = {"kpmask": json.dumps(document, sort_keys=True)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in system.state_dict().items()}
    if half:
        parameters = [name for name, _ in system.named_parameters(remove_duplicate=False)]
        tensors |= {name: _halved(name, tensors[name], path) for name in parameters}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as part:
        save_file(tensors, part, metadata=metadata)
        _check_length(part, max_bytes, subject=str(path))
        return _sha256(part)


def _halved(name: str, tensor: Tensor, path: Path) -> Tensor:
    half = tensor.half()
    if not torch.isfinite(half).all():
        largest = torch.finfo(torch.float16).max
        raise CheckpointError(
            f"{name} holds NaN or a value beyond {largest:g}, which float16 cannot hold",
            subject=str(path),
        )
    return half


def _check_length(path: Path, max_bytes: int | None, *, subject: str) -> None:
    size_bytes = path.stat().st_size
    if max_bytes is not None and size_bytes > max_bytes:
        raise CheckpointError(
            f"would have {size_bytes / 1e6:.2f} MB, more than {max_bytes / 1e6:g} MB",
            subject=subject,
            hint="train a narrower model, or raise the limit",
        )


def release(src: Path, out: Path, *, max_bytes: int = MAX_RELEASE_BYTES) -> LoadedCheckpoint:
    """Make a small file for shipping: float16, and only what animates.

    A discriminator is left out, with its settings; of the information what says how the weights
    came to be stays, without the run's own names.

    Args:
        src: a file written by `save`. out: the file to write or replace.
        max_bytes: refuse to write anything longer.

    Returns:
        The new file, read back.

    Raises:
        CheckpointError: `src` cannot be read, float16 cannot hold its weights, or the result is
            too long.
    """
    loaded = load(src)
    info = {key: value for key, value in loaded.info.items() if key not in _OF_THE_RUN}
    info["made_from"] = loaded.sha256
    save(out, _generating(loaded.system), info, half=True, max_bytes=max_bytes)
    return load(out)


def _generating(system: AnimationSystem[Any, Any]) -> AnimationSystem[Any, Any]:
    """The same system without what only training needs."""
    if getattr(system.config, "discriminator", None) is None:
        return system
    bare = build_system(system.config.model_copy(update={"discriminator": None}))
    tensors = system.state_dict()
    bare.load_state_dict({key: tensors[key] for key in bare.state_dict()})
    return bare.eval()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block succeeds."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}-")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o644)  # mkstemp's files are private
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path, *, system: str | None = None) -> LoadedCheckpoint:
    """Read a checkpoint; the weights are on the CPU, in eval mode.

    Args:
        path: a file written by `save`.
        system: refuse any other system than this one.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    header = _read_header(path)
    if system is not None and header.config.system != system:
        raise CheckpointError(
            f"holds a {header.config.system} system, not {system}",
            subject=str(path),
            code="checkpoint_mismatch",
        )
    built = _skeleton(path, header)
    with _unreadable(path), safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in header.shapes}
    fill(built, tensors, subject=str(path))
    return LoadedCheckpoint(header.config, built.eval(), header.info, _sha256(path))


def load_detector(path: Path, *, config: Part) -> dict[str, Tensor]:
    """A checkpoint's keypoint detector, under the names it has in a system's state dict.

    Args:
        config: the settings that it must have.

    Raises:
        CheckpointError: code checkpoint_mismatch, when it was trained with other settings.
    """
    loaded = load(path)
    found = getattr(loaded.config, "detector", None)
    if type(found) is not type(config):
        raise CheckpointError(
            f"a {loaded.config.system} system has no such keypoint detector",
            subject=str(path),
            code="checkpoint_mismatch",
        )
    differing = [
        f"{name} is {getattr(found, name)!r}, not {value!r}"
        for name, value in config
        if getattr(found, name) != value
    ]
    if differing:
        raise CheckpointError(
            f"its keypoint detector has other settings: {'; '.join(differing)}",
            subject=str(path),
            code="checkpoint_mismatch",
        )
    weights = loaded.system.state_dict()
    return {key: value for key, value in weights.items() if key.startswith("detector.")}


def describe(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, without building it: plain JSON values.

    Raises:
        CheckpointError: it is not a checkpoint.
    """
    header = _read_header(path)
    skeleton = _skeleton(path, header)
    check_tensors(header.shapes, _shapes(skeleton), subject=str(path))
    return {
        "system": header.config.system,
        "image_size_px": header.config.image_size_px,
        "parameters": sum(p.numel() for p in skeleton.parameters()),
        "size_bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "config": header.config.model_dump(mode="json"),
        "info": header.info,
    }


# --- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    config: AnyModel
    info: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def _read_header(path: Path) -> _Header:
    _check_kind(path)
    with _unreadable(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    document = _document(path, metadata)
    try:
        config = _MODEL.validate_json(json.dumps(document.get("config")))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"][1:])) or "config"
        raise CheckpointError(
            f"its settings are no model's: {place}: {problem['msg']}", subject=str(path)
        ) from error
    info = document.get("info")
    if not isinstance(info, dict):
        raise CheckpointError("its information is not a JSON object", subject=str(path))
    return _Header(config, info, shapes)


def _document(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        document = json.loads(metadata.get("kpmask", "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError("its metadata is not JSON", subject=str(path)) from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"a safetensors file, but not one of kpmask's: its format is {found!r}, not {FORMAT!r}",
            subject=str(path),
        )
    assert isinstance(document, dict)
    return document


def _check_kind(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(error.strerror or str(error), subject=str(path)) from error
    if not head:
        raise CheckpointError("is empty", subject=str(path))
    # A zip archive, a pickle, and the magic number of PyTorch's old format.
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise CheckpointError(
            "is a pickle, which is never opened here",
            subject=str(path),
            hint="bring checkpoints of the original code in with: kpmask checkpoint import",
        )


@contextlib.contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"not a safetensors file: {error}", subject=str(path)) from error


def _skeleton(path: Path, header: _Header) -> AnimationSystem[Any, Any]:
    """The system without memory for its weights: settings that ask for too much cost nothing."""
    blocks = header.config.model_dump()
    deepest = max(
        (
            part.get("num_bottleneck_blocks", 0)
            for part in blocks.values()
            if isinstance(part, dict)
        ),
        default=0,
    )
    if deepest > len(header.shapes):
        raise CheckpointError(
            f"settings ask for {deepest} blocks; the file has {len(header.shapes)} tensors",
            subject=str(path),
        )
    try:
        with torch.device("meta"):
            return build_system(header.config)
    except (ConfigError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"its settings cannot be built: {error}", subject=str(path)
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- checking --------------------------------------------------------------------------------


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def check_tensors(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], *, subject: str
) -> None:
    """Refuse tensors that are missing, left over or of another shape, listing them.

    Raises:
        CheckpointError: code checkpoint_mismatch.
    """
    problems = _listed("missing", (key for key in wanted if key not in found))
    problems += _listed("left over", (key for key in found if key not in wanted))
    problems += _listed(
        "of another shape",
        (
            f"{key} {list(found[key])}, not {list(shape)}"
            for key, shape in wanted.items()
            if found.get(key, shape) != shape
        ),
    )
    if problems:
        raise CheckpointError("; ".join(problems), subject=subject, code="checkpoint_mismatch")


def _listed(what: str, items: Iterable[str]) -> list[str]:
    names = list(items)
    if not names:
        return []
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    tensors = "tensor" if len(names) == 1 else "tensors"
    return [f"{len(names)} {tensors} {what}: {', '.join(names[:MAX_LISTED])}{more}"]


def fill(module: nn.Module, tensors: Mapping[str, Tensor], *, subject: str) -> None:
    """Give a module, which may have no memory yet, exactly these tensors.

    Raises:
        CheckpointError: they do not fit, or hold numbers that are not finite.
    """
    wanted = module.state_dict()
    check_tensors({k: tuple(t.shape) for k, t in tensors.items()}, _shapes(module), subject=subject)
    ready = {}
    for key, like in wanted.items():
        tensor = tensors[key]
        if tensor.is_floating_point() != like.is_floating_point():
            raise CheckpointError(f"{key} is {tensor.dtype}, not {like.dtype}", subject=subject)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{key} holds NaN or infinity", subject=subject)
        ready[key] = tensor.to(like.dtype)
    module.load_state_dict(ready, assign=True)

"""What goes wrong inside the processes of a catalog, and an account of what they do.

Every process that is started with `chaos.Chaos.environment` loads this before anything else, so it
imports next to nothing. A file or an item that is poison ends the process that touches it, as a
decoder that crashes does, or the kernel when memory runs out.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "KPMASK_CHAOS_FOLDER"
POISON = "poison.json"
EVENTS = "events.jsonl"


def install() -> None:
    """Have the modules of interest changed as soon as somebody imports them."""
    if os.environ.get(VARIABLE):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = CHANGES.get(name)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        spec.loader = _Loader(spec.loader, change)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, change: Callable[[Any], None]) -> None:
        self._loader = loader
        self._change = change

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._change(module)


# --- the account -----------------------------------------------------------------------------


def note(kind: str, **facts: Any) -> None:
    """A line of the account, written at once: the process may not live to the next one."""
    line = json.dumps({"kind": kind, "pid": os.getpid(), "at_s": time.time(), **facts}) + "\n"
    path = Path(os.environ[VARIABLE]) / EVENTS
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def _before(owner: Any, name: str, do: Callable[..., None]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def changed(*args: Any, **options: Any) -> Any:
        do(*args, **options)
        return original(*args, **options)

    setattr(owner, name, changed)


def _after(owner: Any, name: str, do: Callable[..., None]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def changed(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        do(*args, **options)
        return result

    setattr(owner, name, changed)


# --- poison ----------------------------------------------------------------------------------


@functools.cache
def _poison() -> dict[str, Any]:
    path = Path(os.environ[VARIABLE]) / POISON
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _crash_over(path: Path, *args: Any, **options: Any) -> None:
    """Read address 0, as a decoder may that believes what a file says."""
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() in _poison()["sha256s"]:
        note("crash")
        ctypes.string_at(0)


def _swell_over(worker: Any, work: Any) -> None:
    """End as the kernel ends a process that wants more memory than there is; or take a while."""
    time.sleep(_poison()["pause_s"])
    if work.item.name in _poison()["names"]:
        note("crash")
        os.kill(os.getpid(), signal.SIGKILL)


# --- what is changed -------------------------------------------------------------------------


def _change_images(module: Any) -> None:
    _before(module, "read_image", _crash_over)


def _change_decode(module: Any) -> None:
    _before(module, "frames", _crash_over)


def _change_render(module: Any) -> None:
    worker, writer = module.ModelWorker, module._PartWriter
    _before(worker, "__init__", lambda worker, settings: note("model"))
    _before(worker, "_drawing", _swell_over)
    _after(writer, "__init__", lambda parts, store, item: note("begin", feature=item.uri))
    _after(writer, "close", lambda parts, facts: note("stored", feature=parts._item.uri))
    process = worker.process

    def noted(self: Any, bundle: Any) -> Any:
        number = secrets.token_hex(8)
        names = [module.name_of(work) for work in bundle]
        note("bundle", number=number, items=names)
        result = process(self, bundle)
        note("done", number=number)
        return result

    worker.process = noted


def _change_media_worker(module: Any) -> None:
    worker = module.MediaWorker
    _before(worker, "__init__", lambda worker, settings: note("media"))
    _after(worker, "_noted", lambda worker, record: note("made", item=record.name))


CHANGES: dict[str, Callable[[Any], None]] = {
    "kpmask.media.images": _change_images,
    "kpmask.media.decode": _change_decode,
    "tasks.render": _change_render,
    "tasks.media_worker": _change_media_worker,
}

"""Imports of thousands of modules, and the end of a process that made them.

What an import makes stays until the end, so whatever time the garbage collector spends on it is
lost: a third of the import of Prefect and PyTorch, and most of the second after the last line.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


def own_process() -> None:
    """Say that this process is ours from start to end: what it imports is never looked through."""
    gc.freeze()
    atexit.register(gc.freeze)  # else the interpreter looks through everything once more


@contextmanager
def many_imports() -> Iterator[None]:
    """Import without the garbage collector.

    In a process of our own what is there afterwards is left out of all later collections. In
    another's, where garbage may be among it, it is not.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count():
            gc.freeze()
        if was_on:
            gc.enable()

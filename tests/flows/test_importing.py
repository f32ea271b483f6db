"""Imports without the garbage collector, in a process of our own and in another's."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from flows.importing import many_imports

OWN = """
import atexit, gc, sys
from flows.importing import many_imports, own_process
atexit.register(lambda: print(gc.get_freeze_count() > at_the_end, "at the end"))
own_process()
before = gc.get_freeze_count()
with many_imports():
    print(gc.isenabled(), "during")
    made = [[] for _ in range(100_000)]
print(gc.isenabled(), "after", gc.get_freeze_count() - before >= 100_000)
at_the_end = gc.get_freeze_count()
more = [[] for _ in range(100)]
"""


def test_in_a_process_of_our_own_what_is_imported_is_never_looked_through() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OWN], capture_output=True, text=True, timeout=60, check=True
    )
    said = ["False during", "True after True", "True at the end"]
    assert done.stdout.splitlines() == said, done.stderr


class Ring:
    def __init__(self) -> None:
        self.itself = self


def test_in_anothers_process_garbage_stays_garbage() -> None:
    """And the collector is on again, whatever the import came to."""
    with pytest.raises(ImportError), many_imports():
        ring = weakref.ref(Ring())
        raise ImportError
    assert gc.isenabled()
    gc.collect()
    assert ring() is None
    assert gc.get_freeze_count() == 0

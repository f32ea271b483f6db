"""The stages of a run in this process, one item after another.

For tests of what a run decides, where processes would only take time: what workers are given and
return is pickled all the same.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from kpmask.config import Cluster
from kpmask.errors import ItemError
from kpmask.records import Failure, Progress
from tasks.cluster import Outcome, Pending


def copied(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def run_inline(
    items: Iterable[Any],
    worker: type[Any],
    worker_args: tuple[Any, ...],
    *,
    key: Callable[[Any], str],
    stage: str,
    cluster: Cluster,
    total: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Outcome[Any, Any]]:
    """`tasks.cluster.run_items` without actors, and without second attempts."""
    host = worker(*copied(worker_args))
    for item in items:
        if stop is not None and stop.is_set():
            return
        if isinstance(item, Pending):
            time.sleep(0.002)
            continue
        try:
            yield Outcome(item, copied(host.process(copied(item))), None)
        except ItemError as error:
            failure = Failure(key(item), stage, error.code, error.cause, error.retryable, 1)
            yield Outcome(item, None, failure)


def inline_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the preprocess job run its stages here, for the test."""
    monkeypatch.setattr("tasks.preprocess.run_items", run_inline)
    monkeypatch.setattr("tasks.fetching.run_items", run_inline)
    monkeypatch.setattr("tasks.preprocess.ray_session", nullcontext)

"""The stages of a run in this process, one item after another.

For tests of what a run decides, where processes would only take time: what workers are given and
return is pickled all the same.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest

from kpmask.config import Cluster
from kpmask.errors import ItemError, KpmaskError
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


def run_bundles_inline(
    bundles: Iterable[Sequence[Any] | Pending],
    worker: type[Any],
    worker_args: tuple[Any, ...],
    *,
    key: Callable[[Any], str],
    stage: Callable[[Any], str],
    cluster: Cluster,
    total: int,
    stop: threading.Event | None = None,
    also_cpus: float = 0.0,
) -> Iterator[Outcome[Any, Any]]:
    """`tasks.cluster.run_bundles` without actors, and without second attempts."""
    host = worker(*copied(worker_args))
    for bundle in bundles:
        if stop is not None and stop.is_set():
            return
        if isinstance(bundle, Pending):
            time.sleep(0.002)
            continue
        for item, found in zip(bundle, _processed(host, tuple(bundle)), strict=True):
            if isinstance(found, ItemError):
                failure = Failure(
                    key(item), stage(item), found.code, found.cause, found.retryable, 1
                )
                yield Outcome(item, None, failure)
            elif isinstance(found, KpmaskError):
                raise found
            else:
                yield Outcome(item, found, None)


def _processed(host: Any, bundle: tuple[Any, ...]) -> Sequence[Any]:
    """What became of each item; the error of a bundle of one is that item's."""
    if not bundle:
        return []
    try:
        return copied(host.process(copied(bundle)))
    except ItemError as error:
        if len(bundle) > 1:
            raise
        return [error]


def inline_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the preprocess job run its stages here, for the test."""
    monkeypatch.setattr("tasks.preprocess.run_items", run_inline)
    monkeypatch.setattr("tasks.fetching.run_items", run_inline)
    monkeypatch.setattr("tasks.preprocess.ray_session", nullcontext)


def inline_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the evaluate job score here, for the test."""
    monkeypatch.setattr("tasks.evaluate.run_items", run_inline)
    monkeypatch.setattr("tasks.evaluate.ray_session", nullcontext)

"""What the flows share: running one, its progress, and which failures are worth a retry.

One Prefect task is one whole stage. Items are retried inside a stage, stages by Prefect, and what
is done is known from the manifests in the store, never from Prefect's database. So Prefect is
where a run is seen and scheduled; when its server goes away in mid-run the work goes on.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID

import httpx
from prefect import Flow, Task, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import MissingContextError, PrefectHTTPStatusError
from prefect.logging import get_run_logger

from flows.server import prefect_api
from kpmask.errors import ItemError, KpmaskError, RunFailed
from kpmask.records import Progress

J = TypeVar("J")
R = TypeVar("R")
P = ParamSpec("P")
ProgressSink = Callable[[Progress], None]

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
STAGE_RETRIES = 2
STAGE_RETRY_DELAYS_S = [5.0, 30.0]
REPORT_EVERY_S = 5.0

# The server is away, or does not take what it was told.
API_ERRORS = (httpx.HTTPError, PrefectHTTPStatusError, OSError)

_log = logging.getLogger("kpmask.flows")
_sink: ContextVar[ProgressSink | None] = ContextVar("kpmask_progress_sink", default=None)


# --- one run ---------------------------------------------------------------------------------


@dataclass
class _Outcome:
    """What the flow body came to, kept beside Prefect in case that Prefect cannot tell."""

    result: list[Any] = field(default_factory=list)
    server_lost: bool = False


_outcome: ContextVar[_Outcome | None] = ContextVar("kpmask_outcome", default=None)


def run_flow(
    flow: Flow[Concatenate[J, ...], R], job: J, *, on_progress: ProgressSink | None = None
) -> R:
    """Run a flow in this process and return its result.

    Args:
        flow: a flow whose first parameter is the job; others have defaults.
        job: that parameter.
        on_progress: called with every `Progress` of every stage.

    Raises:
        KpmaskError: what a stage raised, as it was raised.
        RunFailed: `server_unavailable`: the Prefect API does not answer.
    """
    outcome = _Outcome()
    with prefect_api(), progress_to(on_progress), _quiet():
        token = _outcome.set(outcome)
        try:
            result: R = flow(job)
            return result
        except API_ERRORS as error:
            result = _despite(error, outcome)
            return result
        finally:
            _outcome.reset(token)


def finished(result: R) -> R:
    """Mark a flow's work as done: from here on, losing the Prefect server loses nothing."""
    outcome = _outcome.get()
    if outcome is not None:
        outcome.result.append(result)
    return result


def tell_prefect(what: str, call: Callable[[], R]) -> R | None:
    """Tell Prefect something that the run can do without; None when it could not be told.

    A server that was lost once is left alone for the rest of the run, because every further call
    would wait for it.
    """
    outcome = _outcome.get() or _Outcome()
    if outcome.server_lost:
        return None
    try:
        return call()
    except API_ERRORS as error:
        outcome.server_lost = True
        _log.warning("Prefect was not told of the %s: %s", what, error)
        return None


def _despite(error: BaseException, outcome: _Outcome) -> Any:  # noqa: ANN401 - the flow's result
    """The flow's result, or what really ended it, when only Prefect's reporting has failed."""
    for cause in _chain(error):
        if isinstance(cause, KpmaskError | KeyboardInterrupt):
            raise cause from None
    if outcome.result:
        _log.warning("the run is done, but the Prefect server was not told: %s", error)
        return outcome.result[-1]
    if isinstance(error, OSError):
        raise error
    raise RunFailed(
        f"the Prefect server was lost: {error}",
        code="server_unavailable",
        hint="run the same command again; finished work is kept",
        retryable=True,
    ) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


class _NotOurErrors(logging.Filter):
    """Drops what Prefect says of errors that the caller gets and shows in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info is None:
            return not str(record.msg).startswith(("Finished in state", "Crash detected"))
        handled = (KpmaskError, KeyboardInterrupt, *API_ERRORS)
        return not any(isinstance(error, handled) for error in _chain(record.exc_info[1]))


@contextmanager
def _quiet() -> Iterator[None]:
    only_others = _NotOurErrors()
    loggers = [logging.getLogger(name) for name in ("prefect.flow_runs", "prefect.task_runs")]
    for logger in loggers:
        logger.addFilter(only_others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(only_others)


# --- stages ---------------------------------------------------------------------------------


def stage(name: str, *, timeout_s: float) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Decorate the function that runs one whole stage: its retries, time limit, no stored result.

    State is in our manifests, so Prefect caches nothing and keeps no pickle of a result.
    """
    return task(
        name=name,
        retries=STAGE_RETRIES,
        retry_delay_seconds=STAGE_RETRY_DELAYS_S,
        retry_condition_fn=worth_retrying,
        timeout_seconds=timeout_s,
        cache_policy=NO_CACHE,
        persist_result=False,
    )


def worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed stage may succeed later: only where the error itself says so."""
    del task, task_run
    error = state.result(raise_on_failure=False)
    retry = isinstance(error, KpmaskError) and error.retryable and not isinstance(error, ItemError)
    if retry:
        _log.warning("%s; trying again", error)
    return retry


# --- progress --------------------------------------------------------------------------------


@contextmanager
def progress_to(sink: ProgressSink | None) -> Iterator[None]:
    """Send the progress of flows that run inside this context to `sink` as well."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


class StageProgress:
    """The `on_progress` of a stage: to the sink at once, to Prefect every few seconds.

    Prefect gets a log line and, where it has steps, a progress artifact for each `Progress.stage`.
    """

    def __init__(self) -> None:
        self._sink = _sink.get()
        self._artifacts: dict[str, UUID] = {}
        self._next_report_s = 0.0

    def __call__(self, progress: Progress) -> None:
        if self._sink is not None:
            self._sink(progress)
        now_s = time.monotonic()
        last = progress.done >= progress.total > 0
        if last or now_s >= self._next_report_s:
            self._next_report_s = now_s + REPORT_EVERY_S
            self._report(progress)

    def _report(self, progress: Progress) -> None:
        percent = 100 * progress.done / progress.total if progress.total else 0.0
        text = f"{progress.stage}: {progress.done}/{progress.total} {progress.message}".rstrip()
        run_logger().info(text)
        known = self._artifacts.get(progress.stage)
        if known is not None:
            tell_prefect(
                "progress", lambda: update_progress_artifact(known, percent, description=text)
            )
            return
        if progress.total <= 1:
            return  # a bar that is empty or full says no more than the log
        key = artifact_key(progress.stage, "progress")
        made = tell_prefect(
            "progress", lambda: create_progress_artifact(percent, key=key, description=text)
        )
        if isinstance(made, UUID):
            self._artifacts[progress.stage] = made


def artifact_key(*parts: str) -> str:
    """A key that Prefect takes: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def run_logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    """Prefect's logger of the current run; outside of one, ours."""
    try:
        return get_run_logger()
    except MissingContextError:
        return _log

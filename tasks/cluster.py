"""The Ray session, and items worked on by a pool of Ray actors.

A pool's actor has one item, or one bundle of items, in flight. Where a process dies over a bundle
nobody knows whose fault it was, and its items are done again one by one; where it dies over one
item, that item is to blame. Actors do not restart by themselves: a new one replaces the dead one
here, and who killed too many is given up. (Ray Data restarts for ever, or drops whole blocks, on
such an item.)

A store that does not answer is nobody's fault: what needs it waits, for `cluster.outage_s`.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import itertools
import logging
import os
import random
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, TypeVar

from kpmask.config import Cluster
from kpmask.errors import ConfigError, ItemError, KpmaskError, RunFailed
from kpmask.records import Failure, Progress
from tasks.actors import (
    Reply,
    Variables,
    death_cause,
    error_reply,
    first_line,
    kill,
    reply_of,
    shortened,
)
from tasks.outage import MIN_REFUSALS, Outage, pause_s, store_is_away

if TYPE_CHECKING:
    from ray.job_config import JobConfig

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES: Final = 512 * 2**20  # records and small arrays only: pixels travel in files
SHARED_MEMORY_FRACTION: Final = 0.8
BACKOFF_S: Final = 0.5  # before the second attempt; doubles with each
MAX_BACKOFF_S: Final = 30.0
MAX_WAIT_S: Final = 5.0
STOP_S: Final = 0.5  # until a request to stop is seen
STARVED_S: Final = 0.05  # until a source that had nothing is asked again
LOOK_S: Final = 5.0  # between two looks at how large the cluster is
CONNECT_TIMEOUT_S: Final = 10.0
MAX_START_DEATHS: Final = 3
ROOT: Final = str(Path(__file__).parents[1])

_jitter = random.Random()  # noqa: S311 - of its own: the caller's random state is not touched

# --- session ---------------------------------------------------------------------------------


@contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[None]:
    """Ray for the duration: the cluster at RAY_ADDRESS, else one of our own on this machine.

    A local one listens on the loopback interface only and is gone afterwards. One that is
    initialised already is used and left alone.

    Args:
        num_cpus: of a local one; None for all.

    Raises:
        ConfigError: RAY_ADDRESS cannot be used.
    """
    with environment({"RAY_USAGE_STATS_ENABLED": "0"}):
        import ray

        if ray.is_initialized():
            yield
            return
        address = os.environ.get("RAY_ADDRESS", "")
        with contextlib.nullcontext() if address else _loopback(), _messages_in_log():
            _start(address, num_cpus)
            try:
                yield
            finally:
                ray.shutdown()


def _start(address: str, num_cpus: int | None) -> None:
    import ray

    # Ray stretches the driver's logging otherwise, and prints every worker's lines.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    quiet["job_config"] = _job_config()
    if not address or address == "local":
        with _few_processes():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_object_store_bytes(),
                **quiet,
            )
        return
    if address.startswith("ray://"):
        raise ConfigError(
            "Ray Client connections do not survive a lost connection",
            subject="RAY_ADDRESS",
            hint="run on a node of the cluster with RAY_ADDRESS=auto, or submit a Ray job",
        )
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {first_line(error)}",
            subject="RAY_ADDRESS",
            hint="start one (ray start --head), or unset it to use this machine",
        ) from error


def _job_config() -> JobConfig:
    """Have workers import this package, whatever lies in the folder in which a command was typed.

    Ray puts that folder first on their path, and `tasks.py` is what many a project has.
    """
    from ray.job_config import JobConfig

    class OursFirst(JobConfig):
        def _serialize(self) -> str:
            if ROOT not in self._py_driver_sys_path:
                self._py_driver_sys_path.append(ROOT)  # the last is put before the others
            return super()._serialize()

    return OursFirst()


def _object_store_bytes() -> int:
    """A modest object store that fits into shared memory (Docker gives 64 MB by default)."""
    try:
        free_bytes = shutil.disk_usage("/dev/shm").free  # noqa: S108 - where Ray puts it
    except OSError:
        return OBJECT_STORE_BYTES
    # Ray's minimum is 75 MB; below that it goes to /tmp by itself, only slower.
    return max(80 * 2**20, min(OBJECT_STORE_BYTES, int(free_bytes * SHARED_MEMORY_FRACTION)))


@contextmanager
def _few_processes() -> Iterator[None]:
    """Have Ray start without the three processes that only look on.

    They are most of the time that a local Ray takes to start, and `ray.init` has no switch for
    them: the autoscaler, where no node can be added; the reader of logs, where `log_to_driver` is
    off; and the dashboard's, which without a dashboard only tells Ray's makers of the use of it.
    """
    from ray._private.node import Node

    def none(self: Node) -> None:
        """No such process."""

    def no_dashboard(self: Node, **_: Any) -> None:  # noqa: ANN401 - Ray's own
        self._webui_url = ""  # as Ray does where there is none

    instead = {
        "start_monitor": none,
        "start_log_monitor": none,
        "start_api_server": no_dashboard,
    }
    before = {name: getattr(Node, name) for name in instead}
    for name, method in instead.items():
        setattr(Node, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


@contextmanager
def _loopback() -> Iterator[None]:
    """Settings that keep a local Ray to this machine and to this process tree."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    # The one switch that makes Ray take 127.0.0.1 for its node and bind to it.
    settings = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    if not any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        # Else Ray writes a token into the home folder, which there may not be.
        settings["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    enabled = ray_constants.ENABLE_RAY_CLUSTER  # read from the variable when Ray was imported
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with environment(settings):
            AuthenticationTokenLoader.instance().reset_cache()
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _messages_in_log() -> Iterator[None]:
    """Have what Ray tells of lost nodes and processes in our log.

    It would go to the standard output, whatever `log_to_driver` says, among a run's results.
    """
    from ray._private import worker

    def logged(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        log.info("Ray: %s", " ".join(data["lines"]))  # the pool warns of what concerns it

    original = worker.print_to_stdstream
    worker.print_to_stdstream = logged
    try:
        yield
    finally:
        worker.print_to_stdstream = original


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process, and of those that it starts, for the duration."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- items -----------------------------------------------------------------------------------

T = TypeVar("T")
R = TypeVar("R")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class Worker(Protocol[T_contra, R_co]):
    """What runs in an actor: made once, then given one item after another."""

    def process(self, item: T_contra, /) -> R_co: ...


class BundleWorker(Protocol[T_contra, R_co]):
    """What runs in an actor: made once, then given one bundle of items after another.

    `process` returns what became of each item, in their order: a result, or the error that it
    would have raised for that item alone.
    """

    def process(self, bundle: tuple[T_contra, ...], /) -> Sequence[R_co | KpmaskError]: ...


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T, R]):
    """What became of an item: a result or a failure."""

    item: T
    result: R | None
    failure: Failure | None


class Pending:
    """What a source of items yields when the next one is not there yet."""


PENDING: Final = Pending()


def run_items(
    items: Iterable[T | Pending],
    worker: type[Worker[T, R]],
    worker_args: tuple[Any, ...],
    *,
    key: Callable[[T], str],
    stage: str,
    cluster: Cluster,
    total: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Outcome[T, R]]:
    """Work on items in actors, each with a `worker(*worker_args)`; outcomes as they come.

    - An `ItemError` is the item's `Failure`; where a retry can help it is tried again with
      back-off, `cluster.max_attempts` times in all. An exception that is no `KpmaskError` is a
      `Failure` of code `bug`.
    - An item whose process died `cluster.max_deaths` times is a `Failure` of code `worker_died`;
      one that takes longer than `cluster.item_timeout_s` is a `Failure` of code `timeout`.
    - Where a store is away (`tasks.outage`) the item is tried again until it is back, which counts
      as no attempt, for up to `cluster.outage_s`.
    - Any other `KpmaskError` ends the run: what is in flight settles and is yielded, then it is
      raised.
    - The pool is looked after: an actor that died is replaced, and with `cluster.num_workers` None
      there are more as soon as there is room for more.
    - Our AWS and KPMASK variables are set in the workers, wherever they run.

    When the caller stops early (`close`, Ctrl-C) the actors are killed. Needs `ray_session`.

    Args:
        items: any number; only those in flight are held here. A source that waits for something
            yields `PENDING` meanwhile, and is asked again.
        key: the item's name in a `Failure`.
        stage: the stage's name in a `Failure` and in `Progress`.
        cluster: workers, their resources and the limits.
        total: how many items there are at most; needed where `items` has no length.
        on_progress: called after every outcome.
        stop: set by another thread, it ends the outcomes, whatever is in flight.

    Raises:
        ConfigError: the cluster has not the resources for one worker.
        RunFailed: no worker starts, within `cluster.item_timeout_s`.
    """
    total = len(items) if isinstance(items, Sized) else total
    assert total is not None, "a source without a length needs a total"
    if total == 0:
        return
    bundles = (item if isinstance(item, Pending) else (item,) for item in items)
    made = _Made(worker, worker_args, in_bundles=False)
    pool: _Pool[T, R] = _Pool(bundles, total, made, _Names(stage, key, lambda _: stage), cluster)
    num_failed = 0
    try:
        for number, outcome in enumerate(pool.outcomes(stop), start=1):
            num_failed += outcome.failure is not None
            if on_progress:
                message = f"{num_failed} failed" if num_failed else ""
                on_progress(Progress(stage, number, total, message))
            yield outcome
    finally:
        pool.kill()


def run_bundles(
    bundles: Iterable[Sequence[T] | Pending],
    worker: type[BundleWorker[T, R]],
    worker_args: tuple[Any, ...],
    *,
    key: Callable[[T], str],
    stage: Callable[[T], str],
    cluster: Cluster,
    total: int,
    stop: threading.Event | None = None,
    also_cpus: float = 0.0,
) -> Iterator[Outcome[T, R]]:
    """Work on items that go well together, as `run_items` does; an outcome for each, as they come.

    - An item whose error says that a retry can help is tried again alone. Those of a bundle whose
      store is away are tried again together.
    - A bundle over which the process died, or a bug or an `ItemError` was raised, or that takes
      longer than `cluster.item_timeout_s` for each of its items, is split: its items are tried
      alone, before anything new, and what befalls one then is its own.

    Args:
        bundles: any number; only those in flight are held here. `PENDING` as for `run_items`.
        worker: is given a tuple of items at a time.
        key: an item's name in a `Failure`.
        stage: an item's stage in a `Failure`.
        cluster: workers, their resources and the limits.
        total: how many items there are at most, in all bundles.
        stop: set by another thread, it ends the outcomes, whatever is in flight.
        also_cpus: what actors that each worker starts by itself take. There are only as many
            workers as there is room for with theirs.

    Raises:
        ConfigError: the cluster has not the resources for one worker.
        RunFailed: no worker starts, within `cluster.item_timeout_s`.
    """
    if total == 0:
        return
    made = _Made(worker, worker_args, in_bundles=True)
    names = _Names(worker.__name__, key, stage)
    pool: _Pool[T, R] = _Pool(bundles, total, made, names, cluster, also_cpus)
    try:
        yield from pool.outcomes(stop)
    finally:
        pool.kill()


@dataclass(frozen=True, slots=True)
class _Made:
    """How a worker is made, and whether it takes a bundle or one item."""

    worker: type[Worker[Any, Any] | BundleWorker[Any, Any]]
    args: tuple[Any, ...]
    in_bundles: bool


class _Host:
    """The actor: holds a worker, and answers with `Reply`."""

    def __init__(self, variables: Variables) -> None:
        # Until the worker is made: what comes before are imports, of what stays (see `start`).
        gc.disable()
        os.environ.update(variables.values)
        self._worker: Any = None
        self._in_bundles = False

    def up(self) -> None:
        """Returns as soon as the process runs."""

    def start(self, made: _Made) -> Reply:
        def make() -> None:
            self._in_bundles = made.in_bundles
            self._worker = made.worker(*made.args)

        try:
            return reply_of(make)
        finally:
            gc.freeze()  # modules are not looked through in every collection
            gc.enable()

    def process(self, items: tuple[Any, ...]) -> Reply:
        return reply_of(lambda: self._replies(items))

    def _replies(self, items: tuple[Any, ...]) -> list[Reply]:
        if not self._in_bundles:
            return [Reply("result", self._worker.process(item)) for item in items]
        found = list(self._worker.process(items))
        if len(found) != len(items):
            raise ValueError(f"{len(found)} results of {len(items)} items")
        return [error_reply(x) if isinstance(x, KpmaskError) else Reply("result", x) for x in found]


@dataclass(slots=True, eq=False)
class _Task(Generic[T]):
    """An item on its way. `attempts` counts those starts that were its own; `refusals` is how often
    its store was away."""

    index: int
    item: T
    attempts: int = 0
    deaths: int = 0
    refusals: int = 0


@dataclass(slots=True, eq=False)
class _Slot(Generic[T]):
    """An actor and what it is doing: coming up, starting its worker, or a bundle of tasks."""

    actor: Any
    phase: Literal["up", "start", "process"] = "up"
    bundle: Sequence[_Task[T]] = ()
    deadline: float = float("inf")  # by time.monotonic()


@dataclass(frozen=True, slots=True)
class _Names(Generic[T]):
    """What the pool, an item, and an item's stage are called."""

    pool: str
    key: Callable[[T], str]
    stage: Callable[[T], str]


class _Pool(Generic[T, R]):
    """The dispatcher. All its state is about what is in flight or waits for another attempt."""

    def __init__(
        self,
        bundles: Iterable[Sequence[T] | Pending],
        total: int,
        made: _Made,
        names: _Names[T],
        cluster: Cluster,
        also_cpus: float = 0.0,
    ) -> None:
        import ray

        self._fresh = iter(bundles)
        self._numbers = itertools.count()
        self._exhausted = False  # no fresh item will come
        self._starved = False  # the source had none at the last look
        self._num_open = 0  # taken from the source, and not yet an outcome
        self._num_left = total  # not yet an outcome, at most
        self._names, self._cluster, self._also_cpus = names, cluster, also_cpus
        _refuse_if_none_fits(cluster, also_cpus)
        self._made = ray.put(made)  # once in the object store, however many actors fetch it
        self._look_at = 0.0  # by time.monotonic()
        self._has_room = True
        self._slots: dict[Any, _Slot[T]] = {}  # by the reference that is waited for
        self._idle: list[_Slot[T]] = []
        self._waiting: list[tuple[float, int, Sequence[_Task[T]]]] = []  # a heap by time
        self._outage = Outage(cluster.outage_s)
        self._start_deaths = 0
        self._start_refused = False
        self._abort: KpmaskError | None = None
        self._ready: list[Outcome[T, R]] = []

    def outcomes(self, stop: threading.Event | None) -> Iterator[Outcome[T, R]]:
        longest_s = MAX_WAIT_S if stop is None else STOP_S
        self._fill()
        while not self._settled():
            if stop is not None and stop.is_set():
                return
            self._dispatch()
            if self._finished():
                break
            for reference in self._wait(longest_s):
                self._handle(self._slots.pop(reference), reference)
            self._kill_late()
            self._dispatch()  # before the caller works on what follows
            self._look()
            while self._ready:
                yield self._ready.pop(0)
        if self._abort:
            raise self._abort

    def _finished(self) -> bool:
        """Whether every item of the source has become an outcome that the caller has seen."""
        return self._exhausted and not self._num_open and not self._ready

    def _settled(self) -> bool:
        """Whether the run was aborted and nothing is in flight any more."""
        return self._abort is not None and not any(slot.bundle for slot in self._slots.values())

    # --- actors

    def _look(self) -> None:
        """Now and then, see whether the cluster has grown. Who has idle actors needs no more."""
        if time.monotonic() >= self._look_at and not self._idle:
            self._fill()

    def _fill(self) -> None:
        """Have as many actors as are wanted now; the rest of the dead are not replaced."""
        self._look_at = time.monotonic() + LOOK_S
        if self._abort:
            return
        for _ in range(self._num_actors, self._num_wanted()):
            self._add_actor()

    @property
    def _num_actors(self) -> int:
        return len(self._slots) + len(self._idle)

    def _num_wanted(self) -> int:
        """One for every item that is left, as far as they fit or were asked for.

        Of those that were asked for, some may be pending: this is what makes a cluster grow that
        does so on demand. One is wanted even if none fits, and takes the next place that comes.
        """
        fits = num_fitting(self._cluster, self._also_cpus)
        self._note_room(fits >= 1)
        wanted = self._cluster.num_workers or fits
        if self._also_cpus:  # a worker too many would take the place of another's helpers
            wanted = min(wanted, fits)
        left = self._num_open if self._exhausted else max(self._num_left, 1)
        return int(min(max(wanted, 1), left))

    def _note_room(self, has_room: bool) -> None:
        if self._has_room and not has_room:
            log.warning("%s: no worker fits into the cluster; waiting for nodes", self._names.pool)
        self._has_room = has_room

    def _add_actor(self) -> None:
        import ray

        host: Any = ray.remote(
            num_cpus=self._cluster.cpus_per_worker,
            num_gpus=self._cluster.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
        )(_Host)
        actor = host.remote(Variables.ours())
        self._slots[actor.up.remote()] = _Slot(actor)

    # --- sending

    def _dispatch(self) -> None:
        while self._idle and not self._abort:
            bundle = self._next_bundle()
            if not bundle:
                return
            slot = self._idle.pop()
            for task in bundle:
                task.attempts += 1
            slot.phase, slot.bundle = "process", bundle
            slot.deadline = time.monotonic() + self._time_s(bundle)
            self._slots[slot.actor.process.remote(tuple(task.item for task in bundle))] = slot

    def _time_s(self, bundle: Sequence[_Task[T]]) -> float:
        return self._cluster.item_timeout_s * max(len(bundle), 1)

    def _next_bundle(self) -> Sequence[_Task[T]]:
        """What is to be sent next; empty for nothing now."""
        if self._waiting and self._waiting[0][0] <= time.monotonic():
            return heapq.heappop(self._waiting)[2]
        self._starved = False
        # Else all of the source would be held here by the end of an outage.
        if self._outage.is_on and len(self._waiting) >= 2 * self._num_actors:
            return ()
        for items in self._fresh:
            if isinstance(items, Pending):
                self._starved = True
                return ()
            if items:
                self._num_open += len(items)
                return [_Task(next(self._numbers), item) for item in items]
        self._exhausted = True
        return ()

    def _send_later(self, bundle: Sequence[_Task[T]], delay_s: float) -> None:
        # An item waits in one bundle only, so no two entries are alike in time and index.
        heapq.heappush(self._waiting, (time.monotonic() + delay_s, bundle[0].index, bundle))

    # --- receiving

    def _wait(self, longest_s: float) -> list[Any]:
        import ray

        now = time.monotonic()
        until = [slot.deadline for slot in self._slots.values()]
        if not self._idle:
            until.append(self._look_at)
        if self._idle and self._waiting:
            until.append(self._waiting[0][0])
        if self._idle and self._starved:
            until.append(now + STARVED_S)
        timeout_s = min(max(min(until, default=now) - now, 0.01), longest_s)
        if not self._slots:  # every actor is idle until a back-off is over, or there is none
            time.sleep(timeout_s)
            return []
        references = list(self._slots)
        if not ray.wait(references, num_returns=1, timeout=timeout_s)[0]:
            return []
        # All that is there, so that nothing finished is taken for late.
        return list(ray.wait(references, num_returns=len(references), timeout=0)[0])

    def _handle(self, slot: _Slot[T], reference: Any) -> None:  # noqa: ANN401 - an ObjectRef
        import ray
        from ray import exceptions

        try:
            reply = ray.get(reference)
        except exceptions.RayTaskError as error:  # the answer could not be sent, say
            reply = Reply("bug", shortened(f"{type(error.cause).__name__}: {error.cause}"))
        except exceptions.RayError as error:
            self._buried(slot, error)
            return
        if slot.phase == "up":
            slot.phase = "start"
            slot.deadline = time.monotonic() + self._cluster.item_timeout_s
            self._slots[slot.actor.start.remote(self._made)] = slot
        elif slot.phase == "start":
            self._started(slot, reply)
        else:
            self._processed(slot, reply)

    def _started(self, slot: _Slot[T], reply: Reply) -> None:
        if reply.kind == "result":
            self._start_deaths = 0
            if self._start_refused:
                self._outage.answered()
                self._start_refused = False
            self._release(slot)
        elif not isinstance(reply.value, KpmaskError):
            self._fail_start(reply.value)
        elif self._can_wait(reply.value, MIN_REFUSALS):
            self._start_refused = True
            kill(slot.actor)  # the next look adds another
        else:
            self._abort = self._abort or reply.value

    def _processed(self, slot: _Slot[T], reply: Reply) -> None:
        bundle = slot.bundle
        self._release(slot)
        if reply.kind == "result":
            self._settle_each(bundle, reply.value)
        elif reply.kind == "abort":
            self._refused(bundle, reply.value)
        elif len(bundle) > 1:
            self._split(bundle, str(reply.value))
        else:
            self._settle(bundle[0], reply)

    def _settle_each(self, bundle: Sequence[_Task[T]], replies: Sequence[Reply]) -> None:
        refused = []
        for task, reply in zip(bundle, replies, strict=True):
            if reply.kind == "abort":
                refused.append((task, reply.value))
            else:
                self._settle(task, reply)
        if refused:  # after the others, whose success ends an outage
            errors = [error for _, error in refused]
            worst = next((error for error in errors if not store_is_away(error)), errors[0])
            self._refused([task for task, _ in refused], worst)

    def _settle(self, task: _Task[T], reply: Reply) -> None:
        if reply.kind == "result":
            self._outage.answered()
            self._finish(task, result=reply.value)
        elif reply.kind == "bug":
            self._fail(task, "bug", reply.value)
        else:
            error: ItemError = reply.value
            if error.retryable and task.attempts < self._cluster.max_attempts:
                self._retry(task)
            else:
                self._fail(task, error.code, _item_cause(error), retryable=error.retryable)

    def _refused(self, bundle: Sequence[_Task[T]], error: KpmaskError) -> None:
        """A store's fault, which is waited for; anything else ends the run."""
        if not self._can_wait(error, bundle[0].refusals + 1):
            self._abort = self._abort or error
            return
        for task in bundle:
            task.attempts -= 1
            task.refusals += 1
        self._send_later(bundle, pause_s(bundle[0].refusals))

    def _can_wait(self, error: KpmaskError, refusals: int) -> bool:
        return store_is_away(error) and self._outage.refused(error, refusals)

    def _split(self, bundle: Sequence[_Task[T]], cause: str) -> None:
        """Try each item alone, at once: nobody knows whose fault it was."""
        log.warning("%s: %d items are tried one by one: %s", self._names.pool, len(bundle), cause)
        for task in bundle:
            task.attempts -= 1
            self._send_later([task], 0.0)

    def _release(self, slot: _Slot[T]) -> None:
        slot.bundle, slot.deadline = (), float("inf")
        self._idle.append(slot)

    def _retry(self, task: _Task[T]) -> None:
        delay_s = min(BACKOFF_S * 2.0 ** (task.attempts - 1), MAX_BACKOFF_S)
        delay_s *= _jitter.uniform(0.5, 1.0)  # so that retries do not come together
        self._send_later([task], delay_s)

    def _finish(self, task: _Task[T], *, result: R) -> None:
        self._close(Outcome(task.item, result, None))

    def _fail(self, task: _Task[T], code: str, cause: str, *, retryable: bool = False) -> None:
        failure = Failure(
            item=self._names.key(task.item),
            stage=self._names.stage(task.item),
            code=code,
            cause=cause,
            retryable=retryable,
            attempts=task.attempts,
        )
        self._close(Outcome(task.item, None, failure))

    def _close(self, outcome: Outcome[T, R]) -> None:
        self._num_open -= 1
        self._num_left -= 1
        self._ready.append(outcome)

    # --- death

    def _buried(self, slot: _Slot[T], error: Exception) -> None:
        """An actor died (or cannot be reached, and is killed to be sure): replace it."""
        kill(slot.actor)
        cause = death_cause(error)
        log.warning("%s: a worker died: %s", self._names.pool, cause)
        if not slot.bundle:
            self._start_deaths += "node has died" not in str(error)  # whoever was on it
            if self._start_deaths >= MAX_START_DEATHS:
                self._fail_start(cause)
        else:
            self._start_deaths = 0
            self._blame_one_of(slot.bundle, error, cause)
        self._fill()

    def _blame_one_of(self, bundle: Sequence[_Task[T]], error: Exception, cause: str) -> None:
        if len(bundle) > 1:
            self._split(bundle, cause)
        else:
            self._blame(bundle[0], error, cause)

    def _blame(self, task: _Task[T], error: Exception, cause: str) -> None:
        task.deaths += not getattr(error, "preempted", False)  # the machine was taken away
        if task.deaths >= self._cluster.max_deaths:
            self._fail(task, "worker_died", cause, retryable=True)
        else:
            self._retry(task)

    def _fail_start(self, cause: str) -> None:
        self._abort = self._abort or RunFailed(
            f"the workers do not start: {cause}", subject=self._names.pool, code="no_output"
        )

    def _kill_late(self) -> None:
        now = time.monotonic()
        for reference, slot in list(self._slots.items()):
            if slot.deadline > now:
                continue
            del self._slots[reference]
            kill(slot.actor)
            self._late(slot.bundle)
            self._fill()

    def _late(self, bundle: Sequence[_Task[T]]) -> None:
        cause = f"not finished after {self._time_s(bundle):g} s (cluster.item_timeout_s)"
        if not bundle:
            self._fail_start(cause)
        elif len(bundle) > 1:
            self._split(bundle, cause)
        else:
            self._fail(bundle[0], "timeout", cause, retryable=True)

    def kill(self) -> None:
        """End every actor at once, whatever it is doing."""
        for slot in [*self._slots.values(), *self._idle]:
            kill(slot.actor)
        self._slots.clear()
        self._idle.clear()


def num_fitting(cluster: Cluster, also_cpus: float) -> float:
    """How many workers, with their helpers, the cluster as it is now has the resources for."""
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    fits = float("inf")
    if cluster.cpus_per_worker + also_cpus:
        fits = resources.get("CPU", 0.0) / (cluster.cpus_per_worker + also_cpus)
    if cluster.gpus_per_worker:
        fits = min(fits, resources.get("GPU", 0.0) / cluster.gpus_per_worker)
    return fits


def with_gpus(cluster: Cluster, device: str) -> Cluster:
    """A GPU for each worker, where the device may be one, Ray has any, and nobody said otherwise.

    An actor that asks for none sees none.
    """
    import ray

    if cluster.gpus_per_worker or device == "cpu":
        return cluster
    if ray.cluster_resources().get("GPU", 0.0) < 1:  # type: ignore[no-untyped-call]
        return cluster
    return cluster.model_copy(update={"gpus_per_worker": 1.0})


def _refuse_if_none_fits(cluster: Cluster, also_cpus: float) -> None:
    import ray

    if num_fitting(cluster, also_cpus) >= 1:
        return
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    helpers = f" (its helpers {also_cpus:g} of the CPUs)" if also_cpus else ""
    raise ConfigError(
        f"Ray has {resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs; a "
        f"worker wants {cluster.cpus_per_worker + also_cpus:g} and {cluster.gpus_per_worker:g}"
        f"{helpers}",
        subject="cluster",
        hint="lower cpus_per_worker or gpus_per_worker",
    )


def _item_cause(error: ItemError) -> str:
    """The error's text without its subject, which the failure names already."""
    return shortened(f"{error.cause} ({error.hint})" if error.hint else error.cause)

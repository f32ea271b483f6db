"""The jobs as Prefect deployments: preprocessing on a schedule, the others when asked.

`register` writes them to a Prefect server for the workers of a process pool; `serve` also runs
what is due, in this process. Either way a run's parameters are the job itself, so that Prefect's
UI shows every setting as a form, and a run is refused before it starts when one is wrong.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import Any, Final
from uuid import UUID
from zoneinfo import available_timezones

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import (
    ConcurrencyLimitConfig,
    ConcurrencyLimitStrategy,
    State,
    StateType,
)
from prefect.client.schemas.schedules import SCHEDULE_TYPES, IntervalSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner
from prefect.schedules import Cron, Interval, Schedule
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType

from flows.animate import animate_flow
from flows.compare import compare_flow
from flows.engine import API_ERRORS
from flows.environment import state_folder
from flows.evaluate import evaluate_flow
from flows.pipeline import pipeline_flow
from flows.preprocess import preprocess_flow
from flows.server import prefect_api
from flows.train import train_flow
from kpmask.errors import ConfigError, RunFailed
from kpmask.model_config import Part
from kpmask.records import digest

log = logging.getLogger(__name__)

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGES: Final = ("kpmask", "tasks", "flows")
POOL: Final = "kpmask"
SCHEDULED: Final = "preprocess"
MIN_INTERVAL_S: Final = 5.0  # how often Prefect looks for new schedules
MAX_INTERVAL_S: Final = 366 * 86400.0
FLOWS: Final[Mapping[str, Flow[..., Any]]] = {
    "preprocess": preprocess_flow,
    "train": train_flow,
    "animate": animate_flow,
    "evaluate": evaluate_flow,
    "compare": compare_flow,
    "pipeline": pipeline_flow,
}


@dataclass(frozen=True)
class Registered:
    """A deployment in the server: `name` is "flow/deployment", what `prefect` commands take.

    `when` is a cron expression, or as "every 600 s"; None: it is run when asked.
    """

    name: str
    pool: str
    when: str | None
    url: str


def register(
    jobs: Mapping[str, Part | Mapping[str, Any]],
    *,
    cron: str | None,
    every_s: float | None = None,
    timezone: str = "UTC",
    pool: str = POOL,
    name: str = POOL,
) -> list[Registered]:
    """Write one deployment of every job to the Prefect server, over those that are there.

    Args:
        jobs: settings by the job's name, whole or in part; what is missing is asked for when a
            run is started by hand.
        cron: when to preprocess; None for never.
        every_s: the same as the seconds from one run's start to the next one's, instead of `cron`.
        timezone: of `cron`.
        pool: the work pool whose workers run them; made, of type process, if it is not there.
        name: the deployments' name; the flow's name comes before it.

    Raises:
        ConfigError: no PREFECT_API_URL; a cron or timezone that is none; an interval that is too
            short; a schedule for a job that is not whole.
        RunFailed: `server_unavailable`.
    """
    deployments = build(jobs, cron=cron, every_s=every_s, timezone=timezone, name=name)
    _need_server()
    with prefect_api():
        _ensure_pool(pool)
        return [_apply(deployment, pool) for deployment in deployments]


def serve(
    jobs: Mapping[str, Part | Mapping[str, Any]],
    *,
    cron: str | None,
    every_s: float | None = None,
    timezone: str = "UTC",
    name: str = POOL,
) -> None:
    """Register the same deployments without a pool, and run what is due here until stopped.

    One run at a time. Ctrl-C and SIGTERM end it and pause the schedule. Runs that an earlier
    process left behind when it was killed are marked as crashed, so that they hold no place.

    Raises:
        ConfigError: as `register`; this folder has modules that runs would take for ours.
        RunFailed: as `register`; code `busy`: another process serves these.
    """
    deployments = build(jobs, cron=cron, every_s=every_s, timezone=timezone, name=name)
    _need_server()
    _need_own_modules(Path.cwd())
    names = [deployment.full_name for deployment in deployments]
    with prefect_api(), _served_here_alone(name):
        _end_lost_runs(names)
        try:
            with suppress(KeyboardInterrupt, asyncio.CancelledError):
                asyncio.run(_run_until_told(deployments))
        finally:
            _pause([d.full_name for d in deployments if d.schedules])
            _end_lost_runs(names)


def build(
    jobs: Mapping[str, Part | Mapping[str, Any]],
    *,
    cron: str | None,
    every_s: float | None = None,
    timezone: str = "UTC",
    name: str = POOL,
) -> list[RunnerDeployment]:
    """The deployments of all jobs, not yet registered.

    Raises:
        ConfigError: see `register`.
    """
    unknown = sorted(set(jobs) - set(FLOWS))
    if unknown:
        raise ConfigError(f"no job {unknown[0]!r}; there are: {', '.join(FLOWS)}", subject="deploy")
    schedule = _schedule(cron, every_s, timezone)
    if schedule is not None and not isinstance(jobs.get(SCHEDULED), Part):
        raise ConfigError(
            f"a schedule needs the whole {SCHEDULED} job: nobody is there to fill it in",
            subject="cron",
        )
    return [
        _deployment(job, flow, jobs.get(job), schedule if job == SCHEDULED else None, name)
        for job, flow in FLOWS.items()
    ]


def _deployment(
    job: str,
    flow: Flow[..., Any],
    settings: Part | Mapping[str, Any] | None,
    schedule: Schedule | None,
    name: str,
) -> RunnerDeployment:
    plain = settings.model_dump(mode="json") if isinstance(settings, Part) else settings
    # The next scheduled run continues what this one leaves, so a queue of them would be idle
    # work. Runs that somebody asked for wait for their turn.
    when_busy = (
        ConcurrencyLimitStrategy.ENQUEUE
        if schedule is None
        else ConcurrencyLimitStrategy.CANCEL_NEW
    )
    made = flow.to_deployment(
        name=name,
        schedule=schedule,
        parameters={} if plain is None else {"job": dict(plain)},
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=when_busy),
        tags=["kpmask", job],
        # By module, not by file: it holds wherever the package is installed.
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(made, RunnerDeployment)  # and no coroutine, outside of an event loop
    return made


def _schedule(cron: str | None, every_s: float | None, timezone: str) -> Schedule | None:
    if every_s is not None:
        return _interval(cron, every_s)
    if cron is None:
        return None
    if timezone not in available_timezones():
        raise ConfigError(f"no timezone {timezone!r}", subject="timezone", hint="as Europe/Berlin")
    try:
        return Cron(cron, timezone=timezone)
    except ValueError as error:
        raise ConfigError(
            f"not a cron expression: {cron!r}", subject="cron", hint="as '0 3 * * *'"
        ) from error


def _interval(cron: str | None, every_s: float) -> Schedule:
    if cron is not None:
        raise ConfigError("give cron or every, not both", subject="every")
    if not MIN_INTERVAL_S <= every_s <= MAX_INTERVAL_S:
        raise ConfigError(
            f"{every_s:g} s is not between {MIN_INTERVAL_S:g} s and {MAX_INTERVAL_S:g} s",
            subject="every",
        )
    return Interval(timedelta(seconds=every_s))


async def _run_until_told(deployments: Sequence[RunnerDeployment]) -> None:
    """What `prefect.serve` does, but SIGTERM ends it as Ctrl-C does, whatever it is just doing.

    Prefect's own handler raises SystemExit wherever the process happens to be. In the callback of
    a weak reference that is lost, and the process goes on; and nobody awaits its clean-up.
    """
    this = asyncio.current_task()
    assert this is not None
    end_when_told = partial(asyncio.get_running_loop().add_signal_handler, SIGTERM, this.cancel)
    end_when_told()
    runner = Runner(limit=1, pause_on_shutdown=False)
    for deployment in deployments:
        await runner.aadd_deployment(deployment)
    running = asyncio.create_task(runner.start())
    await asyncio.sleep(0)  # it has put its own handler there
    end_when_told()
    await running


@contextmanager
def _served_here_alone(name: str) -> Iterator[None]:
    """Hold the name on this machine, which a killed process gives back."""
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = digest([PREFECT_API_URL.value(), name])[:16]
    with (folder / f"serve-{key}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFailed(
                "another process on this machine serves these deployments already",
                subject=name,
                code="busy",
                hint="end it first: two would take one another's runs",
            ) from None
        yield


def _end_lost_runs(names: Sequence[str]) -> None:
    """Mark runs as crashed that no process is at work at, since none but ours would be.

    Such a run would keep the deployment's one place, and those that come due would be cancelled.
    """
    types = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING])
    at_work = FlowRunFilterState(type=types)
    try:
        with get_client(sync_client=True) as client:
            ours = FlowRunFilterDeploymentId(any_=_served(client, names))
            only = FlowRunFilter(state=at_work, deployment_id=ours)
            for run in client.read_flow_runs(flow_run_filter=only):
                gone: State[None] = Crashed(message="The process that ran it is gone.")
                client.set_flow_run_state(run.id, gone)
    except API_ERRORS as error:
        log.warning("runs that were lost could not be marked: %s", error)


def _served(client: SyncPrefectClient, names: Sequence[str]) -> list[UUID]:
    """The deployments that are there and are no pool's, whose workers see to their runs."""
    found = []
    for name in names:
        with suppress(ObjectNotFound):
            found.append(client.read_deployment_by_name(name))
    return [deployment.id for deployment in found if deployment.work_pool_name is None]


def _need_server() -> None:
    if not PREFECT_API_URL.value():
        raise ConfigError(
            "deployments are kept by a Prefect server, and none is named",
            subject="PREFECT_API_URL",
            hint="start one with `prefect server start` and set PREFECT_API_URL to its /api",
        )


def _need_own_modules(folder: Path) -> None:
    """Refuse a folder whose modules a run would import for ours: Prefect looks there first."""
    for name in PACKAGES:
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.is_file() and ROOT not in path.resolve().parents:
                raise ConfigError(
                    f"it has a module {name!r} of its own, which runs would import, not kpmask's",
                    subject=str(folder),
                    hint="serve from another folder",
                )


def _ensure_pool(pool: str) -> None:
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))


def _apply(deployment: RunnerDeployment, pool: str) -> Registered:
    deployment_id = deployment.apply(work_pool_name=pool)
    schedules = [s.schedule for s in deployment.schedules or []]
    ui = (PREFECT_UI_URL.value() or "").rstrip("/")
    return Registered(
        name=deployment.full_name,
        pool=pool,
        when=_words(schedules[0]) if schedules else None,
        url=f"{ui}/deployments/deployment/{deployment_id}",
    )


def _words(schedule: SCHEDULE_TYPES | None) -> str:
    if isinstance(schedule, IntervalSchedule):
        return f"every {schedule.interval.total_seconds():g} s"
    return str(getattr(schedule, "cron", schedule))


def _pause(names: Sequence[str]) -> None:
    try:
        with get_client(sync_client=True) as client:
            for name in names:
                client.pause_deployment(client.read_deployment_by_name(name).id)
    except API_ERRORS as error:
        log.warning("the schedule could not be paused: %s", error)

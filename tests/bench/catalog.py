"""What a catalog costs beside drawing its frames, and whether a long one stays as it began.

    python -m tests.bench.catalog growth --weights demo --json growth.json
    python -m tests.bench.catalog growth --preset taichi256 --frames 4 --sizes 1x1 4x4 12x8
    python -m tests.bench.catalog rehearse --images 1000 --videos 100 --folder DIR

growth: drawn people, N images by M driving videos, in three ways that take turns.

- alone: `stream_states` over states in memory, for every animation; one process, one thread.
- in one process: all that a run does from its plan to its records, with one worker that decodes
  and encodes by itself. What this takes, and what a profile says of it, is the work itself.
- catalog: the same with a worker in an actor and its media worker in another, as a run has them.

The clock starts when the workers are up and have made one animation: Ray's start, imports and the
loading of the model are not in it, nor are the plan and the page. Processor seconds are of all
processes. On a shared machine they say more than the wall clock, which has two processors where
`alone` uses one.

rehearse: `kpmask animate --sources --drivings`, as users call it, over tiny files and with tiny
weights, in a home of its own; it is killed at `--kill-at` of its results and started again. Every
other second it is asked how much memory each kind of process has, how much processor time it took,
how large Prefect's database is and how many results there are. Ten times a second it is seen
whether the workers are in a call: where not, nobody had anything for them to do.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch

from kpmask import bundled, checkpoint, provenance
from kpmask.animate import Animator, Transfer
from kpmask.config import AnimateJob, Cluster, MediaWorkers, TrainJob, resolve_job
from kpmask.demo.videos import film, plan_takes
from kpmask.errors import KpmaskError
from kpmask.media import formats, images
from kpmask.media.encode import encode
from kpmask.models import build_system
from kpmask.records import AnimationRecord, Failure, FeatureRecord
from tasks.catalog import CatalogPlan, planned_catalog
from tasks.catalog_work import CatalogWork
from tasks.cluster import PENDING, Outcome, Pending, ray_session, run_bundles
from tasks.deliver import open_driving
from tasks.lanes import Lane, Renderer
from tasks.render import (
    FeatureItem,
    Made,
    ModelWorker,
    RenderItem,
    Work,
    WorkerSettings,
    features_of,
    name_of,
    stage_of,
)
from tasks.storage import LocalStore, open_store
from tests.bench import rehearsal
from tests.bench.processes import Clock, Cost
from tests.bench.rehearsal import WARM
from tests.support.catalogs import whole_plan

ALONE, ONE_PROCESS, CATALOG, SPLIT_MS = "alone", "in one process", "catalog", "split"
WAYS: Final = (ALONE, ONE_PROCESS, CATALOG)
NUM_WARM: Final = 3  # an image, a video, an animation
# Whose time is counted as what part of the work; none of them is called by another.
SPLIT: Final = (
    (Renderer, "_draw", "draw"),
    (ModelWorker, "_drawing", "read states"),
    (Lane, "strip", "read states"),
    (formats, "write", "encode, poster"),
    (provenance, "label", "sign"),
    (LocalStore, "_publish", "store"),
)


def main() -> None:
    options = _options()
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes to come, as Ray's have it
    torch.set_num_threads(1)
    report, table = options.call(options)
    print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    growing = commands.add_parser("growth", help="the cost of N by M, relative to drawing alone")
    growing.set_defaults(call=growth)
    growing.add_argument("--weights", default="demo", help="a file or a bundled name")
    growing.add_argument("--preset", help="random weights of a preset in place of --weights")
    growing.add_argument(
        "--sizes", nargs="*", default=["1x1", "4x4", "12x8"], help="images x videos"
    )
    growing.add_argument("--frames", type=int, default=48, help="of a video")
    growing.add_argument("--rounds", type=int, default=3)
    growing.add_argument("--no-credentials", action="store_true")
    rehearsing = commands.add_parser("rehearse", help="a long catalog of tiny files")
    rehearsing.set_defaults(call=_rehearse)
    rehearsing.add_argument("--images", type=int, default=1000)
    rehearsing.add_argument("--videos", type=int, default=100)
    rehearsing.add_argument("--frames", type=int, default=2, help="of a video")
    rehearsing.add_argument("--kill-at", type=float, default=0.5, help="of the results; 0: never")
    rehearsing.add_argument("--workers", type=int, help="by default as many as the command has")
    rehearsing.add_argument("--folder", type=Path, required=True, help="a new one, which is kept")
    for command in (growing, rehearsing):
        command.add_argument("--json", type=Path, help="where the results go, too")
    return parser.parse_args()


def _rehearse(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The tiny catalog's work in one process, then all of it as the command does it."""
    folder = options.folder.absolute()
    folder.mkdir(parents=True)
    rehearsal.write_tiny(folder, options.images, options.videos, options.frames)
    few = job_of(folder, min(options.images, 20), min(options.videos, 10), media_workers=0)
    with Aside() as aside:
        cost, split_ms = aside.ask(ONE_PROCESS, few), aside.ask(SPLIT_MS, few)
    cpu_ms = 1000 * cost.cpu_s / len(whole_plan(few).items)
    report = {"one_process_cpu_ms": cpu_ms, "split_ms": split_ms}
    report |= rehearsal.rehearse(
        folder,
        options.images * options.videos,
        num_workers=options.workers,
        kill_at=options.kill_at,
    )
    told = f"in one process {cpu_ms:.1f} CPU ms an animation: {parts_line(split_ms)}"
    return report, f"{told}\n{rehearsal.table(report)}"


# --- growth: what is animated ----------------------------------------------------------------


def growth(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Rounds of every way over every size; the report and its table."""
    with tempfile.TemporaryDirectory(prefix="kpmask-bench-") as name, ray_session():
        folder = Path(name)
        sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
        _write_people(folder, max(n for n, _ in sizes), max(m for _, m in sizes), options.frames)
        _write_weights(folder / "w.safetensors", options)
        results = {}
        with Aside() as aside:
            for size in sizes:
                job = job_of(folder, *size, signed=not options.no_credentials)
                results["{}x{}".format(*size)] = _measured(job, aside, options.rounds)
    report = {"what": _what(options), "sizes": results}
    return report, _growth_table(report)


def _write_people(folder: Path, num_images: int, num_videos: int, num_frames: int) -> None:
    """Drawn videos, and the first frames of others."""
    takes = plan_takes(2 * (num_images + num_videos + 2), seed=0)[::2]
    for number, take in enumerate(takes[: num_images + 1]):
        data = images.encode_png(next(film(take)))
        (folder / f"{WARM if number == num_images else number}.png").write_bytes(data)
    for number, take in enumerate(takes[-num_videos - 1 :]):
        frames = list(itertools.islice(itertools.cycle(film(take)), num_frames))
        path = folder / f"{WARM if number == num_videos else number}.mp4"
        encode(path, frames, fps=take.fps)


def _write_weights(path: Path, options: argparse.Namespace) -> None:
    if options.preset is None:
        shutil.copyfile(bundled.locate(options.weights), path)
        return
    job = resolve_job(
        TrainJob, preset=options.preset, flags={"data": "drawn", "out": str(path.parent)}
    )
    torch.manual_seed(0)
    checkpoint.save(path, build_system(job.phases[-1].model), {})


def job_of(
    folder: Path, num_images: int, num_videos: int, *, media_workers: int = 1, signed: bool = True
) -> AnimateJob:
    pairs = itertools.product(range(num_images), range(num_videos))
    catalog = folder / f"{num_images}x{num_videos}.csv"
    catalog.write_text("source,driving\n" + "".join(f"{n}.png,{m}.mp4\n" for n, m in pairs))
    return AnimateJob(
        checkpoint=str(folder / "w.safetensors"),
        out=str(folder / "out"),
        catalog=str(catalog),
        device="cpu",
        credentials={"enabled": signed},  # type: ignore[arg-type] - pydantic makes it
        cluster=Cluster(num_workers=1),
        media_workers=MediaWorkers(per_worker=media_workers),
    )


# --- growth: a round -------------------------------------------------------------------------


class _Run:
    """A run from its plan to its records, without what its command adds. Use it once."""

    def __init__(self, job: AnimateJob, folder: Path) -> None:
        self._job = job
        self._folder = folder
        self._settled: set[int] = set()
        self._warm: list[FeatureRecord] = []
        self._clock = Clock()

    def cost(self, run: Callable[..., Iterator[Outcome[Work, Made]]]) -> Cost:
        """Args:
        run: `run_bundles`, or what stands for it.
        """
        settings = WorkerSettings.of(self._job)
        with planned_catalog(self._job, self._folder) as plan:
            work = self._work(plan)
            total = work.num_features + plan.book.num_todo() + NUM_WARM
            outcomes = run(
                self._bundles(work, plan.settings_digest),
                ModelWorker,
                (settings,),
                key=name_of,
                stage=stage_of,
                cluster=self._job.cluster,
                total=total,
                also_cpus=settings.media_workers * settings.cpus_per_media_worker,
            )
            with contextlib.closing(work):
                for number, outcome in enumerate(outcomes, start=1):
                    self._settle(plan, work, outcome)
                    if number == total:
                        cost = self._clock.stop()
            assert plan.book.num_todo() == 0
        return cost

    def _work(self, plan: CatalogPlan) -> CatalogWork:
        def lost(_: object, failure: Failure) -> None:
            raise SystemExit(str(failure))

        store = open_store(self._job.out)
        return CatalogWork(
            plan.book,
            store,
            settings_digest=plan.settings_digest,
            num_workers=1,
            first_bundle=1,
            on_lost=lost,
        )

    def _bundles(self, work: CatalogWork, digest: str) -> Iterator[tuple[Work, ...] | Pending]:
        """One animation before the clock starts, then the catalog."""
        (item,) = _warm_up(self._job)
        features = features_of(item, digest)
        for feature in features:
            yield from self._alone(feature)
        yield from self._alone(RenderItem(item, *self._warm))
        self._clock.start()
        yield from work.bundles()

    def _alone(self, item: Work) -> Iterator[tuple[Work, ...] | Pending]:
        num_before = len(self._settled)
        yield (item,)
        while len(self._settled) == num_before:
            yield PENDING

    def _settle(self, plan: CatalogPlan, work: CatalogWork, outcome: Outcome[Work, Made]) -> None:
        item, made = outcome.item, outcome.result
        if made is None:
            raise SystemExit(str(outcome.failure))
        if _is_warm(item):
            self._settled.add(len(self._settled))
            if isinstance(made, FeatureRecord):
                self._warm.append(made)
        elif isinstance(item, FeatureItem):
            assert isinstance(made, FeatureRecord)
            work.feature_over(item, made)
        else:
            assert isinstance(made, AnimationRecord)
            plan.book.set_done(made)
            work.animation_over(item, made=True)


def _is_warm(work: Work) -> bool:
    return Path(name_of(work)).name.startswith(WARM)


def _warm_up(job: AnimateJob) -> Sequence[Any]:
    folder = Path(job.checkpoint).parent
    pair = {"sources": str(folder / f"{WARM}.png"), "drivings": str(folder / f"{WARM}.mp4")}
    return whole_plan(job.model_copy(update={"catalog": None, **pair})).items


def _in_one_process(
    bundles: Iterator[tuple[Work, ...] | Pending],
    worker: type[ModelWorker],
    worker_args: tuple[WorkerSettings],
    **_: object,
) -> Iterator[Outcome[Work, Made]]:
    made_by = worker(*worker_args)
    for bundle in bundles:
        if isinstance(bundle, Pending):
            raise SystemExit("a source that waits for what this process has done")
        for item, made in zip(bundle, made_by.process(bundle), strict=True):
            assert isinstance(made, FeatureRecord | AnimationRecord), made
            yield Outcome(item, made, None)


def _catalog_cost(job: AnimateJob, run: Callable[..., Any]) -> Cost:
    with tempfile.TemporaryDirectory(prefix="kpmask-bench-") as name:
        out = job.model_copy(update={"out": str(Path(name) / "out")})
        return _Run(out, Path(name)).cost(run)


# --- growth: drawing alone -------------------------------------------------------------------


class _Alone:
    """The animations of a job, out of states in memory."""

    def __init__(self, job: AnimateJob) -> None:
        self._animator = Animator.load(Path(job.checkpoint), device=job.device)
        self._batch_size = job.batch_size
        self._settings = WorkerSettings.of(job)
        self._items = whole_plan(job).items
        self._sources = {item.source: self._source(item) for item in self._items}
        self._drivings = {item.driving: self._driving(item) for item in self._items}
        self._draw(self._items[0])

    def _source(self, item: Any) -> Any:
        image_HWC = images.square_crop(images.read_image(Path(item.source), self._settings.limits))
        side_px = self._animator.image_size_px
        return self._animator.encode_source(images.resize(image_HWC, (side_px, side_px)))

    def _driving(self, item: Any) -> list[Any]:
        side_px = self._animator.image_size_px
        frames = open_driving(Path(item.driving), self._settings, item, side_px=side_px)
        return list(self._animator.encode_chunks(frames, batch_size=self._batch_size))

    def _draw(self, item: Any) -> int:
        chunks = self._drivings[item.driving]
        frames = self._animator.stream_states(
            self._sources[item.source], lambda: iter(chunks), Transfer()
        )
        return sum(1 for _ in frames)

    def cost(self) -> Cost:
        clock = Clock()
        clock.start()
        for item in self._items:
            self._draw(item)
        return clock.stop()


class Aside:
    """A process that measures what needs no other, so that each way has a process of its own."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)

    def __enter__(self) -> Aside:
        self._process.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join()

    def ask(self, what: str, job: AnimateJob) -> Any:
        self._line.send((what, job))
        return self._line.recv()


def _serve(line: Connection) -> None:
    torch.set_num_threads(1)
    alone: dict[str, _Alone] = {}
    while True:
        what, job = line.recv()
        if what == ALONE:
            if job.catalog not in alone:
                alone[job.catalog] = _Alone(job)
            line.send(alone[job.catalog].cost())
        elif what == ONE_PROCESS:
            line.send(_catalog_cost(job, _in_one_process))
        else:
            line.send(_split(job))


def _split(job: AnimateJob) -> dict[str, float]:
    """Processor milliseconds an animation of each part of the work, in one process."""
    times_s: Counter[str] = Counter()

    def timed(bundles: Any, worker: Any, worker_args: Any, **_: object) -> Iterator[Any]:
        made_by = worker(*worker_args)
        for bundle in bundles:
            found, parts = _timed(made_by, bundle)
            if not _is_warm(bundle[0]):
                times_s.update(parts)
            yield from (Outcome(item, made, None) for item, made in zip(bundle, found, strict=True))

    _catalog_cost(job, timed)
    num_items = len(whole_plan(job).items)
    return {name: 1000 * spent_s / num_items for name, spent_s in times_s.items()}


def _timed(
    worker: ModelWorker, bundle: Sequence[Work]
) -> tuple[Sequence[Made | KpmaskError], Mapping[str, float]]:
    """What a worker makes of a bundle, and its processor seconds by part."""
    times_s: Counter[str] = Counter()
    start_s = time.process_time()
    with contextlib.ExitStack() as stack:
        for owner, name, part in SPLIT:
            counted = _counted(getattr(owner, name), times_s, part)
            stack.enter_context(mock.patch.object(owner, name, counted))
        found = worker.process(bundle)
    total_s = time.process_time() - start_s
    if isinstance(bundle[0], FeatureItem):
        return found, {"features": total_s}
    return found, times_s | {"rest": total_s - sum(times_s.values())}


def _counted(function: Callable[..., Any], times_s: Counter[str], part: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start_s = time.thread_time()  # a film has a thread of its own
        try:
            return function(*args, **kwargs)
        finally:
            times_s[part] += time.thread_time() - start_s

    return timed


# --- growth: comparison ----------------------------------------------------------------------


def _measured(job: AnimateJob, aside: Aside, num_rounds: int) -> dict[str, Any]:
    by_itself = job.model_copy(update={"media_workers": MediaWorkers(per_worker=0)})
    rounds: dict[str, list[Cost]] = {way: [] for way in WAYS}
    for turn in range(num_rounds):
        rounds[ALONE].append(aside.ask(ALONE, by_itself))
        rounds[ONE_PROCESS].append(aside.ask(ONE_PROCESS, by_itself))
        rounds[CATALOG].append(_catalog_cost(job, run_bundles))
        told = ", ".join(f"{way} {costs[-1].wall_s:.1f} s" for way, costs in rounds.items())
        print(
            f"  {Path(job.catalog or '').stem}, round {turn}: {told}", file=sys.stderr, flush=True
        )
    return {
        "rounds": {way: [dataclasses.asdict(c) for c in costs] for way, costs in rounds.items()},
        "ratios": {
            way: {
                clock: _ratios(rounds[way], rounds[ALONE], clock) for clock in ("wall_s", "cpu_s")
            }
            for way in (ONE_PROCESS, CATALOG)
        },
        "split_ms": aside.ask(SPLIT_MS, by_itself),
    }


def _ratios(costs: Sequence[Cost], alone: Sequence[Cost], clock: str) -> list[float]:
    """The median of the rounds' ratios, the least and the largest."""
    ratios = [getattr(a, clock) / getattr(b, clock) for a, b in zip(costs, alone, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def _what(options: argparse.Namespace) -> dict[str, Any]:
    weights = options.weights if options.preset is None else f"random, {options.preset}"
    return {"weights": weights, "frames": options.frames, "signed": not options.no_credentials}


def _growth_table(report: dict[str, Any]) -> str:
    lines = ["{weights}, {frames} frames a video, signed: {signed}".format(**report["what"])]
    lines.append(f"{'':8}{'':16}{'wall s':>9}{'CPU s':>9}{'by wall':>24}{'by CPU':>24}")
    for size, found in report["sizes"].items():
        for way in WAYS:
            wall_s, cpu_s = (
                statistics.median(cost[clock] for cost in found["rounds"][way])
                for clock in ("wall_s", "cpu_s")
            )
            ratios = found["ratios"].get(way, {})
            told = "".join(
                "{:>10.3f} ({:.3f} to {:.3f})".format(*ratio).rjust(24) for ratio in ratios.values()
            )
            lines.append(f"{size:8}{way:16}{wall_s:9.2f}{cpu_s:9.2f}{told}")
        lines.append(f"{'':8}catalog, CPU s: {parts_line(_roles(found['rounds'][CATALOG]))}")
        lines.append(f"{'':8}CPU ms an animation: {parts_line(found['split_ms'])}")
    return "\n".join(lines)


def _roles(costs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    roles = {role for cost in costs for role in cost["by_role"]}
    return {r: statistics.median(cost["by_role"].get(r, 0.0) for cost in costs) for r in roles}


def parts_line(times: Mapping[str, float]) -> str:
    parts = sorted(times.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {spent:.1f}" for name, spent in parts)


if __name__ == "__main__":
    main()

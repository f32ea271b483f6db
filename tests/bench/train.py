"""How fast we train, against a loop as the original projects wrote it, interleaved in one run.

    python -m tests.bench.train --preset actions64 --system fomm --seconds 40

Both train the same model with the same losses on the same drawn clips, each in a process of its
own: rounds of ours and of theirs take turns, and the medians of the rounds are compared. What
counts is the wall clock, on a machine that does nothing else; on a shared one the ratio of
processor seconds, with --threads 1, says more.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kpmask.config import TrainJob, resolve_job
from kpmask.data.dataset import Dataset
from kpmask.data.frame_cache import FrameCache
from kpmask.data.loader import BatchLoader
from kpmask.data.pairs import PairSampler
from kpmask.data.shards import ShardWriter
from kpmask.demo.videos import film, plan_takes
from kpmask.device import keep_freed_memory, training_precision
from kpmask.models.base import Batch, LossTerms
from kpmask.perceptual import PerceptualFeatures, load_perceptual
from kpmask.records import ClipRecord
from kpmask.train import PhasePlan, Trainer, Worker, initial_system, plan_phases
from tests.bench.original_loop import OriginalLoop

NUM_CLIPS, FRAMES_PER_CLIP = 24, 24
STEPS_PER_ROUND = 4
SPLIT = ("data", "forward", "backward", "optimiser")


def main() -> None:
    options = _options()
    job = _job(options)
    plans = _plans(job)
    with tempfile.TemporaryDirectory(prefix="kpmask-bench-") as folder:
        clips = _clips(Path(folder), job.phases[0].model.image_size_px)
        for plan in plans:
            print(_title(options, job, plan))
            with contextlib.ExitStack() as stack:
                loops = {
                    name: stack.enter_context(_Process(name, options, plan.index, clips, folder))
                    for name in ("ours", "original")
                }
                _compare(loops, options.seconds / len(plans), plan.phase.batch_size)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="actions64")
    parser.add_argument("--system", help="by default the preset's first")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def _job(options: argparse.Namespace) -> TrainJob:
    systems = [options.system] if options.system else None
    job = resolve_job(
        TrainJob,
        preset=options.preset,
        systems=systems,
        overrides=options.set,
        flags={"data": "drawn", "out": "nowhere"},
    )
    if options.batch_size is None:
        return job
    phases = [p.model_copy(update={"batch_size": options.batch_size}) for p in job.phases]
    return job.model_copy(update={"phases": tuple(phases)})


def _plans(job: TrainJob) -> tuple[PhasePlan, ...]:
    return plan_phases(job, pairs_per_epoch=job.num_repeats * NUM_CLIPS)


def _device(options: argparse.Namespace) -> str:
    return "cuda" if options.gpu else "cpu"


def _title(options: argparse.Namespace, job: TrainJob, plan: PhasePlan) -> str:
    phase, device = plan.phase, _device(options)
    return (
        f"{options.preset} {phase.name} ({phase.model.system}), {phase.model.image_size_px} px, "
        f"batch {phase.batch_size}, {job.perceptual}, {training_precision(job, device)}, {device}, "
        f"{options.threads or torch.get_num_threads()} threads"
    )


# --- data ------------------------------------------------------------------------------------


def _clips(root: Path, size_px: int) -> list[ClipRecord]:
    """Drawn clips: as a shard for us, and as folders of PNG files for them."""
    records = []
    with ShardWriter(root / "shard.arrow") as shard:
        for number, take in enumerate(plan_takes(NUM_CLIPS, seed=0)):
            frames = (frame for frame, _ in zip(film(take), range(FRAMES_PER_CLIP), strict=False))
            folder = root / "png" / f"{number:03d}"
            folder.mkdir(parents=True)
            for index, frame in enumerate(frames):
                image = Image.fromarray(frame).crop(take.box_px)
                image.resize((size_px, size_px), Image.Resampling.BOX).save(
                    folder / f"{index:04d}.png"
                )
            images = [path.read_bytes() for path in sorted(folder.iterdir())]
            row = shard.add(folder.name, 25.0, images)
            records.append(_record(folder.name, row, len(images), size_px))
    return records


def _record(name: str, row: int, num_frames: int, size_px: int) -> ClipRecord:
    return ClipRecord(
        clip_id=name,
        name=name,
        partition="train",
        identity=name,
        video_id=name,
        shard="shard.arrow",
        row=row,
        num_frames=num_frames,
        fps=25.0,
        width_px=size_px,
        height_px=size_px,
        start_s=0.0,
        end_s=num_frames / 25,
        crop_px=(0, 0, size_px, size_px),
        clamped=False,
        num_frames_lost=0,
        sha256="0" * 64,
    )


# --- our loop --------------------------------------------------------------------------------


class _TimedTrainer(Trainer):
    """A trainer that keeps account of its forward passes and of its weights' updates."""

    def __init__(self, *args: object, split_s: dict[str, float], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.split_s = split_s

    def _losses(self, part: Batch) -> LossTerms:
        with _timed(self.split_s, "forward"):
            return super()._losses(part)

    def _update(self) -> None:
        with _timed(self.split_s, "optimiser"):
            super()._update()


class OurLoop:
    """What a worker does, but for reports and checkpoints; `split_s` says where its time went."""

    def __init__(
        self,
        job: TrainJob,
        plan: PhasePlan,
        clips: list[ClipRecord],
        root: Path,
        *,
        features: PerceptualFeatures | None,
        device: str,
    ) -> None:
        self.split_s = dict.fromkeys(SPLIT, 0.0)
        self.batch_size = plan.phase.batch_size
        self.trainer = _TimedTrainer(
            plan,
            initial_system(plan, seed=job.seed),
            features=features,
            seed=job.seed,
            worker=Worker(device=device),
            precision=training_precision(job, device),
            split_s=self.split_s,
        )
        sampler = PairSampler(
            clips, num_repeats=job.num_repeats, batch_size=self.batch_size, seed=job.seed
        )
        dataset = Dataset(clips, fetch=root.joinpath)
        loader = BatchLoader(FrameCache(dataset.read), sampler, job.augmentation, device=device)
        self.batches = loader.batches(0, 10**6)

    def step(self) -> float:
        with _timed(self.split_s, "data"):
            batch = next(self.batches)
        before_s, start_s = sum(self.split_s.values()), time.perf_counter()
        loss = self.trainer.step(batch).loss
        timed_s = sum(self.split_s.values()) - before_s
        self.split_s["backward"] += time.perf_counter() - start_s - timed_s
        return loss


@contextlib.contextmanager
def _timed(split_s: dict[str, float], name: str) -> Iterator[None]:
    start_s = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    split_s[name] += time.perf_counter() - start_s


# --- comparison ------------------------------------------------------------------------------

Seconds = tuple[float, float]  # of a step: wall, processor


class _Process:
    """One of the loops in a process of its own, which runs when it is asked to."""

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        phase: int,
        clips: list[ClipRecord],
        folder: str,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, name, options, phase, clips, folder), daemon=True
        )

    def __enter__(self) -> _Process:
        self._process.start()
        self._line.recv()  # it is ready
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join()

    def round(self) -> Seconds:
        self._line.send("round")
        seconds: Seconds = self._line.recv()
        return seconds

    def split(self) -> dict[str, float]:
        self._line.send("split")
        shares: dict[str, float] = self._line.recv()
        return shares


def _serve(
    line: Connection,
    name: str,
    options: argparse.Namespace,
    phase: int,
    clips: list[ClipRecord],
    folder: str,
) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    loop = _loop(name, options, phase, clips, Path(folder))
    for _ in range(2):  # first steps allocate, choose algorithms, fill caches
        loop.step()
    loop.split_s.update(dict.fromkeys(loop.split_s, 0.0))
    line.send("ready")
    while True:
        if line.recv() == "round":
            line.send(_round(loop))
        else:
            total_s = sum(loop.split_s.values())
            line.send({key: loop.split_s[key] / total_s for key in SPLIT})


def _loop(
    name: str, options: argparse.Namespace, phase: int, clips: list[ClipRecord], root: Path
) -> OurLoop | OriginalLoop:
    job = _job(options)
    plan, device = _plans(job)[phase], _device(options)
    features = load_perceptual(job.perceptual, job.perceptual_weights)
    if name == "ours":
        keep_freed_memory()
        return OurLoop(job, plan, clips, root, features=features, device=device)
    folders = [root / "png" / clip.name for clip in clips]
    return OriginalLoop(plan, folders, features=features, seed=job.seed, device=device)


def _round(loop: OurLoop | OriginalLoop) -> Seconds:
    """Wall and processor seconds of a step: means over a round."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    losses = [loop.step() for _ in range(STEPS_PER_ROUND)]
    assert np.isfinite(losses).all()
    elapsed = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return elapsed[0] / STEPS_PER_ROUND, elapsed[1] / STEPS_PER_ROUND


def _compare(loops: Mapping[str, _Process], seconds: float, batch_size: int) -> None:
    rounds: dict[str, list[Seconds]] = {name: [] for name in loops}
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s or len(rounds["original"]) < 3:
        for name, loop in loops.items():
            rounds[name].append(loop.round())
    lines = [_line(name, loop, rounds[name], batch_size) for name, loop in loops.items()]
    for place, clock in enumerate(("wall", "CPU")):
        ours_s, theirs_s = ([times[place] for times in rounds[name]] for name in loops)
        ratios = sorted(b / a for a, b in zip(ours_s, theirs_s, strict=True))
        ratio = statistics.median(theirs_s) / statistics.median(ours_s)
        lines.append(f"  {clock} ratio {ratio:.2f}, of rounds {ratios[0]:.2f} to {ratios[-1]:.2f}")
    print("\n".join(lines), flush=True)


def _line(name: str, loop: _Process, rounds: list[Seconds], batch_size: int) -> str:
    wall_s, cpu_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    split = ", ".join(f"{key} {share:.0%}" for key, share in loop.split().items())
    return (
        f"  {name:9s} {batch_size / wall_s:7.1f} samples/s, {cpu_s:.3f} CPU s a step "
        f"({len(rounds)} rounds): {split}"
    )


if __name__ == "__main__":
    main()

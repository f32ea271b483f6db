"""How fast we train, against a loop as the original projects wrote it, interleaved in one run.

    python -m tests.bench.train --preset actions64 --system fomm --seconds 40

Both train the same model with the same losses on the same drawn clips: rounds of ours and of
theirs take turns, and the medians of the rounds are compared. What counts is the wall clock, on a
machine that does nothing else; on a shared one the ratio of processor seconds, with --threads 1,
says more.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kpmask.config import TrainJob, resolve_job
from kpmask.data.dataset import Dataset
from kpmask.data.loader import BatchLoader
from kpmask.data.pairs import PairSampler
from kpmask.data.shards import ShardWriter
from kpmask.demo.videos import film, plan_takes
from kpmask.device import training_precision
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
    torch.set_num_threads(options.threads or torch.get_num_threads())
    device = "cuda" if options.gpu else "cpu"
    features = load_perceptual(job.perceptual, job.perceptual_weights)
    with tempfile.TemporaryDirectory(prefix="kpmask-bench-") as folder:
        clips = _clips(Path(folder), job.phases[0].model.image_size_px)
        plans = plan_phases(job, pairs_per_epoch=job.num_repeats * NUM_CLIPS)
        seconds = options.seconds / len(plans)
        for plan in plans:
            ours = OurLoop(job, plan, clips, Path(folder), features=features, device=device)
            theirs = OriginalLoop(
                plan,
                [Path(folder) / "png" / clip.name for clip in clips],
                features=load_perceptual(job.perceptual, job.perceptual_weights),
                seed=job.seed,
                device=device,
            )
            print(_title(options, job, plan, device))
            _compare(ours, theirs, seconds)
            ours.close()


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


def _title(options: argparse.Namespace, job: TrainJob, plan: PhasePlan, device: str) -> str:
    phase = plan.phase
    return (
        f"{options.preset} {phase.name} ({phase.model.system}), batch {phase.batch_size}, "
        f"{job.perceptual}, {training_precision(job, device)}, {device}, "
        f"{torch.get_num_threads()} threads"
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
        loader = BatchLoader(dataset.read, sampler, job.augmentation, device=device)
        self.batches = loader.batches(0, 10**6)

    def step(self) -> float:
        with _timed(self.split_s, "data"):
            batch = next(self.batches)
        before_s, start_s = sum(self.split_s.values()), time.perf_counter()
        loss = self.trainer.step(batch).loss
        timed_s = sum(self.split_s.values()) - before_s
        self.split_s["backward"] += time.perf_counter() - start_s - timed_s
        return loss

    def close(self) -> None:
        self.batches.close()


@contextlib.contextmanager
def _timed(split_s: dict[str, float], name: str) -> Iterator[None]:
    start_s = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    split_s[name] += time.perf_counter() - start_s


# --- comparison ------------------------------------------------------------------------------


def _compare(ours: OurLoop, theirs: OriginalLoop, seconds: float) -> None:
    loops = {"ours": ours, "original": theirs}
    for loop in loops.values():  # first steps allocate, choose algorithms, fill caches
        for _ in range(2):
            loop.step()
        loop.split_s.update(dict.fromkeys(loop.split_s, 0.0))
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s or len(rounds["original"]) < 3:
        for name, loop in loops.items():
            rounds[name].append(_round(loop))
    for name, loop in loops.items():
        total_s = sum(loop.split_s.values())
        split = ", ".join(f"{key} {loop.split_s[key] / total_s:.0%}" for key in SPLIT)
        wall_s, cpu_s = (statistics.median(column) for column in zip(*rounds[name], strict=True))
        print(
            f"  {name:9s} {loop.batch_size / wall_s:7.1f} samples/s, {cpu_s:.3f} CPU s a step "
            f"({len(rounds[name])} rounds): {split}"
        )
    for place, clock in enumerate(("wall", "CPU")):
        ours_s, theirs_s = ([times[place] for times in rounds[name]] for name in loops)
        ratios = sorted(b / a for a, b in zip(ours_s, theirs_s, strict=True))
        ratio = statistics.median(theirs_s) / statistics.median(ours_s)
        print(
            f"  {clock} ratio {ratio:.2f}, of rounds {ratios[0]:.2f} to {ratios[-1]:.2f}",
            flush=True,
        )


def _round(loop: OurLoop | OriginalLoop) -> tuple[float, float]:
    """Wall and processor seconds of a step: means over a round."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    losses = [loop.step() for _ in range(STEPS_PER_ROUND)]
    assert np.isfinite(losses).all()
    elapsed = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return elapsed[0] / STEPS_PER_ROUND, elapsed[1] / STEPS_PER_ROUND


if __name__ == "__main__":
    main()

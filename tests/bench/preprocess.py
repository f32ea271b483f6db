"""How fast we cut clips, against a loop as the published scripts have it, by turns in one run.

    python -m tests.bench.preprocess --videos 4 --cores 2 --json preprocess.json
    python -m tests.bench.preprocess --data FOLDER        # metadata/*.csv and raw/

Without --data the videos are drawn: 720p, some spans out of each, as the published tables have
them. Both cut the same clips of the same size from the same files; ours in as many processes as
there are cores, theirs in one, by its nature. Ours writes a part file for each clip as the
workers of a run do, theirs folders of PNG files. On a shared machine the ratio of processor
seconds says more than that of the wall clock, and is for one core of ours.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import multiprocessing
import pstats
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from cProfile import Profile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from kpmask.config import Clips, MediaLimits, Storage, Subject
from kpmask.data.metadata import raw_stem
from kpmask.data.shards import ShardWriter, clip_info, num_clips, read_clip
from kpmask.demo.videos import COLUMNS, film, plan_takes
from kpmask.media.encode import encode
from kpmask.media.images import decode_image
from kpmask.media.probe import probe
from kpmask.preprocess import CutClip, CutSettings, cut_clips, plan_clips
from kpmask.records import SourceRow
from tests.support.metadata import read_metadata

LIMITS, STORAGE = MediaLimits(), Storage()
DRAWN_SIZE_PX, DRAWN_S, DRAWN_FPS = (1280, 720), 40, Fraction(25)
DRAWN_SPANS_S = ((4.0, 7.2), (15.0, 20.4), (16.5, 19.1), (32.0, 35.0))  # of the published kind
GRAIN = 2.0  # levels of noise: 1.7 Mbit/s, as video sites have 720p; still drawings have a tenth
# Functions by which the profile of our cutting is split.
SPLIT = {
    "decode": ("reader.py", ("read", "skip_to", "__init__")),
    "crop and scale": ("graph.py", ("render",)),
    "encode": ("preprocess.py", ("_encoded",)),
    "measure": ("quality.py", ("add", "measures")),
    "hash frames": ("~", ("<method 'update' of '_hashlib.HASH' objects>",)),
    "write": ("~", ("<method 'write' of '_io.BufferedWriter' objects>",)),
    "part files": ("shards.py", ("add_file", "__exit__")),
    "hash the file": ("hashlib.py", ("file_digest",)),
}

Video = tuple[Path, list[SourceRow]]


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over all videos took."""

    wall_s: float
    cpu_s: float
    num_frames: int
    peak_bytes: int


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="kpmask-bench-") as name:
        folder = Path(name)
        videos = _read(options.data) if options.data else _drawn(folder / "drawn", options.videos)
        videos = videos[: options.videos]
        passes = _compare(videos, folder, options)
        difference = _difference(folder)
        split = _split(videos, folder / "split", options.size)
    report = _report(videos, passes, difference, split, options)
    print(_table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with metadata/*.csv and raw/")
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--size", type=int, default=256, help="px of a clip's side")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


# --- data ------------------------------------------------------------------------------------


def _read(data: Path) -> list[Video]:
    """The videos of a folder in the order of its tables."""
    rows_of: dict[str, list[SourceRow]] = {}
    for table in sorted((data / "metadata").glob("*-metadata.csv")):
        for row in read_metadata(table)[0]:
            rows_of.setdefault(raw_stem(row.video_id), []).append(row)
    raw = {path.stem: path for path in (data / "raw").iterdir()}
    return [(raw[stem], _without_repeats(rows)) for stem, rows in rows_of.items() if stem in raw]


def _without_repeats(rows: Sequence[SourceRow]) -> list[SourceRow]:
    """One row for a span: tables of faces and of bodies may cut the same one."""
    named = {(row.start_frame, row.end_frame, row.person_id): row for row in reversed(rows)}
    return list(named.values())[::-1]


def _drawn(folder: Path, num_videos: int) -> list[Video]:
    (folder / "metadata").mkdir(parents=True)
    (folder / "raw").mkdir()
    with (folder / "metadata" / "drawn-metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for take in plan_takes(num_videos, seed=0):
            take = dataclasses.replace(
                take, size_px=DRAWN_SIZE_PX, fps=DRAWN_FPS, duration_s=1.0, codec=0
            )
            images = list(film(take))
            path = folder / "raw" / f"{take.video_id}.mp4"
            encode(path, _to_and_fro(images), fps=DRAWN_FPS, crf=20)
            box = "-".join(map(str, take.box_px))
            for start_s, end_s in DRAWN_SPANS_S:
                span = round(start_s * DRAWN_FPS), round(end_s * DRAWN_FPS)
                rest = (box, float(DRAWN_FPS), *DRAWN_SIZE_PX, take.partition, take.person_id)
                writer.writerow((take.video_id, *span, *rest))
    return _read(folder)


def _to_and_fro(images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """A take played forwards and backwards, with grain."""
    rng = np.random.default_rng(0)
    height_px, width_px = images[0].shape[:2]
    noise_HWC = rng.normal(0, GRAIN, (height_px, width_px * 2, 1)).repeat(3, axis=2)
    noise_HWC = noise_HWC.round().astype(np.int16)
    order = [*range(len(images)), *range(len(images) - 2, 0, -1)]
    for index in range(round(DRAWN_S * DRAWN_FPS)):
        at = int(rng.integers(width_px))
        grain_HWC = noise_HWC[:, at : at + width_px]
        yield cv2.add(images[order[index % len(order)]], grain_HWC, dtype=cv2.CV_8U)


# --- the two loops ---------------------------------------------------------------------------


def _ours(video: Video, out: Path, size_px: int) -> tuple[int, float, int]:
    """Cut a video as a worker does; frames written, processor seconds, peak memory in bytes."""
    start_s = _cpu_s()
    num_frames = _cut(video, out, size_px)
    return num_frames, _cpu_s() - start_s, _peak_bytes()


def _cut(video: Video, out: Path, size_px: int) -> int:
    path, rows = video
    folder = out / path.stem
    folder.mkdir(parents=True)
    clips = Clips(size_px=size_px, fit="stretch", min_frames=1)
    facts = probe(path, LIMITS)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    plans, failures = plan_clips(
        rows,
        facts,
        sha256,
        path=path,
        clips=clips,
        storage=STORAGE,
        subject=Subject(),
        limits=LIMITS,
    )
    assert not failures, failures
    settings = CutSettings(clips=clips, storage=STORAGE, limits=LIMITS, whole=False)
    num_frames = 0
    for clip in cut_clips(path, plans, facts, settings=settings, folder=folder):
        assert isinstance(clip, CutClip), clip
        with ShardWriter(folder / f"{clip.plan.name}.arrow") as shard:
            shard.add_file(clip.plan.name, clip.fps, clip.path, clip.ends)
        clip.path.unlink()
        num_frames += len(clip.ends)
    return num_frames


def _theirs(videos: Sequence[Video], out: Path, size_px: int) -> tuple[int, float, int]:
    from tests.bench import original_preprocess

    start_s = _cpu_s()
    num_frames = sum(
        original_preprocess.cut_video(path, rows, out, size_px=size_px) for path, rows in videos
    )
    return num_frames, _cpu_s() - start_s, _peak_bytes()


def _cpu_s() -> float:
    """Processor seconds of this process and of its children that ended."""
    child = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + child.ru_utime + child.ru_stime


def _peak_bytes() -> int:
    # Not ru_maxrss, which a process takes over from the one that started it.
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def _warm(_: int) -> None:
    """Import what both loops need, long enough for every process of a pool to start."""
    from tests.bench import original_preprocess

    assert original_preprocess
    time.sleep(1.0)


# --- comparison ------------------------------------------------------------------------------


def _compare(
    videos: list[Video], folder: Path, options: argparse.Namespace
) -> dict[str, list[Pass]]:
    """Passes of ours and theirs in turns; what they wrote last stays in `folder`."""
    passes: dict[str, list[Pass]] = {"ours": [], "original": []}
    with _pool(options.cores) as many, _pool(1) as one:
        for turn in range(options.rounds):
            ours, theirs = folder / f"ours{turn}", folder / f"original{turn}"
            passes["ours"].append(
                _timed(lambda out=ours: many.map(_ours, *_calls(videos, out, options.size)))
            )
            passes["original"].append(
                _timed(lambda out=theirs: [one.submit(_theirs, videos, out, options.size).result()])
            )
            for name, (took,) in ((n, p[-1:]) for n, p in passes.items()):
                print(f"  round {turn}: {name} {took.wall_s:.1f} s", file=sys.stderr, flush=True)
    (folder / f"ours{options.rounds - 1}").rename(folder / "ours")
    (folder / f"original{options.rounds - 1}").rename(folder / "original")
    return passes


def _pool(num_processes: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"))
    list(pool.map(_warm, range(num_processes)))
    return pool


def _calls(
    videos: Sequence[Video], out: Path, size_px: int
) -> tuple[list[Video], list[Path], list[int]]:
    return list(videos), [out] * len(videos), [size_px] * len(videos)


def _timed(run: Callable[[], Iterator[tuple[int, float, int]]]) -> Pass:
    start_s = time.perf_counter()
    results = list(run())
    return Pass(
        wall_s=time.perf_counter() - start_s,
        cpu_s=sum(cpu_s for _, cpu_s, _ in results),
        num_frames=sum(num_frames for num_frames, _, _ in results),
        peak_bytes=max(peak for _, _, peak in results),
    )


def _difference(folder: Path) -> dict[str, float]:
    """How the clips of both differ, in levels of 255."""
    means, worst, uneven = [], 0, 0
    for path in sorted((folder / "ours").rglob("*.arrow")):
        assert num_clips(path) == 1
        ours_THWC = read_clip(path, 0)
        images = sorted((folder / "original" / clip_info(path, 0)[0]).iterdir())
        uneven += len(images) != len(ours_THWC)
        for ours_HWC, image in zip(ours_THWC, images, strict=False):
            difference_HWC = np.abs(ours_HWC.astype(np.int16) - decode_image(image.read_bytes()))
            means.append(float(difference_HWC.mean()))
            worst = max(worst, int(difference_HWC.max()))
    return {
        "mean": statistics.fmean(means),
        "worst_frame_mean": max(means),
        "worst_pixel": worst,
        "clips_of_other_length": uneven,
    }


def _split(videos: Sequence[Video], out: Path, size_px: int) -> dict[str, float]:
    """Shares of the processor time of our cutting, by a profile of one process."""
    profile = Profile(time.process_time)
    profile.enable()
    for video in videos:
        _cut(video, out, size_px)
    profile.disable()
    stats = pstats.Stats(profile)
    shares = dict.fromkeys(SPLIT, 0.0)
    for (file, _, function), (_, _, _, cumulative_s, _) in stats.stats.items():  # type: ignore[attr-defined]
        for name, (place, functions) in SPLIT.items():
            if function in functions and Path(file).name == place:
                shares[name] += cumulative_s / stats.total_tt  # type: ignore[attr-defined]
    return shares | {"rest": 1.0 - sum(shares.values())}


# --- report ----------------------------------------------------------------------------------


def _report(
    videos: Sequence[Video],
    passes: dict[str, list[Pass]],
    difference: dict[str, float],
    split: dict[str, float],
    options: argparse.Namespace,
) -> dict[str, object]:
    ratios = {
        clock: sorted(
            getattr(theirs, clock) / getattr(ours, clock)
            for ours, theirs in zip(passes["ours"], passes["original"], strict=True)
        )
        for clock in ("wall_s", "cpu_s")
    }
    return {
        "data": str(options.data) if options.data else "drawn",
        "videos": len(videos),
        "clips": sum(len(rows) for _, rows in videos),
        "size_px": options.size,
        "cores": options.cores,
        "passes": {name: [dataclasses.asdict(p) for p in all_] for name, all_ in passes.items()},
        "ratios": ratios,
        "difference": difference,
        "split": split,
    }


def _table(report: dict[str, object]) -> str:
    lines = [
        "{data}: {videos} videos, {clips} clips of {size_px} px, {cores} cores".format(**report),
        f"{'':10}{'frames':>8}{'wall s':>9}{'CPU s':>9}{'frames/s':>10}{'ms CPU':>9}{'peak MB':>9}",
    ]
    for name, passes in report["passes"].items():
        wall_s, cpu_s = (statistics.median(p[key] for p in passes) for key in ("wall_s", "cpu_s"))
        frames, peak = passes[0]["num_frames"], max(p["peak_bytes"] for p in passes)
        lines.append(
            f"{name:10}{frames:8}{wall_s:9.1f}{cpu_s:9.1f}{frames / wall_s:10.1f}"
            f"{1000 * cpu_s / frames:9.1f}{peak / 1e6:9.0f}"
        )
    for clock, ratios in report["ratios"].items():
        name = clock.removesuffix("_s")
        ratio = statistics.median(ratios)
        lines.append(f"ratio by {name}: {ratio:.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")
    lines.append(
        "difference of pixels: {mean:.2f} levels on average, {worst_frame_mean:.2f} in the worst "
        "frame, {clips_of_other_length} clips of another length".format(**report["difference"])
    )
    shares = sorted(report["split"].items(), key=lambda item: -item[1])
    lines.append("ours: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))
    return "\n".join(lines)


if __name__ == "__main__":
    main()

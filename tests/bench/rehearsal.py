"""A long catalog of tiny files, made by the command as users call it, killed and started again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import torch

from kpmask import checkpoint
from kpmask.media import images
from kpmask.media.encode import encode
from kpmask.models import build_system
from tests.bench.processes import MEDIA, MODEL, ROLES, Processes, all_stats, is_in_call, title
from tests.support.models import CIRCLES, SIDE_PX

WARM: Final = "warm"  # names what is not of the catalog
SAMPLE_S: Final = 2.0
GLANCE_S: Final = 0.1
ORPHANS_S: Final = 60.0
TABLE_LINES: Final = 12


@dataclass(frozen=True, slots=True)
class Sample:
    time_s: float
    num_results: int
    database_bytes: int
    rss_bytes: dict[str, int]
    cpu_s: dict[str, float]


@dataclass(slots=True)
class Story:
    """What was seen of one start of the command.

    `num_before` are the results that were there when it had workers: those of a killed run go on
    with what they have. `calls` counts glances by role and by whether the process was in a call.
    """

    num_before: int = 0
    samples: list[Sample] = field(default_factory=list)
    calls: Counter[tuple[str, bool]] = field(default_factory=Counter)
    wall_s: float = 0.0
    exit_status: int = 0

    def add(self, sample: Sample) -> None:
        if not self.has_results and MEDIA not in sample.rss_bytes:
            self.num_before = sample.num_results
        self.samples.append(sample)

    @property
    def has_results(self) -> bool:
        return bool(self.samples) and self.samples[-1].num_results > self.num_before


def rehearse(
    folder: Path, num_items: int, *, num_workers: int | None, kill_at: float
) -> dict[str, Any]:
    """Run the command over what `write_tiny` wrote; what was seen.

    Args:
        kill_at: the share of results at which it is killed; 0 for never.
    """
    command, limit = _command(folder, num_workers), int(kill_at * num_items)
    stories = [_start(command, folder, limit or None)]
    report: dict[str, Any] = {"items": num_items}
    if limit:
        inodes = _inodes(folder)
        stories.append(_start(command, folder, None))
        after = _inodes(folder)
        report["made_twice"] = sum(after.get(name) != inode for name, inode in inodes.items())
    report["problems"] = [*_problems(folder, num_items), *_left_over(folder)]
    return report | {"starts": [_told(story) for story in stories]}


def write_tiny(folder: Path, num_images: int, num_videos: int, num_frames: int) -> None:
    """Weights, and images and videos of their size."""
    torch.manual_seed(0)
    checkpoint.save(folder / "w.safetensors", build_system(CIRCLES), {})
    cell_px = SIDE_PX // 4
    drawn = np.random.default_rng(0)

    def squares(count: int) -> np.ndarray:
        small_THWC = drawn.integers(0, 255, (count, 4, 4, 3), np.uint8)
        return small_THWC.repeat(cell_px, 1).repeat(cell_px, 2)

    for name in [*map(str, range(num_images)), WARM]:
        (folder / f"{name}.png").write_bytes(images.encode_png(squares(1)[0]))
    for name in [*map(str, range(num_videos)), WARM]:
        encode(folder / f"{name}.mp4", squares(num_frames), fps=25)


# --- the command -----------------------------------------------------------------------------


def _command(folder: Path, num_workers: int | None) -> list[str]:
    return [
        str(Path(sys.executable).with_name("kpmask")),
        "animate",
        *("--checkpoint", str(folder / "w.safetensors"), "--out", str(folder / "out")),
        *("--sources", f"{folder}/[0-9]*.png", "--drivings", f"{folder}/[0-9]*.mp4"),
        *("--device", "cpu"),
        *(() if num_workers is None else ("--workers", str(num_workers))),
    ]


def _environment(folder: Path) -> dict[str, str]:
    """This process's, but with nothing of a user's own."""
    others = ("KPMASK_", "PREFECT_", "RAY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    own = {"HOME": "home", "PREFECT_HOME": "prefect", "KPMASK_CACHE": "cache"}
    for place in own.values():
        (folder / place).mkdir(exist_ok=True)
    return kept | {name: str(folder / place) for name, place in own.items()}


def _start(command: list[str], folder: Path, limit: int | None) -> Story:
    """Start the command, watch it, and kill it where there are so many results."""
    story, start_s = Story(), time.monotonic()
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command, env=_environment(folder), stdout=log, stderr=log, start_new_session=True
        )
    try:
        _watch(process, folder, story, limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        story.exit_status = process.wait()
    story.wall_s = time.monotonic() - start_s
    return story


def _watch(process: subprocess.Popen[bytes], folder: Path, story: Story, limit: int | None) -> None:
    processes, start_s = Processes(process.pid), time.monotonic()
    over = threading.Event()
    glances = threading.Thread(target=_glance, args=(processes, story, over))
    glances.start()
    try:
        while process.poll() is None:
            processes.look()
            story.add(_sample(processes, folder, time.monotonic() - start_s))
            if limit is not None and story.samples[-1].num_results >= limit:
                return
            time.sleep(SAMPLE_S if story.has_results else SAMPLE_S / 8)
    finally:
        over.set()
        glances.join()


def _sample(processes: Processes, folder: Path, time_s: float) -> Sample:
    return Sample(
        time_s,
        len(_inodes(folder)),
        sum(path.stat().st_size for path in (folder / "prefect").glob("prefect.db*")),
        dict(processes.rss_bytes()),
        dict(processes.cpu_s()),
    )


def _glance(processes: Processes, story: Story, over: threading.Event) -> None:
    """See, now and then, who of the workers is in a call."""
    while not over.wait(GLANCE_S):
        workers = [pid for pid, known in processes.alive.items() if known.role in {MODEL, MEDIA}]
        for pid in workers if story.has_results else ():
            with contextlib.suppress(OSError):  # it ended meanwhile
                story.calls[processes.alive[pid].role, is_in_call(pid)] += 1


def _inodes(folder: Path) -> dict[str, int]:
    """The results, and what tells one from another that took its place."""
    try:
        with os.scandir(folder / "out") as entries:
            return {e.name: e.inode() for e in entries if e.name.endswith(".mp4")}
    except FileNotFoundError:
        return {}


# --- what is wrong with it -------------------------------------------------------------------


def _problems(folder: Path, num_items: int) -> list[str]:
    out = folder / "out"
    if not (out / "manifest.parquet").exists():
        return ["it did not come to its end"]
    table = pq.read_table(out / "manifest.parquet", columns=["key"])
    keys = set(table.column("key").to_pylist())
    found = {
        f"{table.num_rows} rows in the manifest": table.num_rows != num_items,
        f"{len(keys)} different results": len(keys) != num_items,
        "files and manifest differ": keys != _inodes(folder).keys(),
        "failures": pq.read_metadata(out / "failures.parquet").num_rows > 0,
        "states are left": (out / "features").exists(),
        "a journal is left": (out / "journal").exists(),
    }
    return [problem for problem, is_so in found.items() if is_so]


def _left_over(folder: Path) -> list[str]:
    """The processes of the run that a while after its end are still there."""
    home = f"HOME={folder / 'home'}".encode()
    deadline = time.monotonic() + ORPHANS_S
    while found := [pid for pid, _ in all_stats() if _lives_in(pid, home)]:
        if time.monotonic() > deadline:
            return [f"process {pid} is left: {title(pid)[:80]}" for pid in found]
        time.sleep(0.2)
    return []


def _lives_in(pid: int, home: bytes) -> bool:
    try:
        return home in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


# --- report ----------------------------------------------------------------------------------


def _told(story: Story) -> dict[str, Any]:
    samples, before = story.samples, story.num_before
    first = next((s for s in samples if s.num_results > before), samples[-1])
    last = next(s for s in samples if s.num_results == samples[-1].num_results)
    between = max(last.num_results - first.num_results, 1)
    spent_s = Counter(last.cpu_s)
    spent_s.subtract(first.cpu_s)
    return {
        "made": last.num_results - before,
        "wall_s": story.wall_s,
        "first_s": first.time_s,
        "last_s": last.time_s,
        "exit_status": story.exit_status,
        "cpu_s_before_first": first.cpu_s,
        "wall_ms": 1000 * (last.time_s - first.time_s) / between,
        "cpu_ms": {role: 1000 * spent_s[role] / between for role in ROLES},
        "idle": {role: _share_of_idle(story, role) for role in (MODEL, MEDIA)},
        "samples": [dataclasses.asdict(sample) for sample in samples],
    }


def _share_of_idle(story: Story, role: str) -> float:
    return story.calls[role, False] / max(sum(story.calls[role, is_in] for is_in in (0, 1)), 1)


def table(report: dict[str, Any]) -> str:
    lines = [f"{report['items']} animations are asked for"]
    for start in report["starts"]:
        lines += ["", *_lines(start)]
    twice = report.get("made_twice", 0)
    return "\n".join([*lines, "", f"made twice: {twice}; problems: {report['problems']}"])


def _lines(start: dict[str, Any]) -> list[str]:
    heads = "".join(f"{role + ' MB':>12}" for role in ROLES)
    lines = [f"{'s':>7}{'results':>9}{'Prefect kB':>12}{heads}"]
    samples = start["samples"]
    for sample in samples[:: max(len(samples) // TABLE_LINES, 1)] + samples[-1:]:
        held = "".join(f"{sample['rss_bytes'].get(role, 0) / 1e6:12.0f}" for role in ROLES)
        database_kb = sample["database_bytes"] / 1e3
        lines.append(f"{sample['time_s']:7.0f}{sample['num_results']:9}{database_kb:12.0f}{held}")
    before = ", ".join(f"{role} {start['cpu_s_before_first'].get(role, 0):.1f}" for role in ROLES)
    cpu = ", ".join(f"{role} {cpu_ms:.2f}" for role, cpu_ms in start["cpu_ms"].items())
    idle = ", ".join(f"{role} {share:.1%}" for role, share in start["idle"].items())
    return [
        *lines,
        "{made} made in {wall_s:.0f} s (exit status {exit_status}): the first after "
        "{first_s:.1f} s, the last after {last_s:.1f} s".format(**start),
        f"CPU s until the first: {before}",
        f"an animation: {start['wall_ms']:.1f} ms wall; CPU ms: {cpu}",
        f"not in a call: {idle}",
    ]

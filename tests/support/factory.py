"""Small datasets: drawn videos, tables about them, jobs, and what a run made of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from kpmask.config import PreprocessJob, validated
from kpmask.media.encode import encode
from kpmask.records import Failure
from tasks.manifest import read_table
from tasks.storage import open_store
from tasks.workbook import VideoItem

ROOT = Path(__file__).parents[2]
HEADER = "video_id,start,end,bbox,fps,width,height,partition,person_id"
NUM_FRAMES = 48

RUN = """
import sys
from pathlib import Path
from kpmask.config import PreprocessJob
from tasks.preprocess import preprocess
preprocess(PreprocessJob.model_validate_json(sys.argv[1]))
"""


def film(seed: int, count: int = NUM_FRAMES) -> list[np.ndarray]:
    """A square that moves over a background of its own."""
    rng = np.random.default_rng(seed)
    colour, back = rng.integers(64, 255, 3), rng.integers(0, 64, 3)
    frames = []
    for i in range(count):
        frame = np.full((64, 96, 3), back, np.uint8)
        frame[16:48, i % 64 : i % 64 + 32] = colour
        frames.append(frame)
    return frames


def filmed(folder: Path, names: Iterable[str]) -> Path:
    """A folder with a video of 48 frames at 24 frames/s for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        encode(folder / f"{name}.mp4", film(i), fps=Fraction(24))
    return folder


def line(video: str, start: int, end: int, split: str, person: str) -> str:
    return f"{video},{start},{end},0-0-96-64,24,96,64,{split},{person}"


def write_table(path: Path, lines: Iterable[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def job(out: Path | str, **settings: object) -> PreprocessJob:
    """A job of 32 px clips with one worker; parts are completed, all else is text."""
    tree = {
        "out": str(out),
        "clips": {"size_px": 32, "min_frames": 8},
        "storage": {"clips_per_shard": 2},
        "download": {"enabled": False},
        "cluster": {"num_workers": 1},
    }
    for key, value in settings.items():
        old = tree.get(key, {})
        tree[key] = old | value if isinstance(value, dict) else str(value)  # type: ignore[operator]
    return validated(PreprocessJob, tree)


def tree_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(files)}


def placeless(folder: Path) -> dict[str, bytes]:
    """`tree_of` a dataset, without the place that two of its files name."""
    tree = tree_of(folder)
    for key in ("stats.json", "index.html"):
        tree[key] = tree[key].replace(str(folder).encode(), b"here")
    return tree


def failures_of(out: Path | str) -> list[Failure]:
    return read_table(open_store(str(out)), "failures.parquet", Failure)


def codes_of(out: Path | str) -> dict[str, str]:
    return {failure.item: failure.code for failure in failures_of(out)}


def recorded_cuts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the videos that are cut from here on."""
    from tasks import preprocess as module

    names: list[str] = []
    original: Callable[..., object] = module.run_items

    def recording(items: Iterable[object], *args: object, **kwargs: object) -> object:
        def passed() -> Iterator[object]:
            for item in items:
                if isinstance(item, VideoItem):
                    names.append(item.name)
                yield item

        return original(passed(), *args, **kwargs)

    monkeypatch.setattr(module, "run_items", recording)
    return names


def started(
    one: PreprocessJob, *, code: str = RUN, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A run in a process group of its own, with a Ray of its own unless `environment` names one."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", code, one.model_dump_json()],
        env=inherited | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

"""What each metric and estimator costs a frame, and what a second worker brings.

    python -m tests.bench.metrics --video FILE --workers 1,2
    python -m tests.bench.metrics --metrics ssim,akd_facemesh --frames 64 --device cuda

Without --video the frames are drawn, and no face is found in some of them. Frames under test are
the true ones after x264 at crf 30, so that all differ and none is remembered. A metric by itself
looks at both; in an evaluation metrics share what an estimator found, and there are the copy and
the codec beside the model. Metrics whose weights are not here are left out and named.

With --workers the same folder of videos is scored by `tasks.evaluate` with each number of workers.
Its rate is counted from the first result to the last, so that starting Ray does not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmask.animate import to_tensor
from kpmask.config import Cluster, EvaluateJob, MediaLimits
from kpmask.demo.videos import film, plan_takes
from kpmask.driving import DrivingVideo
from kpmask.errors import CheckpointError, ConfigError
from kpmask.estimators import embedding_estimator, point_estimator
from kpmask.media.encode import encode
from kpmask.media.roundtrip import through_codec
from kpmask.metric_names import METRICS, SET_METRICS, estimator_of
from kpmask.metrics import build_metrics
from kpmask.records import Progress
from tasks.evaluate import evaluate

Frames = NDArray[np.uint8]  # THWC RGB
FPS, TESTED_CRF = 25, 30


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    true_THWC = _frames(options.video, options.frames, options.side)
    with through_codec(true_THWC, fps=FPS, crf=TESTED_CRF) as frames:
        tested_THWC = np.stack(list(frames))
    report: dict[str, Any] = {
        "frames": len(true_THWC),
        "side_px": options.side,
        "device": options.device,
        "load": os.getloadavg()[0],
        "metrics": {},
        "workers": {},
    }
    names = options.metrics.split(",") if options.metrics else _each_once()
    print(f"{len(true_THWC)} frames of {options.side} px, one thread, {options.device}")
    print(f"{'metric':28} {'ms a frame':>10} {'CPU ms':>8}")
    for name in names:
        found = _of_metric(name, tested_THWC, true_THWC, options.device, options.passes)
        report["metrics"][name] = found
        print(f"{name:28} {found}" if isinstance(found, str) else _line(name, found))
    for count in (int(text) for text in options.workers.split(",") if text):
        rate = _frames_per_s(tested_THWC, true_THWC, names, count, options.videos)
        report["workers"][count] = rate
        print(f"{count} workers: {rate:.1f} frames a second of {options.videos} videos")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--video", type=Path, help="a video with a face or a body in it")
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--side", type=int, default=256, help="px")
    parser.add_argument("--metrics", help="comma-separated; default: one of each kind")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", default="", help="1,2: numbers of workers to be tried")
    parser.add_argument("--videos", type=int, default=12, help="of the evaluation")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _each_once() -> list[str]:
    """Metrics that cost something of their own: of an estimator's one stands for all."""
    seen: set[str] = set()
    names = []
    for name in METRICS:
        estimator = estimator_of(name)
        if (
            estimator in seen or name in SET_METRICS
        ):  # these have features, and no value for a frame
            continue
        seen |= {estimator} - {""}
        names.append(name)
    return names


def _frames(path: Path | None, count: int, side_px: int) -> Frames:
    with tempfile.TemporaryDirectory(prefix="kpmask-bench-") as folder:
        if path is None:
            path = Path(folder) / "drawn.mp4"
            encode(path, film(plan_takes(1, seed=0)[0]), fps=FPS)
        video = DrivingVideo(path, MediaLimits(), side_px=side_px, min_frames=1)
        return np.stack(list(itertools.islice(video, count)))


# --- one metric ------------------------------------------------------------------------------


def _of_metric(
    name: str, tested_THWC: Frames, true_THWC: Frames, device: str, passes: int
) -> dict[str, float] | str:
    """Milliseconds a frame, by the clock and of the processor; or why there are none."""
    both = [to_tensor(frames, device=torch.device(device)) for frames in (tested_THWC, true_THWC)]

    def fresh() -> Callable[[], None]:
        point_estimator.cache_clear()
        embedding_estimator.cache_clear()
        metric = build_metrics([name])[0]
        return lambda: _scored(metric.per_frame, both)

    try:
        fresh()()
    except (ConfigError, CheckpointError) as error:
        return str(error.cause)
    times = [_timed(fresh()) for _ in range(passes)]
    walls, cpus = zip(*times, strict=True)
    count = len(true_THWC)
    return {
        "wall_ms": 1e3 * statistics.median(walls) / count,
        "cpu_ms": 1e3 * statistics.median(cpus) / count,
    }


def _scored(per_frame: Callable[..., object], both: Sequence[Tensor]) -> None:
    tested, true = both
    with torch.inference_mode():
        for start in range(0, len(true), 8):
            part = slice(start, start + 8)
            per_frame(tested[part], true[part], true[0])
    if true.is_cuda:
        torch.cuda.synchronize()


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def _line(name: str, found: dict[str, float]) -> str:
    return f"{name:28} {found['wall_ms']:10.2f} {found['cpu_ms']:8.2f}"


# --- a whole evaluation ----------------------------------------------------------------------


def _frames_per_s(
    tested_THWC: Frames, true_THWC: Frames, names: Sequence[str], workers: int, num_videos: int
) -> float:
    """Frames a second of an evaluation of two folders, from its first result to its last."""
    times: list[float] = []

    def note(progress: Progress) -> None:
        if progress.done > len(times):
            times.extend([time.monotonic()] * (progress.done - len(times)))

    with tempfile.TemporaryDirectory(prefix="kpmask-bench-") as folder:
        root = Path(folder)
        for number in range(num_videos):
            # Each begins elsewhere, so that none is like another.
            for kind, frames in (("generated", tested_THWC), ("reference", true_THWC)):
                (root / kind).mkdir(exist_ok=True)
                moved = np.roll(frames, number, axis=0)
                encode(root / kind / f"{number:03}.mp4", moved, fps=FPS, crf=12)
        job = EvaluateJob(
            out=str(root / "out"),
            generated=str(root / "generated"),
            reference=str(root / "reference"),
            metrics=tuple(names),
            cluster=Cluster(num_workers=workers),
        )
        evaluate(job, on_progress=note)
    return (len(times) - 1) * len(true_THWC) / (times[-1] - times[0])


if __name__ == "__main__":
    main()

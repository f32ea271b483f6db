"""How fast frames come and go without a network: decoding alone, and encoding alone.

The video is drawn at 720p, with noise, so that it takes the bits that videos do. Decoding
is as a catalog does it: cut square and resized to the model's size on the way. What was decoded is
encoded with x264 as results are, read back and hashed. Medians of as many passes as there is time.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np

from kpmask.config import MediaLimits
from kpmask.demo.videos import film, plan_takes
from kpmask.driving import DrivingVideo
from kpmask.media.encode import encode

SIZE_PX: Final = (1280, 720)
FPS: Final = Fraction(25)
DRAWN_S: Final = 2.0
PASSES: Final = 3  # of the drawn frames, forwards and backwards, in the video
GRAIN: Final = 2.0  # levels of noise: about 1.7 Mbit/s, as video sites have 720p


def measured(side_px: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Wall and processor seconds a frame of decoding to a side, and of encoding at it."""
    with tempfile.TemporaryDirectory(prefix="kpmask-bench-") as folder:
        path = Path(folder) / "driving.mp4"
        mbit_per_s = _write_driving(path)
        driving = DrivingVideo(path, MediaLimits(), side_px=side_px, min_frames=1)
        frames = list(driving)

        def write() -> None:
            encode(path.with_name("result.mp4"), frames, fps=FPS)

        parts = {
            "decode": _timed(lambda: [None for _ in driving], len(frames), seconds),
            "encode": _timed(write, len(frames), seconds),
        }
    parts["decode"]["what"] = f"{SIZE_PX[0]}x{SIZE_PX[1]}, {mbit_per_s:.1f} Mbit/s"
    parts["encode"]["what"] = f"{side_px}x{side_px}"
    return parts


def _write_driving(path: Path) -> float:
    """The drawn video; its Mbit/s."""
    take = dataclasses.replace(
        plan_takes(24, seed=0)[0], size_px=SIZE_PX, fps=FPS, duration_s=DRAWN_S, codec=0
    )
    drawn = list(film(take))
    rng = np.random.default_rng(0)

    def noisy() -> Any:
        for number in range(PASSES):
            for image_HWC in drawn[:: -1 if number % 2 else 1]:
                grain_HW1 = rng.normal(0, GRAIN, (*image_HWC.shape[:2], 1))
                yield (image_HWC + grain_HW1).round().clip(0, 255).astype(np.uint8)

    made = encode(path, noisy(), fps=FPS, crf=20)
    return 8e-6 * made.size_bytes / (made.num_frames / float(FPS))


def _timed(work: Callable[[], object], num_frames: int, seconds: float) -> dict[str, Any]:
    times: list[tuple[float, float]] = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s or len(times) < 3:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - wall_s, time.process_time() - cpu_s))
    return {
        "wall_s_per_frame": statistics.median(wall_s for wall_s, _ in times) / num_frames,
        "cpu_s_per_frame": statistics.median(cpu_s for _, cpu_s in times) / num_frames,
        "rounds": len(times),
    }

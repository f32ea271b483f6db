"""How fast we animate, against a loop as the original projects wrote it, interleaved in one run.

    python -m tests.bench.animate --preset taichi256 --system heatmap --seconds 60 --threads 1
    python -m tests.bench.animate --weights demo --json bench.json

Their loop: float32, a frame at a time, the detector on source and driving frame and all of the
generator for each, in eval mode without gradients. It is written with the plain system, which
computes what the original code computes. Ours are animators of both precisions: the source is
encoded before the clock starts, since a video has it once, and driving frames go through in
batches, from 8-bit frames to 8-bit frames.

Each loop runs in a process of its own, because an animator has its process keep freed memory and
theirs does not; `plain, memory kept` is their loop in a process that does. Rounds take turns, and
medians of the rounds' ratios are compared. On a shared machine the ratio of processor seconds with
one thread says more than that of the wall clock. Weights are random with batch statistics of drawn
frames, or those of --weights, and the same in every process: so are the frames, and what is drawn
is compared with the plain loop's.

Latency is from one 8-bit frame to one 8-bit frame, by itself. What else bounds a catalog stands
below: decoding and encoding alone (see `animate_media`), and on a GPU the network alone, by CUDA's
own clock, encoding of driving frames and drawing together.

GFLOP/frame are products and sums of convolutions and matrix products, twice their number of
multiplications. The peak is the best of a matrix product and of a wide 3x3 convolution.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kpmask import bundled, checkpoint
from kpmask.animate import (
    GRAPH_SIZES,
    Animator,
    Frames,
    Transfer,
    fit_square,
    to_frames,
    to_tensor,
)
from kpmask.config import TrainJob, resolve_job
from kpmask.demo.videos import film, plan_takes
from kpmask.device import has_bfloat16, keep_freed_memory
from kpmask.models import build_system
from kpmask.models.base import AnimationSystem
from kpmask.optimize.convolve import FusedConv
from tests.bench import animate_media

PLAIN, KEPT, FLOAT32, BFLOAT16 = "plain", "plain, memory kept", "float32", "bfloat16"
EAGER = "bfloat16, no graphs"
LOOPS = (PLAIN, KEPT, FLOAT32, BFLOAT16, EAGER)
NETWORK_BATCHES = (16, 32)
NETWORK_RUNS, LATENCY_RUNS = 20, 7
MATRIX_SIDE, CONV_CHANNELS, CONV_SIDE_PX = 1536, 256, 64
Seconds = tuple[float, float]  # of a frame: wall, processor


def main() -> None:
    options = _options()
    with contextlib.ExitStack() as stack:
        loops = {name: stack.enter_context(_Process(name, options)) for name in _names(options)}
        results = _compare(loops, options.seconds)
    report = {"machine": _machine(options), "what": _what(options), "loops": results}
    side_px = report["what"]["image_size_px"]
    report["parts"] = animate_media.measured(side_px, options.seconds / 10)
    print(_table(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="taichi256")
    parser.add_argument("--system", help="by default the preset's first")
    parser.add_argument("--weights", help="a file or bundled name in place of random weights")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--frames", type=int, default=4, help="of a round")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--loops", nargs="*", choices=LOOPS, help="by default all that can be")
    parser.add_argument("--json", type=Path, help="where the results go, too")
    return parser.parse_args()


def _names(options: argparse.Namespace) -> list[str]:
    kind = torch.device(options.device).type
    there = {KEPT: kind == "cpu", BFLOAT16: has_bfloat16(kind)}
    there[EAGER] = kind == "cuda" and has_bfloat16(kind)
    chosen = options.loops or [name for name in LOOPS if there.get(name, True)]
    return [PLAIN, *(name for name in chosen if name != PLAIN)]


# --- what is animated ------------------------------------------------------------------------


def _system(options: argparse.Namespace) -> AnimationSystem[Any, Any]:
    if options.weights is not None:
        return checkpoint.load(bundled.locate(options.weights)).system
    job = resolve_job(
        TrainJob,
        preset=options.preset,
        systems=[options.system] if options.system else None,
        flags={"data": "drawn", "out": "nowhere"},
    )
    torch.manual_seed(0)
    system = build_system(job.phases[-1].model)
    _settle(system, to_tensor(_frames(2, system.image_size_px)))
    return system


@torch.no_grad()
def _settle(system: AnimationSystem[Any, Any], images_BCHW: Tensor) -> None:
    """Batch statistics of these images, so that no layer is dead or saturated."""
    norms = [part for part in system.modules() if isinstance(part, nn.BatchNorm2d)]
    system.eval()
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    source = system.encode_source(images_BCHW)
    system.render(source, system.encode_driving(images_BCHW))
    system.eval()


def _frames(count: int, side_px: int) -> Frames:
    """A drawn person, every fourth frame."""
    take = plan_takes(24, seed=0)[0]
    left, top, right, bottom = take.box_px
    chosen = itertools.islice(itertools.cycle(film(take)), 0, 4 * count, 4)
    cut = [np.ascontiguousarray(frame_HWC[top:bottom, left:right]) for frame_HWC in chosen]
    return np.stack([fit_square(frame_HWC, side_px) for frame_HWC in cut])


# --- the loops -------------------------------------------------------------------------------


class PlainLoop:
    """A frame at a time, everything for each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.system = _system(options).to(options.device).eval()
        self.device = torch.device(options.device)
        frames_THWC = _frames(options.frames + 1, self.system.image_size_px)
        self.source_1CHW = to_tensor(frames_THWC[:1], device=self.device)
        self.driving_TCHW = to_tensor(frames_THWC[1:])
        self.first_1HWC = frames_THWC[1:2]
        self.drawn: list[NDArray[np.float32]] = []

    @torch.no_grad()
    def draw(self) -> list[NDArray[np.float32]]:
        predictions = []
        for image_CHW in self.driving_TCHW:
            driving = self.system.encode_driving(image_CHW[None].to(self.device))
            source = self.system.encode_source(self.source_1CHW)
            image_BCHW = self.system.render(source, driving).image_BCHW
            predictions.append(image_BCHW.cpu().numpy()[0].transpose(1, 2, 0))
        self.drawn = predictions
        return predictions

    @torch.no_grad()
    def draw_one(self) -> Frames:
        """From an 8-bit frame to an 8-bit frame."""
        driving = self.system.encode_driving(to_tensor(self.first_1HWC, device=self.device))
        source = self.system.encode_source(self.source_1CHW)
        return to_frames(self.system.render(source, driving).image_BCHW)

    def network(self) -> dict[int, float]:
        """Nothing: it takes no batches."""
        return {}

    def exact(self) -> NDArray[np.float32]:
        """The frames before rounding, THWC."""
        return np.stack(self.drawn)

    def first_seconds(self) -> float:
        """Of what is done once per source: nothing is."""
        return 0.0


class OurLoop:
    """What an animator does with a stored source state and frames of a video."""

    def __init__(
        self, options: argparse.Namespace, *, precision: Any, graph_sizes: Sequence[int]
    ) -> None:
        self.animator = Animator(
            _system(options), device=options.device, precision=precision, graph_sizes=graph_sizes
        )
        if self.animator.precision != precision:
            raise SystemExit(f"{precision}: {self.animator.precision_check}")
        self.system = self.animator.system
        frames_THWC = _frames(options.frames + 1, self.animator.image_size_px)
        self.source_HWC, self.driving_THWC = frames_THWC[0], frames_THWC[1:]
        self.batch_size = options.batch_size
        self.source = self.animator.encode_source(self.source_HWC)

    def draw(self) -> list[NDArray[np.uint8]]:
        def chunks() -> Iterator[Any]:
            return self.animator.encode_chunks(self.driving_THWC, batch_size=self.batch_size)

        return list(self.animator.stream_states(self.source, chunks, Transfer()))

    def draw_one(self) -> Frames:
        """From an 8-bit frame to an 8-bit frame."""
        driving = self.animator.encode_driving(self.driving_THWC[:1])
        drawn = self.animator.render(self.source, driving, initial=None, transfer=Transfer())
        return self.animator.fetch(drawn)()

    @torch.inference_mode()
    def network(self) -> dict[int, float]:
        """On a GPU: seconds a frame of encoding and drawing, by batch size, without the host."""
        if self.animator.device.type != "cuda":
            return {}
        return {size: self._network_s(size) for size in NETWORK_BATCHES}

    def _network_s(self, size: int) -> float:
        chosen = np.resize(np.arange(len(self.driving_THWC)), size)
        images_BCHW = to_tensor(self.driving_THWC[chosen], device=self.animator.device)
        source = self.source.repeat(size)

        def run() -> None:
            self.system.render(source, self.system.encode_driving(images_BCHW))

        run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(NETWORK_RUNS):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / NETWORK_RUNS / size

    def exact(self) -> NDArray[np.float32]:
        driving = self.animator.encode_driving(self.driving_THWC)
        frames_TCHW = self.animator.render(self.source, driving)
        return frames_TCHW.permute(0, 2, 3, 1).cpu().numpy()

    def first_seconds(self) -> float:
        return _seconds(lambda: self.animator.encode_source(self.source_HWC))[1]


def _flop(loop: PlainLoop | OurLoop, num_frames: int) -> float:
    """Draw once, and count the floating-point operations of a frame."""
    counted = 0

    def count(conv: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal counted
        assert isinstance(conv, FusedConv)
        counted += 2 * output.numel() * math.prod(conv.weight.shape[1:])

    convs = [part for part in loop.system.modules() if isinstance(part, FusedConv)]
    hooks = [conv.register_forward_hook(count) for conv in convs]
    with FlopCounterMode(display=False) as counter:
        loop.draw()
    for hook in hooks:
        hook.remove()
    # What torch counts by itself are the convolutions that oneDNN's own functions do not do.
    others = 0 if any(not conv.packed for conv in convs) else counted
    return float(counter.get_total_flops() + others) / num_frames


# --- processes -------------------------------------------------------------------------------


class _Process:
    """One of the loops in a process of its own, which does what it is asked to."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, options), daemon=True)

    def __enter__(self) -> _Process:
        self._process.start()
        self.ask("ready")
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join()

    def ask(self, what: str) -> Any:
        self._line.send(what)
        return self._line.recv()


def _serve(line: Connection, name: str, options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if name == KEPT:
        keep_freed_memory()
    loop = _loop(name, options, GRAPH_SIZES if name != EAGER else ())
    loop.draw()  # first frames allocate and fill caches
    flop = _flop(_loop(name, options, ()), options.frames)  # nothing counts inside a graph
    dtype = torch.bfloat16 if name in {BFLOAT16, EAGER} else torch.float32
    answers: dict[str, Callable[[], Any]] = {
        "ready": lambda: True,
        "round": lambda: tuple(s / options.frames for s in _seconds(loop.draw)),
        "frames": loop.exact,
        "first": loop.first_seconds,
        "latency": lambda: _latency(loop),
        "network": loop.network,
        "flop": lambda: flop,
        "peak": lambda: _peak(dtype, options.device),
    }
    while True:
        line.send(answers[line.recv()]())


def _loop(
    name: str, options: argparse.Namespace, graph_sizes: Sequence[int]
) -> PlainLoop | OurLoop:
    if name in {PLAIN, KEPT}:
        return PlainLoop(options)
    precision = BFLOAT16 if name == EAGER else name
    return OurLoop(options, precision=precision, graph_sizes=graph_sizes)


def _latency(loop: PlainLoop | OurLoop) -> Seconds:
    loop.draw_one()
    times = [_seconds(loop.draw_one) for _ in range(LATENCY_RUNS)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def _seconds(work: Callable[[], object]) -> Seconds:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


@torch.inference_mode()
def _peak(dtype: torch.dtype, device: str) -> float:
    """FLOP per processor second (on a GPU: per second) of the quickest thing that we know."""
    left, right = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=device).to(dtype)
    conv = FusedConv(
        torch.randn(CONV_CHANNELS, CONV_CHANNELS, 3, 3, device=device),
        torch.zeros(CONV_CHANNELS, device=device),
        padding=(1, 1),
        relu=False,
        dtype=dtype,
    )
    image = torch.randn(4, CONV_CHANNELS, CONV_SIDE_PX, CONV_SIDE_PX, device=device)
    image = image.to(dtype=dtype, memory_format=torch.channels_last)
    clock = 1 if device == "cpu" else 0
    best = 0.0
    for flop, work in (
        (2 * MATRIX_SIDE**3, lambda: left @ right),
        (2 * 9 * CONV_CHANNELS * image.numel(), lambda: conv(image)),
    ):
        work()
        best = max(best, flop / min(_seconds(work)[clock] for _ in range(5)))
    return best


# --- comparison ------------------------------------------------------------------------------


def _compare(loops: Mapping[str, _Process], seconds: float) -> dict[str, dict[str, Any]]:
    rounds: dict[str, list[Seconds]] = {name: [] for name in loops}
    peaks: dict[str, list[float]] = {name: [] for name in loops}
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s or len(rounds[PLAIN]) < 3:
        for name, loop in loops.items():
            rounds[name].append(loop.ask("round"))
        if len(rounds[PLAIN]) <= 3:
            for name, loop in loops.items():
                peaks[name].append(loop.ask("peak"))
    expected_THWC = loops[PLAIN].ask("frames")
    return {
        name: {
            **_timed(rounds[name], rounds[PLAIN]),
            **_error(loop.ask("frames"), expected_THWC),
            "source_cpu_s": loop.ask("first"),
            **dict(zip(("latency_s", "latency_cpu_s"), loop.ask("latency"), strict=True)),
            "network_s_per_frame": loop.ask("network"),
            "gflop_per_frame": loop.ask("flop") / 1e9,
            "peak_gflop_per_s": max(peaks[name]) / 1e9,
        }
        for name, loop in loops.items()
    }


def _timed(ours: list[Seconds], theirs: list[Seconds]) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": len(ours)}
    for place, clock in enumerate(("wall", "cpu")):
        found[f"{clock}_s_per_frame"] = statistics.median(times[place] for times in ours)
        ratios = [b[place] / a[place] for a, b in zip(ours, theirs, strict=True)]
        found[f"{clock}_ratio"] = statistics.median(ratios)
        found[f"{clock}_ratio_range"] = [min(ratios), max(ratios)]
    return found


def _error(found_THWC: NDArray[np.float32], expected_THWC: NDArray[np.float32]) -> dict[str, Any]:
    difference = found_THWC.astype(np.float64) - expected_THWC
    mean = float(np.square(difference).mean())
    return {
        "max_error": float(np.abs(difference).max()),
        "psnr_db": 10 * math.log10(1 / mean) if mean else None,
    }


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if options.device != "cpu":
        name = torch.cuda.get_device_name(options.device)
    return {
        "device": options.device,
        "name": name,
        "bfloat16": has_bfloat16(torch.device(options.device).type),
        "threads": options.threads or torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _what(options: argparse.Namespace) -> dict[str, Any]:
    system = _system(options)
    return {
        "system": system.config.system,
        "weights": options.weights or f"random, {options.preset} {options.system or ''}".strip(),
        "image_size_px": system.image_size_px,
        "batch_size": options.batch_size,
        "frames_per_round": options.frames,
    }


def _table(report: dict[str, Any]) -> str:
    what, machine = report["what"], report["machine"]
    lines = [
        f"{what['system']} ({what['weights']}), {what['image_size_px']} px, ours in batches of "
        f"{what['batch_size']}; {machine['device']}, {machine['threads']} threads",
        "| loop | frames/s | CPU s/frame | wall ratio | CPU ratio (range) | latency ms (CPU) "
        "| max error | PSNR dB | GFLOP/frame | GFLOP/CPU s | of peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["loops"].items():
        rate = row["gflop_per_frame"] / row["cpu_s_per_frame"]
        low, high = row["cpu_ratio_range"]
        psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        lines.append(
            f"| {name} | {1 / row['wall_s_per_frame']:.2f} | {row['cpu_s_per_frame']:.3f} "
            f"| {row['wall_ratio']:.2f} | {row['cpu_ratio']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {1e3 * row['latency_s']:.1f} ({1e3 * row['latency_cpu_s']:.1f}) "
            f"| {row['max_error']:.1e} | {psnr} | {row['gflop_per_frame']:.1f} | {rate:.0f} "
            f"| {rate / row['peak_gflop_per_s']:.0%} of {row['peak_gflop_per_s']:.0f} |"
        )
    lines += ["| part | what | frames/s | CPU ms/frame |", "|---|---|---|---|"]
    for name, part in report["parts"].items():
        rate, cpu_ms = 1 / part["wall_s_per_frame"], 1e3 * part["cpu_s_per_frame"]
        lines.append(f"| {name} | {part['what']} | {rate:.0f} | {cpu_ms:.2f} |")
    for name, row in report["loops"].items():
        for size, seconds in row["network_s_per_frame"].items():
            lines.append(f"| network | {name}, batch {size} | {1 / seconds:.0f} | - |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Batches of fixed sizes: recordings against what they record, and frames that know no neighbours.

What a GPU does with a recording is done here on its memory by a recorder for the CPU. Tests marked
`gpu` do the same with CUDA graphs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kpmask.animate import Animator, to_frames
from kpmask.config import TrainJob, resolve_job
from kpmask.models import build_system
from kpmask.models.base import AnimationSystem, Prediction
from kpmask.models.refined_mask import RefinedMaskSystem
from kpmask.optimize import Chosen, optimized, render_by
from kpmask.optimize.choice import with_recordings
from kpmask.optimize.cuda import GraphRecorder
from kpmask.optimize.fixed import Recorded, Recording, recorded
from kpmask.optimize.precision import compared, pictures
from kpmask.optimize.transfer import Direct, Pinned, in_order

SYSTEMS = ("heatmap", "circles", "refined", "fomm", "monkey-net", "x2face", "kpmask-plus")
PRECISIONS = ("plain", "float32", "bfloat16")
SIZES = (1, 4)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def make(name: str, precision: str = "plain") -> AnimationSystem[Any, Any]:
    """The preset `debug`'s system, with weights and statistics that show what it draws."""
    flags = {"data": "data", "out": "out"}
    job = resolve_job(TrainJob, preset="debug", systems=[name], flags=flags)
    torch.manual_seed(0)
    system = build_system(job.phases[-1].model).eval().requires_grad_(False)
    for part in system.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.normal_(0, part.weight[0].numel() ** -0.5)
        if isinstance(part, nn.BatchNorm2d):
            part.weight.uniform_(0.5, 1.5)
            assert part.running_mean is not None
            part.running_mean.normal_(0, 0.2)
    return system if precision == "plain" else optimized(system, precision=precision)  # type: ignore[arg-type]


class MemoryRecorder:
    """Does the work again at every replay, and writes it where the first result lies."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        result = work()

        def replay() -> None:
            self.num_replays += 1
            for place, tensor in zip(tensors(result), tensors(work()), strict=True):
                place.copy_(tensor)

        return result, replay


def tensors(value: Any) -> list[Tensor]:
    parts = [value] if isinstance(value, Tensor) else list(vars(value).values())
    return [part for part in parts if part is not None]


def equal(found: Any, expected: Any) -> bool:
    pairs = zip(tensors(found), tensors(expected), strict=True)
    return type(found) is type(expected) and all(torch.equal(a, b) for a, b in pairs)


# --- recordings ------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recorded_system_draws_what_it_draws(name: str) -> None:
    """Of every batch size: smaller than recorded, as recorded, and larger than all recorded."""
    system, record = make(name, "float32"), MemoryRecorder()
    twin = recorded(system, SIZES, record, device="cpu")
    assert type(twin) is type(system)
    images_BCHW, sources_BCHW = pictures(11, system.image_size_px), pictures(2, 32).flip(2)
    expected: list[Tensor] = []
    drawn: list[Prediction] = []
    for count in (1, 3, 4, 11):
        before = record.num_replays
        driving = twin.encode_driving(images_BCHW[:count])
        source = twin.encode_source(sources_BCHW[:1]).repeat(count)  # all entries in one memory
        drawn.append(twin.render(source, driving))
        assert record.num_replays - before == 2 * -(-count // 4), "both run from recordings"
        alone = system.encode_driving(images_BCHW[:count])
        expected.append(system.render(source, alone).image_BCHW)
    for prediction, image_BCHW in zip(drawn, expected, strict=True):
        # Bits are another matter: these are batches of another size.
        torch.testing.assert_close(prediction.image_BCHW, image_BCHW, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_results_outlast_the_next_replay_and_whole_batches_are_exact() -> None:
    system = make("fomm", "float32")
    twin = recorded(system, SIZES, MemoryRecorder(), device="cpu")
    images_BCHW = pictures(8, system.image_size_px)
    source = system.encode_source(images_BCHW[:1]).repeat(4)
    states = [twin.encode_driving(images_BCHW[start : start + 4]) for start in (0, 4)]
    drawn = [twin.render(source, driving) for driving in states]
    for index, start in enumerate((0, 4)):
        driving = system.encode_driving(images_BCHW[start : start + 4])
        assert equal(states[index], driving)
        assert equal(drawn[index], system.render(source, driving))


@torch.inference_mode()
def test_what_does_not_fit_a_recording_runs_as_it_is() -> None:
    def doubled(x_BN: Tensor) -> Tensor:
        return 2 * x_BN

    record = MemoryRecorder()
    function = Recorded(doubled, {2: Recording(doubled, (torch.zeros(2, 3),), record)})
    for odd in (torch.ones(0, 3), torch.ones(2, 4), torch.ones(2, 3, dtype=torch.float64)):
        assert torch.equal(function(odd), 2 * odd)
    assert record.num_replays == 0
    assert torch.equal(function(torch.ones(3, 3)), torch.full((3, 3), 2.0))
    assert record.num_replays == 2
    assert torch.equal(Recorded(doubled, {})(torch.ones(3)), torch.full((3,), 2.0))


@torch.inference_mode()
def test_without_its_steps_a_system_is_another_one() -> None:
    """`refined` is scored as another system, of which there are no recordings."""
    system, record = make("refined", "float32"), MemoryRecorder()
    assert isinstance(system, RefinedMaskSystem)
    twin = recorded(system, (2,), record, device="cpu")
    images_BCHW = pictures(2, system.image_size_px)
    driving = system.encode_driving(images_BCHW)
    source = system.encode_source(images_BCHW)
    expected = system.with_ablation("no_id").render(source, driving)
    assert equal(twin.for_reconstruction().render(source, driving), expected)
    assert not equal(twin.render(source, driving), expected)
    whole = recorded(make("fomm"), (2,), record, device="cpu")
    assert whole.for_reconstruction() is whole


def failing(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    raise RuntimeError("operation not permitted when stream is capturing")


def forgetting(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """A recording that has nothing to do with its inputs."""
    return work(), lambda: None


@pytest.mark.parametrize(
    ("record", "said"), [(failing, "stream is capturing"), (forgetting, "draw something else")]
)
def test_recordings_that_fail_are_done_without(
    record: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = Chosen(make("heatmap", "float32"), "float32")
    with caplog.at_level(logging.WARNING, logger="kpmask"):
        assert with_recordings(chosen, SIZES, record, device="cpu") is chosen
    assert "without CUDA graphs" in caplog.text
    assert said in caplog.text
    kept = with_recordings(chosen, (4, 1), MemoryRecorder(), device="cpu")
    assert (kept.batch_sizes, kept.precision) == ((1, 4), "float32")
    assert kept.system is not chosen.system


def test_on_a_cpu_nothing_is_recorded() -> None:
    animator = Animator(make("heatmap"), device="cpu", precision="float32", graph_sizes=(4,))
    assert animator.graph_sizes == ()


class HostWatch(TorchDispatchMode):
    """Notes operators that make something on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        if any(isinstance(part, Tensor) and part.device.type == "cpu" for part in made):
            self.seen.append(str(function))
        return result


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_recorded_stays_on_its_device(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the `meta` device, where values do not exist: to wait for one or to mix devices raises.

    A CUDA graph can hold nothing that does, and a fast system is to run on a GPU at all.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    system = optimized(make(name).to("meta"), precision=precision)  # type: ignore[arg-type]
    parts = [*system.parameters(), *system.buffers()]
    assert {part.device.type for part in parts} == {"meta"}
    images_BCHW = torch.empty(4, 3, system.image_size_px, system.image_size_px, device="meta")
    with torch.inference_mode():
        source = system.encode_source(images_BCHW)
        with HostWatch() as watch:
            prediction = system.render(source, system.encode_driving(images_BCHW))
    assert prediction.image_BCHW.shape == images_BCHW.shape
    assert watch.seen == []


# --- frames that know no neighbours ----------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_at_one_size_no_bit_depends_on_company(name: str, precision: str) -> None:
    system = make(name, precision)
    images_BCHW = pictures(5, system.image_size_px)
    sources = system.encode_source(images_BCHW[:3])
    driving = system.encode_driving(images_BCHW)
    alone = {
        pair: render_by(system, 3, sources[pair[0] :][:1], driving[pair[1] :][:1])[0]
        for pair in ((0, 4), (1, 0), (2, 3), (0, 1), (1, 2), (2, 4), (0, 0))
    }
    for order in (list(alone), list(alone)[::-1], list(alone)[2:5]):
        at_B = torch.tensor(order)
        mixed_BCHW = render_by(system, 3, sources[at_B[:, 0]], driving[at_B[:, 1]])
        for image_CHW, pair in zip(mixed_BCHW, order, strict=True):
            assert torch.equal(image_CHW, alone[pair])
    spread = render_by(system, 3, sources[:1].repeat(2), driving[[4, 1]])
    assert torch.equal(spread, torch.stack([alone[0, 4], alone[0, 1]]))
    # Against the batch as it is; a bfloat16 may be rounded the other way.
    whole_BCHW = system.render(sources, driving[2:]).image_BCHW
    error = (render_by(system, 2, sources, driving[2:]) - whole_BCHW).abs().max()
    assert error <= (2**-7 if precision == "bfloat16" else 1e-5)


# --- transfers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_ahead", "expected"),
    [
        (0, ["begin 0", "wait 0", "begin 1", "wait 1", "begin 2", "wait 2"]),
        (1, ["begin 0", "begin 1", "wait 0", "begin 2", "wait 1", "wait 2"]),
        (9, ["begin 0", "begin 1", "begin 2", "wait 0", "wait 1", "wait 2"]),
    ],
)
def test_batches_are_begun_ahead_and_waited_for_in_order(
    num_ahead: int, expected: Sequence[str]
) -> None:
    seen: list[str] = []

    def begun() -> Iterator[Callable[[], int]]:
        for number in range(3):
            seen.append(f"begin {number}")
            yield lambda number=number: seen.append(f"wait {number}") or number

    assert list(in_order(begun(), num_ahead=num_ahead)) == [0, 1, 2]
    assert seen == expected


def test_an_animation_is_the_same_a_batch_ahead() -> None:
    """The order of a GPU, by hand: what is begun later does not change what is waited for."""
    animator = Animator(make("heatmap"), device="cpu", precision="float32")
    frames_THWC = to_frames(pictures(7, animator.image_size_px))
    expected = animator.animate(frames_THWC[0], frames_THWC, batch_size=2)
    animator._transfers.num_ahead = 1
    ahead = animator.animate(frames_THWC[0], frames_THWC, batch_size=2)
    np.testing.assert_array_equal(ahead, expected)


def test_direct_transfers_give_what_they_take() -> None:
    frames_THWC = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    there = Direct()
    np.testing.assert_array_equal(there.download(there.upload(frames_THWC))(), frames_THWC)


class FakeStream:
    """Notes what is asked of it, in the order of all streams."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> FakeStream:
        return self

    def synchronize(self) -> None:
        self._log.append(f"host waits for {self.name}")


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA's streams and graphs as notes in a list; everything runs on the CPU at once."""
    log: list[str] = []
    names = iter(("in", "out"))
    computing = FakeStream("computing", log)

    @contextlib.contextmanager
    def within(what: str) -> Iterator[None]:
        log.append(f"{what}:")
        yield
        log.append(f":{what}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    empty, to = torch.empty, Tensor.to
    fakes: dict[str, Any] = {
        "device": lambda device: contextlib.nullcontext(),
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda device=None: FakeStream(next(names), log),
        "current_stream": lambda device=None: computing,
        "stream": lambda stream: within(stream.name),
        "CUDAGraph": Graph,
        "graph": lambda graph, pool: within(f"graph in {pool}"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def pinned(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*shape, **options)

    def copied(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        log.extend(["copied in"] * options.get("non_blocking", False))
        return to(tensor, *args, **options).clone()

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(Tensor, "to", copied)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}")
    )
    return log


def test_pinned_transfers_wait_for_each_other_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads waits for who writes, memory is kept for who reads, and only the end waits."""
    log = fake_cuda(monkeypatch)
    frames_THWC = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    there = Pinned(torch.device("cpu"))
    levels_THWC = there.upload(frames_THWC)
    wait = there.download(255 - levels_THWC)
    assert log == [
        *("in:", "copied in", ":in", "computing waits for in", "kept for computing"),
        *("out waits for computing", "out:", ":out", "kept for out"),
    ]
    np.testing.assert_array_equal(wait(), 255 - frames_THWC)
    assert log[-1] == "host waits for out"


def test_a_graph_is_recorded_after_warming_up_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_cuda(monkeypatch)
    record = GraphRecorder(torch.device("cpu"))
    result, replay = record(lambda: log.append("work") or "result")
    assert result == "result"
    assert log == [
        *("in waits for computing", "in:", "work", "work", "work", ":in"),
        *("computing waits for in", "graph in pool:", "work", ":graph in pool"),
    ]
    replay()
    assert log[-1] == "replay"


# --- with a GPU ------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
def test_pinned_transfers_give_what_they_take() -> None:
    """Several under way at once, each computed on before it is fetched."""
    there = Pinned(torch.device("cuda"))
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (16, 256, 256, 3), np.uint8) for _ in range(8)]
    begun = [there.download(255 - there.upload(batch)) for batch in batches]
    for wait, batch in zip(begun, batches, strict=True):
        np.testing.assert_array_equal(wait(), 255 - batch)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_cuda_graphs_draw_what_the_kernels_draw(name: str, precision: Any) -> None:
    plain = make(name)
    eager = Animator(plain, device="cuda", precision=precision, graph_sizes=())
    graphs = Animator(plain, device="cuda", precision=precision, graph_sizes=SIZES)
    assert graphs.graph_sizes == SIZES, "they could be recorded"
    frames_THWC = to_frames(pictures(8, plain.image_size_px))

    def video(animator: Animator, batch_size: int) -> NDArray[np.int64]:
        return animator.animate(frames_THWC[0], frames_THWC, batch_size=batch_size).astype(int)

    for batch_size in SIZES:
        difference = video(eager, batch_size) - video(graphs, batch_size)
        assert np.abs(difference).max() <= 1
    # Three entries run as four, and eight as two fours.
    for batch_size in (3, 8):
        difference = video(graphs, batch_size) - video(graphs, 4)
        assert np.abs(difference).max() <= 1


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    videos = []
    for device in ("cpu", "cuda"):
        animator = Animator(make("heatmap"), device=device, precision="float32")
        frames_THWC = to_frames(pictures(5, animator.image_size_px))
        video = animator.animate(frames_THWC[0], frames_THWC)
        videos.append(torch.from_numpy(video) / 255)
    assert compared(*videos).psnr_db > 40  # convolutions keep 10 bits there (TF32)

"""Several animations on their way through one model, to media workers that are slow, or die."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from kpmask import Animator
from kpmask.animate import Transfer
from kpmask.errors import ItemError, KpmaskError, MediaError, StorageError, WorkerError
from kpmask.models import build_system
from kpmask.models.base import State
from kpmask.records import AnimationItem
from tasks.lanes import CHUNK_FRAMES, MAX_UNDERWAY, Drawing, Renderer, Slot
from tasks.media_worker import DrivingFacts
from tests.support.models import CIRCLES, SIDE_PX

DEAD = WorkerError("the worker process died", retryable=True)


@dataclass
class Told:
    """A media worker that writes down what it is told, and answers when it is asked for."""

    told: list[tuple[str, str, int]]  # method, item, number of frames
    frames: dict[str, list[np.ndarray]]
    fails: dict[tuple[str, str], KpmaskError] = field(default_factory=dict)  # (method, item)
    is_quick: bool = True
    underway: int = 0
    most_underway: int = 0
    is_dead: bool = False
    _item: str = ""

    def call(self, method: str, *args: Any) -> Any:
        assert not self.is_dead
        if method in {"begin", "deliver"}:
            self._item = args[0].name
        error = self.fails.get((method, self._item))
        frames = args[-1] if method in {"add", "deliver"} else np.empty((0,))
        self.told.append((method, self._item, len(frames)))
        if len(frames) and error is None:
            self.frames.setdefault(self._item, []).extend(frames)
        self.underway += 1
        self.most_underway = max(self.most_underway, self.underway)
        return error, f"record of {self._item}"

    def result(self, ref: Any) -> Any:
        self.underway -= 1
        error, value = ref
        if error is not None:
            raise error
        return value

    def ready(self, ref: Any) -> bool:
        return self.is_quick

    def kill(self) -> None:
        self.is_dead = True


@pytest.fixture(scope="module")
def animator() -> Animator:
    torch.manual_seed(0)
    return Animator(build_system(CIRCLES), device="cpu", precision="plain")


def drawing_of(animator: Animator, name: str, count: int) -> Drawing:
    random = np.random.default_rng(len(name) + count)
    frames_THWC = random.integers(0, 256, (count + 1, SIDE_PX, SIDE_PX, 3), np.uint8)
    item = AnimationItem(
        *(name, name, "s", "d", "0", "1", "absolute"),
        adapt_scale=False,
        best_frame=False,
        audio=False,
    )

    def chunks() -> Iterator[State]:
        return animator.encode_chunks(frames_THWC[1:], batch_size=8)

    source = animator.encode_source(frames_THWC[0])
    return Drawing(item, DrivingFacts(count, 0, 25.0), source, chunks(), None, Transfer())


def expected_of(animator: Animator, name: str, count: int) -> list[np.ndarray]:
    drawing = drawing_of(animator, name, count)
    return list(animator.stream_states(drawing.source, lambda: drawing.chunks, Transfer()))


LENGTHS = {"a": 40, "b": 3, "c": 17, "d": 70, "e": 8, "f": 1, "g": 33}


def slots_of(count: int, **changed: Any) -> tuple[list[Slot], list[Told]]:
    made: list[Told] = []
    frames: dict[str, list[np.ndarray]] = {}

    def start() -> Told:
        made.append(Told([], frames, **changed))
        return made[-1]

    return [Slot(start) for _ in range(count)], made


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("is_quick", [True, False])
def test_each_gets_its_own_frames(animator: Animator, count: int, is_quick: bool) -> None:
    slots, media = slots_of(count, is_quick=is_quick)
    renderer = Renderer(animator, slots, batch_size=8)
    made = renderer.run(drawing_of(animator, *case) for case in LENGTHS.items())
    assert made == [f"record of {name}" for name in LENGTHS]
    for name, length in LENGTHS.items():
        np.testing.assert_array_equal(
            np.stack(media[0].frames[name]), np.stack(expected_of(animator, name, length))
        )
    for one in media:
        assert one.underway == 0
        assert one.most_underway <= MAX_UNDERWAY + 4, "it is not flooded: begin, add, add, finish"
        assert all(n <= CHUNK_FRAMES + 8 for _, _, n in one.told)
    told = [method for one in media for method, name, _ in one.told if name == "b"]
    assert told == ["deliver"], "a short one goes in one call"


@pytest.mark.parametrize("method", ["begin", "add", "finish"])
def test_one_that_cannot_be_written_does_not_stop_the_others(
    animator: Animator, method: str
) -> None:
    error = MediaError("full of errors", code="encode_failed")
    slots, media = slots_of(2, fails={(method, "d"): error})
    renderer = Renderer(animator, slots, batch_size=8)
    made = renderer.run(drawing_of(animator, *case) for case in LENGTHS.items())
    assert made == [error if name == "d" else f"record of {name}" for name in LENGTHS]
    for one in media:
        for index, (asked, name, _) in enumerate(one.told):
            if (asked, name) == ("add", "d") and method == "begin":
                assert ("abandon", "d", 0) not in one.told[:index]
    if method != "finish":
        assert any(("abandon", "d", 0) in one.told for one in media)


def test_a_store_that_does_not_answer_is_nobodys_fault(animator: Animator) -> None:
    error = StorageError("away", code="unavailable", retryable=True)
    slots, _ = slots_of(2, fails={("finish", "a"): error})
    with pytest.raises(StorageError):
        Renderer(animator, slots, batch_size=8).run(
            drawing_of(animator, *case) for case in LENGTHS.items()
        )


def test_who_dies_is_replaced_and_what_it_had_is_lost(animator: Animator) -> None:
    slots, media = slots_of(1, fails={("add", "d"): DEAD})
    renderer = Renderer(animator, slots, batch_size=8)
    made = renderer.run(drawing_of(animator, *case) for case in LENGTHS.items())
    lost = {name for name, one in zip(LENGTHS, made, strict=True) if isinstance(one, ItemError)}
    assert "d" in lost
    assert all(one is DEAD for one in made if isinstance(one, ItemError))
    assert len(media) == 2
    assert [one.is_dead for one in media] == [True, False]
    assert {"e", "f", "g"} & lost == set(), "the new one writes what follows"


def test_answers_come_in_order_and_each_once() -> None:
    order: deque[int] = deque()

    class Counting(Told):
        def result(self, ref: Any) -> Any:
            order.append(ref)
            return ref * 10

        def call(self, method: str, *args: Any) -> Any:
            return args[0]

    start: Callable[[], Any] = partial(Counting, [], {}, is_quick=False)
    slot = Slot(start)
    calls = [slot.call("read", number) for number in range(5)]
    assert not slot.has_room()
    assert slot.result(calls[3]) == 30
    assert list(order) == [0, 1, 2, 3]
    assert slot.result(calls[1]) == 10
    assert slot.has_room()
    slot.wait_for_room()
    assert slot.result(calls[4]) == 40
    assert list(order) == [0, 1, 2, 3, 4]

"""Animations on their way through the model, a few at once, each to a media worker that writes it.

The frames of all go through the model in common batches. A media worker has few calls to answer at
a time: while one is busy, the animations of the others are drawn, or this one waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kpmask import mixed
from kpmask.animate import Animator, Frames, Transfer
from kpmask.errors import ItemError, KpmaskError
from kpmask.mixed import Strip
from kpmask.models.base import State
from kpmask.records import AnimationItem, AnimationRecord
from tasks.media_worker import DrivingFacts, Media

CHUNK_FRAMES: Final = 32  # that go to a media worker together
MAX_UNDERWAY: Final = 2  # calls that a media worker has not answered when it gets another


# --- media workers ---------------------------------------------------------------------------


class Call:
    """What a media worker was asked; settled when the answer is there."""

    def __init__(self, reference: Any) -> None:  # noqa: ANN401 - the media worker's own
        self.reference = reference
        self.settled = False
        self.error: KpmaskError | None = None
        self.value: Any = None


class Slot:
    """A media worker, which answers in order; a dead one is replaced. `num_deaths` counts them."""

    def __init__(self, start: Callable[[], Media]) -> None:
        self.num_deaths = 0
        self._start = start
        self._media = start()
        self._underway: deque[Call] = deque()

    def call(self, method: str, *args: Any) -> Call:  # noqa: ANN401 - the method's own
        """Have the media worker do something, without waiting for it."""
        call = Call(self._media.call(method, *args))
        self._underway.append(call)
        return call

    def result(self, call: Call) -> Any:  # noqa: ANN401 - what the method returns
        """Wait for an answer.

        Raises:
            ItemError: the item's; a WorkerError where the process died.
            StorageError: the store's.
        """
        while not call.settled:
            self._settle_oldest()
        if call.error is not None:
            raise call.error
        return call.value

    def has_room(self) -> bool:
        """Whether it may be given more to do, as far as that is known without waiting."""
        while self._underway and self._media.ready(self._underway[0].reference):
            self._settle_oldest()
        return len(self._underway) <= MAX_UNDERWAY

    def wait_for_room(self) -> None:
        while not self.has_room():
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        call = self._underway.popleft()
        try:
            call.value = self._media.result(call.reference)
        except KpmaskError as error:
            call.error = error
            if error.code == "worker_died":
                self._replace(error)
        call.settled = True

    def _replace(self, error: KpmaskError) -> None:
        """A new one takes a dead one's place; what that had been asked is not done."""
        self.num_deaths += 1
        self._media.kill()
        while self._underway:
            call = self._underway.popleft()
            call.settled, call.error = True, error
        self._media = self._start()


# --- lanes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drawing:
    """An animation to be drawn.

    `chunks` are the driving states in order, once. `initial` is what relative motion starts from;
    None is the first of them.
    """

    item: AnimationItem
    driving: DrivingFacts
    source: State
    chunks: Iterator[State]
    initial: State | None
    transfer: Transfer


class Lane:
    """An animation that is being drawn, and what its media worker was asked for it."""

    def __init__(self, index: int, drawing: Drawing, slot: Slot) -> None:
        self.index = index
        self.slot = slot
        self.is_open = True  # frames still count
        self.num_left = drawing.driving.num_frames  # to be drawn
        self._num_due = drawing.driving.num_frames  # to be handed on
        self._drawing = drawing
        self._initial = drawing.initial
        self._chunk: State | None = None
        self._drawn: list[Frames] = []
        self._begun = False
        self._calls: deque[Call] = deque()  # but for the oldest that went well

    def strip(self, count: int) -> Strip:
        """The next frames to draw: at most `count`, at least one."""
        if self._chunk is None or not len(self._chunk):
            self._chunk = next(self._drawing.chunks, None)
            assert self._chunk is not None, "a stored state has as many entries as its record says"
        if self._initial is None:
            self._initial = self._chunk[:1]
        piece, self._chunk = self._chunk[:count], self._chunk[count:]
        self.num_left -= len(piece)
        return Strip(self._drawing.source, piece, self._initial, self._drawing.transfer)

    def put(self, frames_THWC: Frames) -> None:
        """Hand on what was drawn; a short animation goes in one call."""
        if self.error is not None:
            self.give_up()
        if not self.is_open:
            return
        self._drawn.append(frames_THWC)
        self._num_due -= len(frames_THWC)
        if self.is_over and not self._begun:
            self._ask("deliver", self._drawing.item, self._drawing.driving, self._taken())
        elif self.is_over or sum(map(len, self._drawn)) >= CHUNK_FRAMES:
            if not self._begun:
                self._ask("begin", self._drawing.item, self._drawing.driving)
                self._begun = True
            self._ask("add", self._taken())
            if self.is_over:
                self._ask("finish")

    def give_up(self) -> None:
        """Have the media worker drop it; more frames of it do not count."""
        if self.is_open:
            self.is_open = False
            self.slot.call("abandon")

    @property
    def is_over(self) -> bool:
        """Whether all of it is with the media worker."""
        return self._num_due == 0

    @property
    def error(self) -> KpmaskError | None:
        """What has gone wrong so far."""
        while len(self._calls) > 1 and self._calls[0].settled and not self._calls[0].error:
            self._calls.popleft()
        return self._calls[0].error if self._calls else None

    def result(self) -> AnimationRecord:
        """Wait for what became of it; raises as `Slot.result`."""
        answers = [self.slot.result(call) for call in self._calls]
        record: AnimationRecord = answers[-1]
        return record

    def _ask(self, method: str, *args: Any) -> None:  # noqa: ANN401 - the method's own
        self._calls.append(self.slot.call(method, *args))

    def _taken(self) -> Frames:
        frames_THWC = np.concatenate(self._drawn)
        self._drawn.clear()
        return frames_THWC


# --- drawing ---------------------------------------------------------------------------------

# Whose frames they are, how many of each, and what waits for them.
Drawn = tuple[list[tuple[Lane, int]], Callable[[], Frames]]


class Renderer:
    """Draws animations, one for each media worker at a time.

    Batches are of one size, so that no frame tells what it was drawn with. An animation's last
    frames are drawn with the first ones of the next.
    """

    def __init__(self, animator: Animator, slots: Sequence[Slot], *, batch_size: int) -> None:
        self._animator = animator
        self._slots = slots
        self._batch_size = batch_size
        self._lanes: list[Lane] = []
        self._drawn: deque[Drawn] = deque()
        self._outcomes: dict[int, Lane | ItemError] = {}

    def run(self, drawings: Iterable[Drawing]) -> list[AnimationRecord | ItemError]:
        """Draw and publish all of them; what became of each, in order.

        Raises:
            StorageError: the store denies, lacks space or does not answer.
        """
        waiting = enumerate(drawings)
        while (batch := self._next_batch(waiting)) or self._drawn:
            if batch:
                self._drawn.append(self._draw(batch))
            if not batch or len(self._drawn) > self._animator.num_ahead:
                self._hand_on(*self._drawn.popleft())
            self._close()
        return [_settled(outcome) for _, outcome in sorted(self._outcomes.items())]

    def _next_batch(self, waiting: Iterator[tuple[int, Drawing]]) -> list[tuple[Lane, Strip]]:
        """Pieces of the animations whose media workers keep up, as evenly as they have them."""
        batch: list[tuple[Lane, Strip]] = []
        room = self._batch_size
        while room and (able := self._able(waiting, must=not (batch or self._drawn))):
            for number, lane in enumerate(sorted(able, key=lambda lane: lane.num_left)):
                if not room:
                    break
                strip = lane.strip(-(-room // (len(able) - number)))
                room -= len(strip.driving)
                batch.append((lane, strip))
        return batch

    def _able(self, waiting: Iterator[tuple[int, Drawing]], *, must: bool) -> list[Lane]:
        """Animations with frames to draw, whose media workers have room for them. `must`: wait for
        one, if there is any.
        """
        able = self._with_room(waiting)
        for slot in self._slots:
            if able or not must:
                break
            slot.wait_for_room()
            able = self._with_room(waiting)
        return able

    def _with_room(self, waiting: Iterator[tuple[int, Drawing]]) -> list[Lane]:
        """What can be drawn now; media workers that have nothing to draw get a new animation."""
        drawing = {lane.slot: lane for lane in self._lanes if lane.num_left}
        for slot in self._slots:
            if slot not in drawing and slot.has_room() and (found := next(waiting, None)):
                drawing[slot] = Lane(*found, slot)
                self._lanes.append(drawing[slot])
        return [lane for slot, lane in drawing.items() if slot.has_room()]

    def _draw(self, batch: Sequence[tuple[Lane, Strip]]) -> Drawn:
        strips = [strip for _, strip in batch]
        image_BCHW = mixed.draw(self._animator, strips, size=self._batch_size)
        whose = [(lane, len(strip.driving)) for lane, strip in batch]
        return whose, self._animator.fetch(image_BCHW)

    def _hand_on(self, whose: Sequence[tuple[Lane, int]], fetched: Callable[[], Frames]) -> None:
        frames_BHWC = fetched()
        start = 0
        for lane, count in whose:
            lane.put(frames_BHWC[start : start + count])
            start += count

    def _close(self) -> None:
        """Let go of the animations that are with their media workers, or have failed."""
        for lane in list(self._lanes):
            error = lane.error
            if error is None and not lane.is_over:
                continue
            if error is not None and not isinstance(error, ItemError):
                raise error
            self._lanes.remove(lane)
            self._outcomes[lane.index] = lane if error is None else error
            if error is not None:
                lane.give_up()


def _settled(outcome: Lane | ItemError) -> AnimationRecord | ItemError:
    if isinstance(outcome, ItemError):
        return outcome
    try:
        return outcome.result()
    except ItemError as error:
        return error

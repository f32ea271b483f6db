"""Batches of fixed sizes: their frames are the same to the last bit, and they can be recorded.

A recording (`kpmask.optimize.cuda`) does the same work on the same memory every time. So inputs are
copied to where it reads them, and results away from where it writes them. A smaller batch leaves
the rest of that memory as it was, which is harmless, since no entry depends on another.

Values of recorded functions are tensors, or records of tensors, whose first axis is the batch.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from kpmask.models.base import AnimationSystem, Prediction, State
from kpmask.optimize.precision import PrecisionCheck, compared, pictures

MAX_REPLAY_ERROR: Final = 1e-3  # of values in [0, 1]: a bfloat16 sum in another order, and no more
NUM_PICTURES: Final = 4

Value = Tensor | State | Prediction
Function = Callable[..., Any]
# Runs some work, and gives its result and what does the work again, into the same memory.
Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
System = TypeVar("System", bound=AnimationSystem[Any, Any])


def recorded(
    system: System,
    batch_sizes: Sequence[int],
    record: Recorder,
    *,
    device: torch.device | str,
) -> System:
    """The same system, whose `render` and `encode_driving` run from recordings.

    Args:
        system: in eval mode, on the device. It is not changed; its parts are shared.
        batch_sizes: what is recorded. A batch runs as the next larger size, or in parts of the
            largest.
        record: how.

    Raises:
        RuntimeError: recording failed, or draws something else than the system.
    """
    draw = Recorded(system.render, {})
    encode = Recorded(system.encode_driving, {})
    with torch.inference_mode():
        for size in sorted(set(batch_sizes), reverse=True):  # the small ones fit in its memory
            images_BCHW = _pictures(size, system.image_size_px).to(device)
            states = system.encode_source(images_BCHW), system.encode_driving(images_BCHW)
            encode.recordings[size] = Recording(system.encode_driving, (images_BCHW,), record)
            draw.recordings[size] = Recording(system.render, states, record)
    twin = copy.copy(system)

    def for_reconstruction() -> System:
        other = system.for_reconstruction()
        return twin if other is system else other  # of another one there are no recordings

    # What stands in the object itself goes before what its class has.
    vars(twin).update(render=draw, encode_driving=encode, for_reconstruction=for_reconstruction)
    for size in batch_sizes:
        check = _check(twin, system, size, device)
        if not check.max_error <= MAX_REPLAY_ERROR:
            raise RuntimeError(f"batches of {size} draw something else: {check}")
    return twin


@torch.inference_mode()
def _check(
    twin: AnimationSystem[Any, Any],
    system: AnimationSystem[Any, Any],
    size: int,
    device: torch.device | str,
) -> PrecisionCheck:
    """How far frames are from those of the system; in another order than when recording."""
    images_BCHW = _pictures(size, system.image_size_px).to(device).roll(1, dims=0)
    frames = []
    for each in (twin, system):
        source = each.encode_source(images_BCHW)
        driving = each.encode_driving(images_BCHW.flip(3))
        frames.append(each.render(source, driving).image_BCHW)
    return compared(*frames)


def _pictures(count: int, side_px: int) -> Tensor:
    few_BCHW = pictures(NUM_PICTURES, side_px)
    return few_BCHW[torch.arange(count) % NUM_PICTURES]


def render_by(
    system: AnimationSystem[Any, Any], size: int, source: State, driving: State
) -> Tensor:
    """Frames of B entries, drawn `size` at a time: float32 [B, 3, H, W] in [0, 1].

    For a batch of another size a kernel may sum in another order. At one size no bit of a frame
    depends on its place, or on what it is drawn with; the last batch is filled up for that.

    Args:
        size: at least 1. source, driving: B entries each, at least 1.
    """
    frames = []
    for start in range(0, len(driving), size):
        part = slice(start, start + size)
        states = (_filled(state[part], size) for state in (source, driving))
        frames.append(system.render(*states).image_BCHW[: len(driving) - start])
    return torch.cat(frames)


def _filled(state: State, size: int) -> State:
    """Up to `size` entries, by its last one; a copy in any case, so that all are laid out alike."""
    return type(state).cat([state, state[-1:].repeat(size - len(state))])


class Recording:
    """A function at one batch size."""

    def __init__(self, function: Function, example: Sequence[Value], record: Recorder) -> None:
        self._arguments = [_mapped(value, torch.clone) for value in example]
        self._result, self._replay = record(lambda: function(*self._arguments))

    def fits(self, arguments: Sequence[Value]) -> bool:
        """Whether these are as the recorded ones, but for the length."""
        return len(arguments) == len(self._arguments) and all(
            _form(own) == _form(given)
            for own, given in zip(self._arguments, arguments, strict=True)
        )

    def __call__(self, arguments: Sequence[Value]) -> Any:  # noqa: ANN401 - as the function's
        """The function's result, which is the caller's own.

        Args:
            arguments: they fit, and are no longer than the recorded ones.
        """
        count = _length(arguments)
        for own, given in zip(self._arguments, arguments, strict=True):
            for place, tensor in zip(_tensors(own), _tensors(given), strict=True):
                place[:count].copy_(tensor)
        self._replay()
        return _mapped(_cut(self._result, slice(count)), torch.clone)


class Recorded:
    """A function that runs from its recordings where they fit, and as it is elsewhere."""

    def __init__(self, function: Function, recordings: Mapping[int, Recording]) -> None:
        self.function = function
        self.recordings = dict(recordings)
        self._lock = threading.Lock()  # their memory is for one call at a time

    @torch.inference_mode()
    def __call__(self, *arguments: Value) -> Any:  # noqa: ANN401 - as the function's
        count = _length(arguments)
        if not count or not any(r.fits(arguments) for r in self.recordings.values()):
            return self.function(*arguments)
        largest = max(self.recordings)
        with self._lock:
            parts = [
                self._part([_cut(value, slice(start, start + largest)) for value in arguments])
                for start in range(0, count, largest)
            ]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _part(self, arguments: Sequence[Value]) -> Any:  # noqa: ANN401 - as the function's
        size = min(size for size in self.recordings if size >= _length(arguments))
        return self.recordings[size](arguments)


# --- records of tensors ----------------------------------------------------------------------


def _mapped(value: Value, function: Callable[[Tensor], Tensor]) -> Value:
    if isinstance(value, Tensor):
        return function(value)
    parts: dict[str, Any] = {k: p if p is None else function(p) for k, p in vars(value).items()}
    return type(value)(**parts)


def _cut(value: Value, entries: slice) -> Value:
    return _mapped(value, lambda tensor: tensor[entries])


def _tensors(value: Value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    yield from (part for part in vars(value).values() if part is not None)


def _joined(values: Sequence[Value]) -> Value:
    columns = iter(list(zip(*(_tensors(value) for value in values), strict=True)))
    return _mapped(values[0], lambda _: torch.cat(next(columns)))


def _length(arguments: Sequence[Value]) -> int:
    return len(next(_tensors(arguments[0])))


def _form(value: Value) -> tuple[Any, ...]:
    parts = vars(value) if not isinstance(value, Tensor) else {"": value}
    there = {name: part for name, part in parts.items() if part is not None}
    return type(value), {name: (part.shape[1:], part.dtype) for name, part in there.items()}

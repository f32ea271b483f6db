"""Counts over streams of any length in bounded memory, the same in whatever order things come."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")
Row = TypeVar("Row", bound=tuple[Any, ...])

MAX_BINS: Final = 2048
TAIL: Final = 0.02  # of the values on either side that may share an open bin
FEW_MORE: Final = 4  # bins that a chart may have beyond those it asks for, to show the tails


def place(key: str) -> int:
    """Where a key stands in a fixed shuffle of all keys: 64 bits of its BLAKE2 digest."""
    data = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class Sample(Generic[T]):
    """At most `limit` items, those that stand first in the shuffle: all where there are fewer.

    A longer stream replaces few of them, and the order of the stream none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[tuple[int, int, T]] = []  # the last in the shuffle is on top
        self.num_offered = 0

    def offer(self, at: int, item: T) -> None:
        """Keep an item if its place is among the first ones."""
        self.num_offered += 1
        entry = (-at, -self.num_offered, item)  # the number, so that items are never compared
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, entry)
        elif self._heap and entry[0] > self._heap[0][0]:
            heapq.heapreplace(self._heap, entry)

    def __iter__(self) -> Iterator[T]:
        """The items, first places first."""
        return (item for _, _, item in sorted(self._heap, key=lambda e: e[:2], reverse=True))

    def __len__(self) -> int:
        return len(self._heap)


class Distinct:
    """Counts different values, up to `limit` of them; beyond, `exact` is False."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[int] = set()
        self.exact = True

    def add(self, value: Hashable) -> bool:
        """Whether the value is a new one that is now counted."""
        key = hash(value)
        if key in self._seen:
            return False
        if len(self._seen) >= self._limit:
            self.exact = False
            return False
        self._seen.add(key)
        return True

    def __len__(self) -> int:
        return len(self._seen)

    def num_shared(self, other: Distinct) -> int:
        """How many values both have counted."""
        return len(self._seen & other._seen)


@dataclass(frozen=True, slots=True)
class Bin:
    """How many values of each of two sides lie between two round numbers, in words."""

    label: str
    first: int
    second: int


class Histogram:
    """Counts values of two sides (the splits of a dataset) in bins that chart any range of them.

    The fine bins are 10**-decimals wide, then ten times as wide, and so on, whenever more than
    MAX_BINS of them hold something. A chart's bins, 1, 2 or 5 times a power of ten wide, are then
    made of whole fine ones: its counts are exact.

    Args:
        decimals: of the values; 0 for whole numbers.
    """

    def __init__(self, decimals: int = 0) -> None:
        self._decimals = decimals
        self._scale = 10.0**decimals
        self._power = 0  # a fine bin is 10**(power - decimals) wide
        self._divisor = 1
        self._bins: dict[int, list[int]] = {}
        self.num_values = 0

    def add(self, value: float, side: int = 0) -> None:
        """Count a value of side 0 or 1; what is not finite is left out."""
        if not math.isfinite(value):
            return
        self.num_values += 1
        # 0.3 is a little less than 3 / 10.
        key = math.floor(value * self._scale + 1e-6) // self._divisor
        counts = self._bins.get(key)
        if counts is None:
            self._bins[key] = counts = [0, 0]
            if len(self._bins) > MAX_BINS:
                counts[side] += 1
                self._widen()
                return
        counts[side] += 1

    def _widen(self) -> None:
        while len(self._bins) > MAX_BINS:
            self._power += 1
            self._divisor *= 10
            wider: dict[int, list[int]] = {}
            for key, (first, second) in self._bins.items():
                counts = wider.setdefault(key // 10, [0, 0])
                counts[0] += first
                counts[1] += second
            self._bins = wider

    def chart(self, num_bins: int = 8) -> list[Bin]:
        """About `num_bins` bins of a round width; a far tail shares an open one."""
        if not self._bins:
            return []
        low, high = self._range()
        width = _round_up((high - low + 1) / num_bins)
        first, last = low // width, high // width
        if max(self._bins) // width - min(self._bins) // width < num_bins + FEW_MORE:
            first, last = min(self._bins) // width, max(self._bins) // width
        counts = {index: [0, 0] for index in range(first, last + 1)}
        under, over = [0, 0], [0, 0]
        for key, values in self._bins.items():
            index = key // width
            into = under if index < first else over if index > last else counts[index]
            into[0] += values[0]
            into[1] += values[1]
        bins = [Bin(self._label(index, width), *found) for index, found in counts.items()]
        if any(under):
            bins.insert(0, Bin(f"under {self._number(first, width)}", *under))
        if any(over):
            bins.append(Bin(f"{self._number(last + 1, width)} and more", *over))
        return bins

    def _range(self) -> tuple[int, int]:
        """The fine bins between which all but the tails lie."""
        keys = sorted(self._bins)
        tail = int(TAIL * self.num_values)
        return self._after(keys, tail), self._after(keys[::-1], tail)

    def _after(self, keys: list[int], tail: int) -> int:
        passed = 0
        for key in keys:
            passed += sum(self._bins[key])
            if passed > tail:
                return key
        return keys[-1]

    def _number(self, index: int, width: int, *, less: int = 0) -> str:
        """The lower bound of a bin, with the decimals that bounds have."""
        exponent = self._power - self._decimals
        step = Decimal(width).scaleb(exponent).normalize()
        decimals = max(0, -int(step.as_tuple().exponent))
        return f"{Decimal(index * width).scaleb(exponent) - less:.{decimals}f}"

    def _label(self, index: int, width: int) -> str:
        start = self._number(index, width)
        if self._decimals:
            return f"{start}–{self._number(index + 1, width)}"
        end = self._number(index + 1, width, less=1)
        return start if start == end else f"{start}–{end}"


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 …"""
    power = 1
    while 10 * power < width:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= width)


def as_many_as_fit(rows: Iterable[Row], *, max_chars: int) -> list[Row]:
    """The first rows, whose texts have `max_chars` characters at most in all."""
    kept, chars = [], 0
    for row in rows:
        chars += sum(len(value) for value in row if isinstance(value, str))
        if chars > max_chars:
            break
        kept.append(row)
    return kept

"""Clips that show the same again, found among a million by their looks.

The rule: two clips repeat each other when the hashes of their mean pictures differ in at most
`max_bits` bits, and those of their changes in at most `max_bits` bits on average
(`kpmask.data.quality` says what is hashed). It does not reach through others: of a chain in which
each repeats only the next, all but the first are found to repeat the one before.

The search is exact. The three changes may differ in T = 3 `max_bits` bits together, so that of
T + k groups of their bits, k at least are equal (the pigeonhole principle, as in Norouzi et al.,
"Fast Search in Hamming Space with Multi-Index Hashing", 2012). For every choice of k groups the
clips are sorted by them and compared where they are equal. So that this is never quadratic where
clips are alike:

- Equal looks are one look: a million black clips cost as much as one.
- In a run of clips with equal groups, all are compared with its first, those that do not repeat it
  with its second, and so on: copies of one clip cost a comparison each.
- A long run is split again by groups of the mean picture's bits, of which one is equal, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kpmask.data.quality import LOOK_HASHES, LOOK_LENGTH

_Words = NDArray[np.uint64]
_Ints = NDArray[np.int64]
_Code = NDArray[np.uint16 | np.uint32]

_NUM_CHANGES: Final = LOOK_HASHES - 1
_HASH_BITS: Final = 63  # the highest of the 64 is always 0
_SHORT_RUN: Final = 128
_LONG_RUN: Final = 256
_FEW: Final = 32
_MAX_EQUAL: Final = 3  # the largest k
_KEY_BITS: Final = 32  # beside them lies the clip's number
_CHUNK: Final = 65_536
# Of a clip in one table: to sort it, and to compare it in a run of one, in short runs and long.
_SORT_COST: Final = 10.0
_SHORT_COST: Final = 1.5
_LONG_COST: Final = 4.0


def near_duplicates(looks: Iterable[str], *, max_bits: int) -> list[int]:
    """For each clip the number, from 0, of the first clip that it repeats; -1 where that is itself.

    Args:
        looks: of the clips, in the order of which the first is kept. An empty one repeats none.
        max_bits: see the rule above; 0 finds equal looks.

    Raises:
        ValueError: what is no look, or a negative `max_bits`.
    """
    if max_bits < 0:
        raise ValueError(f"max_bits is {max_bits}, and the least is 0")
    words_NW, numbers, count = _words(looks)
    first = _first_equal(words_NW)
    distinct = np.flatnonzero(first == np.arange(len(first)))
    earliest = first
    if max_bits:
        earliest = np.empty_like(first)
        earliest[distinct] = distinct[_Search(words_NW[distinct], max_bits).run()]
        earliest = earliest[first]  # what equals a clip repeats the same
    repeats = np.full(count, -1, np.int64)
    repeating = earliest < np.arange(len(earliest))
    repeats[numbers[repeating]] = numbers[earliest[repeating]]
    return [int(number) for number in repeats]


def look_distances(one: str, other: str) -> tuple[int, float]:
    """In how many bits two looks differ: of the mean pictures, and of the changes on average.

    Raises:
        ValueError: what is no look.
    """
    words_NW, _, _ = _words([one, other])
    if len(words_NW) < 2:
        raise ValueError("an empty look has no distance")
    bits_W = np.bitwise_count(words_NW[0] ^ words_NW[1])
    return int(bits_W[0]), float(bits_W[1:].mean())


# --- looks as numbers ------------------------------------------------------------------------


def _words(looks: Iterable[str]) -> tuple[_Words, _Ints, int]:
    """The looks that are not empty as [N, W] words, their numbers, and how many looks there are."""
    words: list[_Words] = [np.empty((0, LOOK_HASHES), np.uint64)]
    numbers: list[_Ints] = [np.empty(0, np.int64)]
    iterator, count = iter(looks), 0
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        known = [i for i, look in enumerate(chunk) if look]
        words.append(_parsed([chunk[i] for i in known]))
        numbers.append(np.array(known, np.int64) + count)
        count += len(chunk)
    return np.concatenate(words), np.concatenate(numbers), count


def _parsed(looks: list[str]) -> _Words:
    for look in looks:
        if len(look) != LOOK_LENGTH:
            raise ValueError(f"{look[:80]!r} is no look: it has {len(look)} digits")
    data = bytes.fromhex("".join(looks))
    if len(data) != len(looks) * LOOK_LENGTH // 2:
        raise ValueError("there are spaces in a look")
    return np.frombuffer(data, ">u8").reshape(-1, LOOK_HASHES).astype(np.uint64)


def _first_equal(words_NW: _Words) -> _Ints:
    """For each row the first that equals it."""
    order = np.lexsort(words_NW.T)  # equal rows stay in order
    differs = (words_NW[order][1:] != words_NW[order][:-1]).any(axis=1)
    starts = np.flatnonzero(np.concatenate([[True], differs])[: len(order)])
    first = np.empty(len(order), np.int64)
    first[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
    return first


# --- the search ------------------------------------------------------------------------------


class _Search:
    """The earliest clip that each clip repeats, itself where there is none.

    Args:
        words_NW: looks, no two of them equal.
        max_bits: at least 1.
    """

    def __init__(self, words_NW: _Words, max_bits: int) -> None:
        self._picture = np.ascontiguousarray(words_NW[:, 0])
        self._changes = [np.ascontiguousarray(words_NW[:, 1 + i]) for i in range(_NUM_CHANGES)]
        self._max_bits = max_bits
        self._max_changes = _NUM_CHANGES * max_bits
        self._earliest = np.arange(len(words_NW))

    def run(self) -> _Ints:
        count = len(self._earliest)
        num_equal, num_groups = _best_groups(count, self._max_changes)
        codes = _codes(self._changes, num_groups, most=_KEY_BITS // num_equal)
        everyone = np.arange(count)
        for chosen in itertools.combinations(codes, num_equal):
            key = np.zeros(count, np.uint64)
            for code, width in chosen:
                key = key << np.uint64(width) | code
            self._search(everyone, key, split=True)
        return self._earliest

    def _search(self, clips: _Ints, key: _Words, *, split: bool) -> None:
        """Compare clips where their keys, of up to `_KEY_BITS` bits, are equal."""
        packed = key << np.uint64(_KEY_BITS) | clips.astype(np.uint64)
        packed.sort()
        ordered = (packed & np.uint64(2**_KEY_BITS - 1)).astype(np.int64)
        differs = np.diff(packed >> np.uint64(_KEY_BITS)) != 0
        starts = np.flatnonzero(np.concatenate([[True], differs])[: len(ordered)])
        lengths = np.diff(starts, append=len(ordered))
        short = np.repeat(lengths <= _SHORT_RUN, lengths)
        self._compare_short(ordered[short], int(lengths[lengths <= _SHORT_RUN].max(initial=1)))
        if not short.all():
            lengths = lengths[lengths > _SHORT_RUN]
            self._compare_long(ordered[~short], lengths, split=split)

    def _compare_short(self, ordered: _Ints, longest: int) -> None:
        """Compare each clip with those less than `longest` places before it, of its run or not.

        That is more than is asked for, but goes through memory in order: it takes a fifth of what
        picking pairs does.
        """
        # Of random pairs a few in a hundred pass one change at 8 bits, and none pass two.
        words = [change[ordered] for change in self._changes[: 1 if self._max_bits <= 6 else 2]]
        for apart in range(1, min(longest, len(ordered))):
            bits = np.bitwise_count(words[0][apart:] ^ words[0][:-apart])
            for word in words[1:]:
                bits += np.bitwise_count(word[apart:] ^ word[:-apart])
            places = np.flatnonzero(bits <= self._max_changes)
            clips, others = ordered[places + apart], ordered[places]
            found = self._repeats(clips, others)
            clips, others = clips[found], others[found]
            np.minimum.at(self._earliest, np.maximum(clips, others), np.minimum(clips, others))

    def _compare_long(self, ordered: _Ints, lengths: _Ints, *, split: bool) -> None:
        """Compare clips in runs of such lengths, each in order."""
        start_of = np.repeat(np.cumsum(lengths) - lengths, lengths)
        left = self._compare(ordered, np.arange(len(ordered)), start_of, stop=_FEW)
        # To split costs about as much as to compare every clip with `_LONG_RUN` others.
        if not split or (left - start_of[left]).sum() <= _LONG_RUN * len(ordered):
            self._compare(ordered, left, start_of + _FEW)
        else:
            run_of = np.repeat(np.arange(len(lengths)), lengths)
            self._split(ordered, run_of.astype(np.uint64))

    def _split(self, clips: _Ints, run_of: _Words) -> None:
        """Compare clips of the same run where a group of their mean pictures' bits is equal."""
        free_bits = _KEY_BITS - int(run_of[-1]).bit_length()
        for code, width in _codes([self._picture[clips]], self._max_bits + 1, most=free_bits):
            self._search(clips, run_of << np.uint64(width) | code, split=False)

    def _compare(
        self, ordered: _Ints, left: _Ints, start_of: _Ints, *, stop: int | None = None
    ) -> _Ints:
        """Compare the clips at the places `left` with those from `start_of` on, which are in order.

        Returns:
            The places that are left after `stop` others, if that is given.
        """
        others = start_of[left]
        worth = others < left
        worth[worth] = ordered[others[worth]] < self._earliest[ordered[left[worth]]]
        left, others = left[worth], others[worth]
        while len(left) and stop != 0:
            clips, earlier = ordered[left], ordered[others]
            found = self._repeats(clips, earlier)
            self._earliest[clips[found]] = np.minimum(self._earliest[clips[found]], earlier[found])
            others += 1
            still = others < left
            still[found] = False  # what comes later in a run is later
            left, others = left[still], others[still]
            stop = None if stop is None else stop - 1
        return left

    def _repeats(self, clips: _Ints, others: _Ints) -> _Ints:
        """Where clips[i] repeats others[i]."""
        near = np.arange(len(clips))
        total = np.zeros(len(clips), np.int64)
        for change in self._changes:
            total = total + np.bitwise_count(change[clips[near]] ^ change[others[near]])
            near, total = near[total <= self._max_changes], total[total <= self._max_changes]
        bits = np.bitwise_count(self._picture[clips[near]] ^ self._picture[others[near]])
        close: _Ints = near[bits <= self._max_bits]
        return close


def _best_groups(count: int, max_bits: int) -> tuple[int, int]:
    """How many groups are to be equal, of how many, so that random looks take the least time."""

    def cost(num_equal: int) -> float:
        num_groups = max_bits + num_equal
        key_bits = min(_NUM_CHANGES * _HASH_BITS / num_groups * num_equal, _KEY_BITS)
        run_length = count / math.exp2(key_bits)
        comparing = _SHORT_COST if run_length < _SHORT_RUN / 2 else _LONG_COST
        return math.comb(num_groups, num_equal) * (_SORT_COST + run_length * comparing)

    num_equal = min(range(1, _MAX_EQUAL + 1), key=cost)
    return num_equal, max_bits + num_equal


def _codes(words: list[_Words], num_groups: int, *, most: int) -> list[tuple[_Code, int]]:
    """Groups of the words' bits as numbers, each with how many bits it has, `most` at most.

    Frequencies beside each other say much the same, so that bits are drawn for the groups.
    """
    drawn = np.random.default_rng(0).permutation(len(words) * _HASH_BITS)
    codes: list[tuple[_Code, int]] = []
    for group in range(num_groups):
        bits = drawn[group::num_groups][:most]
        code = np.zeros(len(words[0]), np.uint32)
        for bit in bits.tolist():
            word, place = divmod(bit, _HASH_BITS)
            digit = words[word] >> np.uint64(place) & np.uint64(1)
            code = code << np.uint32(1) | digit.astype(np.uint32)
        codes.append((code if len(bits) > 16 else code.astype(np.uint16), len(bits)))
    return codes

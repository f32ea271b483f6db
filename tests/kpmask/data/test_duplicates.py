"""The search for clips that repeat each other, against comparing every two."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from kpmask.data.duplicates import look_distances, near_duplicates
from kpmask.data.quality import LOOK_HASHES, LOOK_LENGTH

Random = np.random.Generator


@pytest.fixture
def random() -> Random:
    return np.random.default_rng(7)


def look(hashes: list[int]) -> str:
    return "".join(f"{value:016x}" for value in hashes)


def random_hashes(random: Random) -> list[int]:
    return [int(value) for value in random.integers(0, 2**63, LOOK_HASHES)]


def flipped(hashes: list[int], counts: list[int], random: Random) -> list[int]:
    """Hashes of which hash i differs in counts[i] of its 63 bits."""
    bits = [random.choice(63, count, replace=False) for count in counts]
    return [h ^ sum(1 << int(b) for b in some) for h, some in zip(hashes, bits, strict=True)]


def by_comparing_all(looks: list[str], max_bits: int) -> list[int]:
    """The rule, written out."""
    hashes = [[int(one[i : i + 16], 16) for i in range(0, len(one), 16)] for one in looks]
    found = []
    for i, mine in enumerate(hashes):
        found.append(-1)
        for j, other in enumerate(hashes[:i]):
            bits = [bin(a ^ b).count("1") for a, b in zip(mine, other, strict=True)]
            if bits and bits[0] <= max_bits and sum(bits[1:]) / 3 <= max_bits:
                found[-1] = j
                break
    return found


def planted(random: Random, count: int) -> list[str]:
    """Random looks, half of them near others (also near near ones), by what is about the limit."""
    all_hashes: list[list[int]] = []
    for _ in range(count):
        if all_hashes and random.random() < 0.5:
            near = all_hashes[int(random.integers(len(all_hashes)))]
            counts = random.integers(0, [9, 20, 12, 8]).tolist()
            all_hashes.append(flipped(near, counts, random))
        else:
            all_hashes.append(random_hashes(random))
    return [look(hashes) for hashes in all_hashes]


@pytest.mark.parametrize("max_bits", [0, 1, 2, 4, 6, 8, 12])
def test_finds_what_comparing_all_finds(random: Random, max_bits: int) -> None:
    looks = planted(random, 1000)
    looks += [looks[int(i)] for i in random.integers(0, 1000, 50)]
    expected = by_comparing_all(looks, max_bits)
    assert near_duplicates(looks, max_bits=max_bits) == expected
    assert 50 <= sum(number >= 0 for number in expected) < 900


@pytest.mark.parametrize(
    ("run", "few", "max_equal"), [(1, 0, 1), (2, 1, 2), (4, 3, 3), (10**6, 32, 2)]
)
def test_any_way_of_searching_finds_the_same(
    random: Random, monkeypatch: pytest.MonkeyPatch, run: int, few: int, max_equal: int
) -> None:
    """Long runs that are split at once, and keys of one to three groups, with few bits in them."""
    monkeypatch.setattr("kpmask.data.duplicates._LONG_RUN", run)
    monkeypatch.setattr("kpmask.data.duplicates._FEW", few)
    groups = (max_equal, 12 + max_equal)
    monkeypatch.setattr("kpmask.data.duplicates._best_groups", lambda *_: groups)
    looks = planted(random, 600)
    assert near_duplicates(looks, max_bits=4) == by_comparing_all(looks, 4)


def test_many_that_are_alike(random: Random) -> None:
    """Looks of a few clips again and again, some a few bits off, so that runs are long."""
    few = [random_hashes(random) for _ in range(3)]
    few += [[random_hashes(random)[0], *few[0][1:]] for _ in range(300)]  # still: other pictures
    some = [few[int(i)] for i in random.integers(0, len(few), 900)]
    looks = [look(flipped(h, random.integers(0, 4, LOOK_HASHES).tolist(), random)) for h in some]
    assert near_duplicates(looks, max_bits=3) == by_comparing_all(looks, 3)


def test_both_limits_hold_for_themselves(random: Random) -> None:
    base = random_hashes(random)
    near = [
        flipped(base, [6, 0, 0, 0], random),
        flipped(base, [7, 0, 0, 0], random),
        flipped(base, [0, 18, 0, 0], random),
        flipped(base, [0, 18, 1, 0], random),
    ]
    for hashes, expected in zip(near, [0, -1, 0, -1], strict=True):
        assert near_duplicates([look(base), look(hashes)], max_bits=6) == [-1, expected]
    assert look_distances(look(base), look(near[3])) == (0, 19 / 3)


def test_a_chain_is_found_link_by_link(random: Random) -> None:
    chain = [random_hashes(random)]
    for i in range(5):
        # Other bits each time, so that only neighbours are near.
        chain.append([chain[-1][0] ^ (0x1F << 5 * i), *chain[-1][1:]])
    assert near_duplicates(map(look, chain), max_bits=6) == [-1, 0, 1, 2, 3, 4]


def test_what_is_not_there(random: Random) -> None:
    one = look(random_hashes(random))
    assert near_duplicates([], max_bits=6) == []
    assert near_duplicates([one], max_bits=6) == [-1]
    assert near_duplicates(["", one, "", one, ""], max_bits=6) == [-1, -1, -1, 1, -1]
    assert near_duplicates(["", ""], max_bits=0) == [-1, -1]


@pytest.mark.parametrize("wrong", ["00", "g" * LOOK_LENGTH, " " * LOOK_LENGTH, "é" * LOOK_LENGTH])
def test_what_is_no_look_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError):
        near_duplicates(["0" * LOOK_LENGTH, wrong], max_bits=1)
    with pytest.raises(ValueError):
        look_distances("", wrong)


def test_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bits is -1, and the least is 0"):
        near_duplicates([], max_bits=-1)


def hundred_thousand(kind: str, random: Random) -> Iterator[str]:
    base = random_hashes(random)
    for i in range(100_000):
        if kind == "black":
            yield "0" * LOOK_LENGTH
        elif kind == "almost equal":
            yield look([base[0] ^ 1 << i % 63, base[1] ^ 1 << i // 63 % 63, *base[2:]])
        else:
            yield look(random_hashes(random))


@pytest.mark.parametrize("kind", ["black", "almost equal", "different"])
def test_a_hundred_thousand_take_seconds(random: Random, kind: str) -> None:
    """Comparing every two would take 5,000,000,000 comparisons."""
    looks = list(hundred_thousand(kind, random))
    tracemalloc.start()
    started = time.process_time()
    found = near_duplicates(looks, max_bits=6)
    taken_s, peak_bytes = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(found) == ({-1} if kind == "different" else {-1, 0})
    assert found.count(-1) == (100_000 if kind == "different" else 1)
    assert taken_s < 15 and peak_bytes < 60_000_000


def test_equal_ones_point_where_the_first_of_them_does(random: Random) -> None:
    base = random_hashes(random)
    near = flipped(base, [1, 1, 1, 1], random)
    other = random_hashes(random)
    looks = [look(h) for h in (base, other, near, near, other, base)]
    for max_bits, expected in ((0, [-1, -1, -1, 2, 1, 0]), (2, [-1, -1, 0, 0, 1, 0])):
        assert near_duplicates(looks, max_bits=max_bits) == expected
    for a, b in itertools.combinations(range(6), 2):
        assert look_distances(looks[a], looks[b]) == look_distances(looks[b], looks[a])

"""Counts of streams against NumPy's and against lists that hold everything."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest

from kpmask.report.counting import MAX_BINS, Distinct, Histogram, Sample, place


def bounds(label: str) -> tuple[float, float]:
    """The half-open interval that a bin's label of real numbers means."""
    if label.startswith("under "):
        return -math.inf, float(label.removeprefix("under "))
    if label.endswith(" and more"):
        return float(label.removesuffix(" and more")), math.inf
    found = re.fullmatch(r"(-?[\d.]+)–(-?[\d.]+)", label)
    assert found, label
    return float(found[1]), float(found[2])


# In exact hundredths, so that the reference has no doubt about bounds.
HUNDREDTHS = {
    "uniform": np.random.default_rng(0).integers(0, 1000, 5000),
    "few": np.array([0, 30, 30, 60, 90]),
    "one": np.array([700]),
    "far tail": np.append(np.random.default_rng(1).integers(100, 200, 999), 10**11),
    "log-normal": np.random.default_rng(2).lognormal(5, 2, 20_000).round().astype(int),
    "negative": np.random.default_rng(3).integers(-500, 20, 3000),
}


@pytest.mark.parametrize("name", HUNDREDTHS)
def test_every_bin_holds_what_lies_in_it(name: str) -> None:
    values = HUNDREDTHS[name]
    histogram = Histogram(decimals=2)
    for value in values.tolist():
        histogram.add(value / 100, side=value % 2)
    bins = histogram.chart()
    assert sum(found.first + found.second for found in bins) == len(values)
    assert 1 <= len(bins) <= 14
    for found in bins:
        low, high = bounds(found.label)
        inside = (values >= np.round(100 * low)) & (values < np.round(100 * high))
        assert found.second == (inside & (values % 2 == 1)).sum(), found.label
        assert found.first == (inside & (values % 2 == 0)).sum(), found.label


def test_whole_numbers_have_bins_of_whole_numbers() -> None:
    histogram = Histogram()
    for value in range(20, 70, 7):
        histogram.add(value)
    assert [(b.label, b.first) for b in histogram.chart()] == [
        ("20–29", 2), ("30–39", 1), ("40–49", 2), ("50–59", 1), ("60–69", 2)
    ]  # fmt: skip
    small = Histogram()
    for value in (1, 1, 3):
        small.add(value)
    assert [(b.label, b.first) for b in small.chart()] == [("1", 2), ("2", 0), ("3", 1)]


def test_a_histogram_is_small_and_the_same_in_any_order() -> None:
    values = np.random.default_rng(0).lognormal(3, 3, 50_000).tolist()
    shuffled = random.Random(0).sample(values, len(values))
    charts = []
    for order in (values, shuffled):
        histogram = Histogram(decimals=5)
        for value in order:
            histogram.add(value)
            assert len(histogram._bins) <= MAX_BINS
        charts.append(histogram.chart())
    assert charts[0] == charts[1]
    assert sum(found.first for found in charts[0]) == len(values)


def test_what_is_no_number_is_not_counted() -> None:
    histogram = Histogram(decimals=3)
    for value in (math.nan, math.inf, -math.inf):
        histogram.add(value)
    assert histogram.num_values == 0
    assert histogram.chart() == []


def test_a_sample_is_that_of_a_full_sort_in_any_order() -> None:
    keys = [f"clip-{index}" for index in range(3000)]
    wanted = sorted(keys, key=place)[:50]
    for seed in range(3):
        sample: Sample[str] = Sample(50)
        for key in random.Random(seed).sample(keys, len(keys)):
            sample.offer(place(key), key)
        assert list(sample) == wanted
        assert sample.num_offered == 3000


def test_a_growing_stream_keeps_most_of_its_sample() -> None:
    before, after = (sorted((f"{i}" for i in range(n)), key=place)[:600] for n in (20_000, 21_000))
    assert len(set(before) & set(after)) > 550
    # It is an even draw: the mean number is in the middle, within four standard errors.
    assert abs(np.mean([int(key) for key in before]) - 10_000) < 4 * 20_000 / math.sqrt(12 * 600)


def test_few_items_are_all_kept_and_none_is_fine() -> None:
    sample: Sample[dict[str, int]] = Sample(10)
    for index in range(4):
        sample.offer(7, {"a": index})  # equal places: items are not compared
    assert [item["a"] for item in sample] == [0, 1, 2, 3]
    empty: Sample[int] = Sample(0)
    empty.offer(1, 1)
    assert list(empty) == []


def test_different_values_are_counted_up_to_a_limit() -> None:
    values = Distinct(3)
    assert [values.add(v) for v in ("a", "b", "a", "c", "b")] == [True, True, False, True, False]
    assert (len(values), values.exact) == (3, True)
    assert not values.add("d")
    assert (len(values), values.exact) == (3, False)
    other = Distinct(3)
    other.add("b")
    other.add("x")
    assert values.num_shared(other) == 1

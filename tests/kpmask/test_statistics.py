"""Intervals and paired tests against closed forms, SciPy and plain sums."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from kpmask import statistics
from kpmask.statistics import (
    bootstrap_interval,
    margin_interval,
    margin_percent,
    mean_interval,
    paired,
    sign_test,
    two_way_interval,
)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_videos() -> None:
    values = np.random.default_rng(1).normal(0.3, 0.1, 400)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.06 * half)


def level(num: int) -> float:
    """The share of draws between Hesterberg's percentiles."""
    reach = math.sqrt(num / (num - 1)) * stats.t.ppf(0.975, num - 1)
    return float(1 - 2 * stats.norm.cdf(-reach))


def test_the_interval_of_a_mean_is_scipys() -> None:
    values = np.random.default_rng(2).exponential(1.0, 12)  # few and skewed
    expected = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=level(12),
        method="percentile",
        n_resamples=50_000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    width = expected.high - expected.low
    assert mean_interval(values) == pytest.approx(tuple(expected), abs=0.04 * width)


def test_the_interval_of_two_videos_is_known() -> None:
    # Of four equally likely draws, one has the first twice and one the second twice.
    assert mean_interval(np.array([0.2, 0.6])) == pytest.approx((0.2, 0.6))
    assert mean_interval(np.array([0.5])) == (0.5, 0.5)


def test_the_interval_over_rows_and_columns_is_that_of_a_plain_loop() -> None:
    random = np.random.default_rng(6)
    values = (random.uniform(size=(7, 9)) < 0.4).astype(float)
    drawn = []
    for _ in range(20_000):
        rows, columns = random.integers(7, size=7), random.integers(9, size=9)
        drawn.append(np.mean([[values[row, column] for column in columns] for row in rows]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert two_way_interval(values) == pytest.approx((low, high), abs=0.06 * (high - low))
    assert two_way_interval(values) == two_way_interval(values)


def test_the_interval_of_equal_columns_is_that_of_the_rows() -> None:
    rows = np.random.default_rng(7).uniform(0, 1, 30)
    table = np.repeat(rows[:, None], 50, axis=1)
    low, high = mean_interval(rows)
    assert two_way_interval(table) == pytest.approx((low, high), abs=0.06 * (high - low))
    assert two_way_interval(table.T) == pytest.approx((low, high), abs=0.06 * (high - low))
    assert two_way_interval(np.ones((1, 4))) == (1.0, 1.0)


def test_the_interval_over_rows_and_columns_holds_the_truth_as_often_as_it_says() -> None:
    """People and videos both differ; an interval over cells alone would be far too narrow."""
    random = np.random.default_rng(8)
    num_held, num_held_by_cells, num_trials = 0, 0, 150
    for _ in range(num_trials):
        lean = random.normal(size=(12, 1)) + random.normal(size=(1, 10))
        values = (random.uniform(size=(12, 10)) < 1 / (1 + np.exp(-lean))).astype(float)
        low, high = two_way_interval(values)
        num_held += low <= 0.5 <= high
        low, high = mean_interval(values.ravel())
        num_held_by_cells += low <= 0.5 <= high
    assert 0.9 * num_trials < num_held
    assert num_held_by_cells < 0.8 * num_trials


def test_the_interval_of_a_weighted_mean() -> None:
    random = np.random.default_rng(4)
    values, frames = random.uniform(0, 1, 20), random.integers(1, 200, 20).astype(float)
    expected = stats.bootstrap(
        (values, frames),
        lambda v, w, axis: (v * w).sum(axis) / w.sum(axis),
        confidence_level=level(20),
        method="percentile",
        paired=True,
        n_resamples=50_000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    width = expected.high - expected.low
    assert mean_interval(values, frames) == pytest.approx(tuple(expected), abs=0.04 * width)
    equal = mean_interval(values, np.full(20, 7.0))
    assert equal == pytest.approx(mean_interval(values))


@pytest.mark.parametrize("num_videos", [6, 10, 40])
def test_intervals_cover_the_true_mean_about_as_often_as_they_say(num_videos: int) -> None:
    random = np.random.default_rng(6)
    samples = random.normal(0.0, 1.0, (500, num_videos))
    ends = [mean_interval(sample, seed=number) for number, sample in enumerate(samples)]
    covered = np.mean([low <= 0 <= high for low, high in ends])
    assert 0.92 < covered < 0.98


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(7).uniform(0, 1, 30)
    whole = mean_interval(values)
    monkeypatch.setattr(statistics, "MAX_DRAWN", 30 * 7)
    assert mean_interval(values) == whole
    monkeypatch.setattr(statistics, "MAX_DRAWN", 1)
    assert mean_interval(values) == whole
    assert mean_interval(values, seed=1) != whole


def test_draws_without_a_value_do_not_count() -> None:
    ends = bootstrap_interval(
        lambda drawn: np.where(drawn[:, 0] == 0, np.nan, drawn[:, 0] * 1.0), 3
    )
    assert ends == (1.0, 2.0)
    assert np.isnan(bootstrap_interval(lambda drawn: np.full(len(drawn), np.nan), 3)).all()


def test_the_margin_is_paired_and_the_same_every_time() -> None:
    random = np.random.default_rng(0)
    base = random.uniform(0.02, 0.2, 15)  # videos differ much, the systems little
    own = base * random.uniform(0.7, 0.8, 15)
    low, high = margin_interval(own, base)
    assert low < margin_percent(own, base) < high
    assert low > -30 and high < -20
    assert margin_interval(own, base) == (low, high)
    slow = [margin_percent(own[i], base[i]) for i in random.integers(15, size=(4000, 15))]
    assert (low, high) == pytest.approx(tuple(np.percentile(slow, (2.5, 97.5))), abs=0.3)


def test_the_margin_over_a_baseline_that_is_0_in_some_videos() -> None:
    low, high = margin_interval(np.array([1.0, 2.0]), np.array([0.0, 2.0]))
    assert (low, high) == pytest.approx((0.0, 50.0))


@pytest.mark.parametrize("split", [(0, 0), (5, 0), (0, 5), (3, 3), (9, 1), (14, 6), (200, 150)])
def test_the_sign_test_is_the_sum_of_binomials(split: tuple[int, int]) -> None:
    count = sum(split)
    tail = sum(math.comb(count, k) for k in range(min(split) + 1)) / 2**count
    assert sign_test(*split) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    if count:
        assert sign_test(*split) == pytest.approx(stats.binomtest(split[0], count).pvalue)


def test_the_sign_test_counts_all_splits_that_are_as_uneven() -> None:
    splits = [sum(signs) for signs in itertools.product((0, 1), repeat=9)]
    for above in range(10):
        as_uneven = [s for s in splits if abs(2 * s - 9) >= abs(2 * above - 9)]
        assert sign_test(above, 9 - above) == pytest.approx(len(as_uneven) / 2**9)


def test_two_systems_on_the_same_videos() -> None:
    random = np.random.default_rng(8)
    others = random.uniform(0.02, 0.5, 20)
    own = others - random.uniform(0.001, 0.01, 20)
    own[3] = others[3]
    own[4] = others[4] + 0.002
    found = paired(own, others)
    assert found.difference == pytest.approx(own.mean() - others.mean())
    assert found.low is not None and found.high is not None
    assert found.low < found.difference < found.high < 0  # the videos' spread is 50 times it
    assert (found.num_above, found.num_below) == (1, 18)
    assert found.p_value == pytest.approx(stats.binomtest(1, 19).pvalue)
    one = paired(own[:1], others[:1])
    assert (one.low, one.high, one.p_value) == (None, None, 1.0)

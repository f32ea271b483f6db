"""What means over few videos are worth: bootstrapped intervals, and paired tests.

Videos are drawn again and again with replacement, since frames of one video are no independent
samples. Intervals are the middle of what the draws give (the percentile bootstrap of Efron 1979),
of so many of them that the true mean is held in 95 % of cases: see `percentiles`. Draws follow from
the number of videos and a seed, so that equal scores have equal intervals.

- Of two or three videos the interval is their range, and holds the mean in half of the cases or
  three quarters. Nothing that is drawn from so few could do better.
- Videos count as independent. Clips that were cut from one recording are not: their interval is
  about that recording, and too narrow for others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Draws = NDArray[np.int64]  # (R, V): R times V places of videos

NUM_RESAMPLES: Final = 2000
INTERVAL: Final = (2.5, 97.5)  # percentiles, of very many
MAX_DRAWN: Final = 2**20  # places at a time: memory does not grow with the number of videos


def bootstrap_interval(
    statistic: Callable[[Draws], Values], num_videos: int, *, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a statistic over videos; that of nothing is NaN.

    Args:
        statistic: its values (R) for R draws of videos' places (R, V). NaN ones do not count.
        num_videos: one or more.
    """
    random = np.random.default_rng(seed)
    block = max(1, MAX_DRAWN // num_videos)
    parts = [
        statistic(random.integers(num_videos, size=(min(block, NUM_RESAMPLES - start), num_videos)))
        for start in range(0, NUM_RESAMPLES, block)
    ]
    values = np.concatenate(parts)
    values = values[~np.isnan(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.percentile(values, percentiles(num_videos))
    return float(low), float(high)


def percentiles(num_videos: int) -> tuple[float, float]:
    """Which percentiles of the means of draws hold the true mean in 95 % of cases.

    The middle 95 % hold it less often with few videos, 84 % of the time with five: draws differ
    among themselves by the factor ((n - 1) / n)^(1/2) less than samples would, and like normal
    values, where means of few differ like Student's t. The percentiles make good for both (the
    expanded percentile interval of Hesterberg 2015, What Teachers Should Know About the Bootstrap).
    """
    if num_videos < 2:
        return INTERVAL
    from scipy.special import ndtr, stdtrit  # takes a while to load

    reach = math.sqrt(num_videos / (num_videos - 1)) * stdtrit(num_videos - 1, INTERVAL[1] / 100)
    below = 100 * float(ndtr(-reach))
    return below, 100 - below


def mean_interval(
    values_V: Values, weights_V: Values | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the videos' mean, or of their weighted one.

    Args:
        weights_V: how much each video weighs, its number of frames for a pooled mean.
    """
    if weights_V is None:
        return bootstrap_interval(lambda RV: values_V[RV].mean(1), len(values_V), seed=seed)
    total_V = values_V * weights_V
    return bootstrap_interval(
        lambda RV: total_V[RV].sum(1) / weights_V[RV].sum(1), len(values_V), seed=seed
    )


def two_way_interval(values_PV: Values, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of a table whose rows and columns were both drawn from more.

    Participants (rows) and videos (columns) are drawn with replacement, each by themselves, and
    every cell of a drawn row and a drawn column counts (the pigeonhole bootstrap of Owen 2007). It
    rather errs on the wide side.

    Args:
        values_PV: one or more rows and columns, none of its cells missing.
    """
    num_participants, num_videos = values_PV.shape
    random = np.random.default_rng(seed)

    def times_drawn(count: int) -> Values:
        drawn = random.multinomial(count, np.full(count, 1 / count), NUM_RESAMPLES)
        return drawn.astype(np.float64)

    times_RP, times_RV = times_drawn(num_participants), times_drawn(num_videos)
    means = np.einsum("rv,rv->r", times_RP @ values_PV, times_RV) / values_PV.size
    low, high = np.percentile(means, INTERVAL)
    return float(low), float(high)


# --- one system against another, on the same videos ------------------------------------------


def margin_percent(values_V: Values, base_V: Values) -> float:
    """How far the mean lies above the baseline's, in percent of that, which is not 0."""
    base = float(base_V.mean())
    return 100 * (float(values_V.mean()) - base) / abs(base)


def margin_interval(values_V: Values, base_V: Values, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of `margin_percent` over videos, the same ones drawn for both (paired).

    Draws of videos in which the baseline's mean is 0 do not count.
    """

    def margin(drawn_RV: Draws) -> Values:
        own, base = values_V[drawn_RV].mean(1), base_V[drawn_RV].mean(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(base != 0, 100 * (own - base) / np.abs(base), np.nan)

    return bootstrap_interval(margin, len(values_V), seed=seed)


@dataclass(frozen=True, slots=True)
class Paired:
    """The values of two systems on the same videos.

    Attributes:
        difference: the mean of one's values minus the other's.
        low, high: its 95 % interval; None with fewer than two videos.
        num_above, num_below: videos in which the first one's value is the larger, the smaller.
        p_value: of the two-sided sign test over these.
    """

    difference: float
    low: float | None
    high: float | None
    num_above: int
    num_below: int
    p_value: float


def paired(values_V: Values, others_V: Values, *, seed: int = 0) -> Paired:
    """One system against another: paired bootstrap of the difference, and sign test."""
    difference_V = values_V - others_V
    low, high = mean_interval(difference_V, seed=seed) if len(values_V) > 1 else (None, None)
    above, below = int((difference_V > 0).sum()), int((difference_V < 0).sum())
    return Paired(float(difference_V.mean()), low, high, above, below, sign_test(above, below))


def sign_test(num_above: int, num_below: int) -> float:
    """How likely at least so uneven a split is if either side is equally likely, in [0, 1].

    Two-sided and exact: twice the binomial tail of the smaller side, at most 1. Ties are left out
    before, as usual; of no videos it is 1.
    """
    from scipy.stats import binom  # takes a while to load

    fewer, count = min(num_above, num_below), num_above + num_below
    return min(1.0, 2 * float(binom.cdf(fewer, count, 0.5)))

"""Fréchet distances: how alike two sets of pictures are, as two normal distributions of features.

|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the means m and the covariances C of the features
(Dowson and Landau 1982). A distance is named after the network that its features are of: FID is
that of Inception-v3 (Heusel et al. 2017) and of no other. With few videos it is more of their
number than of what they show, and so is refused below `MIN_VIDEOS`.

| name | features | range, best |
|---|---|---|
| `frechet_sface` | SFace's vectors of the faces in single frames | 0 to 4, 0 |

`frechet_sface` is no FID, and numbers of the two do not compare: it knows faces alone, and of a
frame without a face that it has none. Such a frame is the vector of zeros on both sides, as far
from every face as any: so faces that no detector recognises cost, and do not leave the set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kpmask.estimators import EmbeddingEstimator, embedding_estimator
from kpmask.estimators.frames import embeddings_of
from kpmask.metrics.base import EstimatorMetric

Features = NDArray[np.float64]  # ND
Moments = tuple[NDArray[np.float64], NDArray[np.float64]]  # mean (D) and covariance (DD)

MIN_VIDEOS: Final = 256


# --- on tables of features -------------------------------------------------------------------


def frechet_distance(
    mean1_D: NDArray[np.float64],
    covariance1_DD: NDArray[np.float64],
    mean2_D: NDArray[np.float64],
    covariance2_DD: NDArray[np.float64],
) -> float:
    """The squared distance of two normal distributions; 0 for equal ones, never below.

    Covariances may be singular, as those of fewer samples than features are.
    """
    # Tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): the eigenvalues of
    # C1 C2 are their squares, of which the small ones would be all rounding.
    roots_DD = _root(covariance1_DD) @ _root(covariance2_DD)
    of_roots = np.linalg.svd(roots_DD, compute_uv=False).sum()
    spread = np.trace(covariance1_DD) + np.trace(covariance2_DD) - 2 * of_roots
    return max(0.0, float(np.square(mean1_D - mean2_D).sum() + spread))


def moments(features: Iterable[Features]) -> Moments:
    """Mean and covariance (over N - 1) of the rows of all tables together, one table in memory.

    Raises:
        ValueError: there are fewer than two rows.
    """
    count, mean_D, scatter_DD = 0, np.zeros(0), np.zeros((0, 0))
    for table_ND in features:
        if not len(table_ND):
            continue
        rows_ND = np.asarray(table_ND, np.float64)
        own_D = rows_ND.mean(0)
        apart_ND = rows_ND - own_D
        if not count:
            mean_D, scatter_DD = np.zeros_like(own_D), np.zeros((len(own_D), len(own_D)))
        # Chan et al. 1983: sums of squares less those of means would lose all their digits.
        shift_D, total = own_D - mean_D, count + len(rows_ND)
        scatter_DD += apart_ND.T @ apart_ND
        scatter_DD += np.outer(shift_D, shift_D) * (count * len(rows_ND) / total)
        mean_D = mean_D + shift_D * (len(rows_ND) / total)
        count = total
    if count < 2:
        raise ValueError(f"{count} rows have no covariance")
    return mean_D, scatter_DD / (count - 1)


def _root(matrix_DD: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric square root of a covariance, without what rounding leaves of zeros."""
    values_D, vectors_DD = np.linalg.eigh(matrix_DD)
    smallest = len(values_D) * np.finfo(np.float64).eps * max(values_D.max(), 0.0)
    roots_D = np.sqrt(np.where(values_D > smallest, values_D, 0.0))
    return np.asarray((vectors_DD * roots_D) @ vectors_DD.T)


# --- on frames -------------------------------------------------------------------------------


class FrechetMetric:
    """What Fréchet distances share; a subclass has a name, an origin and `features`."""

    frames_per_window: ClassVar[int] = 1
    min_videos: ClassVar[int] = MIN_VIDEOS
    higher_is_better: ClassVar[bool] = False

    def score(self, generated: Iterable[Features], reference: Iterable[Features]) -> float:
        """The distance of two sets, from the features (ND) of each of their videos."""
        return frechet_distance(*moments(generated), *moments(reference))


@dataclass(frozen=True)
class FrechetSFace(EstimatorMetric, FrechetMetric):
    """The Fréchet distance of the faces in two sets, as SFace tells them apart."""

    estimator: EmbeddingEstimator
    name: ClassVar[str] = "frechet_sface"

    @classmethod
    def load(cls) -> FrechetSFace:
        """
        Raises:
            ConfigError: SFace's weights are not here; the hint is the command that gets them.
            CheckpointError: they are other weights.
        """
        return cls(embedding_estimator("sface"))

    def features(self, frames_NTCHW: Tensor) -> Features:
        vectors_ND = embeddings_of(self.estimator, frames_NTCHW[:, 0])
        return np.nan_to_num(vectors_ND, nan=0.0)

"""Whether faces and bodies move as they should, by the points that an estimator finds in them.

All of it is arithmetic on two tables, of the true and of the generated frames: x and y in pixels,
NaN for a point that was not found. A value of a frame is NaN where the truth has nothing to
compare with.

**A point that the truth has and the generated frame has not** counts as if it lay where the frame
is farthest from where it should be: no point in the frame could score worse. So no model gains by
faces that no detector recognises. The papers' code leaves such points out; metrics whose names end
in `_found` do the same, and mean little without their coverage. Of a body single joints come and
go as their scores cross a threshold, and each that goes weighs much more than a small error: read
`akd_movenet_found` with `mkr_movenet` beside it, as the papers have them, and `akd_movenet` for
what both come to.

| name | of a frame | range, best |
|---|---|---|
| `akd` | mean of |dx| and |dy| over points (px), as the papers' code has it | 0 to the side, 0 |
| `akd_euclidean` | mean length of (dx, dy) (px), as their text has it | 0 to the diagonal, 0 |
| `mkr` | share of the truth's points that are missed | 0 to 1, 0 |
| `jitter` | as `akd`, of second differences in time (px a frame^2) | 0 to four sides, 0 |
| `coverage` | 1 where a point was found in both frames, else 0 | 0 to 1, 1 |

AKD is from Siarohin et al. 2019 (Monkey-Net), who also brought in MKR. They measured with
face-alignment and OpenPose: only `akd_fan_found`, `akd_openpose_found` and `mkr_openpose` are made
as their numbers are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kpmask.estimators import PointEstimator, point_estimator
from kpmask.estimators.frames import keypoints_of
from kpmask.metric_names import PointsKind, PointsName
from kpmask.metrics.base import EstimatorMetric

Points = NDArray[np.float64]  # TK2, x and y in px; NaN where not found
PerFrame = NDArray[np.float64]  # T


# --- on tables of points ---------------------------------------------------------------------


def akd(true_TK2: Points, generated_TK2: Points, *, missed_TK2: Points | None = None) -> PerFrame:
    """Average keypoint distance (px) of each frame: mean of |dx| and |dy| over its points.

    Args:
        missed_TK2: what counts for a point that only the truth has, along each axis: see
            `farthest`. None leaves such points out.
    """
    return _mean_found(_filled(np.abs(generated_TK2 - true_TK2), missed_TK2).mean(-1))


def akd_euclidean(
    true_TK2: Points, generated_TK2: Points, *, missed_TK2: Points | None = None
) -> PerFrame:
    """Mean of the points' Euclidean distances (px) in each frame; arguments as `akd`'s."""
    apart_TK2 = _filled(np.abs(generated_TK2 - true_TK2), missed_TK2)
    return _mean_found(np.sqrt(np.square(apart_TK2).sum(-1)))


def jitter(
    true_TK2: Points, generated_TK2: Points, *, missed_TK2: Points | None = None
) -> PerFrame:
    """How unlike the truth points are accelerated (px a frame^2): `akd` of second differences.

    Of frame t it is about frames t - 2 to t, and so NaN in frames 0 and 1. A point that the truth
    has not in all three is left out. An error that stays the same or grows steadily does not count.
    """
    values_T = np.full(len(true_TK2), np.nan)
    if len(true_TK2) < 3:
        return values_T
    apart_TK2 = np.abs(np.diff(generated_TK2 - true_TK2, 2, axis=0))
    if missed_TK2 is not None:
        most_TK2 = missed_TK2[:-2] + 2 * missed_TK2[1:-1] + missed_TK2[2:]
        apart_TK2 = _filled(apart_TK2, most_TK2)
    values_T[2:] = _mean_found(apart_TK2.mean(-1))
    return values_T


def mkr(true_TK2: Points, generated_TK2: Points) -> PerFrame:
    """Missing keypoint rate of each frame: which share of the truth's points was not found."""
    wanted_TK = found(true_TK2)
    missed_TK = wanted_TK & ~found(generated_TK2)
    return _ratio(missed_TK.sum(1), wanted_TK.sum(1))


def coverage(true_TK2: Points, generated_TK2: Points) -> PerFrame:
    """1 for frames with a point that was found in both, else 0; never NaN."""
    both_TK = found(true_TK2) & found(generated_TK2)
    return np.asarray(both_TK.any(1), np.float64)


def found(points_TK2: Points) -> NDArray[np.bool_]:
    """Which points there are (TK)."""
    there_TK2: NDArray[np.bool_] = np.isfinite(points_TK2)
    return there_TK2[..., 0] & there_TK2[..., 1]


def farthest(true_TK2: Points, *, width_px: int, height_px: int) -> Points:
    """How far from each true point, along each axis, a point of the frame can be (px, TK2)."""
    last_px = np.array([width_px - 1, height_px - 1], np.float64)
    return np.asarray(np.maximum(np.abs(true_TK2), np.abs(last_px - true_TK2)))


def _filled(apart_TK2: Points, missed_TK2: Points | None) -> Points:
    """Distances, with those that are missing taken from another table, where that has them."""
    if missed_TK2 is None:
        return apart_TK2
    return np.where(np.isfinite(apart_TK2), apart_TK2, missed_TK2)


def _mean_found(values_TK: NDArray[np.float64]) -> PerFrame:
    """The mean over points, of those that are numbers; NaN without any."""
    there_TK: NDArray[np.bool_] = np.isfinite(values_TK)
    return _ratio(np.where(there_TK, values_TK, 0.0).sum(1), there_TK.sum(1))


def _ratio(over_T: NDArray[np.number], under_T: NDArray[np.number]) -> PerFrame:
    """Quotients, NaN where there is nothing to divide by."""
    quotient_T = np.full(len(over_T), np.nan)
    np.divide(over_T, under_T, out=quotient_T, where=np.asarray(under_T) != 0)
    return quotient_T


# --- on frames -------------------------------------------------------------------------------

_DISTANCES: Final = {"akd": akd, "akd_euclidean": akd_euclidean, "jitter": jitter}


@dataclass(frozen=True)
class KeypointMetric(EstimatorMetric):
    """One of the formulas above, of the points that an estimator finds.

    Attributes:
        only_found: leave points out that were not found in the generated frame.
    """

    kind: PointsKind
    estimator: PointEstimator
    only_found: bool = False
    counts_first: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.estimator.name}" + ("_found" if self.only_found else "")

    @property
    def higher_is_better(self) -> bool:
        return self.kind == "coverage"

    @property
    def frames_before(self) -> int:
        return 2 if self.kind == "jitter" else 0

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> PerFrame:
        true_TK2 = keypoints_of(self.estimator, reference_TCHW).points_TK2
        generated_TK2 = keypoints_of(self.estimator, generated_TCHW).points_TK2
        if self.kind == "mkr":
            return mkr(true_TK2, generated_TK2)
        if self.kind == "coverage":
            return coverage(true_TK2, generated_TK2)
        height_px, width_px = reference_TCHW.shape[-2:]
        most_TK2 = farthest(true_TK2, width_px=width_px, height_px=height_px)
        missed_TK2 = None if self.only_found else most_TK2
        return _DISTANCES[self.kind](true_TK2, generated_TK2, missed_TK2=missed_TK2)


def keypoint_metric(name: str) -> KeypointMetric:
    """The metric of this name.

    Raises:
        ConfigError: the estimator's weights are not here; the hint is the command that gets them.
        CheckpointError: they are other weights.
    """
    only_found = name.endswith("_found")
    kind, estimator = _PARTS[name.removesuffix("_found")]
    return KeypointMetric(kind, point_estimator(estimator), only_found=only_found)


_PARTS: Final[dict[str, tuple[PointsKind, PointsName]]] = {
    f"{kind}_{estimator}": (kind, estimator)
    for estimator in get_args(PointsName)
    for kind in get_args(PointsKind)
}

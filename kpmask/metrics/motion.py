"""Whether a subject moves as the driving one does, wherever it stands and however large it is.

For another identity's motion, where `akd` counts the place and the build of the driving subject
as errors, too. Of points p of the generated frames and q of the driving ones, the value of frame t
is the mean over points of |x| and |y| of

    (p_t - p_0) - s (q_t - q_0),    s = size of the source / size of the driving subject

in px: displacements from frame 0, those of the driving subject as large as the source would make
them. A size is the root of the mean squared distance of the points from their mean, over the
points that both have: in the source image and in the driving video's frame 0. It is the source's
and not that of the generated frame 0, or a model would gain by drawing its subject small.

- A point that is not in driving frame t, or not in driving frame 0, is left out. Nothing is scored
  where the sizes cannot be had.
- A point that the generated frame t has not, or the generated frame 0, counts as if it had moved
  across the whole frame, and away from where it should: no point could score worse. `_found`
  leaves it out. A joint that is lost in frame 0 costs in every frame, so of bodies read
  `akd_motion_movenet_found` with `mkr_movenet` and its coverage.
- Frame 0 is 0 by itself, where everything was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kpmask.estimators import PointEstimator, point_estimator
from kpmask.estimators.frames import keypoints_of
from kpmask.metric_names import PointsName
from kpmask.metrics import FRAME_0
from kpmask.metrics.base import EstimatorMetric
from kpmask.metrics.keypoints import PerFrame, Points, akd, found


def akd_motion(
    driving_TK2: Points,
    generated_TK2: Points,
    source_K2: NDArray[np.float64],
    *,
    most_px: tuple[int, int] | None = None,
) -> PerFrame:
    """The formula above, of frames of which the first is the video's frame 0.

    Args:
        most_px: width and height of the frames less 1, which counts for points that only the
            driving video has; None leaves them out.
    """
    wanted_TK2 = (driving_TK2 - driving_TK2[:1]) * size_ratio(source_K2, driving_TK2[0])
    moved_TK2 = generated_TK2 - generated_TK2[:1]
    farthest_TK2 = None if most_px is None else np.abs(wanted_TK2) + np.array(most_px, np.float64)
    return akd(wanted_TK2, moved_TK2, missed_TK2=farthest_TK2)


def size_ratio(source_K2: NDArray[np.float64], driving_K2: NDArray[np.float64]) -> float:
    """How large the source is beside the driving subject; NaN where that cannot be said."""
    both_K = found(source_K2) & found(driving_K2)
    if not both_K.any():
        return np.nan
    source, driving = (_size(points_K2[both_K]) for points_K2 in (source_K2, driving_K2))
    return source / driving if source > 0 and driving > 0 else np.nan


def _size(points_K2: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(points_K2 - points_K2.mean(0)).sum(1).mean()))


@dataclass(frozen=True)
class MotionMetric(EstimatorMetric):
    """The formula above, of the points that an estimator finds.

    Attributes:
        only_found: leave points out that were not found in the generated frames.
    """

    estimator: PointEstimator
    only_found: bool = False
    counts_first: ClassVar[bool] = False
    frames_before: ClassVar[int] = FRAME_0
    higher_is_better: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"akd_motion_{self.estimator.name}" + ("_found" if self.only_found else "")

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> PerFrame:
        driving_TK2, generated_TK2, source_TK2 = (
            keypoints_of(self.estimator, image_TCHW).points_TK2
            for image_TCHW in (reference_TCHW, generated_TCHW, source_CHW[None])
        )
        height_px, width_px = reference_TCHW.shape[-2:]
        most_px = None if self.only_found else (width_px - 1, height_px - 1)
        return akd_motion(driving_TK2, generated_TK2, source_TK2[0], most_px=most_px)


def motion_metric(name: str) -> MotionMetric:
    """The metric of this name.

    Raises:
        ConfigError: the estimator's weights are not here; the hint is the command that gets them.
        CheckpointError: they are other weights.
    """
    estimator = _ESTIMATORS[name.removesuffix("_found")]
    return MotionMetric(point_estimator(estimator), only_found=name.endswith("_found"))


_ESTIMATORS: Final[dict[str, PointsName]] = {
    f"akd_motion_{estimator}": estimator for estimator in get_args(PointsName)
}

"""Estimators: what finds faces and bodies in frames, for the metrics that compare them.

| name | gives | weights |
|---|---|---|
| `facemesh` | 468 points of a face; YuNet finds it | `facemesh`, and `kpmask[faces]` |
| `sface` | 128 numbers of a face; YuNet finds it | `kpmask[faces]` |
| `movenet` | 17 points of a body, as COCO orders them | `movenet` |
| `fan` * | 68 points of a face | `fan` and `s3fd`: research only |
| `openface` * | 128 numbers of the whole frame | `openface` |
| `arcface` * | 512 numbers of a face; YuNet finds it | `arcface`: non-commercial |
| `openpose` * | 18 points of a body; takes a GPU | `openpose`: non-commercial |
| `openposeone` | the same network, once and of one person | `openpose`: non-commercial |
| `reidpaper` * | 2048 numbers of the whole frame | `reid`: research only |
| `reid` | the same network, used as it was trained for | `reid`: research only |

- What weights there are, and whether `kpmask weights fetch` gets them or only the user can, who
  gives them to `kpmask weights add`: see `kpmask.estimators.weights`.
- An estimator looks at each frame by itself: equal frames get equal values, however a video is
  cut into chunks. Of several people in a frame it takes one, by a rule that it states.
- Where nothing is found there is NaN. A frame on which an estimator breaks is one in which nothing
  was found, and the log says so.
- Those with a star are what the papers used, `kpmask.metric_names.PAPER_ESTIMATORS`. Numbers of two
  estimators do not compare, nor do those of one estimator with other weights: `name`, `version`
  and `weights_sha256` must agree.
- Each runs on one CPU thread if torch is set to one; OpenCV is kept to one here. Networks of torch
  run on a GPU where there is one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from kpmask.metric_names import EmbeddingName, PointsName

Subject = Literal["face", "person"]
Frames = NDArray[np.uint8]  # THWC RGB

ESTIMATORS: Final[tuple[str, ...]] = (*get_args(PointsName), *get_args(EmbeddingName))


@dataclass(frozen=True, slots=True)
class Keypoints:
    """Points of the subject of each frame.

    Attributes:
        points_TK2: x and y (float64), in pixels from the centre of the frame's first pixel; NaN
            for a point that was not found. They may lie outside of the frame.
        scores_TK: how sure, in [0, 1]; 0 where there was no subject at all.
    """

    points_TK2: NDArray[np.float64]
    scores_TK: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.points_TK2.shape != (*self.scores_TK.shape, 2):
            raise ValueError(
                f"points of shape {self.points_TK2.shape}, scores of {self.scores_TK.shape}"
            )


class Estimator(Protocol):
    """What every estimator says of itself.

    Attributes:
        name, version, weights_sha256: which estimator this is; the digest covers every file that
            its answers depend on.
        licence: SPDX identifiers of the weights.
        subject: what it looks for.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def weights_sha256(self) -> str: ...
    @property
    def licence(self) -> str: ...
    @property
    def subject(self) -> Subject: ...


class PointEstimator(Estimator, Protocol):
    """Finds the points of a subject.

    Attributes:
        num_points: how many; K of what it returns.
    """

    @property
    def num_points(self) -> int: ...

    def estimate(self, frames_THWC: Frames) -> Keypoints:
        """The points in each of the frames, uint8 RGB of any size."""
        ...


class EmbeddingEstimator(Estimator, Protocol):
    """Says who or what is in a frame.

    Attributes:
        size: how many numbers; D of what it returns.
    """

    @property
    def size(self) -> int: ...

    def estimate(self, frames_THWC: Frames) -> NDArray[np.float64]:
        """A vector for each of the frames (TD), uint8 RGB; NaN where nothing is.

        Of length 1, unless the estimator says otherwise.
        """
        ...


@functools.lru_cache(maxsize=len(ESTIMATORS))
def point_estimator(name: PointsName) -> PointEstimator:
    """The estimator of this name, made once for a process.

    Raises:
        ConfigError: its weights are not here; the hint is the command that gets them.
        CheckpointError: they are other weights.
    """
    if name == "facemesh":
        from kpmask.estimators.facemesh import FaceMesh

        return FaceMesh.load()
    if name == "movenet":
        from kpmask.estimators.movenet import MoveNet

        return MoveNet.load()
    if name == "fan":
        from kpmask.estimators.fan import Fan

        return Fan.load()
    from kpmask.estimators.openpose import OpenPose

    return OpenPose.load(name)


@functools.lru_cache(maxsize=len(ESTIMATORS))
def embedding_estimator(name: EmbeddingName) -> EmbeddingEstimator:
    """As `point_estimator`."""
    if name == "sface":
        from kpmask.estimators.sface import SFace

        return SFace.load()
    if name == "openface":
        from kpmask.estimators.openface import OpenFace

        return OpenFace.load()
    if name == "arcface":
        from kpmask.estimators.arcface import ArcFace

        return ArcFace.load()
    from kpmask.estimators.reid import ReId

    return ReId.load(name)


def check_weights(name: str, path: Path) -> None:
    """See that a file is of the network that it was brought for, where its digest does not say so.

    Args:
        name: of the weights, not of an estimator.

    Raises:
        CheckpointError: it is not.
    """
    if name == "openpose":
        from kpmask.estimators.openpose import read_network

        read_network(path)
    elif name == "reid":
        from kpmask.estimators.reid import read_network as read_reid

        read_reid(path)

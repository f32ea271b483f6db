"""Evaluation metrics: one file per family, one protocol.

- A metric scores each frame by itself, or with the few before it; a metric of a whole set has
  features of each frame or video, and one value for all of them. Averaging and what frames there
  are is `kpmask.evaluate`'s business.
- Frames are float RGB in [0, 1], as `ScoreProtocol.quantise` has them.
- A frame that a metric cannot score (nothing moved in it, no face was found) is NaN and is left
  out of the means, whose `num_frames` says how many were counted.
- Two numbers are comparable only if name, version, weights and protocol of their metrics agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kpmask.errors import ConfigError
from kpmask.metric_names import (
    IDENTITY_METRICS,
    KEYPOINT_METRICS,
    MOTION_METRICS,
    SET_METRICS,
    with_coverage,
)

FRAME_0: Final = -1  # as `frames_before`: not those just before, but the video's first


class Described(Protocol):
    """What is said of every metric's numbers.

    Attributes:
        name: what its rows are called.
        version: changes whenever the same frames would get another value.
        weights_sha256: the network behind it; None where there is none.
        licence: SPDX identifier of the code and weights behind it.
        higher_is_better: how to read it.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def weights_sha256(self) -> str | None: ...
    @property
    def licence(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...


class Metric(Described, Protocol):
    """How alike generated and true frames are.

    Attributes:
        counts_first: whether frame 0, which is the source itself, is part of the mean whatever
            the protocol says.
        frames_before: how many frames before a frame its value needs, 0 for a frame by itself;
            `FRAME_0` for the first one of the video, wherever the frame is.
    """

    @property
    def counts_first(self) -> bool: ...
    @property
    def frames_before(self) -> int: ...

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        """One value a frame (T), NaN for a frame that cannot be scored.

        Frames are consecutive. The first `frames_before` of them have too few before them and are
        NaN, so that a long video may be scored in pieces that overlap by so many. With `FRAME_0`
        the first one is that of the video.

        Args:
            generated_TCHW, reference_TCHW: float RGB in [0, 1], of the same shape.
            source_CHW: the image that was animated.
        """
        ...


class SetMetric(Described, Protocol):
    """How alike two sets of videos are, without pairing them: a Fréchet distance, say.

    Attributes:
        frames_per_window: its features are of so many consecutive frames, 1 for single frames.
        min_videos: of fewer videos than so many there is no value.
    """

    @property
    def frames_per_window(self) -> int: ...
    @property
    def min_videos(self) -> int: ...

    def features(self, frames_NTCHW: Tensor) -> NDArray[np.float64]:
        """Features (N, D) of N windows.

        Args:
            frames_NTCHW: float RGB in [0, 1], T being `frames_per_window`.
        """
        ...

    def score(
        self, generated: Iterable[NDArray[np.float64]], reference: Iterable[NDArray[np.float64]]
    ) -> float:
        """The value of a set, from the features (ND) of each of its videos.

        Both are gone through once and a table at a time: all of them may not fit into memory.
        """
        ...


def build_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics of these names, in their order, each once, and those of their coverages.

    Raises:
        ConfigError: an estimator's weights are not here; the hint is the command that gets them.
            Or a metric is one of a whole set, which has no value for a frame.
        CheckpointError: they are other weights.
    """
    from kpmask.metrics.identity import identity_metric
    from kpmask.metrics.keypoints import keypoint_metric
    from kpmask.metrics.lpips import Lpips
    from kpmask.metrics.motion import motion_metric
    from kpmask.metrics.pixel import L1, L1WithFirst, MovingL1, Psnr
    from kpmask.metrics.ssim import Ssim
    from kpmask.metrics.temporal import Flicker, TemporalError
    from kpmask.metrics.warping import WarpingError

    makers: dict[str, Callable[[], Metric]] = {
        "l1": L1,
        "l1_with_first": L1WithFirst,
        "l1_moving": MovingL1,
        "psnr": Psnr,
        "ssim": Ssim,
        "temporal_error": TemporalError,
        "flicker": Flicker,
        "warping_error": WarpingError,
        "lpips_alex": Lpips.load,
        **{name: partial(keypoint_metric, name) for name in KEYPOINT_METRICS},
        **{name: partial(motion_metric, name) for name in MOTION_METRICS},
        **{name: partial(identity_metric, name) for name in IDENTITY_METRICS},
    }
    of_sets = [name for name in names if name in SET_METRICS]
    if of_sets:
        raise ConfigError(
            f"{', '.join(of_sets)}: of a whole set of videos, and no frame's",
            subject="metrics",
            hint="kpmask evaluate has metrics of sets",
        )
    return [makers[name]() for name in with_coverage(names)]


def build_set_metrics(names: Sequence[str]) -> list[SetMetric]:
    """The metrics of whole sets among these names, in their order, each once.

    Raises:
        ConfigError, CheckpointError: as `build_metrics`.
    """
    from kpmask.metrics.fid import Fid, Fvd
    from kpmask.metrics.frechet import FrechetSFace

    makers: dict[str, Callable[[], SetMetric]] = {
        "frechet_sface": FrechetSFace.load,
        "fid": Fid.load,
        "fvd": Fvd.load,
    }
    return [makers[name]() for name in dict.fromkeys(names) if name in SET_METRICS]

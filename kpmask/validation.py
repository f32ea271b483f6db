"""How well a model in training draws clips that it does not train on: a bounded few of them.

The scores are the evaluation's, in its protocol, over evenly spaced frames of clips spread over
the split. So they show a training's course; what a finished model scores is the evaluation's to
say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kpmask.config import MetricName
from kpmask.data.frame_cache import ReadFrames
from kpmask.data.loader import to_float
from kpmask.evaluate import FramePair, score_video, summarise, video_scores
from kpmask.metrics import build_metrics
from kpmask.models.base import AnimationSystem
from kpmask.records import ClipRecord, ClipScores, Method, ValidationScore

METRICS: Final[tuple[MetricName, ...]] = ("l1", "l1_moving", "ssim")
MAX_CLIPS: Final = 8
MAX_FRAMES: Final = 16  # of a clip, its first one included
# Before a metric's name.
NAMES: Final[dict[Method, str]] = {
    "model": "",
    "copy": "copy_",
    "codec": "codec_",
    "driving": "driving_",
}


class Validation:
    """Scores systems on some of `clips`: always the same, whatever their order.

    Args:
        read: where frames come from.
        clips: test clips.
        device: where the system is.
    """

    def __init__(self, read: ReadFrames, clips: Sequence[ClipRecord], *, device: str) -> None:
        self._read = read
        self._device = device
        self._metrics = build_metrics(METRICS)
        ordered = sorted(clips, key=lambda clip: clip.clip_id)
        self._clips = [ordered[place] for place in _spread(len(ordered), MAX_CLIPS)]

    def scores(
        self, system: AnimationSystem[Any, Any], *, phase: str, step: int
    ) -> list[ValidationScore]:
        """A row for each metric, and for the same of a copy of the source (`copy_l1`, ...).

        A metric that could score nothing has no row. The system is left in the mode that it was in.
        """
        was_training = system.training
        system.eval()
        try:
            scored = [self._scored(system.for_reconstruction(), clip) for clip in self._clips]
        finally:
            system.train(was_training)
        return [
            ValidationScore(phase, step, NAMES[row.method] + row.metric, row.mean, row.num_videos)
            for row in summarise(video_scores(scored))
        ]

    def _scored(self, system: AnimationSystem[Any, Any], clip: ClipRecord) -> ClipScores:
        frames_THWC = self._read(clip, _spread(clip.num_frames, MAX_FRAMES))
        pairs = [self._drawn(system, frames_THWC)]
        return score_video(pairs, self._metrics, clip_id=clip.clip_id, name=clip.name)

    @torch.inference_mode()
    def _drawn(
        self, system: AnimationSystem[Any, Any], frames_THWC: NDArray[np.uint8]
    ) -> FramePair:
        """The frames as the system draws them from the first one, and as they are."""
        true_TCHW = to_float(torch.from_numpy(frames_THWC).to(self._device))
        source = system.encode_source(true_TCHW[:1])
        drawn = system.render(source.repeat(len(true_TCHW)), system.encode_driving(true_TCHW))
        return drawn.image_BCHW, true_TCHW


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced from 0 on."""
    return [] if not count else sorted({place * count // most for place in range(most)})

"""Scores of generated videos against true ones: protocol and averages, without files or workers.

- Reconstruction: every frame of a clip is drawn from the clip's own frame 0.
- Beside each score stands the same score of a copy, frame 0 repeated, over the same frames. What a
  model adds is the difference.
- Frame 0 is the source itself. Metrics leave it out unless they say otherwise.
- A video's score is the mean over its scored frames. Over videos there are two means: of the
  videos' means, and pooled over all frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmask.animate import Animator, to_tensor
from kpmask.errors import CheckpointError
from kpmask.metrics import Metric
from kpmask.records import ClipScores, Method, MetricInfo, ScoreSummary, VideoScore

Frames = NDArray[np.uint8]  # THWC RGB
FramePair = tuple[Tensor, Tensor]  # generated and true frames, float TCHW in [0, 1]


def reconstruct(animator: Animator, chunks: Iterable[Frames]) -> Iterator[FramePair]:
    """Each chunk of a clip as the model draws it from the clip's first frame, and as it is.

    Raises:
        CheckpointError: code checkpoint_mismatch, when the clip is not of the model's size:
            resized frames would have other scores.
    """
    animator = animator.for_reconstruction()
    source = None
    side_px = animator.image_size_px
    for frames_THWC in chunks:
        if frames_THWC.shape[1:3] != (side_px, side_px):
            height_px, width_px = frames_THWC.shape[1:3]
            raise CheckpointError(
                f"the model draws {side_px}x{side_px} px, the clips are {width_px}x{height_px}",
                code="checkpoint_mismatch",
            )
        if source is None:
            source = animator.encode_source(frames_THWC[0])
        generated = animator.render(source, animator.encode_driving(frames_THWC))
        yield generated, to_tensor(frames_THWC, device=animator.device)


@torch.inference_mode()
def score_video(
    pairs: Iterable[FramePair], metrics: Sequence[Metric], *, clip_id: str, name: str
) -> ClipScores:
    """The scores of one video, from its chunks in order.

    A metric that could not score any frame has no entry.
    """
    totals: dict[tuple[str, Method], tuple[float, int]] = {}
    source_CHW: Tensor | None = None
    first = True
    for generated_TCHW, reference_TCHW in pairs:
        if source_CHW is None:
            source_CHW = reference_TCHW[0]
        copy_TCHW = source_CHW.expand_as(reference_TCHW)
        shown: dict[Method, Tensor] = {"model": generated_TCHW, "copy": copy_TCHW}
        for metric, (method, frames_TCHW) in itertools.product(metrics, shown.items()):
            values_T = metric.per_frame(frames_TCHW, reference_TCHW, source_CHW)
            values_T = values_T[1:] if first and not metric.counts_first else values_T
            values_T = values_T[~np.isnan(values_T)]
            total, count = totals.get((metric.name, method), (0.0, 0))
            totals[metric.name, method] = (total + float(values_T.sum()), count + len(values_T))
        first = False
    scored = {key: value for key, value in totals.items() if value[1]}
    return ClipScores(
        clip_id=clip_id,
        name=name,
        metrics=tuple(metric for metric, _ in scored),
        methods=tuple(method for _, method in scored),
        values=tuple(total / count for total, count in scored.values()),
        num_frames=tuple(count for _, count in scored.values()),
    )


def video_scores(clips: Iterable[ClipScores]) -> list[VideoScore]:
    """One row for each score of each clip."""
    return [
        VideoScore(clip.clip_id, clip.name, metric, _method(method), value, num_frames)
        for clip in clips
        for metric, method, value, num_frames in zip(
            clip.metrics, clip.methods, clip.values, clip.num_frames, strict=True
        )
    ]


def summarise(scores: Iterable[VideoScore]) -> tuple[ScoreSummary, ...]:
    """Means over videos, one for each metric and method, in the order of their first rows."""
    groups: dict[tuple[str, Method], list[VideoScore]] = {}
    for score in scores:
        groups.setdefault((score.metric, score.method), []).append(score)
    return tuple(_summary(rows) for rows in groups.values())


def metric_info(metric: Metric) -> MetricInfo:
    """What the metric's numbers are made with."""
    return MetricInfo(
        name=metric.name,
        version=metric.version,
        weights_sha256=metric.weights_sha256,
        licence=metric.licence,
        higher_is_better=metric.higher_is_better,
    )


def _summary(rows: Sequence[VideoScore]) -> ScoreSummary:
    values = np.array([row.value for row in rows])
    counts = np.array([row.num_frames for row in rows])
    return ScoreSummary(
        metric=rows[0].metric,
        method=rows[0].method,
        mean=float(values.mean()),
        std=float(values.std()),
        pooled=float((values * counts).sum() / counts.sum()),
        num_videos=len(rows),
        num_frames=int(counts.sum()),
    )


def _method(text: str) -> Method:
    methods: dict[str, Any] = {method: method for method in get_args(Method)}
    method: Method = methods[text]
    return method

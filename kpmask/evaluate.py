"""Scores of generated videos against true ones: protocol and averages, without files or workers.

- Reconstruction: every frame of a clip is drawn from the clip's own frame 0.
- Beside each score stands the same score of a copy, frame 0 repeated, over the same frames: what a
  model adds is the difference. And, where they are given, of the true frames after an encoder:
  what no generated video of ours could do better.
- Frame 0 is the source itself. Metrics leave it out unless the protocol or they say otherwise.
- A video's score is the mean over its scored frames. Over videos there are two means: of the
  videos' means, and pooled over all frames.
- A metric of a whole set has features of every window of every video, and one value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmask.animate import Animator, to_tensor
from kpmask.config import ScoreProtocol
from kpmask.errors import CheckpointError, ItemError
from kpmask.metrics import Metric, SetMetric
from kpmask.records import (
    ClipScores,
    Method,
    MetricInfo,
    PairedScore,
    Quantise,
    ScoreSummary,
    VideoScore,
)
from kpmask.statistics import mean_interval, paired

Frames = NDArray[np.uint8]  # THWC RGB
Frame = NDArray[np.uint8]  # HWC RGB
FramePair = tuple[Tensor, Tensor]  # generated and true frames, float TCHW in [0, 1]

PAPER_TEXT: Final = ScoreProtocol()


def reconstruct(animator: Animator, chunks: Iterable[Frames]) -> Iterator[FramePair]:
    """Each chunk of a clip as the model draws it from the clip's first frame, and as it is.

    Raises:
        CheckpointError: code checkpoint_mismatch, when the clip is not of the model's size:
            resized frames would have other scores.
        ItemError: a pixel is drawn that is no number. Frames that cannot be scored are left out of
            means, which such a frame must not gain by.
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
        if not torch.isfinite(generated).all():
            raise ItemError("the model draws pixels that are no numbers")
        yield generated, to_tensor(frames_THWC, device=animator.device)


@torch.inference_mode()
def score_video(
    pairs: Iterable[FramePair],
    metrics: Sequence[Metric],
    *,
    clip_id: str,
    name: str,
    protocol: ScoreProtocol = PAPER_TEXT,
    codec: Iterator[Frame] | None = None,
) -> ClipScores:
    """The scores of one video, from its chunks in order.

    A metric that could not score any frame has no entry.

    Args:
        codec: the true frames after an encoder, from the first one on; None leaves them out.

    Raises:
        ValueError: `codec` has fewer frames than `pairs`, or of another size.
    """
    scorer = _VideoScorer(metrics, protocol)
    for generated_TCHW, reference_TCHW in pairs:
        shown: dict[Method, Tensor] = {"model": quantised(generated_TCHW, protocol.quantise)}
        if codec is not None:
            shown["codec"] = _next_frames(codec, reference_TCHW)
        scorer.add(shown, reference_TCHW)
    scored = {key: value for key, value in scorer.totals.items() if value[1]}
    return ClipScores(
        clip_id=clip_id,
        name=name,
        metrics=tuple(metric for metric, _ in scored),
        methods=tuple(method for _, method in scored),
        values=tuple(total / count for total, count in scored.values()),
        num_frames=tuple(count for _, count in scored.values()),
    )


def quantised(image_TCHW: Tensor, quantise: Quantise) -> Tensor:
    """Drawn frames as a file of 8 bits would have them: cut off below, or the nearest level."""
    if quantise == "none":
        return image_TCHW
    scaled_TCHW = image_TCHW.clamp(0, 1) * 255
    return (scaled_TCHW.floor() if quantise == "truncate" else scaled_TCHW.round()) / 255


def _next_frames(frames: Iterator[Frame], like_TCHW: Tensor) -> Tensor:
    """As many frames as `like_TCHW` has, as it has them."""
    taken = to_tensor(np.stack(list(itertools.islice(frames, len(like_TCHW)))))
    if taken.shape != like_TCHW.shape:
        raise ValueError(f"frames of {tuple(taken.shape)} beside {tuple(like_TCHW.shape)}")
    return taken.to(like_TCHW)


class _VideoScorer:
    """Sums of one video's scores, from its chunks in order.

    Chunks are handed on with the last frames of the chunk before, as many as a metric needs: so
    no metric has a state, and chunks of any length give the same scores.
    """

    def __init__(self, metrics: Sequence[Metric], protocol: ScoreProtocol) -> None:
        self._metrics = metrics
        self._protocol = protocol
        self._most_before = max((metric.frames_before for metric in metrics), default=0)
        self._before: tuple[dict[Method, Tensor], Tensor] | None = None
        self._source_CHW: Tensor | None = None
        self.totals: dict[tuple[str, Method], tuple[float, int]] = {}

    def add(self, shown: Mapping[Method, Tensor], reference_TCHW: Tensor) -> None:
        """Score a chunk: the frames of each method beside the true ones."""
        first = self._source_CHW is None
        source_CHW = reference_TCHW[0] if self._source_CHW is None else self._source_CHW
        self._source_CHW = source_CHW
        by_method = {**shown, "copy": source_CHW.expand_as(reference_TCHW)}
        methods = [method for method in _METHODS if method in by_method]
        # One tensor for all metrics that need the same: what one finds out of it, it may keep.
        windows = {
            count: self._with_before(count, by_method, reference_TCHW)
            for count in {metric.frames_before for metric in self._metrics}
        }
        for metric, method in itertools.product(self._metrics, methods):
            frames, true_TCHW, num_before = windows[metric.frames_before]
            values_T = metric.per_frame(frames[method], true_TCHW, source_CHW)[num_before:]
            counts_first = metric.counts_first or self._protocol.first_frame == "in"
            self._count(
                metric.name, method, values_T[1:] if first and not counts_first else values_T
            )
        if self._most_before:
            frames, true_TCHW, _ = self._with_before(self._most_before, by_method, reference_TCHW)
            last = slice(-self._most_before, None)
            self._before = (
                {m: f[last].clone() for m, f in frames.items()},
                true_TCHW[last].clone(),
            )

    def _with_before(
        self, count: int, frames: Mapping[Method, Tensor], reference_TCHW: Tensor
    ) -> tuple[Mapping[Method, Tensor], Tensor, int]:
        """The chunk with up to `count` frames before it, and how many these are."""
        if not count or self._before is None:
            return frames, reference_TCHW, 0
        before, true_before = self._before
        taken = true_before[-count:]
        joined = {method: torch.cat([before[method][-count:], f]) for method, f in frames.items()}
        return joined, torch.cat([taken, reference_TCHW]), len(taken)

    def _count(self, metric: str, method: Method, values_T: NDArray[np.float64]) -> None:
        values_T = values_T[~np.isnan(values_T)]
        total, count = self.totals.get((metric, method), (0.0, 0))
        self.totals[metric, method] = (total + float(values_T.sum()), count + len(values_T))


_METHODS: Final[tuple[Method, ...]] = get_args(Method)


# --- a whole set -----------------------------------------------------------------------------


class WindowFeatures:
    """The features of a video's windows, which follow one another without overlap.

    Frames that fill no window at the end are left out; a video that is shorter than a window has
    no features.
    """

    def __init__(self, metric: SetMetric) -> None:
        self._metric = metric
        self._left_TCHW: Tensor | None = None
        self._found: list[NDArray[np.float64]] = []

    @torch.inference_mode()
    def add(self, chunk_TCHW: Tensor) -> None:
        """Take the next frames of the video, float TCHW, however many."""
        left_TCHW = (
            chunk_TCHW if self._left_TCHW is None else torch.cat([self._left_TCHW, chunk_TCHW])
        )
        length = self._metric.frames_per_window
        count = len(left_TCHW) // length
        if count:
            whole_TCHW = left_TCHW[: count * length]
            windows_NTCHW = whole_TCHW.reshape(count, length, *whole_TCHW.shape[1:])
            self._found.append(self._metric.features(windows_NTCHW))
        self._left_TCHW = left_TCHW[count * length :].clone()

    def table(self) -> NDArray[np.float64]:
        """The features so far (N, D); (0, 0) where no window was filled."""
        return np.concatenate(self._found) if self._found else np.empty((0, 0))


# --- tables ----------------------------------------------------------------------------------


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


def paired_scores(
    scores: Iterable[VideoScore], metrics: Iterable[MetricInfo], *, against: Method = "copy"
) -> tuple[PairedScore, ...]:
    """The model against another method over the videos that both have a score of, by metric."""
    values: dict[tuple[str, Method], dict[str, float]] = {}
    for score in scores:
        values.setdefault((score.metric, score.method), {})[score.clip_id] = score.value
    found = []
    for info in metrics:
        own, other = values.get((info.name, "model"), {}), values.get((info.name, against), {})
        clips = [clip_id for clip_id in own if clip_id in other]
        if clips:
            result = paired(*(np.array([side[c] for c in clips]) for side in (own, other)))
            split = (result.num_above, result.num_below)
            better, worse = split if info.higher_is_better else split[::-1]
            found.append(
                PairedScore(
                    metric=info.name,
                    against=against,
                    difference=result.difference,
                    low=result.low,
                    high=result.high,
                    num_videos=len(clips),
                    num_better=better,
                    num_worse=worse,
                    p_value=result.p_value,
                )
            )
    return tuple(found)


def metric_info(metric: Metric, protocol: ScoreProtocol = PAPER_TEXT) -> MetricInfo:
    """What the metric's numbers are made with."""
    return MetricInfo(
        name=metric.name,
        version=metric.version,
        weights_sha256=metric.weights_sha256,
        licence=metric.licence,
        higher_is_better=metric.higher_is_better,
        counts_first=metric.counts_first or protocol.first_frame == "in",
        quantise=protocol.quantise,
    )


def _summary(rows: Sequence[VideoScore]) -> ScoreSummary:
    values = np.array([row.value for row in rows])
    counts = np.array([row.num_frames for row in rows], np.float64)
    several = len(rows) > 1
    mean_ends = mean_interval(values) if several else (None, None)
    pooled_ends = mean_interval(values, counts) if several else (None, None)
    return ScoreSummary(
        metric=rows[0].metric,
        method=rows[0].method,
        mean=float(values.mean()),
        std=float(values.std()),
        pooled=float((values * counts).sum() / counts.sum()),
        num_videos=len(rows),
        num_frames=int(counts.sum()),
        mean_low=mean_ends[0],
        mean_high=mean_ends[1],
        pooled_low=pooled_ends[0],
        pooled_high=pooled_ends[1],
    )


def _method(text: str) -> Method:
    methods: dict[str, Any] = {method: method for method in _METHODS}
    method: Method = methods[text]
    return method

"""Scores of generated videos against true ones: protocol and averages, without files or workers.

- Reconstruction: every frame of a clip is drawn from the clip's own frame 0. Otherwise the source
  is given; see `kpmask.score_settings`.
- Beside each score stands the same score of a copy, the source repeated, over the same frames: what
  a model adds is the difference. And, where they are given, of the true frames after an encoder:
  what no generated video of ours could do better. Of another identity's motion there are no true
  frames: there the driving video itself stands beside, which a model that ignores its source draws.
- Frame 0 is the source itself. Metrics leave it out unless the protocol or they say otherwise.
- A video's score is the mean over its scored frames. Over videos there are two means: of the
  videos' means, and pooled over all frames.
- A metric of a whole set has features of every window of every video, and one value.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmask.animate import Animator, Transfer, to_tensor
from kpmask.config import ScoreProtocol
from kpmask.errors import CheckpointError, ItemError
from kpmask.measure import same_measure as same_measure
from kpmask.metric_names import coverage_of, estimator_of
from kpmask.metrics import FRAME_0, Described, Metric, SetMetric
from kpmask.records import (
    ClipScores,
    FrameScores,
    Method,
    MetricInfo,
    Motion,
    PairedScore,
    Quantise,
    ScoreSummary,
    VideoScore,
)
from kpmask.statistics import mean_interval, paired

Frames = NDArray[np.uint8]  # THWC RGB
Frame = NDArray[np.uint8]  # HWC RGB
FramePair = tuple[Tensor, Tensor]  # generated and true frames, float TCHW in [0, 1]
Side = Method | Literal["true"]
Table = NDArray[np.float64]  # ND

PAPER_TEXT: Final = ScoreProtocol()


# --- drawing ---------------------------------------------------------------------------------


def reconstruct(
    animator: Animator, chunks: Iterable[Frames], *, source_HWC: Frame | None = None
) -> Iterator[FramePair]:
    """Each chunk of a clip as the model draws it from one frame of it, and as it is.

    Args:
        source_HWC: another frame of the same person; None is the first of `chunks`.

    Raises:
        CheckpointError: code checkpoint_mismatch, when the clip is not of the model's size:
            resized frames would have other scores.
        ItemError: a pixel is drawn that is no number. Frames that cannot be scored are left out of
            means, which such a frame must not gain by.
    """
    animator = animator.for_reconstruction()
    source = None
    for frames_THWC in chunks:
        _check_size(animator, frames_THWC)
        if source is None:
            source = animator.encode_source(frames_THWC[0] if source_HWC is None else source_HWC)
        generated = animator.render(source, animator.encode_driving(frames_THWC))
        yield _numbers(generated), to_tensor(frames_THWC, device=animator.device)


def animated(
    animator: Animator, source_HWC: Frame, chunks: Iterable[Frames], *, motion: Motion
) -> Iterator[FramePair]:
    """The source by another clip's motion, and the driving frames: as results are made.

    Relative motion is from the first driving frame on.

    Raises:
        CheckpointError, ItemError: as `reconstruct`.
        ConfigError: the system lacks this motion.
    """
    transfer = Transfer(motion)
    transfer.check(animator.system)
    _check_size(animator, source_HWC[None])
    source = animator.encode_source(source_HWC)
    initial = None
    for frames_THWC in chunks:
        _check_size(animator, frames_THWC)
        driving = animator.encode_driving(frames_THWC)
        initial = driving[:1] if initial is None else initial
        generated = animator.render(source, driving, initial=initial, transfer=transfer)
        yield _numbers(generated), to_tensor(frames_THWC, device=animator.device)


def _check_size(animator: Animator, frames_THWC: Frames) -> None:
    side_px = animator.image_size_px
    height_px, width_px = frames_THWC.shape[1:3]
    if (height_px, width_px) != (side_px, side_px):
        raise CheckpointError(
            f"the model draws {side_px}x{side_px} px, the clips are {width_px}x{height_px}",
            code="checkpoint_mismatch",
        )


def _numbers(image_TCHW: Tensor) -> Tensor:
    if not torch.isfinite(image_TCHW).all():
        raise ItemError("the model draws pixels that are no numbers")
    return image_TCHW


# --- a video ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScoredVideo:
    """All that is found out about a video.

    Attributes:
        frames: the curves of `scores`' entries, in their order.
        features: of each metric of sets, for each method and the true frames: see `WindowFeatures`.
    """

    scores: ClipScores
    frames: tuple[FrameScores, ...]
    features: Mapping[tuple[str, Side], Table]


def score_video(
    pairs: Iterable[FramePair],
    metrics: Sequence[Metric],
    *,
    clip_id: str,
    name: str,
    protocol: ScoreProtocol = PAPER_TEXT,
    codec: Iterator[Frame] | None = None,
) -> ClipScores:
    """The `scores` alone of `scored_video`, whose arguments and errors these are."""
    scored = scored_video(
        pairs, metrics, clip_id=clip_id, name=name, protocol=protocol, codec=codec
    )
    return scored.scores


@torch.inference_mode()
def scored_video(
    pairs: Iterable[FramePair],
    metrics: Sequence[Metric],
    *,
    clip_id: str,
    name: str,
    protocol: ScoreProtocol = PAPER_TEXT,
    codec: Iterator[Frame] | None = None,
    source_HWC: Frame | None = None,
    also_driving: bool = False,
    set_metrics: Sequence[SetMetric] = (),
) -> ScoredVideo:
    """What there is to say about one video, from its chunks in order.

    A metric that could not score any frame has no entry.

    Args:
        codec: the true frames after an encoder, from the first one on; None leaves them out.
        source_HWC: what was animated, of the frames' size; None is the first true frame.
        also_driving: score the true frames themselves, too, as the method `driving`.

    Raises:
        ValueError: `codec` has fewer frames than `pairs`, or of another size.
    """
    source_CHW = None if source_HWC is None else to_tensor(source_HWC[None])[0]
    scorer = _VideoScorer(metrics, set_metrics, protocol, source_CHW)
    for generated_TCHW, reference_TCHW in pairs:
        shown: dict[Method, Tensor] = {"model": quantised(generated_TCHW, protocol.quantise)}
        if codec is not None:
            shown["codec"] = _next_frames(codec, reference_TCHW)
        if also_driving:
            shown["driving"] = reference_TCHW
        scorer.add(shown, reference_TCHW)
    means = scorer.means()
    scores = ClipScores(
        clip_id=clip_id,
        name=name,
        metrics=tuple(metric for metric, _ in means),
        methods=tuple(method for _, method in means),
        values=tuple(value for value, _ in means.values()),
        num_frames=tuple(count for _, count in means.values()),
    )
    curves = scorer.curves()
    frames = tuple(
        FrameScores(clip_id, name, metric, method, tuple(curves[metric, method].tolist()))
        for metric, method in means
    )
    return ScoredVideo(scores, frames, scorer.features())


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
    """One video's values, from its chunks in order.

    Chunks are handed on with the last frames of the chunk before, as many as a metric needs, or
    with frame 0: so no metric has a state, and chunks of any length give the same scores.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        set_metrics: Sequence[SetMetric],
        protocol: ScoreProtocol,
        source_CHW: Tensor | None,
    ) -> None:
        self._metrics = metrics
        self._counts_first = protocol.first_frame == "in"
        self._source_CHW = source_CHW
        self._before = _Before(max((metric.frames_before for metric in metrics), default=0))
        # One buffer each that grows: small arrays that stay, between large ones that come and go,
        # would keep the heap in pieces, and a long video would take gigabytes.
        self._values: dict[tuple[str, Method], array[float]] = {}
        self._sets = _SetFeatures(set_metrics, counts_first=self._counts_first)

    def add(self, shown: Mapping[Method, Tensor], reference_TCHW: Tensor) -> None:
        """Score a chunk: the frames of each method beside the true ones."""
        if self._source_CHW is None:
            self._source_CHW = reference_TCHW[0].clone()
        source_CHW = self._source_CHW = self._source_CHW.to(reference_TCHW)
        by_method = {**shown, "copy": source_CHW.expand_as(reference_TCHW)}
        chunk = {method: by_method[method] for method in _METHODS if method in by_method}
        # One tensor for all metrics that need the same: what one finds out of it, it may keep.
        windows = {
            count: self._before.joined(count, chunk, reference_TCHW)
            for count in {metric.frames_before for metric in self._metrics}
        }
        for metric, method in itertools.product(self._metrics, chunk):
            frames, true_TCHW, num_before = windows[metric.frames_before]
            values_T = metric.per_frame(frames[method], true_TCHW, source_CHW)[num_before:]
            kept = self._values.setdefault((metric.name, method), array("d"))
            kept.frombytes(np.asarray(values_T, np.float64).tobytes())
        self._sets.add(chunk, reference_TCHW)
        self._before.follow(chunk, reference_TCHW)

    def curves(self) -> dict[tuple[str, Method], NDArray[np.float64]]:
        """The value of every frame (T), NaN for those that could not be scored."""
        return {key: np.array(values) for key, values in self._values.items()}

    def means(self) -> dict[tuple[str, Method], tuple[float, int]]:
        """The mean over the frames that count, and how many; only where there are any."""
        of_first = {m.name for m in self._metrics if m.counts_first or self._counts_first}
        found = {}
        for (metric, method), values_T in self.curves().items():
            counted_T = values_T if metric in of_first else values_T[1:]
            counted_T = counted_T[~np.isnan(counted_T)]
            if len(counted_T):
                found[metric, method] = (float(counted_T.mean()), len(counted_T))
        return found

    def features(self) -> dict[tuple[str, Side], Table]:
        """The features for metrics of sets."""
        return self._sets.tables(self._source_CHW)


class _Before:
    """The frames of earlier chunks that metrics need before a chunk."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._first: tuple[dict[Method, Tensor], Tensor] | None = None
        self._last: tuple[dict[Method, Tensor], Tensor] | None = None

    def joined(
        self, count: int, chunk: Mapping[Method, Tensor], reference_TCHW: Tensor
    ) -> tuple[Mapping[Method, Tensor], Tensor, int]:
        """The chunk with up to `count` frames before it (or frame 0), and how many these are."""
        kept = self._first if count == FRAME_0 else self._last
        if not count or kept is None:
            return chunk, reference_TCHW, 0
        before, true_TCHW = kept
        taken = slice(None) if count == FRAME_0 else slice(-count, None)
        joined = {method: torch.cat([before[method][taken], f]) for method, f in chunk.items()}
        return joined, torch.cat([true_TCHW[taken], reference_TCHW]), len(true_TCHW[taken])

    def follow(self, chunk: Mapping[Method, Tensor], reference_TCHW: Tensor) -> None:
        """Keep of a chunk what the next one needs."""
        if self._first is None:
            self._first = ({m: f[:1].clone() for m, f in chunk.items()}, reference_TCHW[:1].clone())
        if self._most > 0:
            frames, true_TCHW, _ = self.joined(self._most, chunk, reference_TCHW)
            last = slice(-self._most, None)
            self._last = ({m: f[last].clone() for m, f in frames.items()}, true_TCHW[last].clone())


class _SetFeatures:
    """A video's features for metrics of sets, of each method and of the true frames.

    Of the copy one window is looked at: all are equal.
    """

    def __init__(self, metrics: Sequence[SetMetric], *, counts_first: bool) -> None:
        self._metrics = metrics
        self._counts_first = counts_first
        self._has_begun = False
        self._windows: dict[tuple[str, Side], WindowFeatures] = {}

    def add(self, chunk: Mapping[Method, Tensor], reference_TCHW: Tensor) -> None:
        start = 0 if self._has_begun or self._counts_first else 1
        self._has_begun = True
        sides: dict[Side, Tensor] = {"true": reference_TCHW}
        sides |= {method: frames for method, frames in chunk.items() if method != "copy"}
        for metric, (side, frames_TCHW) in itertools.product(self._metrics, sides.items()):
            windows = self._windows.setdefault((metric.name, side), WindowFeatures(metric))
            windows.add(frames_TCHW[start:])

    def tables(self, source_CHW: Tensor | None) -> dict[tuple[str, Side], Table]:
        tables = {key: windows.table() for key, windows in self._windows.items()}
        if source_CHW is None:
            return tables  # there were no frames
        for metric in self._metrics:
            frozen = WindowFeatures(metric)
            frozen.add(source_CHW.expand(metric.frames_per_window, *source_CHW.shape))
            count = len(tables[metric.name, "true"])
            row_1D = frozen.table()
            tables[metric.name, "copy"] = np.broadcast_to(row_1D, (count, row_1D.shape[1]))
        return tables


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
        self._found: array[float] = array("d")  # one buffer, see `_VideoScorer`
        self._num_windows = 0

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
            found_ND = np.asarray(self._metric.features(windows_NTCHW), np.float64)
            self._found.frombytes(found_ND.tobytes())
            self._num_windows += count
        self._left_TCHW = left_TCHW[count * length :].clone()

    def table(self) -> NDArray[np.float64]:
        """The features so far (N, D); (0, 0) where no window was filled."""
        table_ND = np.array(self._found)
        return table_ND.reshape(self._num_windows, -1) if self._num_windows else np.empty((0, 0))


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
    return _info(metric, protocol, counts_first=metric.counts_first)


def set_metric_info(metric: SetMetric, protocol: ScoreProtocol = PAPER_TEXT) -> MetricInfo:
    """As `metric_info`, of a metric of a whole set."""
    return _info(metric, protocol, of_set=True)


def _info(
    metric: Described, protocol: ScoreProtocol, *, counts_first: bool = False, of_set: bool = False
) -> MetricInfo:
    return MetricInfo(
        name=metric.name,
        version=metric.version,
        weights_sha256=metric.weights_sha256,
        licence=metric.licence,
        higher_is_better=metric.higher_is_better,
        counts_first=counts_first or protocol.first_frame == "in",
        quantise=protocol.quantise,
        estimator=estimator_of(metric.name),
        coverage=coverage_of(metric.name),
        of_set=of_set,
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

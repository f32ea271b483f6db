"""The evaluation protocol: what is averaged over what."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmask.animate import to_frames
from kpmask.config import MetricName, ScoreProtocol
from kpmask.evaluate import (
    WindowFeatures,
    metric_info,
    paired_scores,
    quantised,
    score_video,
    scored_video,
    summarise,
    video_scores,
)
from kpmask.metrics import build_metrics
from kpmask.metrics.pixel import L1, L1WithFirst
from kpmask.records import ClipScores, VideoScore
from kpmask.statistics import mean_interval
from tests.support.long_video import growth_bytes


@dataclass(frozen=True)
class Listed:
    """A metric whose values are given: frame t of the generated video holds the number t."""

    values: Sequence[float]
    counts_first: bool = False
    name: str = "listed"
    version: str = "3"
    weights_sha256: str | None = "ab"
    licence: str = "MIT"
    higher_is_better: bool = True
    frames_before: int = 0

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        return np.array([self.values[int(number)] for number in generated_TCHW[:, 0, 0, 0]])


def numbered(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 4, 4)


def chunks(frames: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(frames), size):
        yield frames[start : start + size], frames[start : start + size]


def of_model(scores: ClipScores) -> tuple[float, int]:
    index = scores.methods.index("model")
    return scores.values[index], scores.num_frames[index]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_frame_0_and_unscored_frames_are_left_out(size: int) -> None:
    values = [100.0, 1.0, float("nan"), 3.0, float("nan"), 8.0, 4.0]
    frames = numbered(7)
    scores = score_video(chunks(frames, size), [Listed(values)], clip_id="c", name="n")
    assert of_model(scores) == (4.0, 4)
    with_first = [Listed(values, counts_first=True)]
    scores = score_video(chunks(frames, size), with_first, clip_id="c", name="n")
    assert of_model(scores) == (116 / 5, 5)


def test_a_metric_that_scored_nothing_has_no_row() -> None:
    nothing = Listed([1.0, float("nan")])
    scores = score_video(chunks(numbered(2), 2), [nothing, L1()], clip_id="c", name="n")
    assert {row.metric for row in video_scores([scores])} == {"l1"} | {"listed"}
    # the copy repeats frame 0, whose number is 0, and so has a value
    assert [row.method for row in video_scores([scores]) if row.metric == "listed"] == ["copy"]


def test_the_copy_is_frame_0_repeated() -> None:
    true = torch.rand(5, 3, 16, 16)
    drawn = (true + 0.1 * torch.rand_like(true)).clamp(0, 1)
    pairs = [(drawn[:2], true[:2]), (drawn[2:], true[2:])]
    scores = score_video(pairs, [L1()], clip_id="c", name="n")
    rows = {row.method: row.value for row in video_scores([scores])}
    assert rows["copy"] == pytest.approx((true[1:] - true[0]).abs().mean().item(), abs=1e-6)
    assert rows["model"] == pytest.approx((drawn - true)[1:].abs().mean().item(), abs=1e-6)


# --- chunks, the codec, the protocol ---------------------------------------------------------

DEFAULT: tuple[MetricName, ...] = ("l1", "psnr", "temporal_error", "flicker", "warping_error")


def drifting(count: int, *, seed: int = 0) -> Tensor:
    """Frames of a smooth picture that drifts over one that stands still."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 9, 9, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0, 1)
    frames = picture.repeat(count, 1, 1, 1)
    for t in range(count):
        frames[t, :, 10:30, 8 + t : 28 + t] = picture[0, :, 40:60, 40:60]
    return frames


@dataclass(frozen=True)
class SecondChange:
    """The mean of a frame less that of two frames before; what came as frame 0 does not matter."""

    frames_before: int = 2
    counts_first: bool = False
    name: str = "second_change"
    version: str = "1"
    weights_sha256: str | None = None
    licence: str = "MIT"
    higher_is_better: bool = False

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> NDArray[np.float64]:
        means = generated_TCHW.double().mean((1, 2, 3)).numpy()
        values = np.full(len(means), np.nan)
        values[2:] = means[2:] - means[:-2]
        return values


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_length_of_chunks_changes_no_score(size: int) -> None:
    true = drifting(7)
    drawn = (true + 0.1 * torch.rand(true.shape, generator=torch.manual_seed(1))).clamp(0, 1)
    metrics = [*build_metrics(DEFAULT), SecondChange()]
    whole, parts = (
        score_video(
            ((drawn[i : i + n], true[i : i + n]) for i in range(0, 7, n)),
            metrics,
            clip_id="c",
            name="n",
            codec=iter(to_frames(0.5 * true)),
        )
        for n in (7, size)
    )
    assert parts.metrics == whole.metrics
    assert parts.methods == whole.methods == ("model", "copy", "codec") * len(metrics)
    assert parts.num_frames == whole.num_frames
    np.testing.assert_allclose(parts.values, whole.values, rtol=1e-9, atol=1e-15)
    by_hand = drawn.double().mean((1, 2, 3)).numpy()
    change = whole.values[whole.metrics.index("second_change")]
    assert change == pytest.approx((by_hand[2:] - by_hand[:-2]).mean())


def test_the_codec_is_scored_beside_the_model() -> None:
    true = drifting(4)
    stored = to_frames(0.9 * true)
    scores = score_video([(true, true)], [L1()], clip_id="c", name="n", codec=iter(stored))
    rows = {row.method: row.value for row in video_scores([scores])}
    expected = np.abs(stored / 255 - true.permute(0, 2, 3, 1).double().numpy())[1:].mean()
    assert rows["codec"] == pytest.approx(expected, abs=1e-7)
    assert rows["model"] == 0
    for wrong in (stored[:3], stored[:, :32]):
        with pytest.raises(ValueError, match="beside"):
            score_video([(true, true)], [L1()], clip_id="c", name="n", codec=iter(wrong))


def test_drawn_frames_in_8_bits() -> None:
    image = torch.rand(2, 3, 16, 16, generator=torch.manual_seed(2)) * 1.2 - 0.1
    clipped = image.clamp(0, 1).numpy()
    truncated = (255 * clipped).astype(np.uint8)  # as the papers' code writes its PNGs
    assert (quantised(image, "truncate").numpy() * 255).round().tolist() == truncated.tolist()
    assert quantised(image, "round").numpy() == pytest.approx(np.rint(clipped * 255) / 255)
    assert quantised(image, "none") is image
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16).float() / 255
    assert (to_frames(quantised(levels, "truncate")) == to_frames(levels)).all()


def test_the_protocol_is_in_the_scores() -> None:
    true = drifting(5)
    drawn = 0.7 * true + 0.001
    protocol = ScoreProtocol(first_frame="in", quantise="truncate")
    scores = score_video([(drawn, true)], [L1()], clip_id="c", name="n", protocol=protocol)
    cut = torch.from_numpy((drawn.numpy() * 255).astype(np.uint8)) / 255
    assert of_model(scores) == (pytest.approx((cut - true).abs().mean().item(), abs=1e-6), 5)
    info = metric_info(L1(), protocol)
    assert (info.counts_first, info.quantise) == (True, "truncate")
    assert metric_info(L1WithFirst()).counts_first
    assert not metric_info(L1()).counts_first


# --- a whole set -----------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanGap:
    """A metric of a set: how far the windows' mean brightnesses are apart."""

    frames_per_window: int = 3
    min_videos: int = 2
    name: str = "mean_gap"
    version: str = "1"
    weights_sha256: str | None = None
    licence: str = "MIT"
    higher_is_better: bool = False

    def features(self, frames_NTCHW: Tensor) -> NDArray[np.float64]:
        assert frames_NTCHW.shape[1] == self.frames_per_window
        return frames_NTCHW.double().mean((2, 3, 4)).numpy()

    def score(
        self, generated: Iterable[NDArray[np.float64]], reference: Iterable[NDArray[np.float64]]
    ) -> float:
        means = [np.concatenate(list(side)).mean(0) for side in (generated, reference)]
        return float(np.abs(means[0] - means[1]).sum())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_windows_follow_one_another_whatever_the_chunks(size: int) -> None:
    frames = numbered(8)
    windows = WindowFeatures(MeanGap())
    for start in range(0, 8, size):
        windows.add(frames[start : start + size])
    assert windows.table().tolist() == [[0, 1, 2], [3, 4, 5]]
    short = WindowFeatures(MeanGap())
    short.add(frames[:2])
    assert short.table().shape == (0, 0)


def test_features_are_of_every_method_and_of_the_truth() -> None:
    true = drifting(8)
    drawn = 0.5 * true
    for size in (1, 3, 8):
        scored = scored_video(
            [(drawn[i : i + size], true[i : i + size]) for i in range(0, 8, size)],
            [],
            clip_id="c",
            name="n",
            codec=iter(to_frames(0.9 * true)),
            set_metrics=[MeanGap()],
        )
        found = {side: table for (_, side), table in scored.features.items()}
        means = true.double().mean((1, 2, 3)).numpy()
        windows = np.stack([means[1:4], means[4:7]])  # frame 0 is left out, and 7 fills no window
        np.testing.assert_allclose(found["true"], windows, rtol=1e-6)
        np.testing.assert_allclose(found["model"], windows / 2, rtol=1e-6)
        np.testing.assert_allclose(found["codec"], 0.9 * windows, atol=1 / 255)
        np.testing.assert_allclose(found["copy"], np.full((2, 3), means[0]), rtol=1e-6)
    with_first = scored_video(
        [(drawn, true)],
        [],
        clip_id="c",
        name="n",
        protocol=ScoreProtocol(first_frame="in"),
        set_metrics=[MeanGap()],
    )
    table = with_first.features["mean_gap", "true"]
    np.testing.assert_allclose(table, [means[:3], means[3:6]], rtol=1e-6)


# --- curves, and sources that are given ------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_video_takes_no_more_memory_than_a_short_one() -> None:
    # Two chunks of frames take 2 MiB; kept in pieces, the heap grew by some 100 kB a frame.
    assert growth_bytes(4000) < 64 * 2**20


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_curves_have_every_frame_counted_or_not(size: int) -> None:
    values = [100.0, 1.0, float("nan"), 3.0, float("nan"), 8.0, 4.0]
    scored = scored_video(chunks(numbered(7), size), [Listed(values), L1()], clip_id="c", name="n")
    assert [(row.metric, row.method) for row in scored.frames] == list(
        zip(scored.scores.metrics, scored.scores.methods, strict=True)
    )
    curves = {(row.metric, row.method): row.values for row in scored.frames}
    np.testing.assert_array_equal(curves["listed", "model"], values)
    assert curves["l1", "model"] == (0.0,) * 7
    assert curves["l1", "copy"] == pytest.approx([0, 1, 2, 3, 4, 5, 6])


def test_a_source_that_is_given_is_what_the_copy_repeats() -> None:
    true = drifting(4)
    source_HWC = to_frames(1 - true[:1])[0]
    scored = scored_video(
        chunks(true, 2), [L1()], clip_id="c", name="n", source_HWC=source_HWC, also_driving=True
    )
    rows = {row.method: row.value for row in video_scores([scored.scores])}
    repeated = source_HWC.transpose(2, 0, 1) / 255
    assert rows["copy"] == pytest.approx(np.abs(true.numpy() - repeated)[1:].mean(), abs=1e-6)
    assert rows["driving"] == 0
    assert list(rows) == ["model", "copy", "driving"]


# --- tables ----------------------------------------------------------------------------------


def test_the_model_against_the_copy_video_by_video() -> None:
    values = {"a": (0.1, 0.3), "b": (0.2, 0.1), "c": (0.1, 0.4), "d": (0.2, 0.2)}
    rows = [
        VideoScore(clip, clip, metric, method, value, 9)
        for metric in ("l1", "ssim")
        for clip, pair in values.items()
        for method, value in zip(("model", "copy"), pair, strict=True)
    ]
    rows.append(VideoScore("e", "e", "l1", "model", 7.0, 9))  # has no copy: does not count
    infos = [metric_info(metric) for metric in build_metrics(("l1", "ssim", "psnr"))]
    l1, ssim = paired_scores(rows, infos)
    assert (l1.metric, l1.against, l1.num_videos) == ("l1", "copy", 4)
    assert (l1.num_better, l1.num_worse) == (2, 1)
    assert (ssim.num_better, ssim.num_worse) == (1, 2)
    assert l1.difference == pytest.approx(-0.1)
    assert l1.low is not None and l1.high is not None and l1.low < -0.1 < l1.high
    assert l1.p_value == 1.0  # one of three


def test_both_means_have_intervals() -> None:
    random = np.random.default_rng(3)
    values, frames = random.uniform(0, 1, 12), random.integers(5, 50, 12)
    rows = [
        VideoScore(str(i), str(i), "l1", "model", v, n)
        for i, (v, n) in enumerate(zip(values.tolist(), frames.tolist(), strict=True))
    ]
    (summary,) = summarise(rows)
    assert (summary.mean_low, summary.mean_high) == mean_interval(values)
    assert (summary.pooled_low, summary.pooled_high) == mean_interval(values, frames.astype(float))
    (single,) = summarise(rows[:1])
    assert (single.mean_low, single.pooled_high) == (None, None)


def test_two_means_over_videos() -> None:
    rows = [
        VideoScore("a", "a", "l1", "model", 1.0, 10),
        VideoScore("b", "b", "l1", "model", 3.0, 30),
        VideoScore("a", "a", "l1", "copy", 5.0, 10),
    ]
    model, copy = summarise(rows)
    assert (model.mean, model.std, model.pooled) == (2.0, 1.0, 2.5)
    assert (model.num_videos, model.num_frames) == (2, 40)
    assert (copy.method, copy.mean, copy.std) == ("copy", 5.0, 0.0)
    assert summarise([]) == ()


def test_a_metric_says_what_its_numbers_are_made_with() -> None:
    info = metric_info(Listed([]))
    assert (info.name, info.version, info.weights_sha256) == ("listed", "3", "ab")
    assert [metric_info(m).higher_is_better for m in build_metrics(("l1", "ssim"))] == [False, True]

"""The evaluation protocol: what is averaged over what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmask.evaluate import metric_info, score_video, summarise, video_scores
from kpmask.metrics import build_metrics
from kpmask.metrics.pixel import L1
from kpmask.records import ClipScores, VideoScore


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

"""Motion with the placement taken out: against plain loops, and what must not change a score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kpmask.estimators import Keypoints, Subject
from kpmask.evaluate import scored_video
from kpmask.metrics.motion import MotionMetric, akd_motion, motion_metric, size_ratio

NAN = math.nan
Points = NDArray[np.float64]


def by_the_formula(driving: Points, generated: Points, source: Points) -> list[float]:
    """(p_t - p_0) - s (q_t - q_0), in loops over frames, points and axes."""

    def size(points: Points) -> float:
        x, y = points[:, 0].mean(), points[:, 1].mean()
        return math.sqrt(sum((p[0] - x) ** 2 + (p[1] - y) ** 2 for p in points) / len(points))

    scale = size(source) / size(driving[0])
    values = []
    for p, q in zip(generated, driving, strict=True):
        errors = [
            abs((p[k][axis] - generated[0][k][axis]) - scale * (q[k][axis] - driving[0][k][axis]))
            for k in range(len(p))
            for axis in (0, 1)
        ]
        values.append(sum(errors) / len(errors))
    return values


def moving(count: int = 6, points: int = 5, *, seed: int = 0) -> Points:
    return np.random.default_rng(seed).uniform(5, 60, (count, points, 2))


def test_the_formula_in_loops() -> None:
    driving, generated, source = moving(seed=1), moving(seed=2), moving(1, seed=3)[0]
    found = akd_motion(driving, generated, source)
    np.testing.assert_allclose(found, by_the_formula(driving, generated, source), rtol=1e-12)
    assert found[0] == 0


def test_place_and_size_do_not_count() -> None:
    driving = moving(seed=4)
    for scale, shift in ((1.0, 0.0), (0.5, 30.0), (2.0, -12.0)):
        source = scale * moving(seed=4)[0] + 7  # the driving subject, larger and elsewhere
        generated = scale * driving + shift
        np.testing.assert_allclose(akd_motion(driving, generated, source), 0, atol=1e-12)
    frozen = np.repeat(driving[:1], len(driving), axis=0)
    assert akd_motion(driving, frozen, driving[0])[1:].min() > 1


def test_points_that_are_missed() -> None:
    driving, generated, source = moving(seed=5), moving(seed=6), moving(1, seed=7)[0]
    whole = akd_motion(driving, generated, source, most_px=(63, 63))
    np.testing.assert_allclose(whole, akd_motion(driving, generated, source))
    lost = generated.copy()
    lost[3, 2] = NAN  # in one frame
    scale = size_ratio(source, driving[0])
    wanted = np.abs(scale * (driving[3, 2] - driving[0, 2]))
    worst = akd_motion(driving, lost, source, most_px=(63, 31))
    each = np.abs((generated[3] - generated[0]) - scale * (driving[3] - driving[0]))
    each[2] = wanted + np.array([63, 31])
    assert worst[3] == pytest.approx(each.mean())
    assert akd_motion(driving, lost, source)[3] == pytest.approx(np.delete(each, 2, 0).mean())
    np.testing.assert_allclose(np.delete(worst, 3), np.delete(whole, 3))
    lost = generated.copy()
    lost[0, 2] = NAN  # in frame 0: its motion is never known
    assert (akd_motion(driving, lost, source, most_px=(63, 63))[1:] > whole[1:]).all()
    unseen = driving.copy()
    unseen[4] = NAN
    assert np.isnan(akd_motion(unseen, generated, source, most_px=(63, 63))).tolist() == [
        t == 4 for t in range(6)
    ]


def test_without_a_size_nothing_is_scored() -> None:
    nothing = np.full((5, 2), NAN)
    driving = moving(seed=8)
    assert np.isnan(akd_motion(driving, driving, nothing, most_px=(63, 63))).all()
    assert math.isnan(size_ratio(driving[0], np.zeros((5, 2))))
    partly = driving[0].copy()
    partly[:3] = NAN  # over those that both have
    assert size_ratio(partly, 2 * driving[0]) == pytest.approx(0.5)


class Corners:
    """Finds the first and the last bright pixel; nothing in dark frames."""

    name, version, weights_sha256, licence = "facemesh", "9", "aa" * 32, "MIT"
    subject: Subject = "face"
    num_points = 2

    def estimate(self, frames_THWC: NDArray[np.uint8]) -> Keypoints:
        points_TK2 = np.full((len(frames_THWC), 2, 2), NAN)
        for t, frame_HWC in enumerate(frames_THWC):
            places = np.argwhere(frame_HWC[..., 0] > 128)[:, ::-1]
            if len(places):
                points_TK2[t] = places[0], places[-1]
        return Keypoints(points_TK2=points_TK2, scores_TK=np.ones((len(frames_THWC), 2)))


def boxes(places: list[tuple[int, int, int]]) -> torch.Tensor:
    """White squares: left, top, side; a side of 0 is a dark frame."""
    frames = torch.zeros(len(places), 3, 64, 64)
    for t, (left, top, side) in enumerate(places):
        frames[t, :, top : top + side, left : left + side] = 1
    return frames


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_frames_are_measured_from_frame_0_whatever_the_chunks(size: int) -> None:
    driving = boxes([(4, 4, 9), (6, 4, 9), (10, 4, 9), (10, 9, 9), (0, 0, 0), (20, 20, 9)])
    generated = boxes([(30, 5, 5), (31, 5, 5), (30, 5, 5), (33, 7, 5), (9, 9, 5), (0, 0, 0)])
    source_HWC = (boxes([(2, 2, 5)])[0].permute(1, 2, 0) * 255).numpy().astype(np.uint8)
    pairs = [(generated[i : i + size], driving[i : i + size]) for i in range(0, 6, size)]
    scored = scored_video(
        pairs,
        [MotionMetric(Corners())],
        clip_id="c",
        name="n",
        source_HWC=source_HWC,
        also_driving=True,
    )
    curves = {row.method: row.values for row in scored.frames}
    # the source is half as large (4 px between its points, and 8): wanted is half of the motion
    assert curves["model"][:4] == pytest.approx([0, 0, 1.5, (0 + 0.5) / 2])
    assert math.isnan(curves["model"][4])
    assert curves["model"][5] == pytest.approx(8 + 63)  # lost: half of (16, 16), and 63 px
    assert curves["copy"][:4] == pytest.approx([0, 0.5, 1.5, (3 + 2.5) / 2])
    assert curves["driving"][:4] == pytest.approx([0, 0.5, 1.5, (3 + 2.5) / 2])
    assert scored.scores.num_frames == (4, 4, 4)  # frame 0 and the dark frame are left out


def test_its_name_says_the_estimator() -> None:
    metric = MotionMetric(Corners(), only_found=True)
    assert (metric.name, metric.version) == ("akd_motion_facemesh_found", "1+9")
    with pytest.raises(KeyError):
        motion_metric("akd_motion_sface")

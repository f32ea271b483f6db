"""FID's network against pytorch-fid's answers; FVD's program as a program of the same kind."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kpmask.errors import CheckpointError, ConfigError
from kpmask.estimators.i3d import I3D
from kpmask.estimators.inception import InceptionV3
from kpmask.estimators.weights import OWN
from kpmask.evaluate import WindowFeatures
from kpmask.metrics import SetMetric, build_metrics, build_set_metrics
from kpmask.metrics.fid import Fid, Fvd
from tests.support.networks import FACTS, made_images, made_weights, own_weights

SHAPES, VALUES = FACTS["shapes"]["inception"], FACTS["values"]["inception"]
LAYERS = {name: shape for name, shape in SHAPES.items() if not name.startswith("fc.")}
SEED = 5  # of the numbers with which pytorch-fid was asked


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    network = InceptionV3()
    network.load_state_dict(made_weights(LAYERS, SEED), strict=False)
    return network


def table(metric: SetMetric, frames_TCHW: Tensor, *, chunk: int) -> np.ndarray:
    windows = WindowFeatures(metric)
    for part in torch.split(frames_TCHW, chunk):
        windows.add(part)
    return windows.table()


# --- FID -------------------------------------------------------------------------------------


def test_the_file_has_these_names_and_shapes() -> None:
    names = {name: list(tensor.shape) for name, tensor in InceptionV3().state_dict().items()}
    assert {k: v for k, v in names.items() if not k.endswith("num_batches_tracked")} == LAYERS


@pytest.mark.parametrize("size", VALUES)
def test_features_are_those_of_pytorch_fid(network: InceptionV3, size: str) -> None:
    height_px, width_px = map(int, size.split("x"))
    metric = Fid(network, "ab" * 32, "Apache-2.0")
    found = metric.features(made_images(1, height_px, width_px, seed=6)[:, None])
    assert found.shape == (1, 2048) and found.dtype == np.float64
    np.testing.assert_allclose(found[0, ::64], VALUES[size], rtol=1e-4, atol=2e-5)


def test_features_are_of_each_frame_however_a_video_is_cut(network: InceptionV3) -> None:
    metric = Fid(network, "ab" * 32, "Apache-2.0")
    frames = made_images(3, 48, 64, seed=7)
    whole = table(metric, frames, chunk=3)
    np.testing.assert_array_equal(whole, table(metric, frames, chunk=2))
    with torch.inference_mode():
        np.testing.assert_allclose(network(frames).numpy(), whole, rtol=1e-3, atol=1e-5)


def test_the_distance_of_features_is_scipy_s(network: InceptionV3) -> None:
    """Of few features: scipy's root of a covariance of rank 5 among 2048 is mostly rounding."""
    metric = Fid(network, "ab" * 32, "Apache-2.0")
    sides = [table(metric, made_images(6, 32, 32, seed=seed), chunk=6) for seed in (8, 9)]
    a, b = (side[:, ::700] for side in sides)
    a_DD, b_DD = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root_DD = scipy.linalg.sqrtm(a_DD @ b_DD)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(a_DD + b_DD - 2 * root_DD)
    assert metric.score([a], [b]) == pytest.approx(float(np.real(expected)), rel=1e-6)
    assert metric.score([a], [a]) == pytest.approx(0, abs=1e-6)
    assert metric.score([a], [b]) > 0.01


def test_weights_of_fid_are_those_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError) as refused:
        build_set_metrics(["fid"])
    assert "kpmask weights fetch inception" in str(refused.value.hint)
    tensors = made_weights({**LAYERS, "fc.bias": [1008]}, SEED)
    torch.save(tensors, tmp_path / "inception.pth")
    own_weights(tmp_path / "inception.pth", "inception", monkeypatch)
    (metric,) = build_set_metrics(["fid"])
    assert (metric.name, metric.min_videos, metric.frames_per_window) == ("fid", 256, 1)
    assert not metric.higher_is_better
    found = metric.features(made_images(1, 64, 80, seed=6)[:, None])
    np.testing.assert_allclose(found[0, ::64], VALUES["64x80"], rtol=1e-4, atol=2e-5)
    with pytest.raises(ConfigError, match="whole set"):
        build_metrics(["fid"])


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_finds(network: InceptionV3) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    metric = Fid(network, "ab" * 32, "Apache-2.0")
    frames = made_images(4, 64, 80, seed=6)[:, None]
    expected = metric.features(frames)
    try:
        found = metric.features(frames.cuda())
    finally:
        network.cpu()  # other tests have it too
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_pytorch_fid_says_the_same(network: InceptionV3, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    package = pytest.importorskip("pytorch_fid.inception")
    state = {**network.state_dict(), "fc.weight": torch.ones(1008, 2048)}
    state["fc.bias"] = torch.ones(1008)
    monkeypatch.setattr(package, "load_state_dict_from_url", lambda *_, **__: state)
    theirs = package.InceptionV3([3]).eval()
    frames = made_images(2, 100, 140, seed=1)
    with torch.no_grad():
        expected = theirs(frames)[0][:, :, 0, 0].numpy()
    metric = Fid(network, "ab" * 32, "Apache-2.0")
    np.testing.assert_allclose(metric.features(frames[:, None]), expected, rtol=1e-3, atol=1e-5)


# --- FVD -------------------------------------------------------------------------------------


class Program(nn.Module):
    """What the TorchScript of I3D is called with, and a small network in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 6, (4, 8, 8), stride=(4, 16, 16))

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        if resize:
            x = F.interpolate(x, [x.shape[2], 224, 224], mode="trilinear", align_corners=False)
        if rescale:
            x = 2 * x / 255 - 1
        x = self.conv(x).relu().mean((2, 3, 4))
        return x if return_features else x.softmax(1)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(1)
    return Program().eval()


@pytest.fixture
def program_file(program: Program, tmp_path: Path) -> Path:
    path = tmp_path / "i3d.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript's; the file is one
        torch.jit.script(program).save(str(path))
    return path


def test_features_of_fvd_are_the_programs_on_windows_of_16(
    program: Program, program_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    own_weights(program_file, "i3d", monkeypatch)
    (metric,) = build_set_metrics(["fvd"])
    assert (metric.name, metric.min_videos, metric.frames_per_window) == ("fvd", 256, 16)
    frames = made_images(37, 40, 48, seed=2)
    found = table(metric, frames, chunk=10)
    assert found.shape == (2, 6)  # 5 frames are left over
    for row, start in zip(found, (0, 16), strict=True):
        video_CTHW = frames[start : start + 16].movedim(1, 0)
        large_CTHW = F.interpolate(video_CTHW, (224, 224), mode="bilinear")
        maps = F.conv3d(2 * large_CTHW[None] - 1, *program.conv.parameters(), stride=(4, 16, 16))
        np.testing.assert_allclose(
            row, maps.relu().mean((2, 3, 4))[0].detach().numpy(), rtol=1e-4, atol=1e-6
        )


def test_fvd_falls_apart_where_time_does(program_file: Path) -> None:
    metric = Fvd(I3D(program_file), "ab" * 32, "Apache-2.0")
    videos = [made_images(16, 32, 32, seed=seed) for seed in range(12)]
    still = [video[:1].expand(16, -1, -1, -1) for video in videos]
    moving, frozen = ([table(metric, v, chunk=16) for v in side] for side in (videos, still))
    assert metric.score(moving, moving) == pytest.approx(0, abs=1e-9)
    assert metric.score(frozen, moving) > 1e-5


def test_only_the_known_program_is_loaded(
    program_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError) as absent:
        build_set_metrics(["fvd"])
    assert "kpmask weights fetch i3d" in str(absent.value.hint)
    known = OWN["i3d"]
    own_weights(program_file, "i3d", monkeypatch)
    # As though it had been added before a digest was published, which `add` holds it to.
    monkeypatch.setitem(OWN, "i3d", replace(known))
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(CheckpointError, match="not the known TorchScript"):
        build_set_metrics(["fvd"])


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i3d.pt"
    for content in (b"", b"text", b"PK\x03\x04" + bytes(200)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a TorchScript"):
            I3D(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a TorchScript"):
        I3D(path)

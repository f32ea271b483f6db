"""LPIPS against what its authors' package computed, a plain reading, and what it must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmask.errors import CheckpointError, ConfigError
from kpmask.estimators.alexnet import AlexNet
from kpmask.estimators.networks import at_once, load_weights, whole_floats
from kpmask.estimators.weights import KNOWN, find
from kpmask.metrics import build_metrics
from kpmask.metrics.lpips import Lpips, LpipsNetwork
from tests.support.estimator_weights import need_weights
from tests.support.networks import FACTS, made_images, made_weights, own_weights

Array = NDArray[np.float64]
SHAPES, VALUES = FACTS["shapes"], FACTS["values"]["lpips"]
LAYERS = {k: v for k, v in SHAPES["alexnet"].items() if k.startswith("features.")}


@pytest.fixture(scope="module")
def network() -> LpipsNetwork:
    """With the numbers that the package had."""
    network = LpipsNetwork()
    network.network.load_state_dict(made_weights(LAYERS, 1))
    network.heads.load_state_dict(made_weights(SHAPES["lpips"], 2))
    return network


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """AlexNet's file as torchvision publishes it, but for its size, and the heads' file."""
    folder = tmp_path_factory.mktemp("lpips")
    paths = (folder / "alexnet.pth", folder / "alex.pth")
    classifier = {"classifier.1.weight": torch.ones(2, 2), "classifier.1.bias": torch.ones(2)}
    torch.save({**made_weights(LAYERS, 1), **classifier}, paths[0])
    torch.save(made_weights(SHAPES["lpips"], 2), paths[1])
    return paths


def metric(network: LpipsNetwork) -> Lpips:
    return Lpips(network, "ab" * 32, "MIT")


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def test_the_files_have_these_names_and_shapes(network: LpipsNetwork) -> None:
    assert shapes(AlexNet()) == LAYERS
    assert shapes(network.heads) == SHAPES["lpips"]


@pytest.mark.parametrize("size", VALUES)
def test_it_is_what_the_package_computes(network: LpipsNetwork, size: str) -> None:
    height_px, width_px = map(int, size.split("x"))
    a, b = (made_images(2, height_px, width_px, seed=seed) for seed in (3, 4))
    found = metric(network).per_frame(a, b, a[0])
    np.testing.assert_allclose(found, VALUES[size], rtol=1e-5)


def test_it_is_what_the_formula_says(network: LpipsNetwork) -> None:
    a, b = made_images(1, 45, 38, seed=7), made_images(1, 45, 38, seed=8)
    tensors = {**made_weights(LAYERS, 1), **made_weights(SHAPES["lpips"], 2)}
    plain = plain_lpips(a[0].double().numpy(), b[0].double().numpy(), tensors)
    assert metric(network).per_frame(a, b, a[0]) == pytest.approx([plain], rel=1e-5)


def plain_lpips(a_CHW: Array, b_CHW: Array, tensors: Mapping[str, Tensor]) -> float:
    """In float64, pixel by pixel where the text of the paper is about pixels."""
    total, sides = 0.0, [plain_maps(image_CHW, tensors) for image_CHW in (a_CHW, b_CHW)]
    for index, (x_CHW, y_CHW) in enumerate(zip(*sides, strict=True)):
        weights_C = tensors[f"lin{index}.model.1.weight"].double().numpy().ravel()
        height_px, width_px = x_CHW.shape[1:]
        for row in range(height_px):
            for column in range(width_px):
                x_C, y_C = x_CHW[:, row, column], y_CHW[:, row, column]
                apart_C = x_C / np.linalg.norm(x_C) - y_C / np.linalg.norm(y_C)
                total += float(weights_C @ apart_C**2) / (height_px * width_px)
    return total


def plain_maps(image_CHW: Array, tensors: Mapping[str, Tensor]) -> list[Array]:
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    x_CHW = (2 * image_CHW - 1 - shift[:, None, None]) / scale[:, None, None]
    maps = []
    for layer, stride, pad_px in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
        if layer in (3, 6):
            x_CHW = windows(x_CHW, 3, 2).max((3, 4))
        weights = tensors[f"features.{layer}.weight"].double().numpy()
        bias_C = tensors[f"features.{layer}.bias"].double().numpy()
        padded = np.pad(x_CHW, [(0, 0), (pad_px, pad_px), (pad_px, pad_px)])
        sums = np.einsum("chwij,ocij->ohw", windows(padded, weights.shape[-1], stride), weights)
        x_CHW = np.maximum(sums + bias_C[:, None, None], 0)
        maps.append(x_CHW)
    return maps


def windows(x_CHW: Array, side_px: int, stride: int) -> Any:
    found = np.lib.stride_tricks.sliding_window_view(x_CHW, (side_px, side_px), axis=(1, 2))
    return found[:, ::stride, ::stride]


def test_equal_frames_are_at_no_distance_and_each_counts_by_itself(network: LpipsNetwork) -> None:
    a, b = made_images(3, 40, 40, seed=1), made_images(3, 40, 40, seed=2)
    b[1] = a[1]
    values = metric(network).per_frame(a, b, a[0])
    assert values[1] == 0 and values[0] > 0.01 and values[2] > 0.01
    np.testing.assert_array_equal(values[2:], metric(network).per_frame(a[2:], b[2:], a[0]))
    np.testing.assert_allclose(values, metric(network).per_frame(b, a, a[0]), rtol=1e-12)
    copy = a[0].expand_as(b)  # as an evaluation has the frozen picture
    assert metric(network).per_frame(copy, b, a[0])[0] == values[0]


def test_a_batch_is_scored_as_its_frames_are(network: LpipsNetwork) -> None:
    a, b = made_images(3, 40, 52, seed=1), made_images(3, 40, 52, seed=2)
    each = metric(network).per_frame(a, b, a[0])
    np.testing.assert_allclose(network(a, b).numpy(), each, rtol=1e-5)


def test_a_frame_that_is_no_picture_is_not_scored(network: LpipsNetwork) -> None:
    a, b = made_images(2, 40, 40, seed=1), made_images(2, 40, 40, seed=2)
    a[0, 1, 7, 7] = torch.nan
    values = metric(network).per_frame(a, b, a[0])
    assert np.isnan(values).tolist() == [True, False]


def test_small_frames_are_refused(network: LpipsNetwork) -> None:
    small = torch.zeros(1, 3, 30, 64)
    with pytest.raises(ValueError, match="31 px"):
        metric(network).per_frame(small, small, small[0])


def test_weights_are_those_of_this_machine(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    heads = KNOWN["lpips"]  # which may be installed where the tests run
    elsewhere = replace(heads, package=replace(heads.package, name="not_installed"))
    monkeypatch.setitem(KNOWN, "lpips", elsewhere)
    with pytest.raises(ConfigError) as refused:
        build_metrics(["lpips_alex"])
    assert "kpmask weights fetch alexnet" in str(refused.value.hint)
    own_weights(files[0], "alexnet", monkeypatch)
    with pytest.raises(ConfigError) as refused:
        build_metrics(["lpips_alex"])
    assert "kpmask weights fetch lpips" in str(refused.value.hint)
    own_weights(files[1], "lpips", monkeypatch)
    (found,) = build_metrics(["lpips_alex"])
    assert (found.name, found.version, found.higher_is_better) == ("lpips_alex", "0.1", False)
    assert found.licence == "BSD-3-Clause AND BSD-2-Clause"
    a, b = made_images(2, 31, 31, seed=3), made_images(2, 31, 31, seed=4)
    np.testing.assert_allclose(found.per_frame(a, b, a[0]), VALUES["31x31"], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"features.0.bias": None}, "has no features.0.bias"),
        ({"features.12.weight": torch.ones(1)}, "has an unexpected features.12.weight"),
        ({"features.0.bias": torch.ones(3)}, r"features.0.bias is \[3\], not \[64\]"),
        ({"features.0.bias": None, "features.3.bias": None}, "features.0.bias and 1 more"),
        ({"features.0.bias": "text"}, "not a dictionary of tensors"),
    ],
)
def test_a_file_of_another_network_is_refused(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    tensors: dict[str, Any] = {**made_weights(LAYERS, 1), **change}
    path = tmp_path / "net.pth"
    torch.save({k: v for k, v in tensors.items() if v is not None}, path)
    with pytest.raises(CheckpointError, match=says):
        load_weights(AlexNet(), path, unread=("classifier.",))


def test_a_gpu_gets_batches_and_whole_floats() -> None:
    assert at_once(torch.zeros(9, 3, 8, 8)) == 1
    assert at_once(torch.zeros(9, 3, 1024, 1024, device="meta")) == 4
    before = torch.backends.cudnn.allow_tf32
    with whole_floats():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.gpu
def test_a_gpu_scores_as_a_cpu_does(network: LpipsNetwork) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    a, b = made_images(5, 64, 97, seed=1), made_images(5, 64, 97, seed=2)
    expected = metric(network).per_frame(a, b, a[0])
    try:
        found = metric(network).per_frame(a.cuda(), b.cuda(), a[0].cuda())
    finally:
        network.cpu()  # other tests have it too
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_package_says_the_same(network: LpipsNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision").models
    package = pytest.importorskip("lpips")
    need_weights("lpips")
    theirs = models.alexnet()
    theirs.load_state_dict(made_weights(LAYERS, 1), strict=False)
    monkeypatch.setattr(package.pretrained_networks.tv, "alexnet", lambda pretrained: theirs)
    model = package.LPIPS(net="alex", pretrained=False, verbose=False)
    missing = model.load_state_dict(made_weights(SHAPES["lpips"], 2), strict=False)
    assert not missing.unexpected_keys
    a, b = made_images(4, 128, 100, seed=1), made_images(4, 128, 100, seed=2)
    with torch.no_grad():
        expected = model(a, b, normalize=True).flatten().numpy()
    np.testing.assert_allclose(metric(network).per_frame(a, b, a[0]), expected, rtol=1e-5)


def test_the_published_heads_are_read() -> None:
    need_weights("lpips")
    heads = LpipsNetwork().heads
    load_weights(heads, find("lpips").paths[0])
    weights = torch.cat([weight.flatten() for weight in heads.weights()])
    # The authors keep them from falling below 0; in all they are about 0.1.
    assert weights.min() >= 0 and 0.01 < weights.mean() < 0.3

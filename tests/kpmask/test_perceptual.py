"""Perceptual features against plain readings of the two networks, and on a photograph."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kpmask import perceptual
from kpmask.errors import CheckpointError
from kpmask.perceptual import Lite0Features, Vgg19Features, available_features, load_perceptual

needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec(perceptual.LITE0_PACKAGE) is None,
    reason="the extra offline-features is not installed",
)
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)

# torchvision's VGG-19: index of each convolution in `features`, and where it pools before it.
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
POOL_BEFORE = {5, 10, 19, 28}
TAPPED = {0, 5, 10, 19, 28}


def vgg19_file(path: Path, divide: int = 16) -> dict[str, Tensor]:
    """A file in torchvision's layout, with the classifier, narrower by `divide`."""
    tensors, channels = {}, 3
    for index, width in zip(
        CONVOLUTIONS, [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8, strict=True
    ):
        width //= divide
        tensors[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3) * 0.2
        tensors[f"features.{index}.bias"] = torch.randn(width) * 0.1
        channels = width
    tensors["classifier.0.weight"] = torch.randn(4, 4)
    tensors["classifier.0.bias"] = torch.randn(4)
    torch.save(tensors, path)
    return tensors


def plain_vgg19(tensors: Mapping[str, Tensor], image: Tensor) -> list[Tensor]:
    x, maps = (image - MEAN) / STD, []
    for index in CONVOLUTIONS[:13]:
        if index in POOL_BEFORE:
            x = functional.max_pool2d(x, 2)
        name = f"features.{index}"
        x = functional.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], padding=1)
        x = x.clamp(min=0)
        if index in TAPPED:
            maps.append(x)
    return maps


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG-19 with a sixteenth of its channels."""
    widths = tuple(width // 16 for width in perceptual.VGG19_WIDTHS)
    monkeypatch.setattr(perceptual, "Vgg19Features", lambda: Vgg19Features(widths))


def test_vgg19_has_torchvisions_names_and_shapes() -> None:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in Vgg19Features().state_dict().items()}
    expected = {}
    channels = 3
    for index, width in zip(
        CONVOLUTIONS[:13], [64] * 2 + [128] * 2 + [256] * 4 + [512] * 5, strict=True
    ):
        expected |= {f"features.{index}.weight": (width, channels, 3, 3)}
        expected |= {f"features.{index}.bias": (width,)}
        channels = width
    assert shapes == expected


@pytest.mark.usefixtures("narrow")
def test_vgg19_maps_are_those_of_the_formula(tmp_path: Path) -> None:
    tensors = vgg19_file(tmp_path / "vgg19.pth")
    features = load_perceptual("vgg19", tmp_path / "vgg19.pth")
    assert features is not None
    image = torch.rand(2, 3, 32, 32)
    found, expected = features(image), plain_vgg19(tensors, image)
    assert [m.shape[-1] for m in found] == [32, 16, 8, 4, 2]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_features_are_frozen() -> None:
    features = load_perceptual("random")
    assert features is not None
    features.train()
    assert not any(m.training for m in features.modules())
    assert not any(p.requires_grad for p in features.parameters())
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    torch.stack([m.sum() for m in features(image)]).sum().backward()
    assert image.grad is not None
    assert image.grad.any()


def test_random_features_are_the_same_for_everybody() -> None:
    state = torch.get_rng_state()
    first, second = load_perceptual("random"), load_perceptual("random")
    assert torch.equal(state, torch.get_rng_state())
    assert first is not None
    assert second is not None
    image = torch.rand(1, 3, 32, 32)
    maps = first(image)
    assert all(torch.equal(a, b) for a, b in zip(maps, second(image), strict=True))
    # He initialisation: no map dies or explodes on the way.
    assert all(0.1 < float(m.abs().mean()) < 10 for m in maps)


def test_none_has_no_features() -> None:
    assert load_perceptual("none") is None


# --- EfficientNet-Lite0 ----------------------------------------------------------------------


def same(x: Tensor, weight: Tensor, stride: int, groups: int = 1) -> Tensor:
    """TensorFlow's SAME for even sizes."""
    kernel = weight.shape[-1]
    low, high = ((kernel - 1) // 2,) * 2 if stride == 1 else ((kernel - 2) // 2, (kernel - 1) // 2)
    return functional.conv2d(
        functional.pad(x, (low, high, low, high)), weight, None, stride, 0, 1, groups
    )


def norm(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    values = [w[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    mean, var, scale, shift = (v[:, None, None] for v in values)
    return (x - mean) / (var + 1e-3).sqrt() * scale + shift


def plain_lite0(w: Mapping[str, Tensor], image: Tensor) -> tuple[list[Tensor], Tensor]:
    """All sixteen blocks and the classifier: the maps after stem and blocks, and the logits."""
    x = norm(w, "_bn0", same((image - MEAN) / STD, w["_conv_stem.weight"], 2)).clamp(0, 6)
    maps = [x]
    strides = {1: 2, 3: 2, 5: 2, 11: 2}
    for i in range(16):
        name, y, stride = f"_blocks.{i}", x, strides.get(i, 1)
        if f"{name}._expand_conv.weight" in w:
            y = functional.conv2d(y, w[f"{name}._expand_conv.weight"])
            y = norm(w, f"{name}._bn0", y).clamp(0, 6)
        depthwise = w[f"{name}._depthwise_conv.weight"]
        y = norm(w, f"{name}._bn1", same(y, depthwise, stride, len(depthwise))).clamp(0, 6)
        y = norm(w, f"{name}._bn2", functional.conv2d(y, w[f"{name}._project_conv.weight"]))
        x = x + y if x.shape == y.shape else y
        maps.append(x)
    x = norm(w, "_bn1", functional.conv2d(x, w["_conv_head.weight"])).clamp(0, 6).mean((2, 3))
    return maps, functional.linear(x, w["_fc.weight"], w["_fc.bias"])


@needs_lite0
@torch.no_grad()
def test_lite0_is_the_network_that_knows_a_cat() -> None:
    data = pytest.importorskip("skimage.data", reason="the extra metrics is not installed")
    cat = torch.from_numpy(np.array(data.cat()[:300, 100:400])).permute(2, 0, 1)[None] / 255
    image = functional.interpolate(cat, (224, 224), mode="bilinear", antialias=True)
    path = perceptual._find_lite0()
    assert path is not None
    maps, logits = plain_lite0(torch.load(path, weights_only=True), image)
    best = logits[0].softmax(0).topk(2)
    assert set(best.indices.tolist()) <= {281, 282, 285}  # tabby, tiger cat, Egyptian cat
    features = load_perceptual("efficientnet-lite0")
    assert features is not None
    found = features(image)
    tapped = [maps[0], *(maps[i + 1] for i in (0, 2, 4, 10))]
    assert [m.shape[1] for m in found] == [32, 16, 24, 40, 112]
    for m, t, size in zip(found, tapped, perceptual.LITE0_MAGNITUDES, strict=True):
        torch.testing.assert_close(m, t / size, rtol=1e-4, atol=1e-4)
        # Comparable terms: that is what the magnitudes are for.
        assert 0.5 < float(m.abs().mean()) < 2


@needs_lite0
@torch.no_grad()
def test_lite0_takes_small_and_odd_sizes() -> None:
    features = load_perceptual("efficientnet-lite0")
    assert features is not None
    assert [m.shape[-1] for m in features(torch.rand(1, 3, 8, 8))] == [4, 4, 2, 1, 1]
    assert [m.shape[-1] for m in features(torch.rand(1, 3, 31, 31))] == [16, 16, 8, 4, 2]


def test_lite0_has_the_packages_names() -> None:
    names = Lite0Features().state_dict()
    assert "blocks.10.project_conv.weight" in names
    assert re.sub(r"(^|\.)_", r"\1", "_blocks.10._project_conv.weight") in names


# --- weights that cannot be had --------------------------------------------------------------


def test_a_missing_package_says_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "LITE0_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(CheckpointError, match="offline-features") as raised:
        load_perceptual("efficientnet-lite0")
    assert raised.value.code == "weights_unavailable"
    assert available_features()["efficientnet-lite0"] is None


def test_available_features_are_found_without_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path))
    assert available_features()["vgg19"] is None
    (tmp_path / "vgg19-dcbb9e9d.pth").write_bytes(b"")
    assert available_features()["vgg19"] == str(tmp_path / "vgg19-dcbb9e9d.pth")


def file_of(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_local_files_that_are_not_weights(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    cases = {
        tmp_path / "gone.pth": "No such file",
        tmp_path / "text.pth": "not a file of tensors",
        tmp_path / "empty.pth": "not a file of tensors",
        file_of(tmp_path / "list.pth", [1, 2]): "not a dictionary of tensors",
        file_of(tmp_path / "other.pth", {"a": torch.zeros(1)}): "has no features.0.weight",
        file_of(tmp_path / "shape.pth", {"features.0.weight": torch.zeros(1)}): "is \\[1\\], not",
    }
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message) as raised:
            load_perceptual("vgg19", path)
        assert raised.value.subject == str(path)

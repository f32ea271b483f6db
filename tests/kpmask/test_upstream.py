"""Checkpoints of the original layouts, made here with the names and shapes of the real ones."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional

from kpmask import checkpoint
from kpmask.config import Losses
from kpmask.errors import CheckpointError, ConfigError
from kpmask.model_config import (
    DenseMotion,
    Discriminator,
    EncoderDecoder,
    FommGenerator,
    FommModel,
    Hourglass,
    KeypointDetector,
    KeypointMaskModel,
    LowResolution,
    MaskGenerator,
    RefinedMaskModel,
)
from kpmask.models import build_system
from kpmask.models.base import Batch
from kpmask.upstream import export_upstream, import_checkpoint, import_upstream
from kpmask.upstream_yaml import read_yaml

_spec = importlib.util.spec_from_file_location(
    "model_reference", Path(__file__).with_name("model_reference.py")
)
assert _spec is not None
assert _spec.loader is not None
slow = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(slow)


# --- files in the original layouts, built from their description -----------------------------

K = 3


@dataclass(frozen=True)
class Sizes:
    """What FOMM's files differ in: widths as (first, how many blocks, most)."""

    keypoints: int = K
    scale: float = 0.5
    detector: tuple[int, int, int] = (4, 2, 8)
    motion: tuple[int, int, int] = (4, 2, 8)
    generator: tuple[int, int, int] = (4, 2, 8)
    residuals: int = 1
    discriminator: tuple[int, int, int] = (2, 2, 6)


SMALL = Sizes()
PUBLISHED = Sizes(
    keypoints=10,
    scale=0.25,
    detector=(32, 5, 1024),
    motion=(64, 5, 1024),
    generator=(64, 2, 512),
    residuals=6,
    discriminator=(32, 4, 512),
)


def block(name: str, cin: int, cout: int, kernel: int = 3) -> dict[str, Tensor]:
    return {
        f"{name}.conv.weight": torch.randn(cout, cin, kernel, kernel) / (kernel * cin**0.5),
        f"{name}.conv.bias": torch.randn(cout) * 0.1,
        **norm(f"{name}.norm", cout),
    }


def norm(name: str, channels: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.rand(channels) + 0.5,
        f"{name}.bias": torch.randn(channels) * 0.1,
        f"{name}.running_mean": torch.randn(channels) * 0.1,
        f"{name}.running_var": torch.rand(channels) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(100),
    }


def conv(name: str, cin: int, cout: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.randn(cout, cin, 7, 7) * 0.1,
        f"{name}.bias": torch.randn(cout) * 0.1,
    }


def hourglass(name: str, cin: int, width: int, blocks: int, most: int) -> dict[str, Tensor]:
    widths = [min(most, width * 2**i) for i in range(blocks + 1)]
    tensors: dict[str, Tensor] = {}
    for i in range(blocks):
        tensors |= block(f"{name}.encoder.down_blocks.{i}", widths[i] if i else cin, widths[i + 1])
    for n, i in enumerate(reversed(range(blocks))):
        double = 1 if n == 0 else 2
        tensors |= block(f"{name}.decoder.up_blocks.{n}", double * widths[i + 1], widths[i])
    return tensors


def kernel(scale: float = 0.5) -> Tensor:
    from kpmask.models.layers import gaussian_kernel

    found = gaussian_kernel(scale)
    return found.expand(3, 1, *found.shape).clone()


def detector(sizes: Sizes = SMALL, *, single_jacobian_map: bool = False) -> dict[str, Tensor]:
    features = sizes.detector[0] + 3
    return {
        **hourglass("predictor", 3, *sizes.detector),
        **conv("kp", features, sizes.keypoints),
        **conv("jacobian", features, 4 if single_jacobian_map else 4 * sizes.keypoints),
        "down.weight": kernel(sizes.scale),
    }


def discriminator(
    sizes: Sizes = SMALL, *, sn: bool = False, use_kp: bool = False
) -> dict[str, Tensor]:
    width, blocks, most = sizes.discriminator
    widths = [
        3 + sizes.keypoints * use_kp,
        *(min(most, width * 2**i) for i in range(1, blocks + 1)),
    ]
    tensors: dict[str, Tensor] = {}
    for i in range(blocks):
        name = f"discs.1.down_blocks.{i}"
        tensors |= judging_conv(f"{name}.conv", widths[i], widths[i + 1], 4, sn=sn)
        if i > 0:
            both = norm(f"{name}.norm", widths[i + 1])
            tensors |= {k: v for k, v in both.items() if k.endswith((".weight", ".bias"))}
    return tensors | judging_conv("discs.1.conv", widths[-1], 1, 1, sn=sn)


def judging_conv(name: str, cin: int, cout: int, size: int, *, sn: bool) -> dict[str, Tensor]:
    weight = torch.randn(cout, cin, size, size) / (size * cin**0.5)
    bias = {f"{name}.bias": torch.randn(cout) * 0.1}
    if not sn:
        return {f"{name}.weight": weight} | bias
    right = torch.randn(cin * size**2)
    for _ in range(5):
        left = functional.normalize(weight.flatten(1) @ right, dim=0)
        right = functional.normalize(left @ weight.flatten(1), dim=0)
    vectors = {f"{name}.weight_u": left, f"{name}.weight_v": right}
    return bias | {f"{name}.weight_orig": weight} | vectors


def residual(name: str, channels: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i in (1, 2):
        tensors[f"{name}.conv{i}.weight"] = torch.randn(channels, channels, 3, 3) * 0.1
        tensors[f"{name}.conv{i}.bias"] = torch.randn(channels) * 0.1
        tensors |= norm(f"{name}.norm{i}", channels)
    return tensors


def fomm_file(
    sizes: Sizes = SMALL,
    *,
    sn: bool = False,
    use_kp: bool = False,
    single_jacobian_map: bool = False,
) -> dict[str, Any]:
    motion, seen = "dense_motion_network", 4 * (sizes.keypoints + 1)
    width, downs, most = sizes.generator
    widths = [min(most, width * 2**i) for i in range(downs + 1)]
    generator = {
        **hourglass(f"{motion}.hourglass", seen, *sizes.motion),
        **conv(f"{motion}.mask", sizes.motion[0] + seen, sizes.keypoints + 1),
        **conv(f"{motion}.occlusion", sizes.motion[0] + seen, 1),
        f"{motion}.down.weight": kernel(sizes.scale),
        **block("first", 3, width, 7),
        **conv("final", width, 3),
    }
    for i in range(downs):
        generator |= block(f"down_blocks.{i}", widths[i], widths[i + 1])
        generator |= block(f"up_blocks.{downs - 1 - i}", widths[i + 1], widths[i])
    for i in range(sizes.residuals):
        generator |= residual(f"bottleneck.r{i}", widths[-1])
    return {
        "generator": generator,
        "discriminator": discriminator(sizes, sn=sn, use_kp=use_kp),
        "kp_detector": detector(sizes, single_jacobian_map=single_jacobian_map),
        "optimizer_generator": {"state": {0: {"step": 5}}, "param_groups": []},
        "optimizer_discriminator": {},
        "optimizer_kp_detector": {},
        "epoch": 99,
    }


FOMM = FommModel(
    image_size_px=256,
    detector=KeypointDetector(
        block_expansion=4, num_blocks=2, max_features=8, num_keypoints=K, scale_factor=0.5
    ),
    dense_motion=DenseMotion(block_expansion=4, num_blocks=2, max_features=8, scale_factor=0.5),
    generator=FommGenerator(
        block_expansion=4, num_down_blocks=2, num_bottleneck_blocks=1, max_features=8
    ),
    discriminator=Discriminator(block_expansion=2, num_blocks=2, max_features=6),
)


def keypoint_mask_file() -> dict[str, Any]:
    generator = {
        "source_first.weight": kernel(),
        **block("first", 5, 8, 7),
        **block("down_blocks.0", 4, 8),
        **block("up_blocks.0", 8, 4),
        **residual("bottleneck.r0", 8),
        **residual("bottleneck.r1", 8),
        **conv("final", 4, 3),
        **hourglass("hourglass", 8, 4, 3, 1024),
        **conv("final_hourglass", 12, 3),
    }
    return {
        "generator": generator,
        "kp_detector": detector(),
        "optimizer_generator": {},
        "epoch": 89,
    }


KEYPOINT_MASK = KeypointMaskModel(
    image_size_px=256,
    detector=FOMM.detector,
    low_resolution=LowResolution(scale_factor=0.5, block_expansion=4, num_bottleneck_blocks=2),
    high_resolution=Hourglass(block_expansion=4, num_blocks=3, max_features=1024),
)


def refined_mask_file() -> dict[str, Any]:
    generator = keypoint_mask_file()["generator"]
    del generator["source_first.weight"]
    generator |= {**plain("mask_fix_net", 5, 4, 3, 16), **conv("ref", 4, 1)}
    return {
        "generator": generator,
        "mask_generator": {
            **plain("predictor", 3, 4, 2, 8),
            **conv("ref", 4, 1),
            "down.weight": kernel(),
        },
        "optimizer_generator": {},
        "optimizer_mask_generator": {},
        "epoch": 99,
    }


def plain(name: str, cin: int, width: int, blocks: int, most: int) -> dict[str, Tensor]:
    """An hourglass without skips: its up blocks see half as much."""
    tensors = hourglass(name, cin, width, blocks, most)
    for i in range(1, blocks):
        key = f"{name}.decoder.up_blocks.{i}.conv.weight"
        tensors[key] = tensors[key][:, ::2].clone()
    return tensors


REFINED_MASK = RefinedMaskModel(
    image_size_px=256,
    mask=MaskGenerator(block_expansion=4, num_blocks=2, max_features=8, scale_factor=0.5),
    refinement=EncoderDecoder(block_expansion=4, num_blocks=3, max_features=16),
    low_resolution=KEYPOINT_MASK.low_resolution,
    high_resolution=KEYPOINT_MASK.high_resolution,
)


def saved(path: Path, content: object, *, new_format: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    return path


def yaml_file(path: Path, **groups: Any) -> Path:
    path.write_text(yaml.safe_dump(groups))
    return path


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new_format", "align_corners"), [(True, None), (True, True), (True, False), (False, None)]
)
@torch.no_grad()
def test_fomm_computes_what_its_file_says(
    tmp_path: Path, new_format: bool, align_corners: bool | None
) -> None:
    content = fomm_file()
    path = saved(tmp_path / "f.pth.tar", content, new_format=new_format)
    system = import_upstream(path, align_corners=align_corners)
    corners = align_corners is not False
    assert system.config == FOMM.model_copy(update={"align_corners": corners})
    assert not system.training
    system.config = FOMM.model_copy(update={"image_size_px": 32})
    source_image, driving_image = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    states = [
        slow.detector(content["kp_detector"], image, scale=0.5)[2:]
        for image in (source_image, driving_image)
    ]
    expected = slow.fomm_generator(
        content["generator"],
        source_image,
        *states,
        scale=0.5,
        variance=0.01,
        align_corners=corners,
    )
    found = system.render(
        system.encode_source(source_image), system.encode_driving(driving_image)
    ).image_BCHW
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("new_format", [True, False])
@torch.no_grad()
def test_keypoint_mask_computes_what_its_file_says(tmp_path: Path, new_format: bool) -> None:
    content = keypoint_mask_file()
    path = saved(tmp_path / "k.pth.tar", content, new_format=new_format)
    size = yaml_file(tmp_path / "32.yaml", dataset_params={"frame_shape": [32, 32, 3]})
    system = import_upstream(path, config=size)
    assert system.config == KEYPOINT_MASK.model_copy(update={"image_size_px": 32})
    source_image, driving_image = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    masks = [
        slow.mask(slow.detector(content["kp_detector"], i, scale=0.5)[0].double().numpy(), ring=3)
        for i in (source_image, driving_image)
    ]
    low, high = slow.keypoint_mask_generator(content["generator"], source_image, *masks, scale=0.5)
    found = system.render(system.encode_source(source_image), system.encode_driving(driving_image))
    torch.testing.assert_close(found.low_resolution_BCHW, low, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.image_BCHW, high, rtol=0, atol=1e-5)


def test_defaults_are_the_published_settings() -> None:
    judged = FommModel(discriminator=Discriminator())
    for config in (FommModel(), judged, KeypointMaskModel(), RefinedMaskModel()):
        with torch.device("meta"):
            sections = build_system(config).to_empty(device="cpu")
        content = export_upstream(sections)
        for section in content.keys() - {"epoch"}:
            for value in content[section].values():
                value.zero_()
        system = _imported(content)
        assert system.config == config


@torch.no_grad()
def test_refined_mask_computes_what_its_file_says() -> None:
    content = refined_mask_file()
    system = _imported(content, system="refined-mask")
    assert system.config == REFINED_MASK
    source, driving = torch.rand(1, 3, 32, 32), torch.rand(1, 1, 16, 16)
    masks = torch.rand(1, 1, 16, 16), driving
    low = torch.rand(1, 3, 32, 32)
    large = [
        functional.interpolate(mask, (32, 32), mode="bilinear", align_corners=False)
        for mask in masks
    ]
    # The original's order: source, its mask, the first stage's frame, the driver's mask.
    seen = torch.cat([source, large[0], low, large[1]], 1)
    features = slow.hourglass(slow.sub(content["generator"], "hourglass"), seen)
    expected = slow.conv(slow.sub(content["generator"], "final_hourglass"), features).sigmoid()
    found = system.high_resolution(source, *masks, low)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def _imported(content: dict[str, Any], **options: Any) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return import_upstream(saved(Path(folder) / "c.pth.tar", content), **options)


def test_export_is_the_inverse_of_import() -> None:
    for content in (fomm_file(), keypoint_mask_file(), refined_mask_file()):
        again = export_upstream(_imported(content))
        assert set(again) <= set(content)
        for section in again.keys() - {"epoch"}:
            assert set(again[section]) == set(content[section])
            for key, value in content[section].items():
                if section == "generator" and "final_hourglass.weight" in content["generator"]:
                    dead = key.startswith("down_blocks.")
                else:
                    dead = False
                found = again[section][key]
                assert found.shape == value.shape
                assert dead or torch.equal(found, value), key


def test_variants_are_read_off_the_shapes() -> None:
    content = fomm_file()
    kept = {k: v for k, v in content["kp_detector"].items() if not k.startswith("jacobian")}
    zero_order = {**content, "kp_detector": kept}
    assert not _imported(zero_order).config.detector.estimate_jacobian
    single = {**content, "kp_detector": {**kept, **conv("jacobian", 7, 4)}}
    assert _imported(single).config.detector.single_jacobian_map
    small = {k: v for k, v in content["kp_detector"].items() if k != "down.weight"}
    assert _imported({**content, "kp_detector": small}).config.detector.scale_factor == 1
    generator = {k: v for k, v in content["generator"].items() if "occlusion" not in k}
    found = _imported({**content, "generator": generator}).config
    assert not found.dense_motion.estimate_occlusion
    generator = {k: v for k, v in content["generator"].items()}
    narrow = fomm_file() | {"epoch": 3}
    narrow.pop("discriminator")
    narrow.pop("optimizer_generator")
    assert _imported(narrow).config == FOMM.model_copy(update={"discriminator": None})


def test_prefixes_of_data_parallel_are_stripped_once() -> None:
    content = fomm_file()
    for section in ("generator", "kp_detector", "discriminator"):
        content[section] = {f"module.{k}": v for k, v in content[section].items()}
    assert _imported(content).config == FOMM
    content["generator"] = {f"module.{k}": v for k, v in content["generator"].items()}
    with pytest.raises(CheckpointError):
        _imported(content)


def test_detector_of_another_file(tmp_path: Path) -> None:
    content, other = keypoint_mask_file(), fomm_file()
    path = saved(tmp_path / "k.pth.tar", content)
    source = saved(tmp_path / "f.pth.tar", other)
    system = import_upstream(path, kp_detector=source)
    found = export_upstream(system)["kp_detector"]
    assert all(torch.equal(found[k], v) for k, v in other["kp_detector"].items())
    del content["kp_detector"]
    saved(path, content)
    with pytest.raises(CheckpointError, match="--kp-detector"):
        import_upstream(path)
    import_upstream(path, kp_detector=source)


def test_import_into_a_file(tmp_path: Path) -> None:
    path, out = saved(tmp_path / "k.pth.tar", keypoint_mask_file()), tmp_path / "k.safetensors"
    line = import_checkpoint(path, out, mask="circles")
    loaded = checkpoint.load(out)
    assert loaded.sha256 in line
    assert "keypoint-mask, circles" in line
    assert loaded.config == KEYPOINT_MASK.model_copy(update={"mask": "circles"})
    assert loaded.info == {"imported_from": "k.pth.tar"}


# --- the original configuration --------------------------------------------------------------

COMMON = {"num_kp": K, "num_channels": 3, "estimate_jacobian": True}
WIDTHS = {"block_expansion": 4, "max_features": 8, "num_blocks": 2}


def test_fomm_configuration(tmp_path: Path) -> None:
    generator = {
        "block_expansion": 4,
        "max_features": 8,
        "num_down_blocks": 2,
        "num_bottleneck_blocks": 1,
        "estimate_occlusion_map": True,
        "dense_motion_params": {**WIDTHS, "scale_factor": 0.5, "kp_variance": 0.02},
    }
    groups: dict[str, Any] = {
        "dataset_params": {"frame_shape": [128, 128, 3], "root_dir": "anywhere"},
        "model_params": {
            "common_params": COMMON,
            "kp_detector_params": {**WIDTHS, "scale_factor": 0.5, "temperature": 0.2},
            "generator_params": generator,
            "discriminator_params": {"scales": [1]},
        },
        "train_params": {"num_epochs": 100},
    }
    found = _imported(fomm_file(), config=yaml_file(tmp_path / "c.yaml", **groups)).config
    assert found.image_size_px == 128
    assert found.detector.temperature == 0.2
    assert found.dense_motion.kp_variance == 0.02
    assert found.detector.num_keypoints == K
    groups["model_params"]["common_params"] = {**COMMON, "num_kp": 5}
    with pytest.raises(CheckpointError, match=r"kp_detector.kp.weight \[3, 7, 7, 7\], not \[5"):
        _imported(fomm_file(), config=yaml_file(tmp_path / "c.yaml", **groups))
    groups["model_params"]["common_params"] = {**COMMON, "num_kps": 5}
    with pytest.raises(ConfigError, match="no such setting of the original model: num_kps"):
        _imported(fomm_file(), config=yaml_file(tmp_path / "c.yaml", **groups))


# --- every published configuration of FOMM ---------------------------------------------------

CONFIGURATIONS: dict[str, dict[str, bool]] = {
    "vox": {"sn": True},
    "taichi": {},
    "fashion": {},
    "mgif": {"sn": True, "single_jacobian_map": True},
    "bair": {"sn": True},
    "nemo": {"sn": True},
    "taichi-adv": {"use_kp": True},
    "vox-adv": {"use_kp": True},
    "vox-adv-sn": {"sn": True, "use_kp": True},
}
each_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)

# {detector}, {motion}, {generator}, {discriminator}: widths in the order of `Sizes`.
FOMM_YAML = """
dataset_params:
  root_dir: data/{name}
  frame_shape: [{side}, {side}, 3]
  id_sampling: True
  pairs_list: data/{name}.csv
  augmentation_params:
    flip_param: {{horizontal_flip: True, time_flip: True}}
    jitter_param: {{brightness: 0.1, contrast: 0.1, saturation: 0.1, hue: 0.1}}

model_params:
  common_params:
    num_kp: {keypoints}
    num_channels: 3
    estimate_jacobian: True
  kp_detector_params:
    temperature: 0.1
    block_expansion: {detector[0]}
    num_blocks: {detector[1]}
    max_features: {detector[2]}
    scale_factor: {scale}
    {jacobian_line}
  generator_params:
    block_expansion: {generator[0]}
    num_down_blocks: {generator[1]}
    max_features: {generator[2]}
    num_bottleneck_blocks: {residuals}
    estimate_occlusion_map: True
    dense_motion_params:
      block_expansion: {motion[0]}
      num_blocks: {motion[1]}
      max_features: {motion[2]}
      scale_factor: {scale}
  discriminator_params:
    scales: [1]
    block_expansion: {discriminator[0]}
    num_blocks: {discriminator[1]}
    max_features: {discriminator[2]}
    {discriminator_lines}

train_params:
  num_epochs: 100
  num_repeats: 75
  epoch_milestones: [60, 90]
  lr_generator: 2.0e-4
  lr_discriminator: 2.0e-4
  lr_kp_detector: 2.0e-4
  batch_size: 40
  scales: [1, 0.5, 0.25, 0.125]
  transform_params: {{sigma_affine: 0.05, sigma_tps: 0.005, points_tps: 5}}
  loss_weights:
    generator_gan: 0
    discriminator_gan: 1
    feature_matching: [10, 10, 10, 10]
    perceptual: [10, 10, 10, 10, 10]
    equivariance_value: 10
    equivariance_jacobian: 10

animate_params:
  num_pairs: 50
  format: .mp4
  normalization_params: {{adapt_movement_scale: False, use_relative_jacobian: True}}
"""


def configuration(path: Path, sizes: Sizes, *, side: int, name: str = "vox") -> Path:
    """The original YAML file of a configuration, with these widths."""
    switches = CONFIGURATIONS[name]
    single = switches.get("single_jacobian_map")
    lines = [f"{key}: True" for key in ("sn", "use_kp") if switches.get(key)]
    text = FOMM_YAML.format(
        name=name,
        side=side,
        jacobian_line="single_jacobian_map: True" if single else "",
        discriminator_lines="\n    ".join(lines),
        **vars(sizes),
    )
    path.write_text(text)
    return path


@each_configuration
@torch.no_grad()
def test_every_configuration_is_imported_exactly(tmp_path: Path, name: str) -> None:
    content = fomm_file(**CONFIGURATIONS[name])
    path = saved(tmp_path / "f.pth.tar", content)
    config = configuration(tmp_path / "c.yaml", SMALL, side=16, name=name)
    system = import_upstream(path, config=config)
    assert system.config == import_upstream(path).config.model_copy(update={"image_size_px": 16})

    again = export_upstream(system)
    for section in ("generator", "kp_detector", "discriminator"):
        assert again[section].keys() == content[section].keys()
        assert all(torch.equal(again[section][k], v) for k, v in content[section].items())

    source, driving = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    states = [slow.detector(content["kp_detector"], i, scale=0.5)[2:] for i in (source, driving)]
    options = {"scale": 0.5, "variance": 0.01, "align_corners": True}
    expected = slow.fomm_generator(content["generator"], source, *states, **options)
    driving_state = system.encode_driving(driving)
    found = system.render(system.encode_source(source), driving_state).image_BCHW
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    points = states[1][0] if CONFIGURATIONS[name].get("use_kp") else None
    judging = slow.sub(content["discriminator"], "discs.1")
    _, expected_map = slow.discriminator(judging, driving, points)
    _, found_map = system.discriminator(driving, driving_state.points_BK2)
    found_map = found_map.double().numpy()
    assert np.abs(found_map - expected_map).max() < 1e-5


@each_configuration
def test_every_configuration_has_the_published_names_and_shapes(tmp_path: Path, name: str) -> None:
    switches = CONFIGURATIONS[name]
    with torch.device("meta"):
        content = fomm_file(PUBLISHED, **switches)
        config = FommModel.model_validate(
            read_yaml(configuration(tmp_path / "c.yaml", PUBLISHED, side=256, name=name), "fomm")
        )
        system = build_system(config)
    assert config == FommModel(
        detector=KeypointDetector(single_jacobian_map=switches.get("single_jacobian_map", False)),
        discriminator=Discriminator(
            spectral_norm=switches.get("sn", False), use_keypoints=switches.get("use_kp", False)
        ),
    )
    found = export_upstream(system.to_empty(device="cpu"))  # pages never written take no memory
    for section in ("generator", "kp_detector", "discriminator"):
        assert shapes(found[section]) == shapes(content[section])


def shapes(section: dict[str, Tensor]) -> list[str]:
    return [f"{k} {list(v.shape)} {v.dtype}" for k, v in sorted(section.items())]


@pytest.mark.parametrize(
    ("switches", "digest"),
    [({"sn": True}, "7c1c9e8748aa0c3b"), ({"use_kp": True}, "83bd78aa777f0795")],
)
def test_discriminators_are_laid_out_as_in_published_files(
    switches: dict[str, bool], digest: str
) -> None:
    with torch.device("meta"):
        found = "\n".join(shapes(discriminator(PUBLISHED, **switches)))
    assert hashlib.sha256(found.encode()).hexdigest()[:16] == digest


def test_a_discriminator_may_be_missing_and_then_is(tmp_path: Path) -> None:
    content = fomm_file()
    config = configuration(tmp_path / "c.yaml", SMALL, side=32, name="taichi")
    assert _imported(content, config=config).config.discriminator == FOMM.discriminator
    del content["discriminator"]
    system = _imported(content, config=config)
    assert system.config.discriminator is None
    assert "discriminator" not in export_upstream(system)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vox", "missing: discriminator.discs.1.down_blocks.0.conv.weight_orig"),
        ("taichi-adv", r"conv.weight \[4, 3, 4, 4\], not \[4, 6, 4, 4\]"),
        ("mgif", r"jacobian.weight \[12, 7, 7, 7\], not \[4, 7, 7, 7\]"),
    ],
)
def test_another_configuration_than_the_files_is_refused(
    tmp_path: Path, name: str, message: str
) -> None:
    config = configuration(tmp_path / "c.yaml", SMALL, side=32, name=name)
    with pytest.raises(CheckpointError, match=message) as raised:
        _imported(fomm_file(), config=config)
    assert raised.value.code == "checkpoint_mismatch"


def test_an_imported_discriminator_goes_on_training() -> None:
    system = _imported(fomm_file(sn=True, use_kp=True))
    system.set_losses(Losses(pixel=1.0, feature_matching=(10.0, 10.0)), None)
    frame = torch.rand(1, 3, 32, 32)
    system.train().training_losses(Batch(frame, frame)).total.backward()
    assert all(p.grad is not None for p in system.discriminator.parameters())


@pytest.mark.parametrize(
    ("group", "switches", "mask"),
    [
        ("kp_detector_params", {}, "heatmap"),
        ("kp_detector_params", {"kp_after_softmax": False}, "heatmap"),
        ("kp_detector_params", {"kp_after_softmax": True}, "circles"),
        ("common_params", {"kp_after_softmax": True}, "circles"),
        ("kp_detector_params", {"softmax_mask": True}, "softmax"),
        ("kp_detector_params", {"softmax_mask": True, "kp_after_softmax": True}, "softmax"),
    ],
)
def test_mask_of_a_configuration(
    tmp_path: Path, group: str, switches: dict[str, bool], mask: str
) -> None:
    model = {
        "common_params": {**COMMON, "scale_factor": 0.5},
        "kp_detector_params": {**WIDTHS, "temperature": 0.1},
        "generator_params": {
            "block_expansion": 4,
            "max_features": 512,
            "num_down_blocks": 1,
            "num_bottleneck_blocks": 2,
        },
    }
    model[group] = {**model[group], **switches}
    path = yaml_file(tmp_path / "c.yaml", model_params=model)
    assert _imported(keypoint_mask_file(), config=path).config.mask == mask
    assert _imported(keypoint_mask_file(), config=path, mask="heatmap").config.mask == "heatmap"


def test_configurations_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    cases = {
        "model_params: [": "not YAML",
        "- a": "not a table",
        "model_params: 3": "model_params is not a table",
        "dataset_params: {frame_shape: [256, 128, 3]}": "must be square",
        "dataset_params: {frame_shape: [wide, wide, 3]}": "must be square",
        "a: !!python/object/apply:os.system ['touch was-run']": "not YAML",
    }
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            _imported(fomm_file(), config=path)
    with pytest.raises(ConfigError, match="No such file"):
        _imported(fomm_file(), config=tmp_path / "gone.yaml")


# --- refusals --------------------------------------------------------------------------------


def changed(section: str, **tensors: Tensor | None) -> dict[str, Any]:
    content = fomm_file() if section == "discriminator" else keypoint_mask_file()
    for name, value in tensors.items():
        key = name.replace("__", ".")
        if value is None:
            del content[section][key]
        else:
            content[section][key] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed("generator", final__bias=None), "1 tensor missing: generator.final.bias"),
        (changed("kp_detector", kp__bias=None), "1 tensor missing: kp_detector.kp.bias"),
        (changed("kp_detector", extra=torch.zeros(1)), "1 tensor left over: kp_detector.extra"),
        (
            changed("generator", down_blocks__0__conv__bias=None),
            "1 tensor missing: generator.down_blocks.0.conv.bias",
        ),
        (
            changed("generator", down_blocks__0__conv__bias=torch.zeros(3)),
            r"generator.down_blocks.0.conv.bias \[3\], not \[8\]",
        ),
        (
            changed("generator", first__conv__weight=torch.zeros(9, 5, 7, 7)),
            r"generator.first.conv.weight \[9, 5, 7, 7\], not \[8, 5, 7, 7\]",
        ),
        (
            changed("generator", final__bias=torch.tensor([0, float("nan"), 0])),
            "low_resolution.final.bias holds NaN",
        ),
        (changed("generator", final__weight=None), "missing: generator.final.weight"),
        (changed("generator", final__weight=torch.zeros(3)), "of another shape"),
        (changed("generator", source_first__weight=torch.zeros(3, 1, 13, 13)), "source_first"),
        (changed("kp_detector", down__weight=torch.zeros(3, 1, 4, 4)), "no scale's kernel"),
        (
            changed("discriminator", discs__1__conv__bias=None),
            "1 tensor missing: discriminator.discs.1.conv.bias",
        ),
        (
            # Of a second scale.
            changed("discriminator", **{"discs__0-5__conv__bias": torch.zeros(1)}),
            "1 tensor left over: discriminator.discs.0-5.conv.bias",
        ),
        (
            changed("discriminator", discs__1__conv__bias=torch.tensor([float("nan")])),
            "discriminator.conv.bias holds NaN",
        ),
        (
            {**fomm_file(), "discriminator": {"discs.1.conv.weight": torch.zeros(1)}},
            "missing: discriminator.discs.1.down_blocks.0.conv.weight",
        ),
        ({**keypoint_mask_file(), "discriminator": discriminator()}, "left over: discriminator"),
        ({**keypoint_mask_file(), "ema": {}}, "no known layout: ema"),
        ({**refined_mask_file(), "kp_detector": detector()}, "tensors left over: kp_detector"),
        (
            {**keypoint_mask_file(), "mask_generator": refined_mask_file()["mask_generator"]},
            "tensor missing: generator.mask_fix_net",
        ),
        ({"generator": {"a": torch.zeros(1)}, "kp_detector": detector()}, "neither FOMM's nor"),
        ({"generator": {"a": 3}, "kp_detector": {}}, "generator is not a dictionary of tensors"),
        ({"epoch": 3}, "has no kp_detector"),
        ([1, 2], "not a dictionary of sections"),
    ],
)
def test_refused_with_what_is_wrong(content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        _imported(content)
    assert raised.value.subject.endswith("c.pth.tar")


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, new_format: bool) -> None:
    mark = tmp_path / "was-run"
    whole = saved(tmp_path / "f.pth.tar", fomm_file())
    for place in ("generator", "optimizer_generator", "epoch"):
        content = {**fomm_file(), place: Attack(mark)}
        path = saved(tmp_path / "a.pth.tar", content, new_format=new_format)
        with pytest.raises(CheckpointError, match="not a file of tensors alone"):
            import_upstream(path)
        with pytest.raises(CheckpointError, match="not a file of tensors alone"):
            import_upstream(whole, kp_detector=path)
    assert not mark.exists()


def test_files_that_end_early(tmp_path: Path) -> None:
    path = saved(tmp_path / "f.pth.tar", fomm_file())
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a file of tensors alone") as raised:
            import_upstream(path)
        assert raised.value.subject == str(path)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        # 4 px of a map that has to divide by 4, less the heads' 6: no pixel left.
        (8, "images of 8 px at scale 0.5 leave maps of -2 px"),
        (250, r"a side of 125 px \(250 \* 0.5\) does not divide by 2\*\*2"),
    ],
)
def test_a_resolution_that_the_networks_do_not_have(
    tmp_path: Path, side: int, message: str
) -> None:
    config = configuration(tmp_path / "c.yaml", SMALL, side=side, name="taichi")
    with pytest.raises(CheckpointError, match=message) as raised:
        _imported(fomm_file(), config=config)
    assert raised.value.code == "checkpoint_mismatch"


def test_wrong_arguments(tmp_path: Path) -> None:
    path = saved(tmp_path / "f.pth.tar", fomm_file())
    with pytest.raises(CheckpointError, match="holds a fomm checkpoint, not keypoint-mask"):
        import_upstream(path, system="keypoint-mask")
    with pytest.raises(ConfigError, match="'x' is not one of fomm, keypoint-mask, refined-mask"):
        import_upstream(path, system="x")
    with pytest.raises(ConfigError, match="'x' is not one of heatmap, circles, softmax"):
        import_upstream(path, mask="x")
    with pytest.raises(ConfigError, match="no mask"):
        import_upstream(path, mask="circles")
    heatmap = saved(tmp_path / "k.pth.tar", keypoint_mask_file())
    for choice in (True, False):
        with pytest.raises(ConfigError, match="a keypoint-mask system warps nothing"):
            import_upstream(heatmap, align_corners=choice)
    refined = saved(tmp_path / "r.pth.tar", refined_mask_file())
    for options, message in (
        ({"mask": "circles"}, "a refined-mask checkpoint has no mask to choose"),
        ({"kp_detector": path}, "has no detector"),
        ({"config": path}, "configuration is not read"),
    ):
        with pytest.raises(ConfigError, match=message):
            import_upstream(refined, **options)
    with pytest.raises(CheckpointError, match="No such file"):
        import_upstream(tmp_path / "gone.pth.tar")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="not a file of tensors"):
        import_upstream(tmp_path / "text")

"""Faster systems against the plain ones, and each trick against the formula that it replaces."""

from __future__ import annotations

import logging
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask import Animator, bundled, checkpoint
from kpmask.errors import ConfigError
from kpmask.model_config import (
    AnyModel,
    DenseMotion,
    EncoderDecoder,
    FommGenerator,
    FommModel,
    Hourglass,
    KeypointDetector,
    KeypointMaskModel,
    KpmaskPlusModel,
    LowResolution,
    MaskGenerator,
    MonkeyDetector,
    MonkeyGenerator,
    MonkeyMotion,
    MonkeyNetModel,
    Perturbation,
    RefinedMaskModel,
    X2FaceModel,
)
from kpmask.models import build_system
from kpmask.models.base import AnimationSystem
from kpmask.models.layers import DownBlock, ResBlock, SameBlock, UpBlock
from kpmask.models.refined_mask import RefinedMaskSystem
from kpmask.optimize import MIN_PSNR_DB, check_precision, choose, optimized
from kpmask.optimize.blocks import FusedDown, FusedRes
from kpmask.optimize.convolve import FusedConv, conv_of
from kpmask.optimize.heads import SplitHead
from kpmask.optimize.precision import compared, drawn, pictures
from kpmask.optimize.upsample import PhaseUp, phase_kernels

SIDE_PX = 32
TOLERANCE = 1e-4
WIDTHS: dict[str, Any] = {"block_expansion": 4, "num_blocks": 2, "max_features": 16}
DETECTOR = KeypointDetector(**WIDTHS, num_keypoints=5, scale_factor=0.5)
LOW = LowResolution(scale_factor=0.5, block_expansion=8, num_bottleneck_blocks=2)
HIGH = Hourglass(**WIDTHS)
HEATMAP = KeypointMaskModel(
    image_size_px=SIDE_PX, detector=DETECTOR, low_resolution=LOW, high_resolution=HIGH
)
FOMM = FommModel(
    image_size_px=SIDE_PX,
    detector=DETECTOR,
    dense_motion=DenseMotion(**WIDTHS, scale_factor=0.5),
    generator=FommGenerator(
        block_expansion=4, num_down_blocks=2, num_bottleneck_blocks=2, max_features=16
    ),
)
PLUS = KpmaskPlusModel(
    image_size_px=SIDE_PX,
    detector=DETECTOR.model_copy(update={"head_padding": 3, "estimate_jacobian": False}),
    low_resolution=LOW,
    high_resolution=HIGH,
)
REFINED = RefinedMaskModel(
    image_size_px=SIDE_PX,
    mask=MaskGenerator(**WIDTHS, scale_factor=0.5),
    refinement=EncoderDecoder(**WIDTHS),
    perturbation=Perturbation(threshold=110),
    low_resolution=LOW,
    high_resolution=HIGH,
)
MONKEY = MonkeyNetModel(
    image_size_px=SIDE_PX,
    detector=MonkeyDetector(**WIDTHS, num_keypoints=3, scale_factor=0.5),
    motion=MonkeyMotion(**WIDTHS, scale_factor=0.5),
    generator=MonkeyGenerator(**WIDTHS, num_refinement_blocks=2),
    heatmap_divisor=5.0,
)
X2FACE = X2FaceModel(image_size_px=SIDE_PX, block_expansion=4, max_features=16, driving_features=8)
SYSTEMS: dict[str, AnyModel] = {
    "heatmap": HEATMAP,
    "softmax": HEATMAP.model_copy(update={"mask": "softmax"}),
    "circles": HEATMAP.model_copy(update={"mask": "circles"}),
    "fomm": FOMM,
    "plus": PLUS,
    "plus-learned": PLUS.model_copy(update={"combination": "learned", "warp": False}),
    "refined": REFINED,
    "monkey-net": MONKEY,
    "x2face": X2FACE,
}
WITHOUT_BFLOAT16 = {"x2face"}


def unsettle(module: nn.Module) -> nn.Module:
    """Weights and batch statistics that fresh ones would not have; some scales are negative."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(-0.5, 1.5)
                part.bias.normal_(0, 0.2)
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 2)
            elif isinstance(part, nn.Conv2d):
                fan = part.weight[0].numel()
                part.weight.normal_(0, fan**-0.5)
                assert part.bias is not None
                part.bias.normal_(0, 0.1)
    return module.eval().requires_grad_(False)


def make(name: str) -> AnimationSystem[Any, Any]:
    system = build_system(SYSTEMS[name])
    unsettle(system)
    return system


def states(system: AnimationSystem[Any, Any]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in system.state_dict().items()}


# --- whole systems ---------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("name", SYSTEMS)
def test_float32_draws_the_plain_frames(name: str) -> None:
    plain = make(name)
    before, images_BCHW = states(plain), pictures(4, SIDE_PX)
    expected_BCHW = drawn(plain, images_BCHW)
    fast = optimized(plain, precision="float32")
    found_BCHW = drawn(fast, images_BCHW)
    assert (found_BCHW - expected_BCHW).abs().max() <= TOLERANCE
    assert expected_BCHW.std() > 0.02, "there is something to see"
    assert type(fast) is type(plain)
    # Its states are the same ones, so that stored ones of either serve the other.
    for encode in ("encode_source", "encode_driving"):
        ours, theirs = (getattr(s, encode)(images_BCHW) for s in (fast, plain))
        for key, value in vars(theirs).items():
            torch.testing.assert_close(getattr(ours, key), value, rtol=1e-4, atol=TOLERANCE)
    # The plain system is as it was, and draws as it did.
    torch.testing.assert_close(drawn(plain, images_BCHW), expected_BCHW, rtol=0, atol=0)
    after = states(plain)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@torch.inference_mode()
@pytest.mark.parametrize("name", SYSTEMS)
def test_bfloat16_is_near_and_leaves_states_alone(name: str) -> None:
    plain, images_BCHW = make(name), pictures(4, SIDE_PX)
    fast = optimized(plain, precision="bfloat16")
    check = check_precision(fast, plain)
    assert check.psnr_db > 40, "random weights are harder on it than trained ones"
    assert (check.max_error > TOLERANCE) == (name not in WITHOUT_BFLOAT16)
    for encode in ("encode_source", "encode_driving"):
        ours, theirs = (getattr(s, encode)(images_BCHW) for s in (fast, plain))
        for key, value in vars(theirs).items():
            torch.testing.assert_close(getattr(ours, key), value, rtol=1e-4, atol=TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["heatmap", "fomm", "plus"])
def test_batches_do_not_show(name: str, precision: Any) -> None:
    system, images_BCHW = optimized(make(name), precision=precision), pictures(6, SIDE_PX)
    whole = drawn(system, images_BCHW)
    parts = [drawn(system, images_BCHW[[0, *chosen]]) for chosen in ([1], [2, 3, 4], [5])]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["circles", "fomm", "monkey-net"])
def test_relative_motion_is_the_plain_one(name: str) -> None:
    plain, images_BCHW = make(name), pictures(4, SIDE_PX)
    frames = []
    for system in (plain, optimized(plain, precision="float32")):
        driving = system.encode_driving(images_BCHW[1:])
        source = system.encode_source(images_BCHW[:1]).repeat(3)
        moved = system.relative_motion(source, driving, driving[:1], adapt_scale=True)
        frames.append(system.render(source, moved).image_BCHW)
    torch.testing.assert_close(frames[1], frames[0], rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_it_may_be_done_twice_and_ablated_afterwards() -> None:
    plain, images_BCHW = make("refined"), pictures(3, SIDE_PX)
    assert isinstance(plain, RefinedMaskSystem)
    once = optimized(plain, precision="float32")
    twice = optimized(once, precision="float32")
    torch.testing.assert_close(drawn(twice, images_BCHW), drawn(once, images_BCHW), rtol=0, atol=0)
    for ablation in ("no_pert", "no_ref", "no_id"):
        expected_BCHW = drawn(plain.with_ablation(ablation), images_BCHW)
        found_BCHW = drawn(twice.with_ablation(ablation), images_BCHW)
        assert (found_BCHW - expected_BCHW).abs().max() <= TOLERANCE


# --- the tricks ------------------------------------------------------------------------------


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size_px", [(1, 1), (1, 5), (7, 4)])
def test_four_small_kernels_are_upsampling_and_a_convolution(size_px: tuple[int, int]) -> None:
    """In float64 and by a loop over the phases: borders, odd sides and single pixels."""
    x = torch.randn(2, 3, *size_px, dtype=torch.float64)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    large = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = functional.conv2d(large, weight, padding=1)
    kernels = phase_kernels(weight).chunk(4)
    found = torch.zeros_like(expected)
    for index in range(4):
        row, column = divmod(index, 2)
        maps = functional.conv2d(x, kernels[index], padding=1)
        found[:, :, row::2, column::2] = maps[
            :, :, row : row + size_px[0], column : column + size_px[1]
        ]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@torch.inference_mode()
@pytest.mark.parametrize("skip_channels", [None, 2])
def test_up_blocks_write_beside_a_skip(skip_channels: int | None) -> None:
    block = unsettle(UpBlock(6, 5))
    x = torch.randn(2, 6, 7, 4)
    fast = PhaseUp(block, dtype=torch.float32)  # type: ignore[arg-type]
    if skip_channels is None:
        near(fast(x), block(x))
        return
    skip = torch.randn(2, skip_channels, 14, 8)
    near(fast(x, skip), torch.cat([block(x), skip], dim=1))


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["same", "same 7x7", "down", "res"])
def test_blocks_are_the_plain_ones(kind: str) -> None:
    x = torch.randn(2, 6, 8, 12)
    block: Any
    fast: nn.Module
    if kind == "res":
        block = unsettle(ResBlock(6))
        fast = FusedRes(block, dtype=torch.float32)
    elif kind == "down":
        block = unsettle(DownBlock(6, 5))
        fast = FusedDown(block, dtype=torch.float32)
    else:
        block = unsettle(SameBlock(6, 5, kernel_px=7 if "7" in kind else 3))
        fast = conv_of(block.conv, block.norm, relu=True, dtype=torch.float32)
    before = x.clone()
    near(fast(x), block(x))
    assert torch.equal(x, before), "an input is not written to"


@torch.inference_mode()
@pytest.mark.parametrize("padding_px", [0, 2, 3])
@pytest.mark.parametrize("outputs", [1, 3])
def test_heads_are_the_whole_convolution(padding_px: int, outputs: int) -> None:
    conv = nn.Conv2d(5, outputs, 7, padding=padding_px)
    x = torch.randn(2, 5, 9, 11)
    near(SplitHead(conv, dtype=torch.float32)(x), conv(x))


@torch.inference_mode()
@pytest.mark.parametrize("relu", [False, True])
def test_without_onednns_own_functions_the_result_is_the_same(
    relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, or with a build of torch that lacks them."""
    conv = nn.Conv2d(4, 8, 3, padding=1, stride=2)
    x, other = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)
    ours = conv_of(conv, relu=relu, dtype=torch.float32)
    monkeypatch.setattr("kpmask.optimize.convolve.packs", lambda device, dtype: False)
    plain = conv_of(conv, relu=relu, dtype=torch.float32)
    assert not plain.packed
    near(ours(x), plain(x))
    near(ours(x, other), plain(x, other))
    after = functional.relu if relu else nn.Identity()
    near(plain(x, other), after(conv(x) + other))


def test_a_bfloat16_convolution_keeps_its_sums_in_float32() -> None:
    """Only what goes in and what comes out is rounded: 8 bits, whatever the number of products."""
    weight, x = torch.randn(8, 256, 3, 3), torch.randn(1, 256, 8, 8)
    conv = FusedConv(weight, torch.zeros(8), padding=(1, 1), relu=False, dtype=torch.bfloat16)
    rounded = (weight.bfloat16().double(), x.bfloat16().double())
    exact = functional.conv2d(rounded[1], rounded[0], padding=1)
    error = (conv(x).double() - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() <= 2**-8


WITHOUT_AVX512 = """
import torch
from kpmask.optimize.convolve import FusedConv
torch.manual_seed(0)
weight, x = torch.randn(8, 16, 3, 3), torch.randn(2, 16, 8, 8)
conv = FusedConv(weight, torch.zeros(8), padding=(1, 1), relu=False, dtype=torch.bfloat16)
exact = torch.nn.functional.conv2d(x.bfloat16().double(), weight.bfloat16().double(), padding=1)
error = (conv(x).double() - exact).abs() / exact.abs().clamp(min=1)
print(conv.packed, error.max().item() <= 2**-8)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its instructions are another's")
def test_bfloat16_computes_on_a_processor_without_avx512() -> None:
    """oneDNN has no bfloat16 there, and packing for it raises."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_AVX512],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "True"]


# --- the choice ------------------------------------------------------------------------------


def test_a_system_that_bfloat16_changes_is_computed_in_float32(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = make("heatmap")
    with torch.no_grad():  # so steep that a rounding decides between black and white
        plain.get_parameter("high_resolution.final.weight").mul_(1000)
    with caplog.at_level(logging.WARNING, logger="kpmask"):
        animator = Animator(plain, device="cpu", precision="bfloat16")
    assert animator.precision == "float32"
    assert animator.precision_check is not None
    assert animator.precision_check.psnr_db < MIN_PSNR_DB
    assert "computing in float32" in caplog.text
    check = check_precision(animator.system, plain)
    assert check.psnr_db > animator.precision_check.psnr_db


@pytest.mark.parametrize("there", [False, True])
def test_auto_is_what_the_processor_has(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpmask.optimize.choice.has_bfloat16", lambda kind: there)
    chosen = choose(make("plus"), "auto", device="cpu")
    assert chosen.precision == ("bfloat16" if there else "float32")
    assert (chosen.check is not None) == there
    alone = choose(make("x2face"), "auto", device="cpu")
    assert (alone.precision, alone.check) == ("float32", None)


def test_plain_is_the_system_itself_and_nonsense_is_refused() -> None:
    plain = make("heatmap")
    assert Animator(plain, device="cpu").system is plain
    assert Animator(plain, device="cpu").precision == "plain"
    with pytest.raises(ConfigError, match="one of auto") as caught:
        Animator(plain, device="cpu", precision="float16")  # type: ignore[arg-type]
    assert caught.value.subject == "precision"


def test_no_number_is_no_likeness() -> None:
    image = torch.zeros(1, 3, 2, 2)
    assert compared(image, image).psnr_db == math.inf
    assert not compared(image.log().mul(0), image).passed
    assert compared(image + 0.01, image).psnr_db == pytest.approx(40, abs=1e-3)
    assert "40.0 dB" in str(compared(image + 0.01, image))


def test_an_animator_loads_fast_and_draws_the_plain_frames(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    checkpoint.save(path, make("circles"), {})
    frames = (255 * pictures(5, SIDE_PX)).byte().permute(0, 2, 3, 1).numpy()
    videos = {}
    for precision in ("plain", "float32"):
        animator = Animator.load(path, device="cpu", precision=precision)
        assert animator.precision == precision
        videos[precision] = animator.animate(
            frames[0], frames[1:], motion="relative", adapt_scale=True, batch_size=2
        )
    difference = videos["plain"].astype(int) - videos["float32"]
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 1e-3


def test_bundled_weights_pass_at_bfloat16() -> None:
    """Trained weights: what the threshold is meant for."""
    for name in bundled.entries():
        animator = Animator.load(name, device="cpu", precision="bfloat16")
        assert animator.precision == "bfloat16", name
        assert animator.precision_check is not None
        assert animator.precision_check.psnr_db > 50

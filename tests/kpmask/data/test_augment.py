"""Augmentation against Pillow, colorsys and counting."""

from __future__ import annotations

import colorsys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from kpmask.config import Augmentation
from kpmask.data import augment as module
from kpmask.data.augment import OPERATIONS, Draw, augment, draw
from kpmask.models.base import Batch

NO_CHANGE = dict(
    reverse=False, mirror=False, order=(0, 1, 2, 3), brightness=1, contrast=1, saturation=1, hue=0
)


def batch(size: int = 6, side: int = 12) -> Batch:
    frames = torch.rand(2, size, 3, side, side)
    return Batch(source_BCHW=frames[0], driving_BCHW=frames[1])


def change(**kwargs) -> Draw:
    return Draw(**{**NO_CHANGE, **kwargs})


def test_half_are_reversed_and_half_of_the_rest_mirrored() -> None:
    draws = [draw(Augmentation(), seed) for seed in range(4000)]
    reverse = np.array([d.reverse for d in draws])
    mirror = np.array([d.mirror for d in draws])
    assert not (reverse & mirror).any()
    assert abs(reverse.mean() - 0.5) < 0.03
    assert abs(mirror.mean() - 0.25) < 0.03


def test_factors_fill_their_ranges_and_orders_are_all_used() -> None:
    config = Augmentation(brightness=0.1, contrast=0.2, saturation=0.3, hue=0.05)
    draws = [draw(config, seed) for seed in range(4000)]
    for name, low, high in [
        ("brightness", 0.9, 1.1),
        ("contrast", 0.8, 1.2),
        ("saturation", 0.7, 1.3),
        ("hue", -0.05, 0.05),
    ]:
        values = np.array([getattr(d, name) for d in draws])
        margin = (high - low) / 100
        assert low <= values.min() < low + margin
        assert high - margin < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 2 * margin
    assert len({d.order for d in draws}) == 24


def test_a_switched_off_augmentation_changes_nothing() -> None:
    config = Augmentation(flip=False, brightness=0, contrast=0, saturation=0, hue=0)
    given = batch()
    changed = augment(given, [draw(config, seed) for seed in range(6)])
    assert torch.allclose(changed.source_BCHW, given.source_BCHW, atol=1e-6)
    assert torch.allclose(changed.driving_BCHW, given.driving_BCHW, atol=1e-6)


def test_reversal_swaps_the_frames_and_mirroring_turns_both() -> None:
    given = batch(3)
    changed = augment(given, [change(reverse=True), change(mirror=True), change()])
    for field, other in [("source_BCHW", "driving_BCHW"), ("driving_BCHW", "source_BCHW")]:
        got, own, swapped = getattr(changed, field), getattr(given, field), getattr(given, other)
        assert torch.allclose(got[0], swapped[0], atol=1e-6)
        assert torch.allclose(got[1], own[1].flip(-1), atol=1e-6)
        assert torch.allclose(got[2], own[2], atol=1e-6)


def pillow(image: torch.Tensor, enhance: type[ImageEnhance._Enhance], factor: float) -> np.ndarray:
    array = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return np.asarray(enhance(Image.fromarray(array)).enhance(factor), dtype=float) / 255


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.1, 1.5])
@pytest.mark.parametrize(
    ("function", "enhance"),
    [
        (module.adjust_brightness, ImageEnhance.Brightness),
        (module.adjust_contrast, ImageEnhance.Contrast),
        (module.adjust_saturation, ImageEnhance.Color),
    ],
)
def test_enhancements_are_pillows(function, enhance, factor: float) -> None:
    image = (torch.rand(3, 24, 24) * 255).round() / 255
    got = function(image, torch.tensor(factor)).permute(1, 2, 0).numpy()
    # Pillow rounds the gray image and the result to 8 bits.
    assert np.abs(got - pillow(image, enhance, factor)).max() < 2.01 / 255


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 0.5])
def test_hue_is_that_of_colorsys(turn: float) -> None:
    image = torch.rand(3, 16, 16, dtype=torch.float64)
    image[:, :2, :2] = 0.3  # gray has no hue
    image[:, 2, 2] = torch.tensor([0.7, 0.7, 0.1])  # two channels share the maximum
    want = np.zeros((16, 16, 3))
    for y in range(16):
        for x in range(16):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
            want[y, x] = colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)
    got = module.adjust_hue(image, torch.tensor(turn, dtype=torch.float64)).permute(1, 2, 0).numpy()
    assert np.abs(got - want).max() < 1e-9


def test_a_batch_is_its_pairs_one_by_one_and_both_frames_change_alike() -> None:
    given = batch(8)
    draws = [draw(Augmentation(brightness=0.4, contrast=0.4, saturation=0.4), s) for s in range(8)]
    assert len({d.order for d in draws}) > 4
    together = augment(given, draws)
    functions = [getattr(module, f"adjust_{name}") for name in OPERATIONS]
    for b, one in enumerate(draws):
        source, driving = given.source_BCHW[b], given.driving_BCHW[b]
        frames = [driving, source] if one.reverse else [source, driving]
        for got, frame in zip(
            [together.source_BCHW[b], together.driving_BCHW[b]], frames, strict=True
        ):
            want = frame.flip(-1) if one.mirror else frame
            for number in one.order:
                want = functions[number](want, torch.tensor(getattr(one, OPERATIONS[number])))
            assert torch.allclose(got, want, atol=1e-5)


def test_the_order_matters_and_is_kept() -> None:
    given = batch(1)
    results = [
        augment(given, [change(order=order, brightness=1.8, contrast=0.5)]).source_BCHW
        for order in [(0, 1, 2, 3), (1, 0, 2, 3)]
    ]
    assert all((a - b).abs().max() > 0.05 for a, b in pairwise(results))
    assert all(r.min() >= 0 and r.max() <= 1 for r in results)

"""The perturbation against scipy, one strip of one mask at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from kpmask.errors import ConfigError
from kpmask.model_config import Perturbation
from kpmask.models.perturb import RandomPerturbation, check_strips, perturb_for_test

CONFIG = Perturbation()


def masks(count: int = 3, side_px: int = 64) -> Tensor:
    """Blobs that reach the border, with levels all over [0, 1]."""
    noise = np.random.default_rng(7).random((count, side_px, side_px))
    smooth = ndimage.gaussian_filter(noise, (0, side_px / 16, side_px / 16))
    low, high = smooth.min(), smooth.max()
    return torch.from_numpy((smooth - low) / (high - low)).float()[:, None]


def close(found: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=0, atol=1e-5)


def scaled(image: np.ndarray, rows: float, columns: float) -> np.ndarray:
    """About the centre, in its own box: bilinear, surrounded by zeros."""
    factor = np.array([rows, columns])
    centre = (np.array(image.shape) - 1) / 2
    return ndimage.affine_transform(
        image, 1 / factor, centre - centre / factor, order=1, mode="grid-constant"
    )


def faint(level: np.ndarray, config: Perturbation, reference: np.ndarray) -> np.ndarray:
    if config.threshold == "median":
        return level < np.median(reference)
    return level <= config.threshold


def slow_train(mask: np.ndarray, one: RandomPerturbation, config: Perturbation) -> np.ndarray:
    level = np.floor(mask * np.float32(255))
    edges = [0, *one.column_cuts_BN[0].tolist(), len(mask)]
    parts = [
        scaled(level[:, a:b], 1, float(s))
        for a, b, s in zip(edges[:-1], edges[1:], one.column_scale_BS[0], strict=True)
    ]
    out = scaled(np.concatenate(parts, axis=1), float(one.height_scale_B1), 1)
    edges = [0, *one.row_cuts_BN[0].tolist(), len(mask)]
    out = scaled(out, 1, float(one.width_scale_B1))
    parts = [
        scaled(out[a:b], float(s), 1)
        for a, b, s in zip(edges[:-1], edges[1:], one.row_scale_BS[0], strict=True)
    ]
    out = np.concatenate(parts, axis=0)
    out[faint(out, config, level)] = 0
    return np.clip(out + one.noise_B1HW[0, 0].numpy(), 0, 255) / 255


def single(drawn: RandomPerturbation, b: int) -> RandomPerturbation:
    return RandomPerturbation(**{k: v[b : b + 1] for k, v in vars(drawn).items()})


# --- at test time ----------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [60.0, 100.0, 0.0, "median"])
@pytest.mark.parametrize(("zoom", "side_px"), [(0.75, 64), (0.5, 15), (1.0, 16)])
def test_for_test_is_the_formula(threshold: float | str, zoom: float, side_px: int) -> None:
    config = Perturbation.model_validate({"threshold": threshold, "zoom": zoom})
    mask = masks(side_px=side_px)
    found = perturb_for_test(mask, config)
    for b in range(len(mask)):
        level = mask[b, 0].numpy() * np.float32(255)
        kept = np.floor(np.where(faint(level, config, level), 0, level))
        close(found[b, 0], scaled(kept, zoom, zoom) / 255)


def test_for_test_leaves_a_quarter_free_and_keeps_the_centre() -> None:
    mask = torch.ones(1, 1, 64, 64)
    found = perturb_for_test(mask, CONFIG)[0, 0]
    inside = torch.zeros(64, 64)
    inside[8:56, 8:56] = 1  # 48 of 64 px
    torch.testing.assert_close(found[9:55, 9:55], inside[9:55, 9:55], rtol=0, atol=1e-6)
    assert not found[inside == 0].gt(0.5).any()
    torch.testing.assert_close(found, found.flip(0, 1), rtol=0, atol=1e-6)


def test_a_mask_that_is_mostly_full_outlives_its_median() -> None:
    config = Perturbation(threshold="median", zoom=1)
    mask = torch.ones(1, 1, 16, 16)
    mask[..., :4] = 0.3
    expected = torch.where(mask == 1, 1.0, 0.0)
    torch.testing.assert_close(perturb_for_test(mask, config), expected)


# --- at training time ------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [60.0, "median"])
@pytest.mark.parametrize("side_px", [64, 17])
def test_for_training_is_the_formula(threshold: float | str, side_px: int) -> None:
    config = Perturbation.model_validate({"threshold": threshold})
    mask = masks(side_px=side_px)
    drawn = RandomPerturbation.draw(config, like=mask)
    found = drawn.apply(mask, config)
    for b in range(len(mask)):
        close(found[b, 0], slow_train(mask[b, 0].numpy(), single(drawn, b), config))
        # A mask does not depend on the others of its batch.
        alone = single(drawn, b).apply(mask[b : b + 1], config)
        torch.testing.assert_close(alone, found[b : b + 1], rtol=0, atol=0)


def test_nothing_remains_to_do_without_strips_threshold_and_noise() -> None:
    config = Perturbation(threshold=0, num_strips=1, strip_scale=0, noise=0)
    mask = masks()
    found = RandomPerturbation.draw(config, like=mask).apply(mask, config)
    torch.testing.assert_close(found, (mask * 255).floor() / 255, rtol=0, atol=1e-6)


def test_result_is_a_mask_and_passes_no_gradient_on() -> None:
    mask = masks().requires_grad_()
    found = RandomPerturbation.draw(CONFIG, like=mask).apply(mask, CONFIG)
    assert not found.requires_grad
    assert found.shape == mask.shape
    assert found.dtype == torch.float32
    assert float(found.amin()) == 0
    assert float(found.amax()) <= 1


def test_draws_have_the_published_ranges() -> None:
    drawn = RandomPerturbation.draw(CONFIG, like=torch.zeros(400, 1, 64, 64))
    for cuts in (drawn.column_cuts_BN, drawn.row_cuts_BN):
        assert cuts.shape == (400, 5)
        assert (cuts.diff(dim=1) > 0).all()
        assert (int(cuts.min()), int(cuts.max())) == (15, 45)
    for scales in (drawn.column_scale_BS, drawn.row_scale_BS):
        assert scales.shape == (400, 6)
        assert 0.75 <= float(scales.min()) < 0.76
        assert 1.24 < float(scales.max()) <= 1.25
    assert not torch.equal(drawn.height_scale_B1, drawn.width_scale_B1)
    size = drawn.noise_B1HW.abs()
    assert float(size.mean()) == pytest.approx(20, abs=0.05)
    assert float(size.var()) == pytest.approx(20, abs=0.3)
    assert float(drawn.noise_B1HW.mean()) == pytest.approx(0, abs=0.1)


def test_cuts_follow_the_masks_size() -> None:
    drawn = RandomPerturbation.draw(CONFIG, like=torch.zeros(400, 1, 16, 16))
    cuts = drawn.column_cuts_BN
    assert (int(cuts.min()), int(cuts.max())) == (4, 11)
    check_strips(CONFIG, 8)
    with pytest.raises(ConfigError, match="a mask of 4 px has room for 4 strips"):
        check_strips(CONFIG, 4)


def test_a_seed_means_the_same_draw() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return RandomPerturbation.draw(CONFIG, like=masks()).apply(masks(), CONFIG)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))

"""A keypoint detector that goes on learning with the generator (`train_detector`)."""

from __future__ import annotations

import pytest
import torch

from kpmask import config
from kpmask.models import build_system
from kpmask.models.base import Batch, LossTerms
from kpmask.models.keypoint_mask import KeypointMaskSystem, recoloured
from kpmask.train import initial_system, plan_phases


def system(mask_mean: float) -> KeypointMaskSystem:
    job = config.resolve_job(config.TrainJob, preset="debug", flags={"data": "d", "out": "o"})
    model = job.phases[-1].model
    made = build_system(model)
    assert isinstance(made, KeypointMaskSystem)
    losses = config.Losses(perceptual=0.0, pixel=1.0, mask_mean=mask_mean)
    made.set_losses(losses, None)
    return made.train()  # type: ignore[return-value]


def batch() -> Batch:
    return Batch(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32))


def reached(made: KeypointMaskSystem, terms: list[str], losses: LossTerms) -> set[str]:
    """The parts of the system that get a gradient from some of the terms."""
    made.zero_grad()
    torch.stack([losses.terms[name] for name in terms]).sum().backward(retain_graph=True)
    return {n.split(".")[0] for n, p in made.named_parameters() if p.grad is not None}


def test_a_released_detector_learns_from_the_first_stage_alone() -> None:
    made = system(mask_mean=1.0)
    made.release_detector()
    made.train()
    losses = made.training_losses(batch())
    assert reached(made, ["pixel_low"], losses) == {"detector", "low_resolution"}
    assert reached(made, ["pixel_high"], losses) == {"high_resolution"}
    assert reached(made, ["mask_mean"], losses) == {"detector"}


def test_its_statistics_move_only_when_released() -> None:
    for release in (False, True):
        made = system(mask_mean=0.0)
        if release:
            made.release_detector()
            made.train()
        before = {k: v.clone() for k, v in made.detector.state_dict().items()}
        made.training_losses(batch())
        same = all(torch.equal(v, before[k]) for k, v in made.detector.state_dict().items())
        assert same is not release


def test_mask_mean_is_the_mean_of_both_masks() -> None:
    made = system(mask_mean=3.0)
    made.release_detector()
    made.train()
    given = batch()
    torch.manual_seed(7)
    term = made.training_losses(given).terms["mask_mean"]
    torch.manual_seed(7)
    masks = [made.mask(given.source_BCHW), made.mask(recoloured(given.driving_BCHW))]
    assert term.item() == pytest.approx(3.0 * torch.cat(masks).mean().item(), abs=1e-6)


def test_a_frozen_detector_sees_the_frame_as_it_is() -> None:
    """And has no mask term, whatever its weight: nothing could learn from it."""
    made, given = system(mask_mean=3.0), batch()
    first, again = made.training_losses(given), made.training_losses(given)
    assert "mask_mean" not in first.terms
    assert torch.equal(first.terms["pixel_low"], again.terms["pixel_low"])


def test_other_colours_keep_the_shape() -> None:
    """A grey picture's edges stay where they are, and every picture gets its own colours."""
    step = torch.zeros(8, 3, 4, 6)
    step[..., 3:] = 0.5
    changed = recoloured(step)
    assert changed.shape == step.shape
    assert changed.min() >= 0 and changed.max() <= 1
    assert torch.equal(changed[..., :3], changed[..., :1].expand(-1, -1, -1, 3))
    assert torch.equal(changed[..., 3:], changed[..., -1:].expand(-1, -1, -1, 3))
    assert len({tuple(c.tolist()) for c in changed[:, :, 0, -1]}) == 8


def test_the_phase_decides() -> None:
    for name, learns in (("demo", True), ("taichi256", False)):
        job = config.resolve_job(config.TrainJob, preset=name, flags={"data": "d", "out": "o"})
        plan = plan_phases(job, pairs_per_epoch=100)[-1]
        assert plan.phase.train_detector is learns
        if learns:
            made = initial_system(plan, seed=0)
            assert isinstance(made, KeypointMaskSystem) and made.detector_learns

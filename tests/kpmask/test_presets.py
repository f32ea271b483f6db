"""Every system of every preset builds, trains a step or two and animates."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kpmask import checkpoint
from kpmask.animate import Animator
from kpmask.config import Phase, TrainJob, load_preset, preset_names, resolve_job
from kpmask.errors import ConfigError
from kpmask.models.base import Batch
from kpmask.perceptual import random_features
from kpmask.train import PhasePlan, Trainer, initial_system

SYSTEMS = (
    "heatmap",
    "circles",
    "refined",
    "fomm",
    "fomm-adv",
    "monkey-net",
    "x2face",
    "kpmask-plus",
)


def systems_of(preset: str) -> list[str]:
    path = resources.files("kpmask") / "presets" / f"{preset}.toml"
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    while "systems" not in tables and "extends" in tables:
        path = resources.files("kpmask") / "presets" / f"{tables['extends']}.toml"
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    names = list(tables.get("systems", {}))
    if "extends" in tables:
        names += [name for name in systems_of(tables["extends"]) if name not in names]
    return names


def phases_of(preset: str, system: str) -> tuple[Phase, ...]:
    flags = {"data": "data", "out": "out"}
    return resolve_job(TrainJob, preset=preset, flags=flags, systems=[system]).phases


def distinct_phases() -> list[Any]:
    """One parameter for each network in any preset, named by where it comes first."""
    found: dict[str, Any] = {}
    for preset in preset_names():
        for system in systems_of(preset):
            for phase in phases_of(preset, system):
                key = f"{phase.model.digest()} {phase.optimizer} {phase.train_detector}"
                found.setdefault(key, pytest.param(phase, id=f"{preset}-{system}-{phase.name}"))
    return list(found.values())


@pytest.mark.parametrize("preset", [p for p in preset_names() if not p.startswith("demo")])
def test_presets_list_every_system(preset: str) -> None:
    assert set(systems_of(preset)) == set(SYSTEMS)


def test_there_are_presets_of_each_size() -> None:
    sizes = {phases_of(p, systems_of(p)[0])[0].model.image_size_px for p in preset_names()}
    assert {64, 128, 256} <= sizes


@pytest.mark.parametrize("phase", distinct_phases())
def test_trains_and_animates(phase: Phase, tmp_path: Path) -> None:
    # Small batches, and few: what is asked is whether the networks fit, at their full widths.
    side_px = phase.model.image_size_px
    batch_size, num_steps = (2, 2) if side_px < 128 else (1, 1)
    small = phase.model_copy(update={"batch_size": batch_size, "accumulate": 1})
    plan = PhasePlan(phase=small, index=0, num_steps=num_steps, steps_before=0, steps_per_epoch=0.5)
    trainer = Trainer(plan, initial_system(plan, seed=0), features=random_features(), seed=0)
    random = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        frames = torch.rand(2, batch_size, 3, side_px, side_px, generator=random)
        assert np.isfinite(trainer.step(Batch(frames[0], frames[1])).loss)
    for name, values in trainer.system.state_dict().items():
        assert torch.isfinite(values).all(), name
    path = tmp_path / "weights.safetensors"
    checkpoint.save(path, trainer.system, {})
    # Not auto: on some processors that draws a frame in two precisions before the first one.
    animator = Animator.load(path, device="cpu", precision="float32")
    path.unlink()  # pytest keeps the folder, and these are gigabytes
    frames_THWC = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), np.uint8)
    video_THWC = animator.animate(frames_THWC[0], frames_THWC)
    assert video_THWC.shape == (2, side_px, side_px, 3)
    assert video_THWC.dtype == np.uint8


def test_an_unknown_system_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no system 'pix2pix'; it has: heatmap"):
        load_preset("taichi256", systems=["pix2pix"])


def test_a_phase_like_another_keeps_what_it_does_not_set() -> None:
    fomm, adversarial = phases_of("taichi256", "fomm-adv")
    assert (fomm.name, adversarial.name) == ("fomm", "fomm-adv")
    assert (adversarial.epochs, adversarial.batch_size) == (150, fomm.batch_size)
    assert (adversarial.takes, adversarial.detector_learning_rate) == ("weights", 0.0)


def test_a_preset_of_ones_own_may_extend_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "debug"\n[shared]\nbatch_size = 2\n', encoding="utf-8")
    flags = {"data": "data", "out": "out"}
    job = resolve_job(TrainJob, preset=str(path), flags=flags, systems=["fomm"])
    assert [phase.batch_size for phase in job.phases] == [2]

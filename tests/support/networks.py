"""Weights and pictures for published networks, the same on every machine, and what they must give.

`network_facts.json` was written by the published packages themselves (torchvision 0.29.2, lpips
0.1.4, pytorch-fid 0.3.0): the names and shapes in their files, and what they compute with the
numbers that are made here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kpmask.estimators.weights import KNOWN, OWN, fetched_files
from tasks.weights_add import add_weights

FACTS: dict[str, Any] = json.loads(
    Path(__file__).with_name("network_facts.json").read_text(encoding="utf-8")
)


def made_weights(shapes: Mapping[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Tensors of these names and shapes that keep a network's maps within a few units."""
    # RandomState, since numpy promises that its numbers stay what they are.
    random = np.random.RandomState(seed)
    return {
        name: torch.from_numpy(_numbers(random, name, shape).astype(np.float32))
        for name, shape in shapes.items()
    }


def made_images(count: int, height_px: int, width_px: int, seed: int) -> Tensor:
    """Smooth pictures with some noise (NCHW) in [0, 1]."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height_px, :width_px] / 20
    phases = random.uniform(0, 6, size=(count, 3, 2, 1, 1))
    waves = np.sin(x + phases[:, :, 0]) * np.cos(y + phases[:, :, 1])
    noise = random.uniform(-1, 1, size=waves.shape)
    return torch.from_numpy((0.5 + 0.4 * waves + 0.1 * noise).astype(np.float32))


def _numbers(random: np.random.RandomState, name: str, shape: list[int]) -> Any:
    if name.startswith("lin"):  # LPIPS has no weights below 0
        return random.uniform(0, 1, shape)
    if name.endswith(("running_var", "bn.weight")):
        return random.uniform(0.5, 1.5, shape)
    if len(shape) == 1:
        return 0.1 * random.standard_normal(shape)
    return random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))


def own_weights(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a file in the tests' cache as the one that was published under this name."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if name in KNOWN:
        weights = KNOWN[name]
        (member,) = weights.files
        made = replace(weights, files=(replace(member, sha256=sha256),))
        monkeypatch.setitem(KNOWN, name, made)
        (target,) = fetched_files(made)
        target.parent.mkdir(parents=True)
        shutil.copyfile(path, target)
    else:
        monkeypatch.setitem(OWN, name, replace(OWN[name], sha256_prefixes=(sha256,)))
        add_weights(name, path)

"""Systems small enough for a test, with weights that move something though nobody trained them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kpmask import checkpoint
from kpmask.model_config import (
    AnyModel,
    Hourglass,
    KeypointDetector,
    KeypointMaskModel,
    LowResolution,
)
from kpmask.models import build_system

SIDE_PX = 32
DETECTOR = KeypointDetector(
    block_expansion=4, num_blocks=2, max_features=8, num_keypoints=5, scale_factor=0.5
)
HEATMAP = KeypointMaskModel(
    image_size_px=SIDE_PX,
    detector=DETECTOR,
    low_resolution=LowResolution(scale_factor=0.5, block_expansion=4, num_bottleneck_blocks=1),
    high_resolution=Hourglass(block_expansion=4, num_blocks=2, max_features=8),
)
CIRCLES = HEATMAP.model_copy(update={"mask": "circles"})


def lively_system(config: AnyModel, *, seed: int = 7) -> Any:
    """A system whose drawings follow its images: with the weights it is built with they hardly
    do."""
    torch.manual_seed(seed)
    system = build_system(config)
    for parameter in system.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return system


def save_weights(
    path: Path, config: AnyModel = CIRCLES, *, seed: int = 7, info: Mapping[str, Any] | None = None
) -> Path:
    """The weights of a `lively_system`."""
    checkpoint.save(path, lively_system(config, seed=seed), dict(info or {}))
    return path


def worn_norms(system: nn.Module) -> None:
    """Give the batch norms scales and statistics that fresh ones would not have."""
    with torch.no_grad():
        for module in system.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)

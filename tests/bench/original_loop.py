"""A training loop as those of the original projects are: the yardstick for ours.

Written anew from their description: float32, images channel by channel in memory, a sample's two
frames decoded from PNG files and changed one after another through 8-bit images while the model
waits, one Adam for each part of the system that loops over its tensors, gradients zeroed instead
of dropped, every loss fetched at every step. A frozen detector is one that no optimiser knows: it
gets gradients and stays in training mode all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from skimage import img_as_float32, img_as_ubyte, io
from torch import nn

from kpmask.losses import PerceptualLoss
from kpmask.models.base import AnimationSystem, Batch
from kpmask.perceptual import PerceptualFeatures
from kpmask.train import PhasePlan, initial_system

Frames = list[NDArray[np.float32]]
PARTS = ("generator", "discriminator", "kp_detector")


class OriginalLoop:
    """The loop on clips that are folders of PNG files; `split_s` sums up where its time went."""

    def __init__(
        self,
        plan: PhasePlan,
        folders: Sequence[Path],
        *,
        features: PerceptualFeatures | None,
        seed: int,
        device: str,
    ) -> None:
        self.folders, self.device = list(folders), device
        self.batch_size = plan.phase.batch_size
        self.random = np.random.default_rng(seed)
        self.system: AnimationSystem = initial_system(plan, seed=seed).to(device)
        losses = plan.phase.losses
        loss = None if features is None else PerceptualLoss(features, losses.scales).to(device)
        self.system.set_losses(losses, loss)
        frozen = {name for name, p in self.system.named_parameters() if not p.requires_grad}
        self.system.requires_grad_(True)
        for module in self.system.modules():
            module.training = True
        self.optimizers = [
            torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999), foreach=False, fused=False)
            for parameters in _by_part(self.system, frozen)
        ]
        self.split_s = dict.fromkeys(("data", "forward", "backward", "optimiser"), 0.0)

    def step(self) -> float:
        """One step; its loss."""
        with _timed(self, "data"):
            batch = self._batch()
        with _timed(self, "forward"):
            losses = self.system.training_losses(batch)
        with _timed(self, "backward"):
            losses.total.backward()
        with _timed(self, "optimiser"):
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            return sum(term.item() for term in losses.terms.values())

    def _batch(self) -> Batch:
        samples = [self._sample() for _ in range(self.batch_size)]
        source, driving = (
            torch.from_numpy(np.stack([s[place].transpose(2, 0, 1) for s in samples]))
            for place in (0, 1)
        )
        return Batch(source.to(self.device), driving.to(self.device))

    def _sample(self) -> Frames:
        files = sorted(self.folders[self.random.integers(len(self.folders))].iterdir())
        places = np.sort(self.random.integers(len(files), size=2))
        frames = [img_as_float32(io.imread(files[place])) for place in places]
        if self.random.random() < 0.5:
            frames = frames[::-1]
        elif self.random.random() < 0.5:
            frames = [np.fliplr(frame) for frame in frames]
        return self._jittered(frames)

    def _jittered(self, frames: Frames) -> Frames:
        brightness, contrast, saturation = self.random.uniform(0.9, 1.1, 3)
        turn = int(self.random.uniform(-0.1, 0.1) * 255)
        changes: list[Callable[[Image.Image], Image.Image]] = [
            lambda image: ImageEnhance.Brightness(image).enhance(brightness),
            lambda image: ImageEnhance.Contrast(image).enhance(contrast),
            lambda image: ImageEnhance.Color(image).enhance(saturation),
            lambda image: _hue_turned(image, turn),
        ]
        order = self.random.permutation(len(changes))
        changed = []
        for frame in frames:
            image = Image.fromarray(img_as_ubyte(frame))
            for place in order:
                image = changes[place](image)
            changed.append(img_as_float32(np.asarray(image)))
        return changed


def _hue_turned(image: Image.Image, turn: int) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue, np.int16) + turn).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def _by_part(system: nn.Module, frozen: set[str]) -> list[list[nn.Parameter]]:
    """The trained parameters, an optimiser each: generator, discriminator, keypoint detector."""
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in system.named_parameters():
        first = name.split(".")[0]
        part = {"detector": "kp_detector", "discriminator": "discriminator"}.get(first, PARTS[0])
        if name not in frozen:
            parts[part].append(parameter)
    return [parameters for parameters in parts.values() if parameters]


class _timed:
    """Adds a block's seconds to the loop's account, the device's included."""

    def __init__(self, loop: OriginalLoop, name: str) -> None:
        self.loop, self.name = loop, name

    def __enter__(self) -> None:
        self.start_s = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self.loop.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.loop.split_s[self.name] += time.perf_counter() - self.start_s

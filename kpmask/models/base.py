"""The seam that every system has: encode a source once, a driving video once, render each frame.

Tensor names end in axis letters: B batch, C channel, H height, W width, K keypoint, T time.
Images are float RGB in [0, 1]. Coordinates are (x, y) in [-1, 1], corner-aligned: point i of n is
2i/(n-1) - 1. Models are plain single-device code; precision, compilation, distribution and
caching are applied from outside.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from kpmask.config import Losses
from kpmask.errors import ConfigError
from kpmask.model_config import AnyModel
from kpmask.records import Motion

if TYPE_CHECKING:
    from kpmask.losses import PerceptualLoss


@dataclass(frozen=True)
class State:
    """Tensors that share their first axis (one entry an image or frame). Subclasses add fields."""

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(**{k: None if v is None else function(v) for k, v in values.items()})

    def __len__(self) -> int:
        return next(
            len(v)
            for v in (getattr(self, f.name) for f in dataclasses.fields(self))
            if v is not None
        )

    def __getitem__(self, index: slice | Tensor) -> Self:
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda tensor: tensor.to(device))

    def repeat(self, count: int) -> Self:
        """A state of one entry, `count` times, without a copy."""
        assert len(self) == 1
        return self._map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        names = [f.name for f in dataclasses.fields(cls)]
        columns = {n: [getattr(s, n) for s in states] for n in names}
        return cls(**{n: None if c[0] is None else torch.cat(c) for n, c in columns.items()})


@dataclass(frozen=True)
class Prediction:
    """What `render` returns.

    Attributes:
        image_BCHW: the frame.
        low_resolution_BCHW: the first stage's frame, where the system has two stages.
        source_mask_B1HW, driving_mask_B1HW: what the generator was shown, where there are masks.
    """

    image_BCHW: Tensor
    low_resolution_BCHW: Tensor | None = None
    source_mask_B1HW: Tensor | None = None
    driving_mask_B1HW: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Frame pairs of the same video: draw `driving_BCHW` from `source_BCHW`.

    `epoch` is how many epochs of the phase lie behind: for losses that begin later.
    """

    source_BCHW: Tensor
    driving_BCHW: Tensor
    epoch: float = 0.0

    def __post_init__(self) -> None:
        if self.source_BCHW.shape != self.driving_BCHW.shape:
            raise ValueError(
                f"source {tuple(self.source_BCHW.shape)} and driving "
                f"{tuple(self.driving_BCHW.shape)} differ in shape"
            )


@dataclass(frozen=True)
class LossTerms:
    """Named, weighted scalar losses; their sum is what is minimised."""

    terms: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()


@dataclass(frozen=True)
class Objective:
    """What a system in training minimises; not a module, so that it is no part of its weights."""

    losses: Losses
    perceptual: PerceptualLoss | None

    def image_terms(self, generated_BCHW: dict[str, Tensor], real_BCHW: Tensor) -> LossTerms:
        """Weighted image losses of each named prediction, as `perceptual<name>`, `pixel<name>`."""
        terms = {}
        if self.perceptual is not None and self.losses.perceptual:
            # The real image's features serve every prediction.
            target = self.perceptual.features(real_BCHW)
            distances = self.perceptual.distances(list(generated_BCHW.values()), target)
            for name, distance in zip(generated_BCHW, distances, strict=True):
                terms[f"perceptual{name}"] = self.losses.perceptual * distance
        if self.losses.pixel:
            for name, image_BCHW in generated_BCHW.items():
                distance = (image_BCHW - real_BCHW).abs().mean()
                terms[f"pixel{name}"] = self.losses.pixel * distance
        return LossTerms(terms)


S = TypeVar("S", bound=State)
D = TypeVar("D", bound=State)


class AnimationSystem(nn.Module, ABC, Generic[S, D]):
    """One way to animate. `motions` names the ways of motion transfer that it supports."""

    motions: ClassVar[frozenset[Motion]] = frozenset({"absolute"})
    config: AnyModel
    _objective: Objective | None = None

    @property
    def image_size_px(self) -> int:
        """The side of the square images that it takes and draws."""
        return self.config.image_size_px

    @abstractmethod
    def encode_source(self, source_BCHW: Tensor) -> S:
        """All that depends on the source image alone; once per image."""

    @abstractmethod
    def encode_driving(self, driving_BCHW: Tensor) -> D:
        """All that depends on a driving frame alone; once per frame, reused for every source."""

    @abstractmethod
    def render(self, source: S, driving: D) -> Prediction:
        """Draw each source in the pose of its driving frame; both states have B entries."""

    def for_reconstruction(self) -> Self:
        """The system as the papers draw a clip from its own first frame: as it is, but for steps
        that only hide who the driver is. Weights are shared.
        """
        return self

    def relative_motion(self, source: S, driving: D, initial: D, *, adapt_scale: bool) -> D:
        """The driving state that moves the source as `driving` moved since `initial`.

        Args:
            source: B entries. driving: B entries. initial: 1 or B entries.
            adapt_scale: scale the motion by the ratio of the two objects' sizes.

        Raises:
            ConfigError: the system has no relative motion.
        """
        raise ConfigError(
            f"{type(self).__name__} supports {', '.join(sorted(self.motions))} motion only",
            subject="motion",
        )

    @abstractmethod
    def training_losses(self, batch: Batch) -> LossTerms:
        """The weighted losses of a batch; what `forward` returns under DistributedDataParallel."""

    def set_losses(self, losses: Losses, perceptual: PerceptualLoss | None) -> None:
        """Choose what training minimises. No part of the weights; `perceptual` is not moved.

        Raises:
            ConfigError: no image loss is left, or the smallest scale is too small for the features.
        """
        perceptual = perceptual if losses.perceptual else None
        if perceptual is None and not losses.pixel:
            raise ConfigError(
                "without perceptual features it must be above 0, or no image loss is left",
                subject="losses.pixel",
            )
        if perceptual is not None:
            perceptual.check_size(self.image_size_px)
        self._objective = Objective(losses, perceptual)

    @property
    def objective(self) -> Objective:
        """What `set_losses` chose."""
        if self._objective is None:
            raise ConfigError("set_losses comes before training_losses", subject="losses")
        return self._objective

    def forward(self, batch: Batch) -> LossTerms:
        """`training_losses`: what DistributedDataParallel wraps."""
        return self.training_losses(batch)

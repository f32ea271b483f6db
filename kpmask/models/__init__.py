"""The animation systems, each behind the seam of `kpmask.models.base`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kpmask.config import FommModel, KeypointMaskModel

if TYPE_CHECKING:
    from kpmask.models.base import AnimationSystem

__all__ = ["build_system"]


def build_system(config: FommModel | KeypointMaskModel) -> AnimationSystem[Any, Any]:
    """A system with fresh weights, drawn from torch's global random state.

    Raises:
        ConfigError: the settings leave a network without pixels.
    """
    # The losses use the layers of this package, and the systems use the losses.
    from kpmask.models.fomm import FommSystem
    from kpmask.models.keypoint_mask import CirclesSystem, KeypointMaskSystem

    if isinstance(config, FommModel):
        return FommSystem(config)
    return CirclesSystem(config) if config.mask == "circles" else KeypointMaskSystem(config)

"""The animation systems, each behind the seam of `kpmask.models.base`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kpmask.model_config import (
    AnyModel,
    FommModel,
    KeypointMaskModel,
    KpmaskPlusModel,
    MonkeyNetModel,
    RefinedMaskModel,
)

if TYPE_CHECKING:
    from kpmask.models.base import AnimationSystem

__all__ = ["build_system"]


def build_system(config: AnyModel) -> AnimationSystem[Any, Any]:
    """A system with fresh weights, drawn from torch's global random state.

    Raises:
        ConfigError: the settings leave a network without pixels.
    """
    # The losses use the layers of this package, and the systems use the losses.
    if isinstance(config, FommModel):
        from kpmask.models.fomm import FommSystem

        return FommSystem(config)
    if isinstance(config, KeypointMaskModel):
        from kpmask.models.keypoint_mask import CirclesSystem, KeypointMaskSystem

        return CirclesSystem(config) if config.mask == "circles" else KeypointMaskSystem(config)
    if isinstance(config, RefinedMaskModel):
        from kpmask.models.refined_mask import RefinedMaskSystem

        return RefinedMaskSystem(config)
    if isinstance(config, MonkeyNetModel):
        from kpmask.models.monkey_net import MonkeyNetSystem

        return MonkeyNetSystem(config)
    if isinstance(config, KpmaskPlusModel):
        from kpmask.models.kpmask_plus import KpmaskPlusSystem

        return KpmaskPlusSystem(config)
    from kpmask.models.x2face import X2FaceSystem

    return X2FaceSystem(config)

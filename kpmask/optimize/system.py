"""Which of a system's blocks are replaced, and which of them may compute in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from torch import nn

from kpmask.device import Precision
from kpmask.models.base import AnimationSystem
from kpmask.models.fomm import FommSystem
from kpmask.models.keypoint_mask import KeypointMaskSystem
from kpmask.models.kpmask_plus import KpmaskPlusSystem
from kpmask.models.layers import DownBlock, Hourglass, ResBlock, SameBlock, UpBlock
from kpmask.models.monkey_net import MonkeyNetSystem
from kpmask.models.refined_mask import RefinedMaskSystem
from kpmask.optimize import heads
from kpmask.optimize.blocks import FusedDown, FusedHourglass, FusedRes
from kpmask.optimize.convolve import conv_of
from kpmask.optimize.heads import SplitHead
from kpmask.optimize.upsample import PhaseUp

System = TypeVar("System", bound=AnimationSystem[Any, Any])

# Parts whose convolutions make colours, once per frame. X2Face's networks make flows alone.
BFLOAT16_PARTS: Final[dict[type[AnimationSystem[Any, Any]], tuple[str, ...]]] = {
    KeypointMaskSystem: ("low_resolution", "high_resolution"),
    RefinedMaskSystem: ("low_resolution", "high_resolution"),
    KpmaskPlusSystem: ("drawing", "composing"),
    FommSystem: ("generator.bottleneck", "generator.up_blocks", "generator.final"),
    MonkeyNetSystem: ("generator.up_blocks", "generator.refinement", "generator.final"),
}
FASTER: Final[dict[type[nn.Module], Callable[..., nn.Module]]] = {
    DownBlock: FusedDown,
    UpBlock: PhaseUp,
    ResBlock: FusedRes,
    Hourglass: FusedHourglass,
}
# Convolutions that are called as modules. Of others the weights are used.
HEADS: Final = frozenset({"final", "ref"})


def optimized(system: System, *, precision: Precision) -> System:
    """A faster system that draws the same frames, for inference.

    Args:
        system: in eval mode, on the device where it is to run. It is not changed, and shares the
            weights of what is not replaced.
        precision: bfloat16 is of the generator's convolutions alone; see `BFLOAT16_PARTS`.
    """
    parts = _bfloat16_parts(system) if precision == "bfloat16" else ()

    def replaced(name: str, module: nn.Module) -> nn.Module | None:
        inside = any(name == part or name.startswith(f"{part}.") for part in parts)
        return _replacement(name, module, torch.bfloat16 if inside else torch.float32)

    return _rewritten("", system, replaced).requires_grad_(False).eval()


def has_bfloat16_parts(system: AnimationSystem[Any, Any]) -> bool:
    """Whether bfloat16 would change anything."""
    return bool(_bfloat16_parts(system))


def _bfloat16_parts(system: AnimationSystem[Any, Any]) -> tuple[str, ...]:
    found = (parts for kind, parts in BFLOAT16_PARTS.items() if isinstance(system, kind))
    return next(found, ())


M = TypeVar("M", bound=nn.Module)


def _rewritten(name: str, module: M, replaced: Callable[[str, nn.Module], nn.Module | None]) -> M:
    """A copy of the tree with new blocks in it; what is no block is shared."""
    twin = copy.copy(module)
    children: dict[str, nn.Module | None] = {}
    for key, child in module._modules.items():
        path = f"{name}.{key}" if name else key
        new = None if child is None else replaced(path, child)
        children[key] = _rewritten(path, child, replaced) if child and new is None else new
    twin._modules = children
    return twin


def _replacement(name: str, module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """What takes a module's place, if anything does; its parts are looked at if nothing does."""
    kind = type(module)
    if kind is SameBlock:
        assert isinstance(module, SameBlock)
        return conv_of(module.conv, module.norm, relu=True, dtype=dtype)
    for plain, faster in FASTER.items():
        if kind is plain:
            return faster(module, dtype=dtype)
    if isinstance(module, nn.Conv2d) and name.rpartition(".")[2] in HEADS:
        if heads.pays(module):
            return SplitHead(module, dtype=dtype)
        return conv_of(module, relu=False, dtype=dtype)
    return _folded_block(module, dtype)


def _folded_block(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """A block of another kind whose `norm` follows its `conv`: the one is put into the other."""
    conv, norm = module._modules.get("conv"), module._modules.get("norm")
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d | None):
        return None
    twin = copy.copy(module)
    twin._modules = {
        **module._modules,
        "conv": conv_of(conv, norm, relu=False, dtype=dtype),
        "norm": nn.Identity(),
    }
    return twin

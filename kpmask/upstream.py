"""Checkpoints of the original code: FOMM's layout, the keypoint mask's, the refined mask's.

- A file is a `torch.save` dictionary of sections; two of them, `generator` and `kp_detector` (or
  `mask_generator`), hold weights; so does FOMM's `discriminator`, which a file may lack. The
  others (optimisers, epoch) are left behind.
- The settings are not in the file. Widths and depths follow from the tensors' shapes; the rest is
  as published, or as the original YAML says.
- Every tensor must have its place here, and every place its tensor; else the file is refused with
  a list. The files are read without running anything that is in them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from kpmask import checkpoint
from kpmask.config import validated
from kpmask.errors import CheckpointError, ConfigError
from kpmask.model_config import AnyModel, FommModel, KeypointMaskModel, RefinedMaskModel
from kpmask.models import build_system
from kpmask.models.base import AnimationSystem
from kpmask.models.layers import DownBlock
from kpmask.torch_files import read_torch_file, tensors_of
from kpmask.upstream_yaml import merge, read_yaml

Tensors = Mapping[str, Tensor]

# Our module -> theirs, as `section.module`.
FOMM_NAMES = {
    "detector": "kp_detector",
    "generator": "generator",
    "discriminator": "discriminator.discs.1",  # its only scale
}
KEYPOINT_MASK_NAMES = {
    "detector": "kp_detector",
    "low_resolution.down": "generator.source_first",
    "low_resolution.first": "generator.first",
    "low_resolution.bottleneck": "generator.bottleneck",
    "low_resolution.up_blocks": "generator.up_blocks",
    "low_resolution.final": "generator.final",
    "high_resolution.hourglass": "generator.hourglass",
    "high_resolution.final": "generator.final_hourglass",
}
REFINED_MASK_NAMES = {
    "mask_generator": "mask_generator",
    "refinement.predictor": "generator.mask_fix_net",
    "refinement.ref": "generator.ref",
    **{k: v for k, v in KEYPOINT_MASK_NAMES.items() if k.startswith(("low_", "high_"))},
}
NAMES = {
    "fomm": FOMM_NAMES,
    "keypoint-mask": KEYPOINT_MASK_NAMES,
    "refined-mask": REFINED_MASK_NAMES,
}
# The code of both mask systems builds, saves and loads these, and never calls them.
DEAD_BLOCKS = "generator.down_blocks"
# The second stage's input: source, its mask, the first stage's frame, the driver's mask in the
# refined mask's code; the last two the other way round here and in the keypoint mask's.
SECOND_STAGE_ORDER = (0, 1, 2, 3, 7, 4, 5, 6)  # ours, by their numbers
SECOND_STAGE_INPUTS = frozenset(
    {"high_resolution.hourglass.encoder.down_blocks.0.conv.weight", "high_resolution.final.weight"}
)

WEIGHTS = ("kp_detector", "mask_generator", "generator", "discriminator")
OTHER_SECTIONS = frozenset(
    {
        "optimizer_generator",
        "optimizer_discriminator",
        "optimizer_kp_detector",
        "optimizer_mask_generator",
        "epoch",
    }
)
MODELS: dict[str, type[FommModel | KeypointMaskModel | RefinedMaskModel]] = {
    "fomm": FommModel,
    "keypoint-mask": KeypointMaskModel,
    "refined-mask": RefinedMaskModel,
}
SYSTEMS = tuple(MODELS)
MASKS = get_args(KeypointMaskModel.model_fields["mask"].annotation)


def import_checkpoint(
    src: Path,
    out: Path,
    *,
    system: str | None = None,
    config: Path | None = None,
    kp_detector: Path | None = None,
    mask: str | None = None,
    align_corners: bool | None = None,
) -> str:
    """`import_upstream` into a file of our own; a line that says what it holds."""
    imported = import_upstream(
        src,
        system=system,
        config=config,
        kp_detector=kp_detector,
        mask=mask,
        align_corners=align_corners,
    )
    sha256 = checkpoint.save(out, imported, {"imported_from": src.name})
    millions = sum(p.numel() for p in imported.parameters()) / 1e6
    kind = f", {imported.config.mask}" if isinstance(imported.config, KeypointMaskModel) else ""
    return f"{imported.config.system}{kind}, {millions:.1f} M parameters, sha256 {sha256}"


def import_upstream(
    src: Path,
    *,
    system: str | None = None,
    config: Path | None = None,
    kp_detector: Path | None = None,
    mask: str | None = None,
    align_corners: bool | None = None,
) -> AnimationSystem[Any, Any]:
    """A system with the weights of an original checkpoint, in eval mode.

    Args:
        src: a `.pth.tar` file.
        system: `fomm`, `keypoint-mask` or `refined-mask`; by default what the file holds.
        config: the original YAML configuration. It overrides what the shapes say, so that a
            configuration of another model is refused. A refined mask's is not read: its shapes say
            all but the settings of P, which are those of its Tai-Chi model.
        kp_detector: take the detector from this file instead, of either layout that has one.
        mask: `heatmap`, `circles` or `softmax`; by default the configuration's, else heatmap.
        align_corners: how warps count pixels, which no file says. True (the default) for weights
            of torch 1.0 to 1.2, as all published ones are; False for later ones.

    Raises:
        CheckpointError: the file is not one of these, or its tensors do not fit.
        ConfigError: an argument or the configuration is wrong.
    """
    _check_choice("--system", system, SYSTEMS)
    _check_choice("--mask", mask, MASKS)
    sections = _sections(src)
    if kp_detector is not None:
        sections["kp_detector"] = _sections(kp_detector).get("kp_detector", {})
    tensors = {f"{s}.{key}": t for s in WEIGHTS for key, t in sections.get(s, {}).items()}
    found = _system_of(tensors, src)
    if system is not None and system != found:
        raise CheckpointError(
            f"holds a {found} checkpoint, not {system}",
            subject=str(src),
            code="checkpoint_mismatch",
        )
    _check_fitting(
        found, config=config, kp_detector=kp_detector, mask=mask, align_corners=align_corners
    )
    settings = _inferred(found, tensors, src)
    if config is not None:
        said = read_yaml(config, found)
        if "discriminator" not in settings:  # public files may lack it, configurations do not
            said.pop("discriminator", None)
        merge(settings, said)
    if mask is not None:
        settings["mask"] = mask
    if align_corners is not None:
        settings["align_corners"] = align_corners
    return _built(settings, tensors, src)


def export_upstream(system: AnimationSystem[Any, Any]) -> dict[str, Any]:
    """The weights in the original layout, ready for `torch.save`."""
    sections: dict[str, Any] = {"epoch": 0}
    tensors = {
        _their_name(key, system): _reordered(value, key, system, imported=False)
        for key, value in system.state_dict().items()
    }
    tensors |= {key: torch.zeros_like(t, device="cpu") for key, t in _dead_tensors(system).items()}
    for name, value in tensors.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value.detach().cpu()
    return sections


def _check_choice(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise ConfigError(f"{value!r} is not one of {', '.join(allowed)}", subject=option)


def _check_fitting(
    found: str,
    *,
    config: Path | None,
    kp_detector: Path | None,
    mask: str | None,
    align_corners: bool | None,
) -> None:
    """Refuse options that mean nothing with the file's system."""
    if align_corners is not None and "align_corners" not in MODELS[found].model_fields:
        raise ConfigError(f"a {found} system warps nothing", subject="--align-corners")
    if mask is not None and found != "keypoint-mask":
        raise ConfigError(f"a {found} checkpoint has no mask to choose", subject="--mask")
    if found == "refined-mask" and kp_detector is not None:
        raise ConfigError("a refined-mask checkpoint has no detector", subject="--kp-detector")
    if found == "refined-mask" and config is not None:
        raise ConfigError("a refined-mask configuration is not read", subject="--config")


# --- reading ---------------------------------------------------------------------------------


def _sections(path: Path) -> dict[str, Tensors]:
    """The file's sections of weights, without the prefix that DataParallel leaves."""
    document = read_torch_file(path)
    if not isinstance(document, Mapping) or not all(isinstance(key, str) for key in document):
        raise CheckpointError("not a dictionary of sections", subject=str(path))
    unknown = sorted(set(document) - set(WEIGHTS) - OTHER_SECTIONS)
    if unknown:
        raise CheckpointError(
            f"sections of no known layout: {', '.join(unknown[: checkpoint.MAX_LISTED])}",
            subject=str(path),
        )
    return {name: _tensors(document[name], name, path) for name in WEIGHTS if name in document}


def _tensors(section: object, name: str, path: Path) -> Tensors:
    found = tensors_of(section, path, what=name)
    return {key.removeprefix("module."): value for key, value in found.items()}


def _system_of(tensors: Tensors, src: Path) -> str:
    if any(key.startswith("mask_generator.") for key in tensors):
        return "refined-mask"
    if not any(key.startswith("kp_detector.") for key in tensors):
        raise CheckpointError(
            "has no kp_detector",
            subject=str(src),
            hint="give the file that has it with --kp-detector",
        )
    if any(key.startswith("generator.dense_motion_network.") for key in tensors):
        return "fomm"
    if any(key.startswith("generator.final_hourglass.") for key in tensors):
        return "keypoint-mask"
    raise CheckpointError(
        "its generator is neither FOMM's nor the keypoint mask's", subject=str(src)
    )


# --- settings from shapes --------------------------------------------------------------------


class _Shapes:
    """The shapes of one file's tensors, where a missing one is the file's fault."""

    def __init__(self, tensors: Tensors, src: Path) -> None:
        self.tensors = tensors
        self.src = src

    def size(self, key: str, axis: int) -> int:
        if key not in self.tensors:
            raise CheckpointError(
                f"1 tensor missing: {key}", subject=str(self.src), code="checkpoint_mismatch"
            )
        shape = self.tensors[key].shape
        if axis >= len(shape):
            raise CheckpointError(
                f"1 tensor of another shape: {key} {list(shape)}",
                subject=str(self.src),
                code="checkpoint_mismatch",
            )
        return shape[axis]

    def has(self, key: str) -> bool:
        return key in self.tensors

    def count(self, pattern: str) -> int:
        """How many of `pattern` with {} = 0, 1, 2, ... there are."""
        return next(i for i in itertools.count() if not self.has(pattern.format(i)))

    def capped(self, widest: int, *, block_expansion: int, num_blocks: int, published: int) -> int:
        """max_features: the widest layer where it cut something off, else the published value."""
        is_cut = widest < block_expansion * 2**num_blocks
        return widest if is_cut else max(widest, published)

    def hourglass(self, prefix: str) -> dict[str, Any]:
        encoder = prefix + ".encoder.down_blocks.{}.conv.weight"
        num_blocks = self.count(encoder)
        last = max(num_blocks - 1, 0)
        width = self.size(f"{prefix}.decoder.up_blocks.{last}.conv.weight", 0)
        widest = self.size(encoder.format(last), 0)
        return {
            "block_expansion": width,
            "num_blocks": num_blocks,
            "max_features": self.capped(
                widest, block_expansion=width, num_blocks=num_blocks, published=1024
            ),
        }

    def scale(self, prefix: str) -> float:
        """The scale whose antialiasing kernel has the file's size; without a kernel it is 1."""
        if not self.has(f"{prefix}.weight"):
            return 1.0
        # k = 2 round(4 sigma) + 1 and sigma = (n - 1) / 2 for a scale of 1 / n.
        shrink, rest = divmod(self.size(f"{prefix}.weight", 2) - 1, 4)
        if rest or not shrink:
            raise CheckpointError(f"{prefix}.weight is no scale's kernel", subject=str(self.src))
        return 1 / (shrink + 1)


def _inferred(system: str, tensors: Tensors, src: Path) -> dict[str, Any]:
    shapes = _Shapes(tensors, src)
    if system == "refined-mask":
        return {"system": system} | _refined_mask(shapes)
    settings = {"system": system, "detector": _detector(shapes)}
    if system == "keypoint-mask":
        return settings | _keypoint_mask(shapes)
    if any(key.startswith("discriminator.") for key in tensors):
        settings["discriminator"] = _discriminator(shapes)
    return settings | _fomm(shapes)


def _detector(shapes: _Shapes) -> dict[str, Any]:
    num_keypoints = shapes.size("kp_detector.kp.weight", 0)
    has_jacobian = shapes.has("kp_detector.jacobian.weight")
    num_maps = shapes.size("kp_detector.jacobian.weight", 0) if has_jacobian else 0
    return shapes.hourglass("kp_detector.predictor") | {
        "num_keypoints": num_keypoints,
        "scale_factor": shapes.scale("kp_detector.down"),
        "estimate_jacobian": has_jacobian,
        "single_jacobian_map": num_maps == 4 and num_keypoints > 1,
    }


def _fomm(shapes: _Shapes) -> dict[str, Any]:
    motion = "generator.dense_motion_network"
    width = shapes.size("generator.first.conv.weight", 0)
    down = "generator.down_blocks.{}.conv.weight"
    num_down_blocks = shapes.count(down)
    widest = shapes.size(down.format(num_down_blocks - 1), 0) if num_down_blocks else width
    return {
        "dense_motion": shapes.hourglass(f"{motion}.hourglass")
        | {
            "scale_factor": shapes.scale(f"{motion}.down"),
            "estimate_occlusion": shapes.has(f"{motion}.occlusion.weight"),
        },
        "generator": {
            "block_expansion": width,
            "num_down_blocks": num_down_blocks,
            "num_bottleneck_blocks": shapes.count("generator.bottleneck.r{}.conv1.weight"),
            "max_features": shapes.capped(
                widest, block_expansion=width, num_blocks=num_down_blocks, published=512
            ),
        },
    }


def _discriminator(shapes: _Shapes) -> dict[str, Any]:
    name = FOMM_NAMES["discriminator"]
    spectral_norm = shapes.has(f"{name}.conv.weight_orig")
    weight = name + ".down_blocks.{}.conv." + ("weight_orig" if spectral_norm else "weight")
    num_blocks = shapes.count(weight)
    block_expansion = (shapes.size(weight.format(0), 0) + 1) // 2  # of the first block's input
    widest = shapes.size(weight.format(max(num_blocks - 1, 0)), 0)
    return {
        "block_expansion": block_expansion,
        "num_blocks": num_blocks,
        "max_features": shapes.capped(
            widest, block_expansion=block_expansion, num_blocks=num_blocks, published=512
        ),
        "spectral_norm": spectral_norm,
        "use_keypoints": shapes.size(weight.format(0), 1) != 3,
    }


def _keypoint_mask(shapes: _Shapes) -> dict[str, Any]:
    num_up_blocks = shapes.count("generator.up_blocks.{}.conv.weight")
    return {
        "low_resolution": {
            "scale_factor": 0.5**num_up_blocks,
            "block_expansion": shapes.size("generator.final.weight", 1),
            "num_bottleneck_blocks": shapes.count("generator.bottleneck.r{}.conv1.weight"),
        },
        "high_resolution": shapes.hourglass("generator.hourglass"),
    }


def _refined_mask(shapes: _Shapes) -> dict[str, Any]:
    return _keypoint_mask(shapes) | {
        "mask": shapes.hourglass("mask_generator.predictor")
        | {"scale_factor": shapes.scale("mask_generator.down")},
        "refinement": shapes.hourglass("generator.mask_fix_net"),
    }


# --- weights ---------------------------------------------------------------------------------


def _built(settings: dict[str, Any], tensors: Tensors, src: Path) -> AnimationSystem[Any, Any]:
    try:
        config: AnyModel = validated(MODELS[settings["system"]], settings)
        with torch.device("meta"):
            system = build_system(config)
    except ConfigError as error:
        raise CheckpointError(
            f"its tensors and configuration make no model: {error}",
            subject=str(src),
            code="checkpoint_mismatch",
        ) from error
    places = {_their_name(key, system): key for key in system.state_dict()}
    wanted = {theirs: system.state_dict()[ours] for theirs, ours in places.items()}
    checkpoint.check_tensors(
        {key: tuple(value.shape) for key, value in tensors.items()},
        {key: tuple(value.shape) for key, value in (wanted | _dead_tensors(system)).items()},
        subject=str(src),
    )
    values = {
        ours: _reordered(tensors[theirs], ours, system, imported=True)
        for theirs, ours in places.items()
    }
    checkpoint.fill(system, values, subject=str(src))
    return system.eval()


def _their_name(key: str, system: AnimationSystem[Any, Any]) -> str:
    names = NAMES[system.config.system]
    ours = next(module for module in names if key.startswith(f"{module}."))
    return names[ours] + key.removeprefix(ours)


def _reordered(
    value: Tensor, key: str, system: AnimationSystem[Any, Any], *, imported: bool
) -> Tensor:
    """A weight of our name `key` with its input channels in our order, or back in theirs."""
    if not isinstance(system.config, RefinedMaskModel) or key not in SECOND_STAGE_INPUTS:
        return value
    order = torch.tensor(SECOND_STAGE_ORDER)
    order = order if imported else order.argsort()
    # The last convolution sees features, then the input again.
    seen = value.shape[1] - len(order)
    return value.index_select(1, torch.cat([torch.arange(seen), order + seen]).to(value.device))


def _dead_tensors(system: AnimationSystem[Any, Any]) -> dict[str, Tensor]:
    """Tensors of the original layout that nothing here uses, without memory."""
    if not isinstance(system.config, KeypointMaskModel | RefinedMaskModel):
        return {}
    low = system.config.low_resolution
    with torch.device("meta"):
        blocks = nn.ModuleList(
            DownBlock(low.block_expansion * 2**i, low.block_expansion * 2 ** (i + 1))
            for i in range(low.num_up_blocks)
        )
    return {f"{DEAD_BLOCKS}.{key}": value for key, value in blocks.state_dict().items()}

"""The original code's YAML configurations, as settings of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from kpmask.errors import ConfigError

# Their key -> our part and key, for each of their groups; None: nothing of ours depends on it.
_Places = Mapping[str, tuple[str, str] | None]
_WIDTHS = ("block_expansion", "max_features", "num_blocks", "scale_factor")
_COMMON: _Places = {
    "num_kp": ("detector", "num_keypoints"),
    "estimate_jacobian": ("detector", "estimate_jacobian"),
    "num_channels": None,
    "scale_factor": ("detector", "scale_factor"),
    "kp_after_softmax": None,  # read by `_mask_of`, wherever they stand
    "softmax_mask": None,
}
_DETECTOR: _Places = {
    **{name: ("detector", name) for name in (*_WIDTHS, "temperature", "single_jacobian_map")},
    "pad": ("detector", "head_padding"),
    "kp_after_softmax": None,
    "softmax_mask": None,
}
_DENSE_MOTION: _Places = {name: ("dense_motion", name) for name in (*_WIDTHS, "kp_variance")}
_DISCRIMINATOR: _Places = {
    **{name: ("discriminator", name) for name in ("block_expansion", "max_features", "num_blocks")},
    "sn": ("discriminator", "spectral_norm"),
    "use_kp": ("discriminator", "use_keypoints"),
    "kp_variance": ("discriminator", "kp_variance"),
    "scales": None,  # always [1]; the tensors of another have no place
}
_GENERATOR: Mapping[str, _Places] = {
    "fomm": {
        "block_expansion": ("generator", "block_expansion"),
        "max_features": ("generator", "max_features"),
        "num_down_blocks": ("generator", "num_down_blocks"),
        "num_bottleneck_blocks": ("generator", "num_bottleneck_blocks"),
        "estimate_occlusion_map": ("dense_motion", "estimate_occlusion"),
        "dense_motion_params": None,
    },
    "keypoint-mask": {
        "block_expansion": ("low_resolution", "block_expansion"),
        "num_bottleneck_blocks": ("low_resolution", "num_bottleneck_blocks"),
        "num_down_blocks": None,  # follows from the scale
        "max_features": None,  # of the dead blocks
        "scale_factor": ("low_resolution", "scale_factor"),
        "estimate_occlusion_map": None,
        "dense_motion_params": None,
        "kp_after_softmax": None,
        "softmax_mask": None,
    },
}


def read_yaml(path: Path, system: str) -> dict[str, Any]:
    """Our settings, as far as the original configuration gives them.

    Args:
        path: the YAML file. system: `fomm` or `keypoint-mask`.

    Raises:
        ConfigError: it is not one, or has a model's setting that is not known here.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(error.strerror or str(error), subject=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not YAML: {error}", subject=str(path)) from error
    model = _group(_group({"": document}, "", path), "model_params", path)
    generator = _group(model, "generator_params", path)
    found = {k: model.get(k) for k in ("common_params", "kp_detector_params")}
    settings: dict[str, Any] = {}
    _place(settings, _group(found, "common_params", path), _COMMON, path)
    _place(settings, _group(found, "kp_detector_params", path), _DETECTOR, path)
    _place(settings, generator, _GENERATOR[system], path)
    if system == "fomm":
        _place(settings, _group(generator, "dense_motion_params", path), _DENSE_MOTION, path)
        _place(settings, _group(model, "discriminator_params", path), _DISCRIMINATOR, path)
    else:
        settings["mask"] = _mask_of(model)
        common = _group(found, "common_params", path)
        if "scale_factor" in common:  # there it is the detector's and the generator's
            merge(settings, {"low_resolution": {"scale_factor": common["scale_factor"]}})
    dataset = _group(document, "dataset_params", path)
    if "frame_shape" in dataset:
        settings["image_size_px"] = _side_px(dataset["frame_shape"], path)
    return settings


def _group(document: object, name: str, path: Path) -> dict[str, Any]:
    group = cast(Mapping[str, Any], document).get(name) or {}
    if not isinstance(group, dict):
        raise ConfigError(f"{name or 'the file'} is not a table", subject=str(path))
    return group


def _place(settings: dict[str, Any], group: Mapping[str, Any], places: _Places, path: Path) -> None:
    for key, value in group.items():
        if key not in places:
            raise ConfigError(
                f"no such setting of the original model: {key}",
                subject=str(path),
                hint=f"known here: {', '.join(sorted(places))}",
            )
        if (place := places[key]) is not None:
            merge(settings, {place[0]: {place[1]: value}})


def _mask_of(model: Mapping[str, Any]) -> str:
    """The published code has two switches, in one of three groups."""
    switches: dict[str, Any] = {}
    for group in ("common_params", "kp_detector_params", "generator_params"):
        switches |= model.get(group) or {}
    if switches.get("softmax_mask"):
        return "softmax"
    return "circles" if switches.get("kp_after_softmax") else "heatmap"


def _side_px(frame_shape: object, path: Path) -> int:
    if (
        not isinstance(frame_shape, list)
        or len(frame_shape) < 2
        or not isinstance(frame_shape[0], int)
        or frame_shape[0] != frame_shape[1]
    ):
        raise ConfigError(f"frame_shape must be square, not {frame_shape!r}", subject=str(path))
    return frame_shape[0]


def merge(settings: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Put nested settings over others, in place."""
    for key, value in over.items():
        if isinstance(value, Mapping):
            merge(settings.setdefault(key, {}), value)
        else:
            settings[key] = value

"""What metrics there are, by name: nothing of them is loaded here.

A metric that an estimator is behind is called `KIND_ESTIMATOR`, `akd_facemesh` say: never by its
kind alone, since numbers of two estimators do not compare. `_found` at the end is the same metric
without what was missed; see `kpmask.metrics.keypoints` and `.identity`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Final, Literal, get_args

PictureMetricName = Literal[
    "l1",
    "l1_with_first",
    "l1_moving",
    "psnr",
    "ssim",
    "temporal_error",
    "flicker",
    "warping_error",
]

PointsName = Literal["facemesh", "movenet", "fan", "openpose", "openposeone"]
PointsKind = Literal["akd", "akd_euclidean", "jitter", "mkr", "coverage"]
EmbeddingName = Literal["sface", "reid", "reidpaper", "openface", "arcface"]
# What the papers measured with. Numbers of others do not belong beside theirs.
PAPER_ESTIMATORS: Final = frozenset({"fan", "openpose", "reidpaper", "openface", "arcface"})
IdentityKind = Literal[
    "aed_sq", "aed_l2", "csim_truth", "csim_source", "coverage", "coverage_source"
]
MotionKind = Literal["akd_motion"]
# Of the others `_found` would be the same, or say nothing.
_WITH_FOUND: Final = frozenset(
    {"akd", "akd_motion", "jitter", "aed_sq", "csim_truth", "csim_source"}
)


def _with_estimators(kinds: tuple[str, ...], estimators: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        f"{kind}_{estimator}{ending}"
        for estimator in estimators
        for kind in kinds
        for ending in (("", "_found") if kind in _WITH_FOUND else ("",))
    )


PICTURE_METRICS: Final[tuple[str, ...]] = get_args(PictureMetricName)
PERCEPTUAL_METRICS: Final[tuple[str, ...]] = ("lpips_alex",)
KEYPOINT_METRICS: Final = _with_estimators(get_args(PointsKind), get_args(PointsName))
MOTION_METRICS: Final = _with_estimators(get_args(MotionKind), get_args(PointsName))
IDENTITY_METRICS: Final = _with_estimators(get_args(IdentityKind), get_args(EmbeddingName))
# One value for a whole set of videos.
SET_METRICS: Final[tuple[str, ...]] = ("frechet_sface", "fid", "fvd")
METRICS: Final = (
    *PICTURE_METRICS,
    *PERCEPTUAL_METRICS,
    *KEYPOINT_METRICS,
    *MOTION_METRICS,
    *IDENTITY_METRICS,
    *SET_METRICS,
)
_ESTIMATORS: Final[tuple[str, ...]] = (*get_args(PointsName), *get_args(EmbeddingName))


def _spelled() -> str:
    plain = ", ".join((*PICTURE_METRICS, *PERCEPTUAL_METRICS, *SET_METRICS))
    kinds = (
        ((*get_args(PointsKind), *get_args(MotionKind)), get_args(PointsName)),
        (get_args(IdentityKind), get_args(EmbeddingName)),
    )
    parts = [f"KIND of {', '.join(kind)} by ESTIMATOR of {', '.join(by)}" for kind, by in kinds]
    return f"{plain}; or KIND_ESTIMATOR, akd_facemesh say: {'; '.join(parts)}"


SPELLED: Final = _spelled()  # all of them, in words that a terminal has room for


def known_metric(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: there is no such metric; it says which there are.
    """
    if name not in METRICS:
        close = difflib.get_close_matches(name, METRICS)
        meant = f"{' or '.join(close)}, perhaps? " if close else ""
        raise ValueError(f"no metric {name!r}. {meant}There are {SPELLED}")
    return name


def estimator_of(name: str) -> str:
    """The estimator behind a metric; empty where there is none."""
    plain = name.removesuffix("_found")
    return next((e for e in _ESTIMATORS if plain.endswith(f"_{e}")), "")


def kind_of(name: str) -> str:
    """A metric's name without its estimator and without `_found`."""
    estimator = estimator_of(name)
    return name.removesuffix("_found").removesuffix(f"_{estimator}") if estimator else name


def coverage_of(name: str) -> str:
    """The metric whose mean is the share of frames in which a metric's estimator found something.

    Empty for that metric itself, and where every frame can be scored.
    """
    estimator = estimator_of(name)
    if not estimator or name.startswith("coverage"):
        return ""
    kind = "coverage_source" if name.startswith("csim_source_") else "coverage"
    return f"{kind}_{estimator}"


def missed_of(name: str) -> str:
    """The metric whose mean is the share of points that a metric leaves out, however many frames
    are covered; empty where it leaves out none."""
    estimator = estimator_of(name)
    leaves_out = name.endswith("_found") and estimator in get_args(PointsName)
    return f"mkr_{estimator}" if leaves_out else ""


def with_coverage(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once, and behind them the coverages that they are to be read with."""
    covers = [cover for name in names if (cover := coverage_of(name))]
    return tuple(dict.fromkeys([*names, *covers]))

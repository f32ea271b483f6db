"""What metrics are called on pages: label, explanation and unit of each; names of methods, too.

- A metric that an estimator is behind is put together from its kind and its estimator, as its name
  is: so a new estimator has labels for all its metrics with one entry.
- A name that is not known here is shown as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kpmask.records import Average, Quantise, Setting

FOUND: Final = "_found"
METHODS: Final[Mapping[str, str]] = {
    "model": "this model",
    "copy": "copy of the source",
    "codec": "the codec alone",
    "driving": "the driving video itself",
}
QUANTISED: Final[Mapping[Quantise, str]] = {
    "none": "frames as they are drawn",
    "truncate": "drawn frames cut off to 8 bits",
    "round": "drawn frames rounded to 8 bits",
}
_COUNTED: Final[Mapping[Setting, tuple[str, str]]] = {
    "reconstruction": ("video", "videos"),
    "cross": ("pair", "pairs"),
    "few_shot": ("person", "people"),
}
AVERAGES: Final[Mapping[Average, str]] = {
    "videos": "mean of the videos' means",
    "frames": "mean over all frames together",
}


@dataclass(frozen=True, slots=True)
class MetricLabel:
    """How a metric is shown.

    Attributes:
        label: stands by itself. short: under its group's heading.
        unit: what its values are in; empty for shares and other plain numbers.
        group: metrics of one group stand in one table: a key of GROUPS.
    """

    label: str
    short: str
    text: str
    unit: str
    group: str


@dataclass(frozen=True, slots=True)
class _Estimator:
    short: str
    title: str
    finds: str


@dataclass(frozen=True, slots=True)
class _Kind:
    label: str
    text: str
    unit: str = ""


PICTURES: Final = "pictures"
SETS: Final = "sets"

# label, text, unit
_PICTURE_METRICS: Final[Mapping[str, tuple[str, str, str]]] = {
    "l1": ("L1", "Mean absolute difference of pixels in [0, 1].", ""),
    "l1_with_first": ("L1 with first", "L1 as the papers' published code has it.", ""),
    "l1_moving": (
        "L1 moving",
        "L1 over the pixels that differ from the source: those that move.",
        "",
    ),
    "psnr": ("PSNR", "Peak signal-to-noise ratio; 100 for equal pictures.", "dB"),
    "ssim": ("SSIM", "Structural similarity; 1 for equal pictures.", ""),
    "temporal_error": (
        "Temporal error",
        "Mean absolute difference of the changes from frame to frame, in [0, 2].",
        "",
    ),
    "flicker": (
        "Flicker",
        "Mean absolute change from frame to frame where the true video stands still. A frozen "
        "picture has none, so read it beside the temporal error.",
        "",
    ),
    "warping_error": (
        "Warping error",
        "Mean squared change of colour along the true video's motion, by DIS optical flow. A true "
        "video is above 0 too.",
        "",
    ),
    "lpips_alex": (
        "LPIPS",
        "Learned perceptual distance of pictures, by the features of AlexNet; 0 for equal ones.",
        "",
    ),
}
_SET_METRICS: Final[Mapping[str, tuple[str, str, str]]] = {
    "fid": (
        "FID",
        "Fréchet distance of the features that an Inception network has of single frames: how "
        "alike two sets of pictures are, whichever belongs to which.",
        "",
    ),
    "fvd": (
        "FVD",
        "Fréchet distance of the features that a video network has of windows of frames: how "
        "alike two sets of videos are, motion included.",
        "",
    ),
    "frechet_sface": (
        "Fréchet SFace",
        "Fréchet distance of the vectors that SFace has of faces. It is no FID, whose features "
        "are others.",
        "",
    ),
}
_ESTIMATORS: Final[Mapping[str, _Estimator]] = {
    "facemesh": _Estimator("FaceMesh", "Faces: MediaPipe FaceMesh", "468 points of a face"),
    "fan": _Estimator("FAN", "Faces: face-alignment", "68 points of a face"),
    "movenet": _Estimator("MoveNet", "Bodies: MoveNet Thunder", "17 points of a body"),
    "openpose": _Estimator("OpenPose", "Bodies: OpenPose", "18 joints of a body"),
    "openposeone": _Estimator(
        "OpenPose once", "Bodies: OpenPose, one size and one person", "18 joints of a body"
    ),
    "sface": _Estimator("SFace", "Identity of faces: SFace", "a face's vector"),
    "openface": _Estimator(
        "OpenFace", "Identity of faces: OpenFace", "the vector of a whole frame"
    ),
    "arcface": _Estimator("ArcFace", "Identity of faces: ArcFace", "a face's vector"),
    "reid": _Estimator(
        "re-ID", "Identity of people: re-identification", "the vector of a whole frame"
    ),
    "reidpaper": _Estimator(
        "re-ID as published",
        "Identity of people: re-identification as the papers' code has it",
        "the vector of a whole frame",
    ),
}
_KINDS: Final[Mapping[str, _Kind]] = {
    "akd": _Kind("AKD", "Average keypoint distance: mean of |dx| and |dy| over {finds}.", "px"),
    "akd_euclidean": _Kind(
        "AKD Euclidean", "Mean length of (dx, dy) over {finds}, as the papers' text has it.", "px"
    ),
    "akd_motion": _Kind(
        "AKD of motion",
        "As AKD, of how {finds} have moved since frame 0, at the source's size: where the driving "
        "subject stands and how large it is does not count.",
        "px",
    ),
    "jitter": _Kind(
        "Jitter",
        "How unlike the truth {finds} are accelerated: mean of |dx| and |dy| of second "
        "differences in time.",
        "px/frame²",
    ),
    "mkr": _Kind("MKR", "Missing keypoint rate: the share of the truth's points that was missed."),
    "coverage": _Kind(
        "Coverage",
        "Share of frames in which both the true and the generated one have {finds}, or of several "
        "points at least one.",
    ),
    "aed_sq": _Kind(
        "AED squared",
        "Distance of identities by {finds}: sum of squared differences, as the papers' code has "
        "it.",
    ),
    "aed_l2": _Kind(
        "AED Euclidean",
        "The root of each frame's AED squared, as the papers' text has it: of means it is not the "
        "root.",
    ),
    "csim_truth": _Kind(
        "CSIM to truth", "Cosine of {finds} with the true frame's; 1 for the same."
    ),
    "csim_source": _Kind(
        "CSIM to source", "Cosine of {finds} with that of the image that was animated."
    ),
    "coverage_source": _Kind(
        "Coverage to source", "Share of frames in which both it and the source have {finds}."
    ),
}
_ONLY_FOUND: Final = (
    " Frames or points that the estimator missed are left out, as in the papers' code: it means "
    "little without the coverage."
)
_MISSED_IS_WORST: Final = " What the estimator missed counts as the worst there can be."
_NEVER_MISSED: Final = frozenset({"mkr", "coverage", "coverage_source"})

GROUPS: Final[Mapping[str, str]] = {
    PICTURES: "Pictures and motion",
    **{name: estimator.title for name, estimator in _ESTIMATORS.items()},
    SETS: "Whole sets of videos",
}


def counted(setting: Setting, count: int) -> str:
    """What so many of the things are called that an evaluation has one score each of."""
    one, several = _COUNTED[setting]
    return one if count == 1 else several


def metric_label(name: str) -> MetricLabel:
    """How the metric of a name is shown; one that is not known is shown by its name."""
    for group, metrics in ((PICTURES, _PICTURE_METRICS), (SETS, _SET_METRICS)):
        if name in metrics:
            label, text, unit = metrics[name]
            return MetricLabel(label, label, text, unit, group)
    whole = name.removesuffix(FOUND)
    kind_name, _, estimator_name = whole.rpartition("_")
    kind, estimator = _KINDS.get(kind_name), _ESTIMATORS.get(estimator_name)
    if kind is None or estimator is None:
        return MetricLabel(name, name, "", "", PICTURES)
    text = kind.text.format(finds=estimator.finds)
    if name.endswith(FOUND):
        ending, text = ", found", text + _ONLY_FOUND
    else:
        ending = ""
        text += "" if kind_name in _NEVER_MISSED else _MISSED_IS_WORST
    label = f"{kind.label} {estimator.short}{ending}"
    return MetricLabel(label, f"{kind.label}{ending}", text, kind.unit, estimator_name)

"""What the papers behind the systems here have published, and whether numbers belong beside it.

- Every number is as it is printed. Nothing of it was measured here.
- A published metric says in words what it was made with, and which of our metrics is made the same
  way. Numbers of another estimator, other frames or another mean do not compare: `differences`
  says why not.
- That the videos are the same ones nobody can tell from a table: who compares must have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kpmask.records import MetricInfo, Quantise, ScoreTable, Setting
from kpmask.report.metric_labels import FOUND, PICTURES, QUANTISED, metric_label

KEYPOINT_MASK: Final = "Image Animation with Keypoint Mask"
REFINED_MASKING: Final = "Image Animation with Refined Masking"


@dataclass(frozen=True, slots=True)
class PublishedMetric:
    """A column of a published table.

    Attributes:
        estimator: what finds points or identities for it, in words; empty where nothing does.
        protocol: which frames count and how, in words.
        ours: the name of our metric that is made the same way; empty where none can be.
        unclear: why none can be.
        setting: what was drawn from what.
        quantise: what became of drawn frames before.
        unit: what its values are in. digits: as many as are printed behind the point.
    """

    name: str
    higher_is_better: bool
    estimator: str
    protocol: str
    ours: str
    unclear: str = ""
    quantise: Quantise = "truncate"
    setting: Setting = "reconstruction"
    unit: str = ""
    digits: int = 3

    def printed(self, value: float) -> str:
        """A value as the paper has it."""
        return f"{value:.{self.digits}f}"


@dataclass(frozen=True, slots=True)
class PublishedScore:
    """One printed number.

    Attributes:
        condition: what sets rows of one method apart: how many pictures it was fine-tuned on.
        same_as: the table that has the very same numbers for this method, where one was copied.
    """

    paper: str
    table: str
    dataset: str
    method: str
    metric: str
    value: float
    condition: str = ""
    same_as: str = ""


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table of one dataset, or what a table has of it; `note` is what a reader should know."""

    paper: str
    table: str
    dataset: str
    metrics: Sequence[PublishedMetric]
    scores: Sequence[PublishedScore]
    note: str = ""

    @property
    def rows(self) -> Mapping[tuple[str, str], Mapping[str, PublishedScore]]:
        """Scores by metric, of each method and condition, in print order."""
        rows: dict[tuple[str, str], dict[str, PublishedScore]] = {}
        for score in self.scores:
            rows.setdefault((score.method, score.condition), {})[score.metric] = score
        return rows


# --- metrics ---------------------------------------------------------------------------------

_ALL_FRAMES: Final = "mean over all frames of all videos together, frame 0 counted"
_POOLED: Final = f"{_ALL_FRAMES}, drawn frames cut off to 8 bits"
_L1: Final = PublishedMetric(
    "L1",
    False,
    "",
    f"{_ALL_FRAMES}, frames as they are drawn",
    "l1_with_first",
    quantise="none",
)
_AKD_BODY: Final = PublishedMetric(
    "AKD",
    False,
    "OpenPose, 18 joints",
    f"mean of |dx| and |dy| over the joints found in both frames; {_POOLED}",
    "akd_openpose_found",
    unit="px",
)
_MKR: Final = PublishedMetric(
    "MKR", False, "OpenPose, 18 joints", f"share of joints missed; {_POOLED}", "mkr_openpose"
)
_AED_BODY: Final = PublishedMetric(
    "AED",
    False,
    "re-identification network, 2048 numbers a frame",
    f"sum of squared differences, the network's input divided by 255 twice as the published code "
    f"has it, though nobody has shown that the printed numbers were made so; {_POOLED}",
    "aed_sq_reidpaper_found",
)
_AKD_FACE: Final = PublishedMetric(
    "AKD",
    False,
    "face-alignment, 68 points",
    f"mean of |dx| and |dy| over the points, frames without a face left out; {_POOLED}",
    "akd_fan_found",
    unit="px",
)
_AED_FACE: Final = PublishedMetric(
    "AED",
    False,
    "OpenFace, 128 numbers a frame",
    f"sum of squared differences; {_POOLED}",
    "aed_sq_openface_found",
)
_SSIM: Final = PublishedMetric(
    "SSIM",
    True,
    "",
    "of unseen frames of a person",
    "",
    unclear="the paper says neither its window nor which frames were held out, and has no code "
    "for it",
    setting="few_shot",
    digits=2,
)
_CSIM: Final = PublishedMetric(
    "CSIM",
    True,
    "ArcFace",
    "cosine with the true frame's vector, of unseen frames of a person",
    "",
    unclear="the paper says neither which weights nor which frames, and has no code for it",
    setting="few_shot",
    digits=2,
)


def _votes(name: str, question: str) -> PublishedMetric:
    return PublishedMetric(
        name,
        True,
        "25 people",
        f"share of people who chose it as {question}, one random sample a dataset each",
        "",
        unclear="a vote of people is not measured here",
        unit="%",
        digits=0,
    )


# --- tables ----------------------------------------------------------------------------------

# In the papers both systems are called "ours".
HEATMAP: Final = "keypoint mask"
CIRCLES: Final = "keypoint mask, circles"
REFINED: Final = "refined masking"


def _table(
    paper: str,
    table: str,
    dataset: str,
    metrics: Sequence[PublishedMetric],
    rows: Mapping[tuple[str, str], Sequence[float]],
    *,
    same_as: Mapping[str, str] | None = None,
    note: str = "",
) -> PublishedTable:
    scores = [
        PublishedScore(
            paper=paper,
            table=table,
            dataset=dataset,
            method=method,
            metric=metric.name,
            value=value,
            condition=condition,
            same_as=(same_as or {}).get(method, ""),
        )
        for (method, condition), values in rows.items()
        for metric, value in zip(metrics, values, strict=True)
    ]
    return PublishedTable(paper, table, dataset, tuple(metrics), tuple(scores), note)


_FRAME_0: Final = "The text reconstructs all frames but the first; the code counts that one too."
_OTHER_TAICHI: Final = f"{REFINED_MASKING}, Table 1"
PUBLISHED: Final[tuple[PublishedTable, ...]] = (
    _table(
        KEYPOINT_MASK,
        "Table 2",
        "Tai-Chi-HD",
        (_AKD_BODY, _AED_BODY, _L1),
        {
            ("X2Face", ""): (17.654, 0.272, 0.080),
            ("Monkey-Net", ""): (10.798, 0.228, 0.077),
            ("FOMM", ""): (6.872, 0.167, 0.063),
            (REFINED, ""): (4.239, 0.147, 0.047),
            (CIRCLES, ""): (14.760, 0.245, 0.077),
            (HEATMAP, ""): (5.551, 0.141, 0.045),
        },
        same_as=dict.fromkeys(("X2Face", "Monkey-Net", REFINED), _OTHER_TAICHI),
        note="125 test videos. Of FOMM the other paper has an AKD of 6.862 and an AED of 0.179: "
        "another run.",
    ),
    _table(
        REFINED_MASKING,
        "Table 1",
        "Tai-Chi-HD",
        (_L1, _AKD_BODY, _MKR, _AED_BODY),
        {
            ("X2Face", ""): (0.080, 17.654, 0.109, 0.272),
            ("Monkey-Net", ""): (0.077, 10.798, 0.059, 0.228),
            ("FOMM", ""): (0.063, 6.862, 0.036, 0.179),
            (REFINED, ""): (0.047, 4.239, 0.015, 0.147),
        },
        note=f"125 test videos. {_FRAME_0}",
    ),
    _table(
        REFINED_MASKING,
        "Table 1",
        "VoxCeleb",
        (_L1, _AKD_FACE, _AED_FACE),
        {
            ("X2Face", ""): (0.078, 7.687, 0.405),
            ("Monkey-Net", ""): (0.049, 1.878, 0.199),
            ("FOMM", ""): (0.043, 1.294, 0.140),
            (REFINED, ""): (0.034, 1.329, 0.130),
        },
        note=f"485 test videos. {_FRAME_0}",
    ),
    _table(
        REFINED_MASKING,
        "Table 1",
        "RoboNet",
        (_L1,),
        {
            ("X2Face", ""): (0.065,),
            ("Monkey-Net", ""): (0.034,),
            ("FOMM", ""): (0.027,),
            (REFINED, ""): (0.021,),
        },
        note=f"128 test videos. {_FRAME_0}",
    ),
    _table(
        REFINED_MASKING,
        "Table 2",
        "VoxCeleb1, few shots",
        (_SSIM, _CSIM),
        {
            ("X2Face", "#FT = 1"): (0.68, 0.16),
            ("X2Face", "#FT = 8"): (0.73, 0.17),
            ("X2Face", "#FT = 32"): (0.75, 0.18),
            ("Pix2PixHD", "#FT = 1"): (0.56, 0.09),
            ("Pix2PixHD", "#FT = 8"): (0.64, 0.12),
            ("Pix2PixHD", "#FT = 32"): (0.70, 0.16),
            ("FSAL", "#FT = 1"): (0.67, 0.15),
            ("FSAL", "#FT = 8"): (0.71, 0.17),
            ("FSAL", "#FT = 32"): (0.74, 0.19),
            (REFINED, "#FT = 0"): (0.80, 0.70),
        },
        note="#FT is how many pictures of the person a method was fine-tuned on.",
    ),
    *(
        _table(
            REFINED_MASKING,
            "Table 3",
            f"{dataset}, people's choice",
            (
                _votes("Quality", "the most realistic animation"),
                _votes("Motion", "the one most faithful to the driving video"),
            ),
            {
                ("X2Face", ""): x2face,
                ("Monkey-Net", ""): monkey_net,
                ("FOMM", ""): fomm,
                (REFINED, ""): refined,
            },
        )
        for dataset, x2face, monkey_net, fomm, refined in (
            ("Tai-Chi-HD", (0, 0), (4, 4), (16, 8), (80, 88)),
            ("VoxCeleb", (0, 0), (8, 0), (16, 12), (76, 88)),
            ("RoboNet", (0, 4), (4, 4), (24, 16), (72, 76)),
        )
    ),
)


# --- beside ours -----------------------------------------------------------------------------

_SETTINGS: Final[Mapping[Setting, str]] = {
    "reconstruction": "reconstruction",
    "cross": "another identity's motion",
    "few_shot": "few shots",
}


def differences(metric: PublishedMetric, table: ScoreTable) -> list[str]:
    """Why no number of an evaluation belongs beside this column's; empty where one does.

    That one does is said of estimator, setting and protocol, not of the videos.
    """
    if metric.unclear:
        return [metric.unclear]
    info = next((info for info in table.metrics if info.name == metric.ours), None)
    if info is None:
        return [_missing(metric, table)]
    reasons = []
    if table.setting != metric.setting:
        names = _SETTINGS[metric.setting], _SETTINGS[table.setting]
        reasons.append("theirs is of {}, this evaluation of {}".format(*names))
    if not info.counts_first:
        reasons.append("theirs counts frame 0, which is left out here")
    if info.quantise != metric.quantise:
        kinds = QUANTISED[metric.quantise], QUANTISED[info.quantise]
        reasons.append("theirs is of {}, here it is of {}".format(*kinds))
    if table.average != "frames":
        reasons.append("theirs is the mean over all frames, here it is that of the videos' means")
    return reasons


def _missing(metric: PublishedMetric, table: ScoreTable) -> str:
    """What there is instead of the metric that would compare."""
    label = metric_label(metric.ours)
    instead = [other for info in table.metrics if (other := _other_estimators(metric, info))]
    if instead:
        found = ", ".join(dict.fromkeys(instead))
        return f"theirs is by {metric.estimator}; {found} finds something else"
    return f"it takes {label.label} ({metric.ours}), which was not measured"


def _other_estimators(metric: PublishedMetric, info: MetricInfo) -> str:
    """The label of a metric of the same kind that another estimator is behind, or nothing."""
    kind, _, _ = metric.ours.removesuffix(FOUND).rpartition("_")
    label = metric_label(info.name)
    same = info.name.removesuffix(FOUND).rpartition("_")[0] == kind
    return label.label.replace(", found", "") if same and label.group != PICTURES else ""

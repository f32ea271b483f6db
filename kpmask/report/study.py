"""The pages of a user study: the one that participants answer, and that of the scores.

The first is given to strangers: it holds blind names alone, and works from a folder, a phone or any
static server, without a network. What it keeps is in the participant's own browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kpmask.records import Failure
from kpmask.report.page import (
    Tile,
    duration,
    failure_tile,
    failure_values,
    figure,
    num,
    render,
)
from kpmask.study import (
    BLIND_LENGTH,
    QUESTIONS,
    MethodShare,
    Preference,
    Question,
    Study,
    StudyScores,
)

ASKED: Final[Mapping[Question, tuple[str, str]]] = {
    "realism": ("Which result looks most real?", "Sharp, whole, and still the same subject."),
    "fidelity": (
        "Which result follows the driving video best?",
        "The same movement at the same moment.",
    ),
}
LABELS: Final[Mapping[Question, str]] = {"realism": "Realism", "fidelity": "Motion fidelity"}
SCREEN_S: Final = 25.0  # how long one takes, for a guess of the whole
MAX_PARTICIPANTS: Final = 500
MAX_COLUMNS: Final = 4  # more results stand in two rows
LEFT, WIDTH = 14, 332  # of a chart's bars, in units of its view box


def study_page(study: Study) -> str:
    """The page that participants answer; its media lie beside it, under their blind names."""
    data = {
        "study": study.study_id,
        "repeats": study.num_repeats,
        "items": [
            {
                "id": item.item_id,
                "driving": item.driving,
                "source": item.source,
                "videos": item.videos,
                "shape": f"{item.width_px} / {item.height_px}",
            }
            for item in study.items
        ],
    }
    num_methods = len(study.methods)
    return render(
        "study.html",
        title=study.title,
        kind="user study",
        home=None,
        own=("study",),
        data=data,
        num_screens=study.num_screens,
        minutes=max(1, round(study.num_screens * SCREEN_S / 60)),
        places=range(1, num_methods + 1),
        columns=num_methods if num_methods <= MAX_COLUMNS else (num_methods + 1) // 2,
        has_source=any(item.source for item in study.items),
        asked=ASKED,
        study_id=study.study_id[:BLIND_LENGTH],
    )


@dataclass(frozen=True, slots=True)
class _ShareRow:
    method: str
    shares: Sequence[MethodShare]
    best: Sequence[bool]


@dataclass(frozen=True, slots=True)
class _PairRow:
    question: str
    pair: Preference


@dataclass(frozen=True, slots=True)
class _Bar:
    label: str
    text: str
    width: float
    ends: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class _Chart:
    title: str
    bars: Sequence[_Bar]
    chance: float


def scores_page(
    scores: StudyScores, failures: Sequence[Failure], *, home: str | None = None
) -> str:
    """The page of a study's scores; `home` is the link of an overview page."""
    tiles = [
        Tile(num(scores.num_participants), "participants"),
        Tile(num(scores.num_items), "items"),
        Tile(num(scores.num_answers), "answers"),
    ]
    for agreement in scores.agreements:
        if agreement.share is not None:
            label = f"the same again, {LABELS[agreement.question].lower()}"
            tiles.append(Tile(percent(agreement.share), label))
    return render(
        "study_scores.html",
        title=scores.title,
        kind="user study, scores",
        home=home,
        scores=scores,
        tiles=[*tiles, failure_tile(scores.num_failures)],
        labels=LABELS,
        asked=ASKED,
        questions=QUESTIONS,
        rows=_share_rows(scores),
        charts=[_chart(scores, question) for question in QUESTIONS],
        frame={"left": LEFT, "width": WIDTH},
        pairs=[_PairRow(LABELS[pair.question], pair) for pair in scores.preferences],
        chance=1 / len(scores.methods),
        participants=scores.participants[:MAX_PARTICIPANTS],
        hidden_participants=max(0, len(scores.participants) - MAX_PARTICIPANTS),
        percent=percent,
        duration=duration,
        p_value=p_value,
        **failure_values(failures),
    )


def percent(share: float | None) -> str:
    """A share in [0, 1] for people."""
    return "–" if share is None else f"{100 * share:.0f} %"


def p_value(value: float) -> str:
    """A probability for people: very small ones are only told to be so."""
    return "< 0.0001" if value < 1e-4 else figure(value)


def _share_rows(scores: StudyScores) -> list[_ShareRow]:
    """Methods by questions, the most chosen first; the best of each question is marked."""
    by_question = {
        question: {s.method: s for s in scores.shares if s.question == question}
        for question in QUESTIONS
    }
    most = {q: max(s.num_chosen for s in found.values()) for q, found in by_question.items()}
    rows = []
    for method in scores.methods:
        shares = [by_question[question][method] for question in QUESTIONS]
        best = [s.num_chosen == most[q] for q, s in zip(QUESTIONS, shares, strict=True)]
        rows.append(_ShareRow(method, shares, best))
    return sorted(rows, key=lambda row: -sum(share.share for share in row.shares))


def _chart(scores: StudyScores, question: Question) -> _Chart:
    """A bar for each method, the most chosen first, and the line of drawing lots."""
    found = [share for share in scores.shares if share.question == question]
    bars = [
        _Bar(
            label=share.method,
            text=percent(share.share),
            width=round(WIDTH * share.share, 2),
            ends=None
            if share.low is None or share.high is None
            else (_x_of(share.low), _x_of(share.high)),
        )
        for share in sorted(found, key=lambda share: -share.share)
    ]
    return _Chart(LABELS[question], bars, _x_of(1 / len(scores.methods)))


def _x_of(share: float) -> float:
    return round(LEFT + WIDTH * share, 2)

"""The page of a folder that holds several jobs: what is there, and the way to each page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from kpmask.report.page import Tile, num, render

JobKind = Literal[
    "front page",
    "dataset",
    "run",
    "animations",
    "evaluation",
    "comparison",
    "study",
    "study scores",
]
# In the order of their headings: singular, plural.
TITLES: Final[Mapping[JobKind, tuple[str, str]]] = {
    "front page": ("front page", "Front pages"),
    "dataset": ("dataset", "Datasets"),
    "run": ("training run", "Training runs"),
    "animations": ("catalog of animations", "Animations"),
    "evaluation": ("evaluation", "Evaluations"),
    "comparison": ("comparison", "Comparisons"),
    "study": ("user study", "User studies"),
    "study scores": ("scored study", "Scores of user studies"),
}
MAX_JOBS: Final = 2000


@dataclass(frozen=True, slots=True)
class FoundJob:
    """A job in a folder.

    Attributes:
        path: of its folder, relative to the page. A front page is that of a whole folder of jobs,
            such as a demonstration's.
        page: of its page, likewise; empty where there is none.
        facts: a few words each.
        picture: of it, relative to the page; empty where there is none.
        failures: items of it that could not be done.
        going_on: it is not finished.
    """

    kind: JobKind
    path: str
    page: str
    facts: Sequence[str] = ()
    picture: str = ""
    failures: int = 0
    going_on: bool = False


def overview_page(*, title: str, jobs: Sequence[FoundJob], home: str | None = None) -> str:
    """The page of a folder of jobs, by kind; within a kind in the order given.

    Args:
        home: link of an overview page above this one.
    """
    groups = [
        (plural, [job for job in jobs[:MAX_JOBS] if job.kind == kind])
        for kind, (_, plural) in TITLES.items()
    ]
    counts = [(sum(job.kind == kind for job in jobs), names) for kind, names in TITLES.items()]
    return render(
        "overview.html",
        title=title,
        kind="overview",
        home=home,
        tiles=[
            Tile(num(count), one if count == 1 else many.lower())
            for count, (one, many) in counts
            if count
        ],
        groups=[(heading, found) for heading, found in groups if found],
        num_hidden=max(0, len(jobs) - MAX_JOBS),
    )

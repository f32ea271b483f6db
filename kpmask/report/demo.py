"""The front page of a demonstration: all four parts, the moving results first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from kpmask.records import (
    AnimationRecord,
    CatalogManifest,
    DatasetManifest,
    Failure,
    RunManifest,
    ScoreTable,
    StepMetrics,
)
from kpmask.report.evaluation import MethodRow, compared_rows, method_rows, metric_columns
from kpmask.report.gallery import GalleryMedia, gallery_item
from kpmask.report.page import Tile, duration, failure_tile, failure_values, num, render
from kpmask.report.run import loss_curve_svg


@dataclass(frozen=True, slots=True)
class Link:
    """A page of a part: its name and its path relative to the front page."""

    label: str
    path: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command to go on with, and what it does."""

    label: str
    text: str


DEMO_LEAD: Final = (
    "Still pictures of drawn people, animated with other people's motion by the weights that come "
    "with kpmask, which have seen none of these people. Below, a short training of your own on "
    "the same videos, and how the two compare."
)


def demo_page(
    *,
    title: str,
    dataset: DatasetManifest,
    run: RunManifest,
    catalog: CatalogManifest,
    records: Sequence[AnimationRecord],
    media: Mapping[str, GalleryMedia],
    table: ScoreTable,
    own_table: ScoreTable | None = None,
    failures: Sequence[Failure] = (),
    metrics: Sequence[StepMetrics] = (),
    samples: Sequence[str] = (),
    links: Sequence[Link] = (),
    commands: Sequence[Command] = (),
    seconds: Mapping[str, float] | None = None,
    lead: str = DEMO_LEAD,
    limit: int = 12,
) -> str:
    """The front page of a whole run: the moving results first, then how they came about.

    Args:
        run: the short training, whose scores are `own_table`.
        catalog, records: of the bundled weights, whose scores are `table`.
        media: of the results, by item id, relative to this page.
        failures: of all four parts together.
        samples: sample strips of the training, oldest first; the last is shown.
        links: the parts' own pages.
        commands: what to type next.
        seconds: wall time of each part by name.
        limit: of results shown here.
    """
    tiles = [
        Tile(num(dataset.num_train + dataset.num_test), "clips cut"),
        Tile(num(dataset.num_frames), "frames in them"),
        Tile(num(run.num_steps), "training steps"),
        Tile(num(catalog.num_items), "animations"),
        Tile(num(catalog.num_frames), "frames made"),
        *(Tile(duration(value), name) for name, value in (seconds or {}).items()),
        failure_tile(len(failures)),
    ]
    return render(
        "demo.html",
        title=title,
        kind="demonstration",
        home=None,
        lead=lead,
        links=links,
        items=[gallery_item(record, media) for record in records[:limit]],
        results_note=_results_note(len(records), limit),
        tiles=tiles,
        curve=Markup(loss_curve_svg(metrics)),  # noqa: S704 - our own drawing
        strips=list(samples)[-1:],
        metrics=metric_columns(table),
        methods=_methods(table, own_table, run),
        training_note=_training_note(run),
        commands=commands,
        footer=f"Bundled weights {catalog.weights_sha256[:16]}; your own training: {run.system} "
        f"with {run.perceptual} features, weights {run.weights_sha256[:16]}.",
        **failure_values(failures),
    )


def _methods(table: ScoreTable, own_table: ScoreTable | None, run: RunManifest) -> list[MethodRow]:
    if own_table is None:
        return method_rows(table)
    mine = f"your own training, {num(run.num_steps)} steps"
    return compared_rows({"the bundled weights": table, mine: own_table})


def _training_note(run: RunManifest) -> str:
    return (
        f"{num(run.num_steps)} steps of {run.system}, enough to see it learn. From left: source, "
        "driving frame, their masks, result. The bundled weights had a far longer training."
    )


def _results_note(count: int, limit: int) -> str:
    shown = f"The first {limit} of {count}. " if count > limit else ""
    return shown + "Left the still picture, in the middle the motion it takes, right the result."

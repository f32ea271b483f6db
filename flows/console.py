"""What a person sees of a running job: progress bars, tables, errors, exit status.

- Progress and words go to standard error; results go to standard output, so that `--json` can be
  piped.
- Exit status: 0 done, 1 the run failed, 2 the command or its configuration is wrong, 130
  interrupted with what is done kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from kpmask.errors import CheckpointError, ConfigError, KpmaskError
from kpmask.records import Progress

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class GuardedGroup(TyperGroup):
    """Turns our errors and Ctrl-C into one line and an exit status; bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer's own context type is private
        try:
            return super().invoke(ctx)
        except KpmaskError as error:
            say_error(error)
            usage = isinstance(error, ConfigError | CheckpointError)
            raise typer.Exit(EXIT_USAGE if usage else EXIT_FAILED) from None
        except KeyboardInterrupt:
            typer.echo("Interrupted. What is done is kept; the same command goes on.", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None


def say_error(error: KpmaskError) -> None:
    """One error for people: subject and cause, then the way out, then the code."""
    subject = f"{error.subject}: " if error.subject else ""
    typer.secho(f"error: {subject}{error.cause}", fg="red", err=True)
    if error.hint:
        typer.echo(f"  try: {error.hint}", err=True)
    typer.echo(f"  code: {error.code}", err=True)


def say(text: str) -> None:
    typer.echo(text, err=True)


def show(result: Any, *, as_json: bool, lines: Sequence[str]) -> None:  # noqa: ANN401
    """A job's result: JSON for scripts, else the given lines."""
    if as_json:
        typer.echo(json.dumps(result, indent=2, sort_keys=True, default=str))
        return
    for line in lines:
        typer.echo(line)


@contextmanager
def progress_bars(*, quiet: bool = False) -> Iterator[Callable[[Progress], None]]:
    """A callback that draws one bar a stage (plain lines when standard error is no terminal)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as Bars,
    )

    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield _line_reporter(console)
        return
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[message]}"),
    )
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def report(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, message="")
            bars.update(
                tasks[progress.stage],
                completed=progress.done,
                total=progress.total,
                message=progress.message,
            )

        yield report


def _line_reporter(console: Any) -> Callable[[Progress], None]:  # noqa: ANN401
    """Without a terminal: a line a stage for each tenth of the way."""
    told: dict[str, int] = {}

    def report(progress: Progress) -> None:
        tenth = 10 * progress.done // progress.total if progress.total else 0
        if told.get(progress.stage) == tenth:
            return
        told[progress.stage] = tenth
        message = f"  {progress.message}" if progress.message else ""
        console.print(
            f"{progress.stage}: {progress.done}/{progress.total}{message}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    return report


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain aligned table; the first column to the left, the rest to the right."""
    widths = [max(len(r[i]) for r in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(columns), "  ".join("-" * w for w in widths), *map(line, rows)])

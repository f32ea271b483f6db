"""Options that several commands share, and the answer to --dry-run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flows import console
from kpmask.model_config import Part

Out = Annotated[str, typer.Option("--out", help="Folder or s3://bucket/prefix for the output.")]
Preset = Annotated[
    str | None, typer.Option("--preset", help="A preset's name, or the path of a TOML file.")
]
JobFile = Annotated[
    str | None, typer.Option("--job", help="A TOML file with settings, over the preset's.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; may be repeated."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved job and what would be done.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def say_plan(job: Part, plan: list[str], *, as_json: bool) -> None:
    """The answer to --dry-run: the job as resolved, and what would be done."""
    import tomli_w

    resolved = job.model_dump(mode="json", exclude={"download": {"cookies_file", "proxy"}})
    console.show(
        {"job": resolved, "plan": plan},
        as_json=as_json,
        lines=[tomli_w.dumps(_without_none(resolved)), *(f"# {line}" for line in plan)],
    )


def _without_none(value: Any) -> Any:  # noqa: ANN401 - plain data
    """TOML has no null: leave out what is not set."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value

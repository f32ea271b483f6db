"""What a run leaves in Prefect's UI: a report, a table of failures by code, a link to the page.

Artifacts are for looking at. Whatever matters is in the store, so a server that cannot be reached
costs the artifacts and nothing else.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows.engine import artifact_key, run_logger, tell_prefect
from kpmask.errors import DatasetError, StorageError
from kpmask.records import Failure
from tasks.manifest import iter_table_if_any
from tasks.storage import open_store

PAGE = "index.html"
FAILURES = "failures.parquet"
MAX_TEXT_CHARS = 300  # of an item or a cause
MAX_PICTURE_CHARS = 200_000  # Prefect keeps every report in its database


def publish(
    job: str,
    uri: str,
    counts: Mapping[str, object],
    *,
    files: Sequence[str] = (PAGE,),
    news: Sequence[str] = (),
) -> None:
    """Leave the report, the failures and the page of a finished job in Prefect.

    Args:
        job: the job's name; it starts the artifacts' keys.
        uri: where the job's output is.
        counts: what the report's table says, in its order.
        files: names under `uri` that the report links to.
        news: Markdown lines that the report starts with.
    """
    failures = _failures(uri)
    _leave(
        create_markdown_artifact,
        key=artifact_key(job, "report"),
        markdown=report(job, uri, counts, files=files, failures=failures, news=news),
        description=f"What {job} made",
    )
    if failures:
        _leave(
            create_table_artifact,
            key=artifact_key(job, "failures"),
            table=failures,
            description="Items that could not be done, by code",
        )
    _leave(
        create_link_artifact,
        key=artifact_key(job, "page"),
        link=link(uri, PAGE),
        link_text=f"{job}: {uri}",
        description="The page with pictures",
    )


def report(
    job: str,
    uri: str,
    counts: Mapping[str, object],
    *,
    files: Sequence[str] = (),
    failures: Sequence[Mapping[str, Any]] = (),
    news: Sequence[str] = (),
) -> str:
    """A finished job as Markdown; `failures` are the rows of `failure_table`."""
    lines = [f"# {job}", "", f"`{uri}`", ""]
    lines += [*news, ""] if news else []
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in counts.items()]
    if failures:
        lines += ["", "| failure | items | stage | for one | cause |", "|---|---|---|---|---|"]
        lines += [
            f"| {row['code']} | {row['items']} | {row['stage']} "
            f"| {_plain(row['example'])} | {_plain(row['cause'])} |"
            for row in failures
        ]
    if files:
        lines += ["", *(f"- [{name}]({link(uri, name)})" for name in files)]
    return "\n".join(lines) + "\n"


def picture(jpeg: bytes, words: str) -> str:
    """A JPEG within Markdown; its words alone where it is too long."""
    data = base64.b64encode(jpeg).decode()
    if len(data) > MAX_PICTURE_CHARS:
        return words
    return f"![{words}](data:image/jpeg;base64,{data})"


def failure_table(failures: Iterable[Failure]) -> list[dict[str, Any]]:
    """One row for each code, the commonest first, with one example."""
    examples: dict[str, Failure] = {}
    counts: Counter[str] = Counter()
    for failure in failures:
        examples.setdefault(failure.code, failure)
        counts[failure.code] += 1
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return [
        {
            "code": code,
            "items": count,
            "stage": examples[code].stage,
            "example": _short(examples[code].item),
            "cause": _short(examples[code].cause),
        }
        for code, count in ordered
    ]


def link(uri: str, name: str) -> str:
    """The address of `name` under `uri`; a folder's becomes a file:// address."""
    if "://" in uri:
        return f"{uri.rstrip('/')}/{name}"
    return (Path(uri).absolute() / name).as_uri()


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[:MAX_TEXT_CHARS]}…"


def _plain(text: str) -> str:
    """Text of strangers, as a file's name: no picture, link, tag or column comes of it."""
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", " ".join(text.split()))


def _failures(uri: str) -> list[dict[str, Any]]:
    try:
        return failure_table(iter_table_if_any(open_store(uri), FAILURES, Failure))
    except (StorageError, DatasetError) as error:
        run_logger().warning("the failures cannot be shown: %s", error)
        return []


def _leave(create: Callable[..., object], **artifact: Any) -> None:  # noqa: ANN401
    tell_prefect(f"artifact {artifact['key']}", lambda: create(**artifact))

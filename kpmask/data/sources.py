"""The kinds of sources: what each needs, and whose videos they are.

Sources with annotations give rows (`source_rows`). Of the others there are the videos alone: a
name says who is in one (`identity_of`), and the subject is looked for in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

from kpmask.config import ANNOTATED_SOURCES, SourceKind
from kpmask.data import layouts
from kpmask.data.layouts import partition_of
from kpmask.data.metadata import iter_metadata
from kpmask.data.voxceleb import iter_voxceleb
from kpmask.records import Failure, SourceRow


def source_rows(
    kind: SourceKind,
    path: Path,
    *,
    test_identities: Collection[str] = (),
    test_fraction: float = 0.1,
) -> Iterator[SourceRow | Failure]:
    """The rows of a source with annotations, and a failure for each that makes no sense.

    One pass in bounded memory; rows are not compared with each other. A table says its split
    itself, as long as no test identities are named.

    Args:
        kind: table, taichi, voxceleb1 or voxceleb2.
        path: the table; or the annotations' folder or archive.
        test_identities: see `partition_of`.
        test_fraction: see `partition_of`.

    Raises:
        ConfigError: as the iteration goes: there is no such thing, or it is not what it should be.
        ValueError: a source of another kind, which has no rows.
    """
    if kind not in ANNOTATED_SOURCES:
        raise ValueError(f"a source of kind {kind} has no rows")
    if kind == "voxceleb1" or kind == "voxceleb2":
        return iter_voxceleb(
            path,
            version=1 if kind == "voxceleb1" else 2,
            test_identities=test_identities,
            test_fraction=test_fraction,
        )
    rows = iter_metadata(path)
    return _split(rows, frozenset(test_identities)) if test_identities else rows


def identity_of(kind: SourceKind, name: str) -> str:
    """Who is in a video that comes without annotations, by its name without folder and suffix.

    nemo: the person, before the first `_`. robonet: the trajectory, whose cameras see one run of
    the robot. videos: what comes before `#`.
    """
    if kind == "nemo":
        return name.partition("_")[0] or name
    return layouts.identity_of(name)


def _split(
    rows: Iterator[SourceRow | Failure], tested: frozenset[str]
) -> Iterator[SourceRow | Failure]:
    for row in rows:
        if isinstance(row, Failure):
            yield row
            continue
        partition = partition_of(row.identity, test_identities=tested, test_fraction=0.0)
        yield dataclasses.replace(row, partition=partition)

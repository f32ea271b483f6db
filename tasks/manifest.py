"""Tables of records and the ledger of a running stage, in an object store.

Equal records give equal bytes: tables are written with fixed settings and without a time, JSON with
sorted keys. A table is written once, at the end; until then a `Journal` keeps what is done.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import re
import tempfile
import threading
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from kpmask.errors import DatasetError, RunFailed, StorageError
from kpmask.records import Failure, as_dict, digest, from_table, to_table
from tasks.storage import ObjectStore, os_errors

log = logging.getLogger(__name__)

R = TypeVar("R")

NUM_CODES_NAMED: Final = 3
JOURNAL_THREADS: Final = 16
ROWS_PER_GROUP: Final = 20_000
BATCH_ROWS: Final = 5_000


# --- tables ----------------------------------------------------------------------------------


def write_table(
    store: ObjectStore,
    key: str,
    records: Iterable[R],
    record_type: type[R],
    *,
    metadata: Mapping[str, str] | None = None,
    rows_at_once: int | None = None,
) -> None:
    """Publish records as a Parquet table; `metadata` (a settings digest, say) goes into it.

    Records are taken as they come, and memory is flat.

    Args:
        rows_at_once: records in memory, and in one group of the table: fewer of long ones. None is
            ROWS_PER_GROUP.
    """
    rows = rows_at_once or ROWS_PER_GROUP
    settings = dict(sorted((metadata or {}).items()))
    stream = iter(records)
    table = to_table(itertools.islice(stream, rows), record_type, settings)
    with tempfile.TemporaryDirectory(prefix="kpmask-") as folder, os_errors(key):
        path = Path(folder) / "table.parquet"
        options: dict[str, Any] = {"compression": "zstd", "version": "2.6"}
        with pq.ParquetWriter(path, table.schema, **options) as writer:
            writer.write_table(table)
            while (
                table := to_table(itertools.islice(stream, rows), record_type, settings)
            ).num_rows:
                writer.write_table(table)
        store.put_file(key, path)


def read_table(store: ObjectStore, key: str, record_type: type[R]) -> list[R]:
    """The records of a table.

    Raises:
        StorageError: `not_found` and the like.
        DatasetError: not a Parquet file, or not of this record type.
    """
    return list(iter_table(store, key, record_type))


def iter_table(
    store: ObjectStore, key: str, record_type: type[R], *, rows_at_once: int = BATCH_ROWS
) -> Iterator[R]:
    """The records of a table, with flat memory; raises as `read_table`."""
    path = store.local(key)
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if file.metadata.num_rows == 0:
                from_table(schema.empty_table(), record_type)  # is it of this type?
            for batch in file.iter_batches(batch_size=rows_at_once):
                yield from from_table(pa.Table.from_batches([batch], schema), record_type)
    except (pa.ArrowInvalid, ValueError, OSError) as error:
        raise DatasetError(f"not a table: {error}", subject=f"{store.uri}/{key}") from error


def read_table_if_any(store: ObjectStore, key: str, record_type: type[R]) -> list[R] | None:
    """`read_table`, or None where there is no such object."""
    try:
        return read_table(store, key, record_type)
    except StorageError as error:
        if error.code == "not_found":
            return None
        raise


def iter_table_if_any(
    store: ObjectStore, key: str, record_type: type[R], *, rows_at_once: int = BATCH_ROWS
) -> Iterator[R]:
    """`iter_table`, or nothing where there is no such object."""
    try:
        yield from iter_table(store, key, record_type, rows_at_once=rows_at_once)
    except StorageError as error:
        if error.code != "not_found":
            raise


def read_table_metadata(store: ObjectStore, key: str) -> dict[str, str]:
    """What `write_table` was given as metadata, and the record's name and schema version."""
    path = store.local(key)
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, ValueError) as error:
        raise DatasetError(f"not a table: {error}", subject=f"{store.uri}/{key}") from error
    return {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}


# --- JSON ------------------------------------------------------------------------------------


def write_json(store: ObjectStore, key: str, value: Any) -> None:  # noqa: ANN401 - JSON or record
    """Publish a JSON value, or a record, in one fixed form."""
    if dataclasses.is_dataclass(value):
        value = as_dict(value)
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    store.put(key, f"{text}\n".encode())


def read_json(store: ObjectStore, key: str) -> Any:  # noqa: ANN401 - any JSON value
    """The value of a JSON object in the store.

    Raises:
        StorageError: `not_found` and the like.
        DatasetError: it is not JSON.
    """
    try:
        return json.loads(store.get(key))
    except ValueError as error:
        raise DatasetError(f"not JSON: {error}", subject=f"{store.uri}/{key}") from error


def read_record(store: ObjectStore, key: str, record_type: type[R]) -> R:
    """A record that `write_json` wrote, with the records and tuples in it.

    Raises:
        StorageError: `not_found` and the like.
        DatasetError: it is not JSON, or not of this record type.
    """
    values = read_json(store, key)
    try:
        return _record(record_type, values)
    except (TypeError, AttributeError) as error:
        cause = f"not a {record_type.__name__}: {error}"
        raise DatasetError(cause, subject=f"{store.uri}/{key}") from error


def _record(record_type: type[R], values: Mapping[str, Any]) -> R:
    hints = typing.get_type_hints(record_type)
    return record_type(**{name: _typed(hints.get(name), v) for name, v in values.items()})


def _typed(hint: Any, value: Any) -> Any:  # noqa: ANN401 - JSON, and what stands for a type
    """A JSON value as the type hint wants it: records for objects, tuples for lists."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if isinstance(value, list) and typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            each = itertools.repeat(inner[0]) if inner[-1] is Ellipsis else inner
            return tuple(_typed(one, part) for one, part in zip(each, value, strict=False))
        if isinstance(value, dict) and isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return _record(kind, value)
    return value


# --- failures --------------------------------------------------------------------------------


def check_failures(failures: Sequence[Failure], total: int, max_failed_fraction: float) -> None:
    """End the run when more than a fraction of its items failed.

    Raises:
        RunFailed: code `too_many_failures`, naming the commonest codes and the first cause.
    """
    counts = Counter(failure.code for failure in failures)
    first = next((f for f in failures if f.code == counts.most_common(1)[0][0]), None)
    check_counts(counts, first, total, max_failed_fraction)


def check_counts(
    counts: Counter[str], first: Failure | None, total: int, max_failed_fraction: float
) -> None:
    """`check_failures` of failures that are counted by code; `first` is one of the commonest.

    Raises:
        RunFailed: as `check_failures`.
    """
    if first is None or counts.total() <= max_failed_fraction * total:
        return
    codes = counts.most_common()
    named = ", ".join(f"{count} x {code}" for code, count in codes[:NUM_CODES_NAMED])
    more = f" and {len(codes) - NUM_CODES_NAMED} other codes" * (len(codes) > NUM_CODES_NAMED)
    raise RunFailed(
        f"{counts.total()} of {total} items failed: {named}{more}; "
        f"for one, {first.item}: {first.cause}",
        code="too_many_failures",
        hint=f"max_failed_fraction allows {max_failed_fraction:g}",
    )


# --- journal ---------------------------------------------------------------------------------


class Journal(Generic[R]):
    """What a running stage has finished, so that a rerun subtracts it.

    One small object per item: what `add` returned from survives any death of ours, drivers do not
    overwrite one another, and there is no state but the objects. (Batches would need fewer requests
    but lose, with a killed run, items that took minutes each. An entry takes 2 to 3 ms to write;
    10,000 are read back in half a second from a folder and in some ten seconds from S3.)

    An id should digest everything that shapes the item's result, or `prefix` should, so that an
    entry is never taken for one of another setting. An entry that cannot be read is logged and
    counts as not there: its item is done again.
    """

    def __init__(self, store: ObjectStore, prefix: str, record_type: type[R]) -> None:
        self._root = store
        self._store = store.child(prefix)
        self._record_type = record_type
        self._read: tuple[dict[str, R], dict[str, Failure]] | None = None
        self._lock = threading.Lock()

    def done(self) -> dict[str, R]:
        """The finished items' records by id. Also sweeps what a killed run left half written."""
        return dict(self._entries()[0])

    def failures(self) -> dict[str, Failure]:
        """The failed items by id."""
        return dict(self._entries()[1])

    def add(self, item_id: str, record: R) -> None:
        """Record a finished item; an earlier failure of it is forgotten."""
        self._put("done", item_id, as_dict(record))
        done, failures = self._entries()
        done[item_id] = record
        if failures.pop(item_id, None):
            self._store.delete(_entry_key("failed", item_id))

    def add_failure(self, item_id: str, failure: Failure) -> None:
        """Record a failed item."""
        self._put("failed", item_id, as_dict(failure))
        self._entries()[1][item_id] = failure

    def clear(self) -> None:
        """Remove the journal, once the manifest that holds its content is published."""
        with ThreadPoolExecutor(JOURNAL_THREADS) as pool:
            for _ in pool.map(self._store.delete, [info.key for info in self._store.list()]):
                pass
        self._read = ({}, {})

    def _put(self, kind: str, item_id: str, record: dict[str, Any]) -> None:
        entry = json.dumps({"id": item_id, "record": record}, sort_keys=True)
        self._store.put(_entry_key(kind, item_id), entry.encode())

    def _entries(self) -> tuple[dict[str, R], dict[str, Failure]]:
        with self._lock:
            if self._read is None:
                self._root.sweep()
                self._read = (
                    self._load("done", self._record_type),
                    self._load("failed", Failure),
                )
                for item_id in self._read[0]:
                    self._read[1].pop(item_id, None)
            return self._read

    def _load(self, kind: str, record_type: type[Any]) -> dict[str, Any]:
        def load(key: str) -> tuple[str, Any] | None:
            try:
                return _parsed(self._store.get(key), record_type)
            except (ValueError, TypeError, KeyError) as error:
                log.warning("%s/%s is unreadable and left out: %s", self._store.uri, key, error)
                return None

        keys = [info.key for info in self._store.list(f"{kind}/")]
        with ThreadPoolExecutor(JOURNAL_THREADS) as pool:
            return dict(entry for entry in pool.map(load, keys) if entry)


def _entry_key(kind: str, item_id: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", item_id)
    return f"{kind}/{item_id if plain else digest(item_id)}.json"


def _parsed(data: bytes, record_type: type[R]) -> tuple[str, R]:
    entry = json.loads(data)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["record"].items()}
    return str(entry["id"]), record_type(**fields)

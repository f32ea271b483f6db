"""A run over a catalog as tables on this machine's disk, so that memory does not grow with it.

Whatever needs all rows or all items at once (which names are taken, what repeats, what is done, in
which order things are made) is a query of a SQLite file that is thrown away with the run. What must
outlive the run is in the store of the results and never here.

    row      what is asked for, until the items are made of it
    taken    names in use, folded, and the number that the next one of a kind may have
    input    images and driving videos: their digests, or why there is none
    item     an animation to be made; its record once it is there
    turn     items in the order in which they are worked on
    feature  states of images and driving videos that items need, and how many still do
    failure  what cannot be had
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

from kpmask.data import catalog
from kpmask.errors import ItemError, RowError
from kpmask.records import (
    AnimationItem,
    AnimationRecord,
    CatalogRow,
    Failure,
    FeatureRecord,
    as_dict,
)
from tasks.sqlite_book import BATCH, SqliteBook
from tasks.storage import ObjectInfo

PAGE: Final = 1000

_TABLES: Final = """
CREATE TABLE row (id INTEGER PRIMARY KEY, line INT, name TEXT, source TEXT, driving TEXT,
                  motion TEXT, data TEXT);
CREATE TABLE taken (name TEXT PRIMARY KEY, next INT DEFAULT 2) WITHOUT ROWID;
CREATE TABLE input (uri TEXT, is_driving INT, sha256 TEXT, num_frames INT, failure TEXT,
                    PRIMARY KEY (uri, is_driving)) WITHOUT ROWID;
CREATE TABLE item (item_id TEXT PRIMARY KEY, name TEXT, source_sha256 TEXT, driving_sha256 TEXT,
                   source_feature TEXT, driving_feature TEXT, num_frames INT, data TEXT,
                   record TEXT, record_frames INT, state TEXT);
CREATE TABLE turn (position INTEGER PRIMARY KEY, item INT);
CREATE TABLE feature (feature_id TEXT PRIMARY KEY, num_left INT, record TEXT, failure TEXT)
                     WITHOUT ROWID;
CREATE TABLE failure (item TEXT, stage TEXT, code TEXT, cause TEXT, data TEXT);
"""
_ITEM_INDEX: Final = "CREATE INDEX item_state ON item (state, record_frames)"

ItemOf = Callable[[CatalogRow, str, str], AnimationItem]
FeatureIds = Callable[[AnimationItem], tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Input:
    """An image or driving video that is there.

    `num_frames` is what a driving video's header says: 0 where it says nothing, and of an image.
    """

    sha256: str
    num_frames: int


class Counts(NamedTuple):
    """How many items, different images, different driving videos, and failures there are."""

    num_items: int
    num_sources: int
    num_drivings: int
    num_failures: int


class Totals(NamedTuple):
    """How many items are done, the frames of their results, and how many failures there are."""

    num_items: int
    num_frames: int
    num_failures: int


class CatalogBook(SqliteBook):
    """The tables of one run, in a new file at `path`.

    In this order: `add_rows`, `name_rows`, `inputs` with `set_inputs`, `make_items`; then what an
    earlier run left: `add_records`, `check_present`; then the work itself.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._db.executescript(_TABLES)

    # --- rows --------------------------------------------------------------------------------

    def add_rows(self, found: Iterable[CatalogRow | Failure]) -> None:
        """Take in the rows of a catalog, as they are read."""
        stream = iter(found)
        while batch := list(itertools.islice(stream, BATCH)):
            self._many(
                "INSERT INTO row (line, name, source, driving, motion, data)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (_row_values(row) for row in batch if isinstance(row, CatalogRow)),
            )
            self.add_failures(f for f in batch if isinstance(f, Failure))

    def name_rows(self) -> None:
        """Give every row a name of its own: the given one, or one made from its files' names.

        A row whose given name an earlier row was given fails as `duplicate_name`. Given names come
        first, so that none is lost to one that was made.
        """
        for page in self._row_pages("name != ''"):
            self._keep_given(page)
        for page in self._row_pages("name = ''"):
            with self._transaction():
                names = [(self._free_name(catalog.made_name(row)), id_) for id_, row in page]
                self._db.executemany("UPDATE row SET name = ? WHERE id = ?", names)

    def _keep_given(self, page: Sequence[tuple[int, CatalogRow]]) -> None:
        with self._transaction():
            refused = [(id_, row) for id_, row in page if not self._take(row.name.casefold())]
        self._refuse((id_, catalog.duplicate_name(row)) for id_, row in refused)

    def _take(self, folded: str) -> bool:
        """Take a name; whether it was free."""
        statement = "INSERT OR IGNORE INTO taken (name) VALUES (?)"
        return self._db.execute(statement, (folded,)).rowcount == 1

    def _free_name(self, name: str) -> str:
        """The name itself if it is free, else with the first number that makes it so."""
        folded = name.casefold()
        if self._take(folded):
            return name
        # All numbers before `next` are taken, and names do not get free again.
        number = int(self._one("SELECT next FROM taken WHERE name = ?", folded))
        while not self._take(f"{folded}-{number}"):
            number += 1
        self._db.execute("UPDATE taken SET next = ? WHERE name = ?", (number + 1, folded))
        return f"{name}-{number}"

    def refuse_motions(self, motions: Collection[str]) -> None:
        """Refuse the rows, which have their names, whose motion is not among these."""
        marks = ", ".join("?" * len(motions))
        cause = f"this checkpoint supports {', '.join(sorted(motions))} motion only"
        for page in self._row_pages(f"motion NOT IN ({marks})", *motions):
            self._refuse((id_, _failure_of(row, RowError(cause))) for id_, row in page)

    def _refuse(self, refused: Iterable[tuple[int, Failure]]) -> None:
        found = list(refused)
        self._many("DELETE FROM row WHERE id = ?", ((id_,) for id_, _ in found))
        self.add_failures(failure for _, failure in found)

    def _row_pages(self, where: str, *values: str) -> Iterator[list[tuple[int, CatalogRow]]]:
        """Rows with their ids, in the order of the catalog; pages may be changed as they come."""
        last = 0
        query = f"SELECT * FROM row WHERE id > ? AND {where} ORDER BY id LIMIT {PAGE}"
        while found := self._db.execute(query, (last, *values)).fetchall():
            last = found[-1][0]
            yield [(id_, _row_of(*columns)) for id_, *columns in found]

    # --- inputs ------------------------------------------------------------------------------

    def inputs(self) -> Iterator[tuple[str, bool]]:
        """(URI, whether as a driving video) of what rows name and nothing is known of yet; once
        each, by URI. One that serves as both comes twice, one after the other.
        """
        for column, is_driving in (("source", 0), ("driving", 1)):
            self._db.execute(
                f"INSERT OR IGNORE INTO input (uri, is_driving) SELECT {column}, ? FROM row",
                (is_driving,),
            )
        last: tuple[str, int] = ("", -1)
        while page := self._db.execute(
            "SELECT uri, is_driving FROM input WHERE (uri, is_driving) > (?, ?)"
            " AND sha256 IS NULL AND failure IS NULL ORDER BY uri, is_driving LIMIT ?",
            (*last, PAGE),
        ).fetchall():
            last = page[-1]
            for uri, is_driving in page:
                yield uri, bool(is_driving)

    def set_inputs(self, found: Iterable[tuple[str, bool, Input | Failure]]) -> None:
        """What was found of some of `inputs`. The rows of one that failed fail as it did."""
        self._many(
            "UPDATE input SET sha256 = ?, num_frames = ?, failure = ?"
            " WHERE uri = ? AND is_driving = ?",
            ((*_input_values(facts), uri, is_driving) for uri, is_driving, facts in found),
        )

    # --- items -------------------------------------------------------------------------------

    def make_items(self, item_of: ItemOf, feature_ids: FeatureIds) -> None:
        """Make the items of the rows; the rows are gone then.

        A row whose input failed fails as its image did, else as its driving video. Of two rows
        with one id the first is made, and the other one fails as `duplicate_row`.

        Args:
            item_of: the item of a row, by the digests of image and video; may raise `ItemError`.
            feature_ids: of the item's image and of its driving video.
        """
        last = 0
        while page := self._db.execute(
            "SELECT row.*, s.sha256, s.failure, d.sha256, d.failure, d.num_frames FROM row"
            " LEFT JOIN input s ON s.uri = row.source AND s.is_driving = 0"
            " LEFT JOIN input d ON d.uri = row.driving AND d.is_driving = 1"
            f" WHERE id > ? ORDER BY id LIMIT {PAGE}",
            (last,),
        ).fetchall():
            last = page[-1][0]
            with self._transaction():
                failures = [f for found in page if (f := self._make(found, item_of, feature_ids))]
            self.add_failures(failures)
        self._db.executescript(f"DROP TABLE row; DROP TABLE taken; {_ITEM_INDEX}")
        self._db.execute(
            "INSERT INTO turn (item) SELECT rowid FROM item"
            " ORDER BY num_frames DESC, driving_feature, source_feature, item_id"
        )

    def _make(
        self, found: Sequence[Any], item_of: ItemOf, feature_ids: FeatureIds
    ) -> Failure | None:
        """Add the item of a row with its inputs; else why there is none."""
        _, *columns, source, source_failure, driving, driving_failure, num_frames = found
        row = _row_of(*columns)
        if source_failure or driving_failure:
            failure = Failure(**json.loads(source_failure or driving_failure))
            return dataclasses.replace(failure, item=row.name)
        assert source and driving, "inputs are set before items are made"
        try:
            item = item_of(row, source, driving)
            self._insert(item, feature_ids(item), num_frames)
        except ItemError as error:
            return _failure_of(row, error)
        return None

    def _insert(self, item: AnimationItem, features: tuple[str, str], num_frames: int) -> None:
        added = self._db.execute(
            "INSERT OR IGNORE INTO item (item_id, name, source_sha256, driving_sha256,"
            " source_feature, driving_feature, num_frames, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(item.item_id, item.name, item.source_sha256, item.driving_sha256),
                *(*features, num_frames, _json(_ITEM_VALUES(item))),
            ),
        )
        if added.rowcount == 0:
            first = self._one("SELECT name FROM item WHERE item_id = ?", item.item_id)
            raise RowError(f"the same result as {first}", code="duplicate_row")

    def counts(self) -> Counts:
        """What the catalog asks for."""
        query = (
            "SELECT COUNT(*), COUNT(DISTINCT source_sha256), COUNT(DISTINCT driving_sha256)"
            " FROM item"
        )
        items, sources, drivings = self._db.execute(query).fetchone()
        return Counts(items, sources, drivings, self.num_failures())

    def items(self) -> Iterator[AnimationItem]:
        """All items: the longest driving videos first, and the items of a video together."""
        return self._items("1")

    def todo(self) -> Iterator[AnimationItem]:
        """The items, in the order of `items`, that are neither done nor failed when their turn
        comes (or a little before: they are read in pages).
        """
        return self._items("item.state IS NULL")

    def _items(self, where: str) -> Iterator[AnimationItem]:
        last = 0
        # In pages: no query stays open while the run writes. CROSS JOIN: in the order of turns.
        query = (
            "SELECT position, data FROM turn CROSS JOIN item ON item.rowid = turn.item"
            f" WHERE position > ? AND {where} ORDER BY position LIMIT {PAGE}"
        )
        while page := self._db.execute(query, (last,)).fetchall():
            last = page[-1][0]
            for _, data in page:
                yield _item_of(data)

    def num_todo(self) -> int:
        """How many items are neither done nor failed."""
        return int(self._one("SELECT COUNT(*) FROM item WHERE state IS NULL"))

    # --- what an earlier run left ------------------------------------------------------------

    def add_records(self, records: Iterable[AnimationRecord]) -> None:
        """Take in results that there are; of two of one item the later one counts.

        What is not of this catalog is passed over. Names and paths are this catalog's own: the
        content is what the id says.
        """
        stream = iter(records)
        while batch := list(itertools.islice(stream, PAGE)):
            with self._transaction():
                for record in batch:
                    self._add_record(record)

    def _add_record(self, record: AnimationRecord) -> None:
        query = "SELECT data FROM item WHERE item_id = ?"
        found = self._db.execute(query, (record.item_id,)).fetchone()
        if found is not None:
            item = _item_of(found[0])
            self._store_record(
                dataclasses.replace(
                    record, name=item.name, source=item.source, driving=item.driving
                )
            )

    def check_present(
        self,
        objects: Iterable[ObjectInfo],
        needs: Callable[[AnimationRecord], Sequence[str]],
    ) -> int:
        """Forget the records whose result is not in the store as it was recorded, or which need
        something else that is not there; how many these are.

        Args:
            objects: what is in the store, best in the order of its keys; not touched where there
                is no record.
            needs: the keys that a record needs beside its own.
        """
        if self._one("SELECT COUNT(*) FROM item WHERE state = 'done'") == 0:
            return 0
        self._db.executescript(  # anew, after a listing that broke off
            "DROP TABLE IF EXISTS present; DROP TABLE IF EXISTS need;"
            "CREATE TEMP TABLE present (key TEXT PRIMARY KEY, size_bytes INT) WITHOUT ROWID;"
            "CREATE TEMP TABLE need (item_id TEXT, key TEXT, size_bytes INT);"
        )
        infos = ((info.key, info.size_bytes) for info in objects)
        self._many("INSERT OR REPLACE INTO present VALUES (?, ?)", infos)
        num_forgotten = 0
        for page in self._record_pages():
            num_forgotten += self._forget_absent(page, needs)
        self._db.executescript("DROP TABLE present; DROP TABLE need")
        return num_forgotten

    def _forget_absent(
        self,
        records: Sequence[AnimationRecord],
        needs: Callable[[AnimationRecord], Sequence[str]],
    ) -> int:
        self._db.execute("DELETE FROM need")
        wanted = [
            *((record.item_id, record.key, record.size_bytes) for record in records),
            *((record.item_id, key, None) for record in records for key in needs(record)),
        ]
        self._many("INSERT INTO need VALUES (?, ?, ?)", wanted)
        forgotten = self._db.execute(
            "UPDATE item SET state = NULL, record = NULL, record_frames = NULL WHERE item_id IN"
            " (SELECT item_id FROM need WHERE NOT EXISTS (SELECT 1 FROM present p"
            " WHERE p.key = need.key"
            " AND (need.size_bytes IS NULL OR p.size_bytes = need.size_bytes)))"
        )
        return forgotten.rowcount

    # --- states ------------------------------------------------------------------------------

    def begin_features(self, stored: Iterable[FeatureRecord]) -> None:
        """Find which states the items need that are neither done nor failed.

        Args:
            stored: the states that there are.
        """
        self._db.execute(
            "INSERT INTO feature (feature_id, num_left) SELECT id, COUNT(*) FROM"
            " (SELECT source_feature AS id FROM item WHERE state IS NULL"
            " UNION ALL SELECT driving_feature FROM item WHERE state IS NULL) GROUP BY id"
        )
        self._many(
            "UPDATE feature SET record = ? WHERE feature_id = ?",
            ((_json(as_dict(record)), record.feature_id) for record in stored),
        )

    def num_features_todo(self) -> int:
        """How many states are needed and neither there nor failed."""
        return int(
            self._one("SELECT COUNT(*) FROM feature WHERE record IS NULL AND failure IS NULL")
        )

    def num_frames_todo(self) -> int:
        """How many frames are to be drawn, as far as the driving videos' headers say."""
        query = "SELECT COALESCE(SUM(num_frames), 0) FROM item WHERE state IS NULL"
        return int(self._one(query))

    def feature(self, feature_id: str) -> FeatureRecord | Failure | None:
        """A needed state, or why there is none; None where nobody has tried yet."""
        query = "SELECT record, failure FROM feature WHERE feature_id = ?"
        record, failure = self._db.execute(query, (feature_id,)).fetchone()
        if failure is not None:
            return Failure(**json.loads(failure))
        return None if record is None else FeatureRecord(**json.loads(record))

    def set_feature(self, feature_id: str, found: FeatureRecord | Failure) -> None:
        """Record a state, or why there is none."""
        column = "failure" if isinstance(found, Failure) else "record"
        self._db.execute(
            f"UPDATE feature SET {column} = ? WHERE feature_id = ?",
            (_json(as_dict(found)), feature_id),
        )

    def release_features(self, feature_ids: Iterable[str]) -> list[FeatureRecord]:
        """Note that an item needs these no more; those of them that no item needs now."""
        freed = []
        for feature_id in feature_ids:
            query = "UPDATE feature SET num_left = num_left - 1 WHERE feature_id = ?"
            found = self._db.execute(f"{query} RETURNING num_left, record", (feature_id,))
            (num_left, record) = found.fetchone()
            if num_left == 0 and record is not None:
                freed.append(FeatureRecord(**json.loads(record)))
        return freed

    # --- the work ----------------------------------------------------------------------------

    def set_done(self, record: AnimationRecord) -> bool:
        """Record a result; whether it counts: not that of an item that has failed."""
        return self._store_record(record, "AND state IS NOT 'failed'")

    def _store_record(self, record: AnimationRecord, also: str = "") -> bool:
        data = _json(_RECORD_VALUES(record))
        changed = self._db.execute(
            "UPDATE item SET record = ?, record_frames = ?, state = 'done'"
            f" WHERE item_id = ? {also}",
            (data, record.num_frames, record.item_id),
        )
        return changed.rowcount == 1

    def set_failed(self, item_id: str, failure: Failure) -> bool:
        """Record a failure; whether it counts: not that of an item that is done or has failed."""
        changed = self._db.execute(
            "UPDATE item SET state = 'failed' WHERE item_id = ? AND state IS NULL", (item_id,)
        )
        if changed.rowcount == 1:
            self.add_failures([failure])
        return changed.rowcount == 1

    def add_failures(self, failures: Iterable[Failure]) -> None:
        """Take in what cannot be had."""
        self._many(
            "INSERT INTO failure VALUES (?, ?, ?, ?, ?)",
            ((f.item, f.stage, f.code, f.cause, _json(as_dict(f))) for f in failures),
        )

    # --- what it came to ---------------------------------------------------------------------

    def records(self) -> Iterator[AnimationRecord]:
        """The results, by id."""
        return itertools.chain.from_iterable(self._record_pages())

    def _record_pages(self) -> Iterator[list[AnimationRecord]]:
        last = ""
        # Not by its state: the index of that would have all of them sorted for every page.
        query = (
            "SELECT item_id, record FROM item WHERE item_id > ? AND record IS NOT NULL"
            f" ORDER BY item_id LIMIT {PAGE}"
        )
        while page := self._db.execute(query, (last,)).fetchall():
            last = page[-1][0]
            yield [_record_of(data) for _, data in page]

    def failures(self) -> Iterator[Failure]:
        """All failures, by item, stage and code."""
        query = "SELECT data FROM failure ORDER BY item, stage, code, cause, data"
        return (Failure(**json.loads(data)) for (data,) in self._db.execute(query))

    def num_failures(self) -> int:
        return int(self._one("SELECT COUNT(*) FROM failure"))

    def totals(self) -> Totals:
        """What there is."""
        query = "SELECT COUNT(*), COALESCE(SUM(record_frames), 0) FROM item WHERE state = 'done'"
        items, frames = self._db.execute(query).fetchone()
        return Totals(items, frames, self.num_failures())

    def lost(self) -> tuple[Counter[str], Failure | None]:
        """Failures by code, and one of the commonest, as `manifest.check_counts` takes them."""
        query = "SELECT code, COUNT(*) FROM failure GROUP BY code"
        counts = Counter(dict(self._db.execute(query)))
        if not counts:
            return counts, None
        code = counts.most_common(1)[0][0]
        query = "SELECT data FROM failure WHERE code = ? ORDER BY item, stage, cause LIMIT 1"
        return counts, Failure(**json.loads(self._one(query, code)))


# --- records as texts ------------------------------------------------------------------------

_ITEM_FIELDS: Final = tuple(field.name for field in fields(AnimationItem))
_RECORD_FIELDS: Final = tuple(field.name for field in fields(AnimationRecord))
_ITEM_VALUES: Final = operator.attrgetter(*_ITEM_FIELDS)
_RECORD_VALUES: Final = operator.attrgetter(*_RECORD_FIELDS)
_ROW_COLUMNS: Final = ("line", "name", "source", "driving", "motion")
_ROW_REST: Final = tuple(f.name for f in fields(CatalogRow) if f.name not in _ROW_COLUMNS)
_ROW_REST_VALUES: Final = operator.attrgetter(*_ROW_REST)


_json: Final = json.JSONEncoder(separators=(",", ":")).encode


def _row_values(row: CatalogRow) -> tuple[Any, ...]:
    rest = _json(_ROW_REST_VALUES(row))
    return row.line, row.name, row.source, row.driving, row.motion, rest


def _row_of(*columns: Any) -> CatalogRow:  # noqa: ANN401 - columns of a table
    own = dict(zip(_ROW_COLUMNS, columns[:-1], strict=True))
    rest = dict(zip(_ROW_REST, json.loads(columns[-1]), strict=True))
    return CatalogRow(**own, **rest)


def _item_of(data: str) -> AnimationItem:
    return AnimationItem(**dict(zip(_ITEM_FIELDS, json.loads(data), strict=True)))


def _record_of(data: str) -> AnimationRecord:
    return AnimationRecord(**dict(zip(_RECORD_FIELDS, json.loads(data), strict=True)))


def _input_values(found: Input | Failure) -> tuple[str | None, int | None, str | None]:
    if isinstance(found, Failure):
        return None, None, _json(as_dict(found))
    return found.sha256, found.num_frames, None


def _failure_of(row: CatalogRow, error: ItemError) -> Failure:
    return Failure(row.name, catalog.STAGE, error.code, error.cause, error.retryable, attempts=1)

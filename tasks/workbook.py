"""A run of preprocess as tables on this machine's disk, so that memory does not grow with it.

Whatever needs all rows, all videos or all clips at once (what repeats, what is done, in which order
things lie, what changed) is a query of a SQLite file that is thrown away with the run. What must
outlive the run is in the dataset's store and never here.

    row      what is asked for, one row of a table each
    item     a video with its rows: its id, its files, and where its result is
    earlier  results that there are: in the journal of a run, in the ledger of the dataset
    result   the chosen result of each item
    clip     the clips of all results: where the images are, and where they will lie
    failure  what could not be had
    before   the clips of the dataset as it is
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from kpmask.data.metadata import raw_stem
from kpmask.errors import RowError
from kpmask.preprocess import failure_of, row_name
from kpmask.records import ClipRecord, Failure, SourceRow, as_dict, digest
from tasks.sqlite_book import BATCH, SqliteBook
from tasks.storage import ObjectInfo

NO_STATE: Final = ""

_TABLES: Final = """
CREATE TABLE row (id INTEGER PRIMARY KEY, line INT, video TEXT, name TEXT, part TEXT,
                  identity TEXT, same BLOB, data TEXT);
CREATE TABLE item (video TEXT PRIMARY KEY, item_id TEXT UNIQUE, url TEXT, files TEXT, state TEXT,
                   is_folder INT, num_rows INT, place TEXT, place_state TEXT,
                   place_retry INT, redo INT DEFAULT 0) WITHOUT ROWID;
CREATE TABLE failure (item TEXT, stage TEXT, code TEXT, cause TEXT, data TEXT, planned INT);
"""
_RUN_TABLES: Final = """
CREATE TABLE earlier (item_id TEXT, state TEXT, retryable INT, place TEXT);
CREATE INDEX earlier_by_id ON earlier (item_id);
CREATE TABLE result (item_id TEXT PRIMARY KEY, data TEXT);
CREATE TABLE clip (clip_id TEXT PRIMARY KEY, part TEXT, name TEXT, video TEXT, sha256 TEXT,
                   look TEXT, source TEXT, source_row INT, shard TEXT, row INT, twin TEXT,
                   data TEXT);
CREATE TABLE before (clip_id TEXT PRIMARY KEY, shard TEXT, row INT, video TEXT) WITHOUT ROWID;
CREATE TABLE before_failure (item TEXT, code TEXT);
"""
_ROW_VALUES: Final = operator.attrgetter(*(field.name for field in fields(SourceRow)))


@dataclass(frozen=True, slots=True)
class VideoItem:
    """A video to be cut.

    Attributes:
        name: of the raw video, a plain name.
        item_id: a digest of what is wanted of it.
        rows: what is wanted of it.
        keys: its files in the raw store; none where it must be downloaded.
        is_folder: the files are the frames of one clip, and not one video.
        url: where it can be had, where the table says so.
        state: a digest of the files' sizes and versions.
        fetched: the files were downloaded for this item just now.
    """

    name: str
    item_id: str
    rows: tuple[SourceRow, ...]
    keys: tuple[str, ...]
    is_folder: bool
    url: str | None
    state: str
    fetched: bool = False


def state_of(files: Sequence[ObjectInfo]) -> str:
    """A digest that changes when one of the files does; empty for none."""
    return digest([[f.key, f.size_bytes, f.etag] for f in files])[:16] if files else NO_STATE


class Workbook(SqliteBook):
    """The tables of one run, in the file at `path`."""

    def __init__(self, path: Path, *, video_of: Callable[[str], str] = raw_stem) -> None:
        self._video_of = video_of  # the item's name by a clip's `video_id`
        super().__init__(path)

    # --- the plan ----------------------------------------------------------------------------

    def create(self) -> None:
        """The tables of a plan, in a new file."""
        self._db.executescript(_TABLES)

    def add_rows(self, found: Iterable[SourceRow | Failure]) -> None:
        """Take in the rows of a table, as they are read."""
        stream = iter(found)
        while batch := list(itertools.islice(stream, BATCH)):
            self._many(
                "INSERT INTO row (line, video, name, part, identity, same, data)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (_row_values(row) for row in batch if isinstance(row, SourceRow)),
            )
            self.add_failures((f for f in batch if isinstance(f, Failure)), planned=True)

    def add_failures(self, failures: Iterable[Failure], *, planned: bool = False) -> None:
        """Take in what could not be had; `planned`: it follows from the rows alone."""
        self._many(
            "INSERT INTO failure VALUES (?, ?, ?, ?, ?, ?)",
            ((f.item, f.stage, f.code, f.cause, _json(as_dict(f)), planned) for f in failures),
        )

    def check_rows(self, label: str) -> None:
        """Refuse rows that repeat, leak or collide, in this order; `label` is the table's name.

        - `duplicate_row`: says what an earlier row says.
        - `bad_row`: a training row of an identity that is tested on, so that nobody is both.
        - `duplicate_name`: its clip would have the name of an earlier row's.
        """
        self._db.executescript(
            "CREATE INDEX row_same ON row (same); CREATE INDEX row_name ON row (name);"
            "CREATE INDEX row_identity ON row (part, identity);"
        )
        self._refuse(
            label,
            "SELECT r.id, r.line, 'repeats line ' || f.line FROM row r JOIN (SELECT same, MIN(id)"
            " AS id FROM row GROUP BY same HAVING COUNT(*) > 1) d ON r.same = d.same"
            " JOIN row f ON f.id = d.id WHERE r.id > d.id",
            "duplicate_row",
        )
        self._refuse(
            label,
            "SELECT id, line, '''' || identity || ''' is in both splits; kept in test only'"
            " FROM row WHERE part = 'train' AND identity IN"
            " (SELECT identity FROM row WHERE part = 'test')",
            "bad_row",
        )
        self._refuse(
            label,
            "SELECT r.id, r.line, 'the clip ''' || r.name || ''' is line ' || f.line ||"
            " '''s already' FROM row r JOIN (SELECT name, MIN(id) AS id FROM row GROUP BY name"
            " HAVING COUNT(*) > 1) d ON r.name = d.name JOIN row f ON f.id = d.id"
            " WHERE r.id > d.id",
            "duplicate_name",
        )

    def _refuse(self, label: str, query: str, code: str) -> None:
        self._db.execute(f"CREATE TEMP TABLE refused AS {query}")
        found = self._db.execute("SELECT * FROM refused ORDER BY 1")
        failures = (
            failure_of(f"{label}:{line}", "metadata", RowError(cause, code=code))
            for _, line, cause in found
        )
        self.add_failures(list(failures), planned=True)
        self._db.execute("DELETE FROM row WHERE id IN (SELECT id FROM refused)")
        self._db.execute("DROP TABLE refused")

    def group_rows(self) -> None:
        """Make one item of each video's rows."""
        self._db.execute("CREATE INDEX row_video ON row (video)")
        found = self._db.execute("SELECT video, data FROM row ORDER BY video, id")
        groups = itertools.groupby(found, key=operator.itemgetter(0))
        values = (self._item_values(video, [data for _, data in rows]) for video, rows in groups)
        while batch := list(itertools.islice(values, BATCH)):
            self._many(
                "INSERT INTO item (video, item_id, url, files, state, is_folder, num_rows)"
                " VALUES (?, ?, ?, '[]', '', 0, ?)",
                batch,
            )

    def _item_values(self, video: str, rows: Sequence[str]) -> tuple[str, str, str | None, int]:
        parsed = [_row_of(data) for data in rows]
        url = next((row.url for row in parsed if row.url), None)
        return video, item_id(video, parsed, is_folder=False), url, len(parsed)

    def add_item(
        self, name: str, row: SourceRow, files: Sequence[ObjectInfo], *, is_folder: bool
    ) -> None:
        """An item that is one whole video, or a folder of frames."""
        self._db.execute(
            "INSERT INTO row (line, video, name, part, identity, same, data)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row.line, name, *_row_values(row)[2:]),
        )
        self._db.execute(
            "INSERT INTO item (video, item_id, files, state, is_folder, num_rows)"
            " VALUES (?, ?, ?, ?, ?, 1)",
            (
                name,
                item_id(name, [row], is_folder=is_folder),
                _json([info.key for info in files]),
                state_of(files),
                is_folder,
            ),
        )

    def counts(self) -> dict[str, int]:
        """How many clips are asked for of each split, by the rows; and `failures` of the rows."""
        found = dict(self._db.execute("SELECT part, COUNT(*) FROM row GROUP BY part"))
        return found | {"failures": self._one("SELECT COUNT(*) FROM failure")}

    # --- a run -------------------------------------------------------------------------------

    def begin(self) -> None:
        """The tables of a run, on those of a plan."""
        self._db.executescript(_RUN_TABLES)
        self._db.execute("CREATE INDEX IF NOT EXISTS row_video ON row (video)")

    def set_files(self, files: Iterable[tuple[str, ObjectInfo]]) -> None:
        """The raw videos that there are, by the video that each is of; the first of each counts."""
        self._db.execute("CREATE TEMP TABLE raw (video TEXT PRIMARY KEY, files TEXT, state TEXT)")
        values = ((video, _json([info.key]), state_of([info])) for video, info in files)
        self._many("INSERT OR IGNORE INTO raw VALUES (?, ?, ?)", values)
        self._db.execute(
            "UPDATE item SET (files, state) = (SELECT files, state FROM raw r"
            " WHERE r.video = item.video) WHERE video IN (SELECT video FROM raw)"
        )
        self._db.execute("DROP TABLE raw")

    def add_before(self, clips: Iterable[ClipRecord], failures: Iterable[Failure]) -> None:
        """The dataset as it is."""
        values = ((c.clip_id, c.shard, c.row, self._video_of(c.video_id)) for c in clips)
        self._many("INSERT OR IGNORE INTO before VALUES (?, ?, ?, ?)", values)
        self._many("INSERT INTO before_failure VALUES (?, ?)", ((f.item, f.code) for f in failures))

    def lose_shards(self, keys: Iterable[str]) -> None:
        """Shards of the dataset as it is that cannot be used: their videos are cut again."""
        for key in keys:
            self._db.execute(
                "UPDATE item SET redo = 1 WHERE video IN"
                " (SELECT video FROM before WHERE shard = ?)",
                (key,),
            )
            self._db.execute("DELETE FROM before WHERE shard = ?", (key,))

    def before_shards(self) -> Iterator[str]:
        """The shards of the dataset as it is."""
        query = "SELECT DISTINCT shard FROM before ORDER BY shard"
        return (key for (key,) in self._db.execute(query))

    def set_earlier(self, found: Iterable[tuple[str, str, bool]], *, place: str) -> None:
        """The results in a place: item id, state of the files, whether a retry may help."""
        self._db.execute("DELETE FROM earlier WHERE place = ?", (place,))
        values = ((item, state, retryable, place) for item, state, retryable in found)
        self._many("INSERT INTO earlier VALUES (?, ?, ?, ?)", values)

    def choose(self, *, waiting: Iterable[str] = ()) -> None:
        """Choose the result of each item, the journal's before the ledger's.

        A result holds where the files are those that it was made from, or where none is left. One
        that a retry may help holds for those items only that wait (`waiting`: their ids).
        """
        self._db.execute("CREATE TEMP TABLE waits (item_id TEXT PRIMARY KEY)")
        self._many("INSERT OR IGNORE INTO waits VALUES (?)", ((item,) for item in waiting))
        self._db.execute(
            "UPDATE item SET (place, place_state, place_retry) ="
            " (SELECT e.place, e.state, e.retryable FROM earlier e WHERE e.item_id = item.item_id"
            " AND (e.place = 'journal' OR NOT item.redo)"
            " AND (e.state = item.state OR item.state = '')"
            " AND (NOT e.retryable OR e.item_id IN (SELECT item_id FROM waits))"
            " ORDER BY e.place = 'journal' DESC, e.retryable LIMIT 1)"
        )
        self._db.execute("DROP TABLE waits")

    def retryable(self) -> Iterator[str]:
        """Ids of the items whose only result is one that a retry may help."""
        query = (
            "SELECT DISTINCT i.item_id FROM item i JOIN earlier e ON e.item_id = i.item_id"
            " WHERE i.place IS NULL AND e.retryable AND (e.state = i.state OR i.state = '')"
            " AND (e.place = 'journal' OR NOT i.redo)"
        )
        return (item for (item,) in self._db.execute(query).fetchall())

    def num_todo(self) -> int:
        """How many items have no result that holds."""
        return int(self._one("SELECT COUNT(*) FROM item WHERE place IS NULL"))

    def todo(self) -> Iterator[VideoItem]:
        """The items without a result that holds, by name."""
        # Ids first, in pages: no query stays open while the run writes.
        last = ""
        while page := self._db.execute(
            "SELECT video, item_id, url, files, state, is_folder FROM item"
            " WHERE place IS NULL AND video > ? ORDER BY video LIMIT 1000",
            (last,),
        ).fetchall():
            last = page[-1][0]
            for video, item, url, files, state, is_folder in page:
                rows = self._db.execute(
                    "SELECT data FROM row WHERE video = ? ORDER BY id", (video,)
                )
                yield VideoItem(
                    name=video,
                    item_id=item,
                    rows=tuple(_row_of(data) for (data,) in rows.fetchall()),
                    keys=tuple(json.loads(files)),
                    is_folder=bool(is_folder),
                    url=url,
                    state=state,
                )

    def chosen(self) -> Iterator[tuple[str, str, bool]]:
        """(item id, state, whether a retry may help) of the results taken from the journal."""
        query = "SELECT item_id, place_state, place_retry FROM item WHERE place = 'journal'"
        return ((item, state, bool(retry)) for item, state, retry in self._db.execute(query))

    def is_chosen(self, item: str, place: str) -> bool:
        """Whether an item's result is to be taken from a place."""
        query = "SELECT 1 FROM item WHERE item_id = ? AND place = ?"
        return self._db.execute(query, (item, place)).fetchone() is not None

    # --- results -----------------------------------------------------------------------------

    def clear_results(self) -> None:
        """Forget results, clips and failures, but for those of the rows."""
        for table in ("result", "clip"):
            self._db.execute(f"DELETE FROM {table}")
        self._db.execute("DELETE FROM failure WHERE NOT planned")

    def add_results(
        self, found: Iterable[tuple[str, str, Sequence[ClipRecord], Sequence[Failure]]]
    ) -> None:
        """Results: item id, the result as stored, its clips (with where their images are in
        `shard` and `row`, or an empty `shard`) and failures.
        """
        stream = iter(found)
        while batch := list(itertools.islice(stream, 1000)):
            self._many("INSERT INTO result VALUES (?, ?)", (entry[:2] for entry in batch))
            self._many(
                "INSERT OR IGNORE INTO clip (clip_id, part, name, video, sha256, look, source,"
                " source_row, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (self._clip_values(clip) for entry in batch for clip in entry[2]),
            )
            self.add_failures(f for entry in batch for f in entry[3])

    def _clip_values(self, clip: ClipRecord) -> tuple[Any, ...]:
        return (
            clip.clip_id,
            clip.partition,
            clip.name,
            self._video_of(clip.video_id),
            clip.sha256,
            clip.look,
            clip.shard,
            clip.row,
            _json(as_dict(clip)),
        )

    def place_clips(self, parts: Iterable[str], *, as_folders: bool) -> None:
        """Find the images of clips: in one of the parts that there are, else in the dataset.

        A folder of images serves as what it is only: for the clip of its name, in that layout.
        """
        self._db.execute("CREATE TEMP TABLE part (key TEXT PRIMARY KEY)")
        self._many("INSERT INTO part VALUES (?)", ((key,) for key in parts))
        self._db.execute(
            "UPDATE clip SET (source, source_row) ="
            " (SELECT b.shard, b.row FROM before b WHERE b.clip_id = clip.clip_id"
            " AND (b.shard LIKE '%.arrow' OR (? AND b.shard = clip.part || '/' || clip.name)))"
            " WHERE source NOT IN (SELECT key FROM part)",
            (as_folders,),
        )
        self._db.execute("DROP TABLE part")

    def redo_homeless(self) -> list[tuple[str, str, bool]]:
        """Have the videos cut again whose clips are wanted and nowhere; the results that do not
        hold, as `chosen` has them.
        """
        homeless = "video IN (SELECT video FROM clip WHERE source IS NULL AND twin IS NULL)"
        found = self._db.execute(
            "SELECT item_id, place_state, place_retry FROM item WHERE place = 'journal'"
            f" AND {homeless}"
        ).fetchall()
        self._db.execute(f"UPDATE item SET redo = 1, place = NULL WHERE {homeless}")
        return [(item, state, bool(retry)) for item, state, retry in found]

    def results(self) -> Iterator[str]:
        """The results as stored, by the name of the video."""
        query = "SELECT data FROM item JOIN result USING (item_id) ORDER BY video"
        return (data for (data,) in self._db.execute(query))

    # --- clips -------------------------------------------------------------------------------

    def index_clips(self) -> None:
        """Prepare for reading clips in order."""
        self._db.execute("CREATE INDEX IF NOT EXISTS clip_order ON clip (part, name)")

    def refuse_names(self) -> None:
        """Refuse clips whose name another one has: a piece of a long row, say, and a short row. The
        first one stays, by split and video.
        """
        found = self._db.execute(
            "SELECT name, video, clip_id FROM clip WHERE name IN"
            " (SELECT name FROM clip GROUP BY name HAVING COUNT(*) > 1)"
            " ORDER BY name, part, video, clip_id"
        ).fetchall()
        for name, same in itertools.groupby(found, key=operator.itemgetter(0)):
            first, *others = (video for _, video, _ in same)
            causes = [f"of {video}; {first} has a clip of this name" for video in others]
            errors = [RowError(cause, code="duplicate_name") for cause in causes]
            self.add_failures([failure_of(name, "plan", error) for error in errors])
        firsts = {name: clip_id for name, _, clip_id in reversed(found)}
        others = [(c,) for name, _, c in found if firsts[name] != c]
        self._many("DELETE FROM clip WHERE clip_id = ?", others)

    def mark_repeats(self) -> None:
        """Mark clips whose frames are exactly those of one before; tests come first."""
        self._db.execute("CREATE INDEX IF NOT EXISTS clip_sha ON clip (sha256, part, name)")
        self._db.execute(
            "UPDATE clip SET twin = (SELECT o.name FROM clip o WHERE o.sha256 = clip.sha256"
            " ORDER BY o.part, o.name LIMIT 1) WHERE sha256 IN"
            " (SELECT sha256 FROM clip GROUP BY sha256 HAVING COUNT(*) > 1)"
        )
        self._db.execute("UPDATE clip SET twin = NULL WHERE twin = name")

    def looks(self) -> Iterator[str]:
        """The looks of the clips that repeat none exactly, in order."""
        query = "SELECT look FROM clip WHERE twin IS NULL ORDER BY part, name"
        return (look for (look,) in self._db.execute(query))

    def clips_at(self, positions: Iterable[int]) -> dict[int, tuple[str, str]]:
        """(name, look) of the clips at some positions among those of `looks`."""
        wanted = set(positions)
        query = "SELECT name, look FROM clip WHERE twin IS NULL ORDER BY part, name"
        return {i: found for i, found in enumerate(self._db.execute(query)) if i in wanted}

    def mark_twins(self, twins: Mapping[str, str]) -> None:
        """Mark clips as looking like others, by name."""
        self._db.execute("CREATE INDEX IF NOT EXISTS clip_name ON clip (name)")
        self._many("UPDATE clip SET twin = ? WHERE name = ?", ((t, n) for n, t in twins.items()))

    def twins(self) -> Iterator[tuple[str, str]]:
        """(name, name of what it repeats) of the clips that are marked."""
        query = "SELECT name, twin FROM clip WHERE twin IS NOT NULL ORDER BY part, name"
        return iter(self._db.execute(query).fetchall())

    def num_clips(self, part: str | None = None) -> int:
        """How many clips are kept, of one split or of both."""
        query = "SELECT COUNT(*) FROM clip WHERE twin IS NULL AND (? IS NULL OR part = ?)"
        return int(self._one(query, part, part))

    def clips(self) -> Iterator[ClipRecord]:
        """The clips that are kept, by split and name, where they will lie."""
        query = "SELECT data, shard, row FROM clip WHERE twin IS NULL ORDER BY part, name"
        for data, shard, row in self._db.execute(query):
            yield _clip_of(data, shard or "", row or 0)

    def sources(self) -> Iterator[tuple[str, str, str, str, int]]:
        """(split, clip id, name, key and row of the images), by split and name."""
        query = (
            "SELECT part, clip_id, name, source, source_row FROM clip WHERE twin IS NULL"
            " ORDER BY part, name"
        )
        return (row for row in self._db.execute(query))

    def set_places(self, places: Iterable[tuple[str, str, int]]) -> None:
        """Where clips will lie: (clip id, shard, row)."""
        self._db.execute(
            "CREATE TEMP TABLE placed (clip_id TEXT PRIMARY KEY, shard TEXT, row INT) WITHOUT ROWID"
        )
        self._many("INSERT INTO placed VALUES (?, ?, ?)", places)
        self._db.execute(
            "UPDATE clip SET (shard, row) = (SELECT shard, row FROM placed p"
            " WHERE p.clip_id = clip.clip_id)"
        )
        self._db.execute("DROP TABLE placed")

    def changes_folders(self) -> bool:
        """Whether a clip of the dataset as it is will not be where it was."""
        query = (
            "SELECT COUNT(*) FROM before b WHERE NOT EXISTS (SELECT 1 FROM clip c"
            " WHERE c.clip_id = b.clip_id AND c.shard = b.shard AND c.twin IS NULL)"
        )
        return bool(self._one(query))

    def keeps_folder(self, clip_id: str, key: str) -> bool:
        """Whether a clip will lie at a key."""
        query = "SELECT 1 FROM clip WHERE clip_id = ? AND shard = ? AND twin IS NULL"
        return self._db.execute(query, (clip_id, key)).fetchone() is not None

    # --- failures ----------------------------------------------------------------------------

    def failures(self) -> Iterator[Failure]:
        """All failures, in a fixed order."""
        query = "SELECT data FROM failure ORDER BY item, stage, code, cause, data"
        return (Failure(**json.loads(data)) for (data,) in self._db.execute(query))

    def num_failures(self) -> int:
        return int(self._one("SELECT COUNT(*) FROM failure"))

    def lost(self, *, by_video: bool) -> tuple[Counter[str], Failure | None]:
        """Failures by code of what was asked for and is not there, and one of the commonest.

        What was there twice or is not wanted is not lost, and neither is a clip that is kept
        although a part of it is damaged. `by_video`: clips are known by their video's name too.
        """
        also = " UNION SELECT video FROM clip WHERE twin IS NULL" if by_video else ""
        where = (
            "FROM failure WHERE stage != 'quality' AND code NOT IN ('duplicate_row', 'filtered')"
            f" AND item NOT IN (SELECT name FROM clip WHERE twin IS NULL{also})"
        )
        counts = Counter(dict(self._db.execute(f"SELECT code, COUNT(*) {where} GROUP BY code")))
        if not counts:
            return counts, None
        code = counts.most_common(1)[0][0]
        query = f"SELECT data {where} AND code = ? ORDER BY item, stage, cause LIMIT 1"
        return counts, Failure(**json.loads(self._one(query, code)))

    # --- changes -----------------------------------------------------------------------------

    def changes(self) -> dict[str, int]:
        """What differs from the dataset as it was: the counts of `DatasetChanges`."""
        kept = "(SELECT clip_id FROM clip WHERE twin IS NULL)"
        now = "(SELECT item, code FROM failure)"
        then = "(SELECT item, code FROM before_failure)"
        new, old = f"{now} EXCEPT SELECT * FROM {then}", f"{then} EXCEPT SELECT * FROM {now}"
        videos_now = "SELECT video FROM clip WHERE twin IS NULL"
        videos_then = "SELECT video FROM before"
        queries = {
            "clips_kept": f"SELECT clip_id FROM before WHERE clip_id IN {kept}",
            "clips_added": f"SELECT * FROM {kept} EXCEPT SELECT clip_id FROM before",
            "clips_removed": f"SELECT clip_id FROM before EXCEPT SELECT * FROM {kept}",
            "videos_added": f"{videos_now} EXCEPT {videos_then}",
            "videos_removed": f"{videos_then} EXCEPT {videos_now}",
            "failures_new": f"SELECT * FROM {new}",
            "failures_gone": f"SELECT * FROM {old}",
        }
        return {
            name: int(self._one(f"SELECT COUNT(*) FROM ({query})"))
            for name, query in queries.items()
        }


def item_id(name: str, rows: Sequence[SourceRow], *, is_folder: bool) -> str:
    """A digest of what is wanted of a video."""
    return digest([name, [_ROW_VALUES(row)[1:] for row in rows], is_folder])[:32]


def _json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    return json.dumps(value, separators=(",", ":"))


def _row_values(row: SourceRow) -> tuple[Any, ...]:
    values = _ROW_VALUES(row)
    same = hashlib.blake2b(_json(values[1:]).encode(), digest_size=16).digest()
    return (
        row.line,
        raw_stem(row.video_id),
        row_name(row),
        row.partition,
        row.identity,
        same,
        _json(values),
    )


def _row_of(data: str) -> SourceRow:
    values: list[Any] = [tuple(v) if isinstance(v, list) else v for v in json.loads(data)]
    return SourceRow(*values)


def _clip_of(data: str, shard: str, row: int) -> ClipRecord:
    values = json.loads(data)
    values["crop_px"] = tuple(values["crop_px"])
    return ClipRecord(**(values | {"shard": shard, "row": row}))

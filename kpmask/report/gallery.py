"""The page of a catalog: thousands of animations that a studio looks through.

- What is shown lies in one block of data; the page's own script draws what is on the screen. Its
  weight is bounded, whatever the catalog: beyond `limit` items an even sample of them is shown.
- Videos are not loaded with the page. A card shows a poster, or the first frame of its video once
  it is on the screen; the video plays under the mouse, the focus or a finger, few at a time.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from kpmask.records import AnimationRecord, CatalogManifest, Failure
from kpmask.report.counting import Distinct, Sample, as_many_as_fit, place
from kpmask.report.page import (
    Tile,
    bars,
    duration,
    failure_tile,
    num,
    num_bytes,
    relative_url,
    render,
)

if TYPE_CHECKING:
    import numpy as np

POSTERS: Final = "posters"
POSTER_PX: Final = 256  # the longer side
POSTER_QUALITY: Final = 82
MAX_ITEMS: Final = 10_000
MAX_FAILURES: Final = 5000
MAX_CODES: Final = 100
MAX_DATA_CHARS: Final = 6_000_000  # of items; of failures too
MAX_CAUSE_CHARS: Final = 500
MAX_METRICS: Final = 24
MAX_FACT_CHARS: Final = 200
MAX_DISTINCT: Final = 250_000


@dataclass(frozen=True, slots=True)
class GalleryMedia:
    """What an item shows, each a path relative to the page or a `data:` URI.

    An empty string means that there is none. In an evaluation `driving` is the true video.
    `poster` is a still picture of the result; `file` is what was made, where `result` is a copy of
    it that browsers play.
    """

    source: str
    driving: str
    result: str
    poster: str = ""
    file: str = ""


MediaOf = Callable[[AnimationRecord], GalleryMedia]


@dataclass(frozen=True, slots=True)
class Item:
    name: str
    media: GalleryMedia
    lines: Sequence[str]


# --- posters ---------------------------------------------------------------------------------


def poster_key(item_id: str) -> str:
    """Where an item's poster lies, relative to the page."""
    return f"{POSTERS}/{item_id}.jpg"


def poster(frame_HWC: np.ndarray) -> bytes:
    """A frame as a JPEG whose longer side is at most POSTER_PX.

    Args:
        frame_HWC: uint8 RGB, at least one pixel.

    Raises:
        ValueError: it is no such frame.
    """
    from PIL import Image

    if frame_HWC.ndim != 3 or frame_HWC.shape[2] != 3 or frame_HWC.size == 0:
        raise ValueError(f"a poster needs an RGB frame, not one of shape {frame_HWC.shape}")
    image = Image.fromarray(frame_HWC)
    scale = min(1.0, POSTER_PX / max(image.size))
    if scale < 1:
        width_px, height_px = (max(1, round(scale * side)) for side in image.size)
        image = image.resize((width_px, height_px), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=POSTER_QUALITY)
    return data.getvalue()


# --- what is kept of a stream ----------------------------------------------------------------


class _Catalog:
    """A catalog's items, that come one by one in any order, in bounded memory."""

    def __init__(self, records: Iterable[AnimationRecord], limit: int) -> None:
        self._shown: Sample[AnimationRecord] = Sample(limit)
        self.sources = Distinct(MAX_DISTINCT)
        self.drivings = Distinct(MAX_DISTINCT)
        self.num_items = 0
        self.seconds = 0.0
        self.size_bytes = 0
        for record in records:
            self._add(record)

    def _add(self, record: AnimationRecord) -> None:
        self._shown.offer(place(record.item_id), record)
        self.sources.add(record.source_sha256)
        self.drivings.add(record.driving_sha256)
        self.num_items += 1
        self.seconds += _seconds(record) or 0.0
        self.size_bytes += record.size_bytes

    @property
    def shown(self) -> list[AnimationRecord]:
        """By name: all, where there are not too many."""
        return sorted(self._shown, key=lambda record: (record.name, record.item_id))


class _Failures:
    """A catalog's failures: counted by code, and as many of them as a search goes through."""

    def __init__(self, failures: Iterable[Failure]) -> None:
        self._kept: Sample[Failure] = Sample(MAX_FAILURES)
        self.codes: Counter[str] = Counter()
        self.stages: Counter[str] = Counter()
        self.num_failures = 0
        for failure in failures:
            key = f"{failure.item}\0{failure.stage}\0{failure.code}"
            self._kept.offer(place(key), failure)
            self.num_failures += 1
            for counts, name in ((self.codes, failure.code), (self.stages, failure.stage)):
                counts[name if name in counts or len(counts) < MAX_CODES else "other"] += 1

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """Item, code, cause, stage, attempts, whether a retry may help, the measured value."""
        rows = [
            (f.item, f.code, _short(f.cause), f.stage, f.attempts, f.retryable, _finite(f.value))
            for f in self._kept
        ]
        return sorted(as_many_as_fit(rows, max_chars=MAX_DATA_CHARS), key=lambda row: row[:4])


def _short(text: str) -> str:
    return text if len(text) <= MAX_CAUSE_CHARS else f"{text[:MAX_CAUSE_CHARS]}…"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _seconds(record: AnimationRecord) -> float | None:
    seconds = record.num_frames / record.fps if record.fps > 0 else 0.0
    return _finite(seconds)


# --- the page --------------------------------------------------------------------------------


def gallery_page(
    *,
    title: str,
    manifest: CatalogManifest,
    records: Iterable[AnimationRecord],
    failures: Iterable[Failure],
    media: MediaOf | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    limit: int = MAX_ITEMS,
    home: str | None = None,
) -> str:
    """The page of a catalog: search, order, groups, each item beside what it was made from.

    Args:
        records, failures: are gone through once; memory does not grow with them.
        media: what to show of an item. None: its result at `record.key`, which is right for a
            page at the output's root.
        metrics: values by item id, by the name of what was measured: what items can be ordered
            by besides their length and size. Items without a value come last.
        limit: of items on the page: an even sample where there are more.
        home: link of an overview page.
    """
    catalog, lost = _Catalog(records, limit), _Failures(failures)
    names = list(metrics or {})[:MAX_METRICS]
    data = _Data(catalog.shown, media or _plain, [(metrics or {})[name] for name in names])
    rows = lost.rows
    return render(
        "gallery.html",
        title=title,
        kind="gallery",
        home=home,
        own=("gallery",),
        manifest=manifest,
        tiles=_tiles(manifest, catalog, lost),
        metrics=names,
        motions=data.motions,
        num_shown=len(data.items),
        num_items=catalog.num_items,
        num_failures=lost.num_failures,
        num_listed=len(rows),
        codes=[(code, num(count)) for code, count in lost.codes.most_common()],
        code_chart=bars(lost.codes.most_common(12)),
        stage_chart=bars(lost.stages.most_common(12)),
        stages=sorted(lost.stages),
        data={**data.block, "metrics": names, "failures": rows, "uri": manifest.uri},
    )


def _plain(record: AnimationRecord) -> GalleryMedia:
    return GalleryMedia("", "", record.key)


def _tiles(manifest: CatalogManifest, catalog: _Catalog, lost: _Failures) -> list[Tile]:
    return [
        Tile(num(catalog.num_items), "animations"),
        Tile(_at_least(catalog.sources), "still images"),
        Tile(_at_least(catalog.drivings), "driving videos"),
        Tile(num(manifest.num_frames), "frames"),
        Tile(duration(catalog.seconds), f"of video, {num_bytes(catalog.size_bytes)}"),
        failure_tile(lost.num_failures),
    ]


def _at_least(count: Distinct) -> str:
    return num(len(count)) if count.exact else f"≥ {num(len(count))}"


class _Inputs:
    """Still images, or driving videos, numbered as they come: (path, SHA-256, URL of a copy)."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str, str], int] = {}

    def number(self, path: str, sha256: str, shown: str) -> int:
        key = (path, sha256, shown and relative_url(shown))
        return self._numbers.setdefault(key, len(self._numbers))

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """Label, path, digest and URL of each."""
        labels = short_labels([path for path, _, _ in self._numbers])
        return [(labels[key[0]], *key) for key in self._numbers]


def short_labels(paths: Iterable[str]) -> dict[str, str]:
    """The end of each path that no other one shares: its name, or some folders with it."""
    wanted, labels = set(paths), {}
    depth = 1
    while wanted:
        ends = {path: "/".join(PurePosixPath(path).parts[-depth:]) for path in wanted}
        counts = Counter(ends.values())
        done = {p for p, end in ends.items() if counts[end] == 1 or depth == 4}
        labels.update({path: ends[path] if counts[ends[path]] == 1 else path for path in done})
        wanted -= done
        depth += 1
    return labels


class _Data:
    """What the page's script reads: rows of values in the order of COLUMNS, then of FACTS (numbers
    of texts that many items share), then of the metrics.
    """

    def __init__(
        self,
        records: Sequence[AnimationRecord],
        media: MediaOf,
        metrics: Sequence[Mapping[str, float]],
    ) -> None:
        self._sources, self._drivings = _Inputs(), _Inputs()
        self.motions = sorted({record.motion for record in records})
        self._metrics = metrics
        self._facts: dict[str, int] = {}
        self.items = as_many_as_fit(
            (self._item(record, media(record)) for record in records), max_chars=MAX_DATA_CHARS
        )

    @property
    def block(self) -> dict[str, Any]:
        return {
            "columns": COLUMNS,
            "facts": [name.replace("_", " ").capitalize() for name in FACTS],
            "texts": list(self._facts),
            "items": self.items,
            "sources": self._sources.rows,
            "drivings": self._drivings.rows,
            "motions": self.motions,
        }

    def _item(self, record: AnimationRecord, shown: GalleryMedia) -> tuple[Any, ...]:
        result, still, file = (
            path and relative_url(path) for path in (shown.result, shown.poster, shown.file)
        )
        return (
            record.name,
            self._sources.number(record.source, record.source_sha256, shown.source),
            self._drivings.number(record.driving, record.driving_sha256, shown.driving),
            self.motions.index(record.motion),
            record.num_frames,
            record.num_frames_lost,
            _finite(record.fps),
            record.width_px,
            record.height_px,
            record.size_bytes,
            record.sha256,
            result,
            # Said in short where they follow from the result's name, as they do in a catalog.
            "" if result.rpartition(".")[0] == record.item_id else record.item_id,
            1 if shown.poster == poster_key(record.item_id) else still,
            record.key if relative_url(record.key) != result else "",
            file if file != result else "",
            *(self._fact(getattr(record, name)) for name in FACTS),
            *(_finite(values.get(record.item_id)) for values in self._metrics),
        )

    def _fact(self, value: object) -> int:
        text = "" if value is None else str(value)
        return self._facts.setdefault(text[:MAX_FACT_CHARS], len(self._facts))


COLUMNS: Final = (
    "name",
    "source",
    "driving",
    "motion",
    "frames",
    "lost",
    "fps",
    "width",
    "height",
    "bytes",
    "sha256",
    "result",
    "id",
    "poster",
    "key",
    "file",
)
_TOLD: Final = frozenset({"item_id", "source_sha256", "driving_sha256", "num_frames"}) | {
    "num_frames_lost", "width_px", "height_px", "size_bytes", *COLUMNS
}  # fmt: skip
# What else a record says (who signed it, say): listed with its details.
FACTS: Final = tuple(
    field.name for field in dataclasses.fields(AnimationRecord) if field.name not in _TOLD
)


def gallery_item(record: AnimationRecord, media: Mapping[str, GalleryMedia]) -> Item:
    """An item as the front page of a demonstration shows it."""
    size = f"{record.width_px} × {record.height_px}"
    lines = [
        f"{PurePosixPath(record.source).name} ← {PurePosixPath(record.driving).name}",
        f"{record.num_frames} frames, {record.fps:.4g} fps, {size}, {record.motion} motion, "
        f"{num_bytes(record.size_bytes)}",
    ]
    if record.num_frames_lost:
        lines.append(f"{record.num_frames_lost} frames of the driving video were lost to damage")
    return Item(record.name, media.get(record.item_id, _plain(record)), lines)

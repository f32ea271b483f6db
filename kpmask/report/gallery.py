"""The page of a catalog: source, driving and result of each item, playing together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from kpmask.records import AnimationRecord, CatalogManifest, Failure
from kpmask.report.page import Tile, duration, failure_tile, failure_values, num, num_bytes, render


@dataclass(frozen=True, slots=True)
class GalleryMedia:
    """What an item shows, each a path relative to the page or a `data:` URI.

    An empty string means that there is no preview. In an evaluation `driving` is the true video.
    """

    source: str
    driving: str
    result: str


@dataclass(frozen=True, slots=True)
class Item:
    name: str
    media: GalleryMedia
    lines: Sequence[str]
    source: str = ""
    driving: str = ""
    motion: str = ""
    seconds: str = "0"
    size_bytes: int = 0
    num_frames_lost: int = 0


def gallery_page(
    *,
    title: str,
    manifest: CatalogManifest,
    records: Sequence[AnimationRecord],
    failures: Sequence[Failure],
    media: Mapping[str, GalleryMedia],
    limit: int = 1000,
    home: str | None = None,
) -> str:
    """The page of a catalog: source, driving and result of each item, playing together.

    Args:
        media: what to show, by item id. An item without shows its result at `record.key`, which
            is right for a page at the output's root.
        limit: of items on the page.
        home: link of an overview page.
    """
    seconds = sum(record.num_frames / record.fps for record in records if record.fps > 0)
    tiles = [
        Tile(num(manifest.num_items), "animations"),
        Tile(num(len({record.source_sha256 for record in records})), "still images"),
        Tile(num(len({record.driving_sha256 for record in records})), "driving videos"),
        Tile(num(manifest.num_frames), "frames"),
        Tile(duration(seconds), "of video"),
        failure_tile(manifest.num_failures),
    ]
    return render(
        "gallery.html",
        title=title,
        kind="gallery",
        home=home,
        manifest=manifest,
        tiles=tiles,
        items=[gallery_item(record, media) for record in records[:limit]],
        hidden_items=max(0, len(records) - limit),
        **failure_values(failures),
    )


def gallery_item(record: AnimationRecord, media: Mapping[str, GalleryMedia]) -> Item:
    shown = media.get(record.item_id, GalleryMedia("", "", record.key))
    seconds = record.num_frames / record.fps if record.fps > 0 else 0.0
    size = f"{record.width_px} × {record.height_px}"
    lines = [
        f"{PurePosixPath(record.source).name} ← {PurePosixPath(record.driving).name}",
        f"{record.num_frames} frames, {record.fps:.4g} fps, {size}, {record.motion} motion, "
        f"{num_bytes(record.size_bytes)}",
    ]
    if record.num_frames_lost:
        lines.append(f"{record.num_frames_lost} frames of the driving video were lost to damage")
    return Item(
        name=record.name,
        media=shown,
        lines=lines,
        source=record.source,
        driving=record.driving,
        motion=record.motion,
        seconds=f"{seconds:.3f}",
        size_bytes=record.size_bytes,
        num_frames_lost=record.num_frames_lost,
    )

"""The page of a dataset: contact sheet, counts, identities, failures."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kpmask.records import ClipRecord, DatasetManifest, Failure
from kpmask.report.page import (
    Bar,
    Chart,
    Tile,
    bars,
    duration,
    failure_tile,
    failure_values,
    num,
    render,
)

MAX_IDENTITIES: Final = 200


@dataclass(frozen=True, slots=True)
class _SheetClip:
    record: ClipRecord
    thumbnail: str


@dataclass(frozen=True, slots=True)
class _Identity:
    identity: str
    partition: str
    num_clips: int
    num_videos: int
    num_frames: int
    seconds: float


def dataset_page(
    *,
    title: str,
    manifest: DatasetManifest,
    clips: Sequence[ClipRecord],
    failures: Sequence[Failure],
    thumbnails: Mapping[str, str],
    limit: int = 600,
    home: str | None = None,
) -> str:
    """The page of a dataset.

    Args:
        thumbnails: picture of a clip by clip id (`picture_uri` of a frame, or a relative path);
            clips without one are listed without.
        limit: of pictures on the contact sheet; `clips[:limit]` need thumbnails.
        home: link of an overview page.
    """
    seconds = sum(clip.num_frames / clip.fps for clip in clips if clip.fps > 0)
    identities = _identities(clips)
    tiles = [
        Tile(num(len(clips)), "clips"),
        Tile(num(manifest.num_train), "for training"),
        Tile(num(manifest.num_test), "for testing"),
        Tile(num(len(identities)), "identities"),
        Tile(num(manifest.num_frames), "frames"),
        Tile(duration(seconds), "of video"),
        failure_tile(manifest.num_failures),
    ]
    return render(
        "dataset.html",
        title=title,
        kind="dataset",
        home=home,
        manifest=manifest,
        tiles=tiles,
        splits_note=_splits_note(clips),
        sheet=[_SheetClip(clip, thumbnails.get(clip.clip_id, "")) for clip in clips[:limit]],
        hidden_clips=max(0, len(clips) - limit),
        charts=_dataset_charts(clips),
        identities=identities[:MAX_IDENTITIES],
        hidden_identities=max(0, len(identities) - MAX_IDENTITIES),
        **failure_values(failures),
    )


def _splits_note(clips: Sequence[ClipRecord]) -> str:
    splits: dict[str, set[str]] = {"train": set(), "test": set()}
    for clip in clips:
        splits[clip.partition].add(clip.identity)
    shared = len(splits["train"] & splits["test"])
    if not splits["train"] or not splits["test"]:
        return ""
    if shared:
        return f"{num(shared)} of the identities {'is' if shared == 1 else 'are'} in both splits."
    return "No identity is in both splits."


def _identities(clips: Sequence[ClipRecord]) -> list[_Identity]:
    groups: dict[tuple[str, str], list[ClipRecord]] = defaultdict(list)
    for clip in clips:
        groups[clip.identity, clip.partition].append(clip)
    rows = [
        _Identity(
            identity,
            partition,
            len(group),
            len({clip.video_id for clip in group}),
            sum(clip.num_frames for clip in group),
            sum(clip.num_frames / clip.fps for clip in group if clip.fps > 0),
        )
        for (identity, partition), group in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row.num_clips, row.identity, row.partition))


def _dataset_charts(clips: Sequence[ClipRecord]) -> list[Chart]:
    splits = Counter(clip.partition for clip in clips)
    rates = Counter(f"{clip.fps:.4g} fps" for clip in clips)
    sides = [float(max(c.crop_px[2] - c.crop_px[0], c.crop_px[3] - c.crop_px[1])) for c in clips]
    clamped = sum(clip.clamped for clip in clips)
    lost = sum(clip.num_frames_lost for clip in clips)
    return [
        Chart("Clips in each split", bars((s, splits[s]) for s in ("train", "test"))),
        Chart(
            "Frames in a clip",
            _histogram([float(clip.num_frames) for clip in clips]),
            f"lost to damage: {num(lost)}" if lost else "",
        ),
        Chart("Frame rate", bars(rates.most_common(8))),
        Chart(
            "Side of the crop in the raw video, px",
            _histogram(sides),
            f"cut to the frame: {num(clamped)}" if clamped else "",
        ),
    ]


def _histogram(values: Sequence[float], num_bins: int = 7) -> list[Bar]:
    """Counts in bins of a round width: 1, 2 or 5 times a power of ten."""
    if not values:
        return []
    low, high = min(values), max(values)
    rough = max(1.0, (high - low) / num_bins)
    power = 10 ** math.floor(math.log10(rough))
    width = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    counts = Counter(math.floor(value / width) for value in values)
    bins = range(min(counts), max(counts) + 1)

    def label(index: int) -> str:
        start = int(index * width)
        return f"{start}" if width == 1 else f"{start}–{start + int(width) - 1}"

    return bars((label(index), counts[index]) for index in bins)

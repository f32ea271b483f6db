"""Clips of an evaluation that can be looked at, and what the page's script knows of them.

- The page has a card for each of them; the script chooses which are seen, by a metric that the
  reader chooses. Without it the worst and the best by the first metric are seen.
- A metric's curve is of the frames that a preview has, and of those that count. Curves are left
  out, the last metrics' first, where they would make the page heavy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kpmask.records import FrameScores, MetricInfo
from kpmask.report.gallery import GalleryMedia
from kpmask.report.page import figure

MAX_CLIPS: Final = 48
NUM_PAIRS: Final = 2  # of the worst and the best, that are seen at first
MAX_CURVE_VALUES: Final = 200_000
CURVES: Final = ("model", "copy")


class ScoredVideo(Protocol):
    """A video with its scores in the order of the metrics, None where it has none."""

    @property
    def clip_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def scores(self) -> Sequence[float | None]: ...


@dataclass(frozen=True, slots=True)
class Clip:
    """A card: the clip's number on the page, its media, and what is said of it at first."""

    number: int
    name: str
    media: GalleryMedia
    line: str
    hidden: bool


def with_media(
    videos: Sequence[ScoredVideo], media: Mapping[str, GalleryMedia]
) -> list[ScoredVideo]:
    """The videos that have a card."""
    return [video for video in videos if video.clip_id in media][:MAX_CLIPS]


def clip_cards(
    label: str,
    *,
    higher_is_better: bool,
    column: int,
    videos: Sequence[ScoredVideo],
    media: Mapping[str, GalleryMedia],
) -> list[Clip]:
    """Cards of all videos, those first that are seen at first: worst, best, second worst, ..."""
    values = [video.scores[column] for video in videos]
    sign = 1 if higher_is_better else -1
    worst_first = sorted(_ranked(values), key=lambda place: sign * (values[place] or 0.0))
    places = worst_and_best(worst_first, NUM_PAIRS)
    seen = {number: f"{word}: {label} {figure(values[number] or 0.0)}" for number, word in places}
    rest = [number for number in range(len(videos)) if number not in seen]
    return [
        Clip(
            number=number,
            name=videos[number].name,
            media=media[videos[number].clip_id],
            line=seen.get(number, ""),
            hidden=number not in seen,
        )
        for number in [*seen, *rest]
    ]


def _ranked(values: Sequence[float | None]) -> list[int]:
    return [at for at, value in enumerate(values) if value is not None and math.isfinite(value)]


def worst_and_best(worst_first: Sequence[int], num_pairs: int) -> list[tuple[int, str]]:
    """The worst and the best in turn with the word for each; none of them twice."""
    if len(worst_first) == 1:
        return [(worst_first[0], "the only one")]
    words = ("", "2nd ", "3rd ")
    found = []
    for place in range(min(num_pairs, len(worst_first) // 2)):
        word = words[place] if place < len(words) else f"{place + 1}th "
        found += [(worst_first[place], f"{word}worst"), (worst_first[-1 - place], f"{word}best")]
    return found


def clip_data(
    metrics: Sequence[tuple[MetricInfo, str, str]],
    videos: Sequence[ScoredVideo],
    clip_ids: Mapping[str, int],
    frames: Iterable[FrameScores],
    *,
    preview_frames: int,
) -> dict[str, Any]:
    """The block of data that the page's script reads.

    Args:
        metrics: each with its label and unit, in the order of the videos' scores.
        clip_ids: the cards' numbers by clip id.
        frames: of these clips and of others; only values of CURVES are taken.
        preview_frames: as many first frames have the clips' videos, or all where they are fewer.
    """
    places = {info.name: place for place, (info, _, _) in enumerate(metrics)}
    found: dict[tuple[int, int, str], list[float | None]] = {}
    lengths: dict[int, int] = {}
    for row in frames:
        if row.clip_id not in clip_ids or row.metric not in places or row.method not in CURVES:
            continue
        number, place = clip_ids[row.clip_id], places[row.metric]
        lengths[number] = len(row.values)
        first = metrics[place][0].counts_first
        found[place, number, row.method] = _curve(row.values[:preview_frames], first)
    kept, total = {}, 0
    for key in sorted(found):
        total += len(found[key])
        if total > MAX_CURVE_VALUES:
            break
        kept[key] = found[key]
    return {
        "metrics": [
            {"label": label, "unit": unit, "higher": info.higher_is_better}
            for info, label, unit in metrics
        ],
        "clips": [
            {
                "name": video.name,
                "values": [_finite(value) for value in video.scores],
                "frames": min(lengths.get(number, 0), preview_frames),
                "of": lengths.get(number, 0),
            }
            for number, video in enumerate(videos)
        ],
        "curves": [[*key, values] for key, values in kept.items()],
        "pairs": NUM_PAIRS,
    }


def _curve(values: Sequence[float], counts_first: bool) -> list[float | None]:
    """Values to four digits; frame 0 is no part of a mean that leaves it out."""
    shown = [_finite(value) for value in values]
    return shown if counts_first else [None, *shown[1:]]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")

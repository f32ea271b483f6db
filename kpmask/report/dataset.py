"""The page of a dataset: what changed, a playing contact sheet, histograms, failures, search.

A `DatasetSummary` sees every record once, in any order, and keeps a bounded number of them: a
dataset of a million clips has a page of the same size as one of a thousand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kpmask.records import ClipRecord, DatasetChanges, DatasetManifest, Failure
from kpmask.report.counting import Bin, Distinct, Histogram, Sample, as_many_as_fit, place
from kpmask.report.page import Bar, Chart, Tile, bars, duration, failure_tile, figure, num, render
from kpmask.report.previews import preview_frame_numbers

MAX_SHOWN: Final = 600  # clips with a picture
MAX_SEARCHED: Final = 20_000  # clips, and failures, that the page's search finds
MAX_SEARCHED_CHARS: Final = 2_500_000  # of either
MAX_IDENTITIES: Final = 200  # in the table
MAX_IDENTITIES_HELD: Final = 50_000
MAX_DISTINCT: Final = 250_000  # some 25 MB
MAX_CODES: Final = 100
MAX_EXAMPLES: Final = 8
MAX_CAUSE_CHARS: Final = 300
OTHER: Final = "other"

FACTS: Final = (
    "Split",
    "Identity",
    "Video",
    "Span in the video",
    "Crop in the video",
    "Frames",
    "Frame rate",
    "Size",
    "Sharpness",
    "Brightness",
    "Motion",
    "Text or logo",
    "Lies at",
    "SHA-256 of its frames",
    "Clip id",
)


# --- what is kept of a stream ----------------------------------------------------------------


@dataclass(slots=True)
class _Identity:
    """The clips of an identity in one split."""

    identity: str
    partition: str
    num_clips: int = 0
    num_videos: int = 0
    num_frames: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Code:
    """The failures of one code in one stage."""

    stage: str
    code: str
    count: int = 0
    num_retryable: int = 0
    lowest: float = math.inf
    highest: float = -math.inf
    sample: Sample[Failure] = field(default_factory=lambda: Sample(MAX_EXAMPLES))

    def add(self, at: int, failure: Failure) -> None:
        self.count += 1
        self.num_retryable += failure.retryable
        if failure.value is not None and math.isfinite(failure.value):
            self.lowest = min(self.lowest, failure.value)
            self.highest = max(self.highest, failure.value)
        self.sample.offer(at, failure)

    @property
    def examples(self) -> list[Failure]:
        return sorted(self.sample, key=lambda failure: failure.item)

    @property
    def measured(self) -> str:
        if self.highest < self.lowest:
            return ""
        low, high = figure(self.lowest), figure(self.highest)
        return low if low == high else f"{low} to {high}"


class _Measures:
    """Histograms of a dataset's clips by split."""

    def __init__(self) -> None:
        self.seconds = Histogram(decimals=3)
        self.frames = Histogram()
        self.side_px = Histogram()
        self.rates: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self.motion = Histogram(decimals=5)
        self.sharpness = Histogram(decimals=5)
        self.brightness = Histogram(decimals=5)

    def add(self, clip: ClipRecord, seconds: float, side: int) -> None:
        left, top, right, bottom = clip.crop_px
        self.seconds.add(seconds, side)
        self.frames.add(clip.num_frames, side)
        self.side_px.add(max(right - left, bottom - top), side)
        self.rates[side][f"{clip.fps:.4g} fps"] += 1  # few, since the digits are
        if _is_measured(clip):
            self.motion.add(clip.motion, side)
            self.sharpness.add(clip.sharpness, side)
            self.brightness.add(clip.brightness, side)


class DatasetSummary:
    """What the page of a dataset needs, of clips and failures that come one by one.

    Memory is bounded, whatever comes: counts are exact, a sample of the clips is kept, those whose
    ids come first in a fixed shuffle. A dataset that grows keeps most of its sample; two summaries
    of the same clips have the same one.

    Args:
        max_shown: clips with a picture.
        max_searched: clips, and failures, that the search finds.
    """

    def __init__(self, *, max_shown: int = MAX_SHOWN, max_searched: int = MAX_SEARCHED) -> None:
        self._shown: Sample[ClipRecord] = Sample(max_shown)
        self._searched: Sample[tuple[str, str, str, str, int]] = Sample(max_searched)
        self._failed: Sample[Failure] = Sample(max_searched)
        self._codes: dict[tuple[str, str], _Code] = {}
        self._rows: dict[tuple[str, str], _Identity] = {}
        self._pairs = Distinct(MAX_DISTINCT)
        self.measures = _Measures()
        self.videos = Distinct(MAX_DISTINCT)
        self.identities = {"train": Distinct(MAX_DISTINCT), "test": Distinct(MAX_DISTINCT)}
        self.num_clips = {"train": 0, "test": 0}
        self.num_clamped = 0
        self.num_frames_lost = 0
        self.seconds = 0.0
        self.num_failures = 0
        self.identities_dropped = 0  # clips of an identity that may be missing from its row

    def add(self, clip: ClipRecord) -> None:
        """Count a clip."""
        at = place(clip.clip_id)
        seconds = clip.num_frames / clip.fps if clip.fps > 0 else 0.0
        self._shown.offer(at, clip)
        found = (clip.name, clip.partition, clip.identity, clip.video_id, clip.num_frames)
        self._searched.offer(at, found)
        self.num_clips[clip.partition] += 1
        self.num_clamped += clip.clamped
        self.num_frames_lost += clip.num_frames_lost
        self.seconds += seconds
        self.videos.add(clip.video_id)
        self.identities[clip.partition].add(clip.identity)
        self.measures.add(clip, seconds, int(clip.partition == "test"))
        self._add_identity(clip, seconds)

    def _add_identity(self, clip: ClipRecord, seconds: float) -> None:
        key = (clip.identity, clip.partition)
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= MAX_IDENTITIES_HELD:
                self._drop_identities()
            row = self._rows[key] = _Identity(clip.identity, clip.partition)
        row.num_clips += 1
        row.num_videos += self._pairs.add((key, clip.video_id))
        row.num_frames += clip.num_frames
        row.seconds += seconds

    def _drop_identities(self) -> None:
        """Forget the half with the fewest clips: those with most clips are what is shown."""
        rows = sorted(self._rows.items(), key=lambda item: (-item[1].num_clips, item[0]))
        kept = rows[: len(rows) // 2]
        self.identities_dropped += rows[len(kept)][1].num_clips
        self._rows = dict(kept)

    def add_failure(self, failure: Failure) -> None:
        """Count a failure."""
        at = place(f"{failure.item}\0{failure.stage}\0{failure.code}\0{failure.cause}")
        if len(failure.cause) > MAX_CAUSE_CHARS:
            failure = _shortened(failure)
        key = (failure.stage, failure.code)
        if key not in self._codes and len(self._codes) >= MAX_CODES:
            key = (OTHER, OTHER)
        self._codes.setdefault(key, _Code(*key)).add(at, failure)
        self._failed.offer(at, failure)
        self.num_failures += 1

    # --- what came out

    @property
    def shown(self) -> list[ClipRecord]:
        """The clips that the page shows, by split and name: all, where there are few."""
        return sorted(self._shown, key=lambda clip: (clip.partition, clip.name))

    @property
    def searched(self) -> list[tuple[str, str, str, str, int]]:
        """Name, split, identity, video and number of frames of clips, those shown first."""
        return as_many_as_fit(self._searched, max_chars=MAX_SEARCHED_CHARS)

    @property
    def failed(self) -> list[tuple[Any, ...]]:
        """Item, code, cause, stage, measured value, attempts and whether a retry may help."""
        rows = [
            (f.item, f.code, f.cause, f.stage, _measured(f.value), f.attempts, f.retryable)
            for f in self._failed
        ]
        return sorted(as_many_as_fit(rows, max_chars=MAX_SEARCHED_CHARS))

    @property
    def codes(self) -> list[_Code]:
        """Failures by stage and code, the commonest first."""
        return sorted(self._codes.values(), key=lambda row: (-row.count, row.stage, row.code))

    def identity_rows(self) -> list[_Identity]:
        """The identities that are held, by split, those with most clips first."""
        rows = self._rows.values()
        return sorted(rows, key=lambda row: (-row.num_clips, row.identity, row.partition))

    @property
    def videos_exact(self) -> bool:
        """Whether the rows' numbers of videos are exact, not least numbers."""
        return self._pairs.exact


def _is_measured(clip: ClipRecord) -> bool:
    """Whether the clip is of a dataset whose quality was measured."""
    return bool(clip.look or clip.sharpness or clip.brightness or clip.motion)


def _shortened(failure: Failure) -> Failure:
    cause = f"{failure.cause[:MAX_CAUSE_CHARS]}…"
    return Failure(
        failure.item,
        failure.stage,
        failure.code,
        cause,
        failure.retryable,
        failure.attempts,
        failure.value,
    )


# --- the page --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _SheetClip:
    """A clip as it is shown; `num_pictures` are side by side in its preview."""

    record: ClipRecord
    preview: str
    num_pictures: int
    seconds: float

    @property
    def text(self) -> str:
        record = self.record
        return f"{record.name} {record.identity} {record.video_id} {record.partition}"

    @property
    def shape(self) -> str:
        """Width over height, for a style."""
        return f"{self.record.width_px / max(1, self.record.height_px):.4f}"


def dataset_page(
    *,
    title: str,
    manifest: DatasetManifest,
    summary: DatasetSummary,
    changes: DatasetChanges | None,
    previews: Mapping[str, str],
    home: str | None = None,
) -> str:
    """The page of a dataset.

    Args:
        summary: all its clips and failures.
        changes: what the last run changed; None: the page does not say.
        previews: `preview_strip` of a clip by clip id: a path relative to the page, or a `data:`
            URI. Clips without one are listed without a picture.
        home: link of an overview page.
    """
    shown = summary.shown
    searched = summary.searched[len(shown) :]
    identities = summary.identity_rows()
    num_clips = sum(summary.num_clips.values())
    return render(
        "dataset.html",
        title=title,
        kind="dataset",
        home=home,
        manifest=manifest,
        tiles=_tiles(manifest, summary),
        changes=changes,
        change_tiles=_change_tiles(changes),
        splits_note=_splits_note(summary),
        sheet=[_sheet_clip(clip, previews.get(clip.clip_id, "")) for clip in shown],
        has_quality=any(_is_measured(clip) for clip in shown),
        facts=FACTS,
        facts_of_clips=[_facts(clip, manifest.uri) for clip in shown],
        num_clips=num_clips,
        hidden_clips=num_clips - len(shown),
        searched=searched,
        num_searched=len(shown) + len(searched),
        charts=_charts(summary),
        identities=identities[:MAX_IDENTITIES],
        hidden_identities=max(0, len(identities) - MAX_IDENTITIES),
        identities_dropped=summary.identities_dropped,
        videos_exact=summary.videos_exact,
        failed=summary.failed,
        codes=summary.codes,
        code_chart=_code_bars(summary, "code"),
        stage_chart=_code_bars(summary, "stage"),
        num_failures=summary.num_failures,
    )


def _sheet_clip(clip: ClipRecord, preview: str) -> _SheetClip:
    num_pictures = len(preview_frame_numbers(max(1, clip.num_frames)))
    seconds = clip.num_frames / clip.fps if clip.fps > 0 else 0.0
    return _SheetClip(clip, preview, num_pictures, seconds)


def _facts(clip: ClipRecord, uri: str) -> list[str]:
    """A clip's record in words: its name, then a text for each of FACTS; empty: not known."""
    left, top, right, bottom = clip.crop_px
    lost = f", {num(clip.num_frames_lost)} lost to damage" if clip.num_frames_lost else ""
    cut = ", cut to the frame" if clip.clamped else ""
    place = f"{uri}/{clip.shard}"
    measures = (clip.sharpness, clip.brightness, clip.motion, clip.overlay)
    return [
        clip.name,
        clip.partition,
        clip.identity,
        clip.video_id,
        f"{clip.start_s:.3f} s to {clip.end_s:.3f} s",
        f"{right - left} × {bottom - top} px at ({left}, {top}){cut}",
        f"{num(clip.num_frames)}{lost}",
        f"{clip.fps:.6g} a second",
        f"{clip.width_px} × {clip.height_px} px",
        *(figure(value) if _is_measured(clip) else "" for value in measures),
        f"{place}, row {clip.row}" if clip.shard.endswith(".arrow") else place,
        clip.sha256,
        clip.clip_id,
    ]


# --- counts ----------------------------------------------------------------------------------


def _tiles(manifest: DatasetManifest, summary: DatasetSummary) -> list[Tile]:
    splits = summary.identities.values()
    num_identities = sum(map(len, splits)) - summary.identities["train"].num_shared(
        summary.identities["test"]
    )
    return [
        Tile(num(sum(summary.num_clips.values())), "clips"),
        Tile(num(manifest.num_train), "for training"),
        Tile(num(manifest.num_test), "for testing"),
        Tile(
            _at_least(num_identities, all(split.exact for split in splits)),
            f"identities, {_at_least(len(summary.videos), summary.videos.exact)} videos",
        ),
        Tile(num(manifest.num_frames), "frames"),
        Tile(duration(summary.seconds), "of video"),
        failure_tile(manifest.num_failures),
    ]


def _at_least(count: int, exact: bool) -> str:
    return num(count) if exact else f"≥ {num(count)}"


def _change_tiles(changes: DatasetChanges | None) -> list[Tile]:
    if changes is None:
        return []
    clips = f"{num(changes.clips_removed)} removed, {num(changes.clips_kept)} kept"
    waiting = f"{num(changes.waiting)} waiting for the next try"
    return [
        Tile(f"+{num(changes.clips_added)}", f"clips; {clips}"),
        Tile(f"+{num(changes.videos_added)}", f"videos; {num(changes.videos_removed)} removed"),
        Tile(
            num(changes.failures_new),
            f"new failures; {num(changes.failures_gone)} gone",
            bad=changes.failures_new > 0,
        ),
        Tile(num(changes.retried), f"videos tried again; {waiting}"),
    ]


def _splits_note(summary: DatasetSummary) -> str:
    train, test = summary.identities["train"], summary.identities["test"]
    shared = train.num_shared(test)
    if not len(train) or not len(test):
        return ""
    if shared:
        return f"{num(shared)} of the identities {'is' if shared == 1 else 'are'} in both splits."
    if not (train.exact and test.exact):
        return ""  # not known
    return "No identity is in both splits."


def _charts(summary: DatasetSummary) -> list[Chart]:
    measures = summary.measures
    lost, clamped = summary.num_frames_lost, summary.num_clamped
    charts = [
        _chart("Length, seconds", measures.seconds),
        _chart("Length, frames", measures.frames, f"lost to damage: {num(lost)}" if lost else ""),
        Chart("Frame rate", _rate_bars(measures.rates)),
        _chart(
            "Side of the crop in the raw video, px",
            measures.side_px,
            f"cut to the frame: {num(clamped)}" if clamped else "",
        ),
    ]
    if measures.motion.num_values:
        charts += [
            _chart("Motion", measures.motion, "change of luma from frame to frame, 0 to 1"),
            _chart("Sharpness", measures.sharpness, "variance of the Laplacian"),
            _chart("Brightness", measures.brightness, "mean luma, 0 to 1"),
        ]
    of_identity = Histogram()
    for row in summary.identity_rows():
        of_identity.add(row.num_clips, int(row.partition == "test"))
    held = "of those with most clips" if summary.identities_dropped else ""
    return [*charts, _chart("Identities by their clips", of_identity, held)]


def _chart(title: str, histogram: Histogram, note: str = "") -> Chart:
    return Chart(title, _split_bars(histogram.chart()), note)


def _split_bars(bins: Sequence[Bin]) -> list[Bar]:
    """Bars of which a part is for testing."""
    most = max((found.first + found.second for found in bins), default=1) or 1
    rows = []
    for found in bins:
        count = found.first + found.second
        test = found.second / count if count else 0.0
        rows.append(Bar(found.label, count / most, num(count), test))
    return rows


def _rate_bars(rates: tuple[Counter[str], Counter[str]], *, limit: int = 8) -> list[Bar]:
    """The commonest frame rates, and the others together."""
    train, test = rates
    rows = [Bin(label, train[label], test[label]) for label in train.keys() | test.keys()]
    rows.sort(key=lambda row: (-row.first - row.second, row.label))
    rest = rows[limit:]
    if rest:
        others = Bin("others", sum(row.first for row in rest), sum(row.second for row in rest))
        rows = [*rows[:limit], others]
    return _split_bars(rows)


def _code_bars(summary: DatasetSummary, by: str) -> list[Bar]:
    counts: Counter[str] = Counter()
    for row in summary.codes:
        counts[getattr(row, by)] += row.count
    return bars(counts.most_common())


def _measured(value: float | None) -> str:
    return "" if value is None else figure(value)

"""What is drawn from what in an evaluation, beside reconstruction: see `ScoreSetting`.

- **cross**: the first frame of one clip by the motion of a clip of another identity. There are no
  true frames, so what compares with them pixel by pixel or as a person is refused: pixels and
  their motion are the source's, and the driving frames are somebody else. What remains is whose
  face it is (against the source), how it moves (against the driving frames), and whether there is
  anybody to be found.
- **few_shot** (paper 003, Table 2, after Zakharov et al. 2019): a person's held-out frames, each
  drawn from one frame of the same person. The others fine-tune on #FT frames of the person; here
  #FT = 0. The frames do not follow one another, so nothing over time is measured.

All choices follow from the clips' ids and names alone, whatever their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kpmask.data.catalog import csv_lines
from kpmask.errors import ConfigError, RowError
from kpmask.metric_names import METRICS, kind_of
from kpmask.records import ClipRecord, Setting

Pair = tuple[ClipRecord, ClipRecord]  # source and driving

PAIR_COLUMNS: Final = ("source", "driving")

# --- metrics ---------------------------------------------------------------------------------

_OF_CROSS: Final = frozenset(
    {
        *("csim_source", "coverage_source"),
        *("akd", "akd_euclidean", "akd_motion", "mkr", "jitter", "coverage"),
    }
)
_OVER_TIME: Final = frozenset(
    {"temporal_error", "flicker", "warping_error", "jitter", "akd_motion", "fvd"}
)
# There the source is no frame of the video.
_OF_FRAME_0: Final = frozenset({"l1_with_first"})
_WHY: Final[Mapping[Setting, str]] = {
    "cross": "compares with true frames, and there are none of a source by another's motion",
    "few_shot": "is over frames that follow one another, or counts the source, and these do not",
}
_SUGGESTED: Final[Mapping[Setting, str]] = {
    "cross": "for faces --metrics csim_source_sface,akd_motion_facemesh,akd_facemesh; "
    "for bodies --metrics akd_motion_movenet_found,akd_movenet_found,mkr_movenet",
    "few_shot": "--metrics ssim,psnr,l1, and for faces csim_truth_sface,akd_facemesh, too",
}


def suits(metric: str, setting: Setting) -> bool:
    """Whether a metric means anything in a setting."""
    kind = kind_of(metric)
    if setting == "cross":
        return kind in _OF_CROSS
    return setting == "reconstruction" or kind not in _OVER_TIME | _OF_FRAME_0


def refuse_unfit(metrics: Sequence[str], setting: Setting) -> None:
    """Let metrics pass that mean something in a setting.

    Raises:
        ConfigError: naming those that do not, those that do, and what to ask for.
    """
    unfit = [name for name in metrics if not suits(name, setting)]
    if unfit:
        fit = dict.fromkeys(_shape_of(name) for name in METRICS if suits(name, setting))
        raise ConfigError(
            f"{', '.join(unfit)}: {_WHY[setting]}; there are {', '.join(fit)}",
            subject="metrics",
            hint=_SUGGESTED[setting],
        )


def _shape_of(metric: str) -> str:
    """What metrics of a kind are called: "akd_ESTIMATOR"."""
    kind = kind_of(metric)
    return kind if kind == metric else f"{kind}_ESTIMATOR"


# --- cross -----------------------------------------------------------------------------------


def spread_pairs(clips: Sequence[ClipRecord], count: int) -> list[Pair]:
    """At most `count` pairs of clips of different identities.

    As evenly as it goes: every clip is a source, and a driver, before any is so twice.
    """
    ordered = sorted(clips, key=lambda clip: hashlib.sha256(clip.clip_id.encode()).digest())
    pairs: list[Pair] = []
    if len({clip.identity for clip in clips}) < 2:
        return pairs  # which would take a look at each pair of clips to find out
    for shift in range(1, len(ordered)):
        for place, source in enumerate(ordered):
            driving = ordered[(place + shift) % len(ordered)]
            if len(pairs) == count:
                return pairs
            if source.identity != driving.identity:
                pairs.append((source, driving))
    return pairs


def read_pairs(path: Path, clips: Sequence[ClipRecord]) -> Iterator[Pair | RowError]:
    """The pairs of a CSV with the columns `source` and `driving`, of clips' names or ids.

    A row that makes no sense is an error in its place, whose subject is the row: unknown or
    ambiguous names, two clips of one identity, a pair that was there.

    Raises:
        ConfigError: when the iteration begins: no table, or a column is missing or unknown.
    """
    lines = csv_lines(path)
    columns = next((row for _, row in lines), None)
    if isinstance(columns, RowError) or columns is None or sorted(columns) != sorted(PAIR_COLUMNS):
        raise ConfigError(
            f"a table of pairs has the columns {' and '.join(PAIR_COLUMNS)}", subject=str(path)
        )
    found: dict[str, list[ClipRecord]] = {}
    for clip in clips:
        for name in {clip.clip_id, clip.name}:
            found.setdefault(name, []).append(clip)
    seen: set[tuple[str, str]] = set()
    for line, row in lines:
        try:
            pair = _pair(columns, row, found)
            ids = (pair[0].clip_id, pair[1].clip_id)
            if ids in seen:
                raise RowError("the pair is there already", code="duplicate_row")
            seen.add(ids)
            yield pair
        except RowError as error:
            yield RowError(error.cause, subject=f"line {line}", code=error.code)


def _pair(
    columns: Sequence[str], row: Sequence[str] | RowError, found: Mapping[str, list[ClipRecord]]
) -> Pair:
    if isinstance(row, RowError):
        raise row
    if len(row) != len(columns):
        raise RowError(f"{len(row)} cells, and {len(columns)} columns")
    cells = dict(zip(columns, row, strict=True))
    source, driving = (_clip(column, cells[column], found) for column in PAIR_COLUMNS)
    if source.identity == driving.identity:
        raise RowError(f"source and driving are both of {source.identity!r}")
    return source, driving


def _clip(column: str, name: str, found: Mapping[str, list[ClipRecord]]) -> ClipRecord:
    clips = found.get(name, [])
    if len(clips) != 1:
        how_many = f"{len(clips)} clips are" if clips else "no clip is"
        raise RowError(f"{column}: {how_many} called {name[:100]!r} in this split")
    return clips[0]


# --- few_shot --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A person's source, frame 0 of `source`, and which frames of which clips are drawn from it."""

    identity: str
    source: ClipRecord
    frames: tuple[tuple[ClipRecord, tuple[int, ...]], ...]


def held_out(clips: Sequence[ClipRecord], num_frames: int) -> list[HeldOut]:
    """Each person's held-out frames, by the persons' names.

    They are spread evenly over all but the person's first clip (by name), and with a single clip
    over its second half. A person with a single frame has none.
    """
    people: dict[str, list[ClipRecord]] = {}
    for clip in sorted(clips, key=lambda clip: (clip.name, clip.clip_id)):
        people.setdefault(clip.identity, []).append(clip)
    return [_held_out(name, own, num_frames) for name, own in sorted(people.items())]


def _held_out(identity: str, clips: Sequence[ClipRecord], num_frames: int) -> HeldOut:
    source, *others = clips
    # Where each stretch of held-out frames begins in its clip.
    stretches = [(clip, 0) for clip in others] or [(source, (source.num_frames + 1) // 2)]
    places = [(clip, n) for clip, start in stretches for n in range(start, clip.num_frames)]
    count = min(num_frames, len(places))
    chosen = [places[(2 * k + 1) * len(places) // (2 * count)] for k in range(count)]
    frames: dict[str, tuple[ClipRecord, list[int]]] = {}
    for clip, number in chosen:
        frames.setdefault(clip.clip_id, (clip, []))[1].append(number)
    return HeldOut(identity, source, tuple((clip, tuple(own)) for clip, own in frames.values()))

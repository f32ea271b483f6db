"""The records that are stored or cross a process, and how they become Parquet rows.

Records are frozen and only move forward: a stage returns new ones and never fills in fields of
one that it was given. Names carry units (`_s`, `_px`, `_bytes`, `_deg`). Fields are scalars,
optional scalars or tuples of scalars, so that one rule maps every record to Arrow and back.
No wall-clock time is stored in a manifest, so that two runs over the same input write equal ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeVar, Union

if TYPE_CHECKING:
    import pyarrow as pa

Partition = Literal["train", "test"]
Motion = Literal["absolute", "relative"]
Method = Literal["model", "copy", "codec", "driving"]
Quantise = Literal["none", "truncate", "round"]
Average = Literal["videos", "frames"]
Setting = Literal["reconstruction", "cross", "few_shot"]


def digest(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """The SHA-256 of a JSON value in canonical form: how every content id here is made."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- preprocess ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a metadata table: frames [start, end) and a box of one video.

    Frame numbers and the box are in the reference video (`ref_fps`, `ref_size_px`), not in the
    file at hand. A reference width of 0 is the one that the file's aspect ratio gives for the
    reference height. A user's own video has no reference: then every one of these is None.
    `line` is unique among the rows of a source.
    """

    line: int
    video_id: str
    partition: Partition
    identity: str
    start_frame: int | None = None
    end_frame: int | None = None
    bbox_px: tuple[int, int, int, int] | None = None  # left, top, right, bottom
    ref_fps: float | None = None
    ref_size_px: tuple[int, int] | None = None  # width, height
    person_id: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True)
class VideoProbe:
    """What a video file is, as displayed: rotation is applied to `width_px` and `height_px`.

    `*_from_header` may lie; everything else was read from the stream.
    """

    fps: float
    duration_s: float | None
    width_px: int
    height_px: int
    codec: str
    pixel_format: str
    rotation_deg: int
    stream_index: int
    has_audio: bool
    num_frames_from_header: int | None


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """Which seconds and pixels of a raw video become which clip.

    `crop_px` is (left, top, right, bottom) in displayed pixels and lies inside the frame;
    `clamped` says that a part of the annotated box is lost: it left the frame, or is too long to
    be cut as a square. Frames with start_s <= t < end_s are kept.
    """

    clip_id: str
    name: str
    video_id: str
    partition: Partition
    identity: str
    start_s: float
    end_s: float
    crop_px: tuple[int, int, int, int]
    clamped: bool
    size_px: int


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """A clip of a finished dataset: row `row` of shard `shard` (a key relative to the dataset).

    `sha256` is over the decoded RGB frames, so that it does not depend on the image format.
    """

    clip_id: str
    name: str
    partition: Partition
    identity: str
    video_id: str
    shard: str
    row: int
    num_frames: int
    fps: float
    width_px: int
    height_px: int
    start_s: float
    end_s: float
    crop_px: tuple[int, int, int, int]
    clamped: bool
    num_frames_lost: int
    sha256: str
    # What `kpmask.data.quality` measured, on the frames as stored.
    sharpness: float = 0.0
    brightness: float = 0.0
    motion: float = 0.0
    overlay: float = 0.0
    look: str = ""  # perceptual hashes of a few frames, hexadecimal


@dataclass(frozen=True, slots=True)
class DatasetManifest:
    """What a finished dataset holds; its `stats.json`."""

    uri: str
    dataset_id: str
    settings_digest: str
    num_train: int
    num_test: int
    num_frames: int
    num_failures: int


@dataclass(frozen=True, slots=True)
class DatasetChanges:
    """What a run of preprocess changed; a dataset's `changes.json`.

    `version` counts the published versions, from 1. Clips are compared by id, failures by item
    and code; `retried` counts videos that an earlier run could not have, `waiting` those whose
    next try is not due yet.
    """

    version: int
    dataset_id: str
    clips_added: int
    clips_removed: int
    clips_kept: int
    videos_added: int
    videos_removed: int
    failures_new: int
    failures_gone: int
    retried: int
    waiting: int


# --- train -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One logged training step. `loss` is the total; `terms` are in `term_names` order."""

    phase: str
    step: int
    epoch: float
    learning_rate: float
    loss: float
    term_names: tuple[str, ...]
    term_values: tuple[float, ...]
    samples_per_s: float


@dataclass(frozen=True, slots=True)
class ValidationScore:
    """One metric on clips that are not trained on, after step `step` of a phase: the mean over
    clips. A run's `validation.parquet`.
    """

    phase: str
    step: int
    metric: str
    value: float
    num_clips: int


@dataclass(frozen=True, slots=True)
class RunManifest:
    """What a finished training run made; its `manifest.json`."""

    uri: str
    run_id: str
    settings_digest: str
    dataset_id: str
    system: str
    perceptual: str
    num_steps: int
    final_loss: float
    weights_sha256: str
    precision: str = "float32"  # of the convolutions


# --- animate ---------------------------------------------------------------------------------

OutputFormat = Literal["mp4", "webm", "gif", "png"]
SUFFIXES: Final[dict[OutputFormat, str]] = {
    "mp4": ".mp4",
    "webm": ".webm",
    "gif": ".gif",
    "png": ".zip",  # of numbered pictures: one object, which is there as a whole or not at all
}
SOUNDLESS: Final[frozenset[OutputFormat]] = frozenset({"gif", "png"})
MAX_GIF_FPS: Final = 50.0  # viewers slow down what is faster, to 10 frames/s
_BOX = re.compile(r"([0-9]{1,6})-([0-9]{1,6})-([0-9]{1,6})-([0-9]{1,6})", re.ASCII)


def parse_box(text: str) -> tuple[int, int, int, int] | None:
    """The box that a text such as `10-20-266-276` means: left, top, right, bottom; else None.

    Raises:
        ValueError: it is a box without area.
    """
    found = _BOX.fullmatch(text)
    if found is None:
        return None
    left, top, right, bottom = (int(part) for part in found.groups())
    if left >= right or top >= bottom:
        raise ValueError(f"the box {text} has no area; it is left-top-right-bottom")
    return left, top, right, bottom


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How an animation is cut, paced and delivered.

    `crop` and `driving_crop` are rules (centre, auto, face, person; motion for a video) or boxes
    (`parse_box`) in pixels as displayed. `fps` None is the driving video's own.
    """

    crop: str = "centre"
    driving_crop: str = "centre"
    format: OutputFormat = "mp4"
    fps: float | None = None
    paste_back: bool = False
    side_by_side: bool = False

    def delivery(self) -> dict[str, Any]:
        """These values by name, JSON-ready, also of a record that has more."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(Delivery)}

    @property
    def max_fps(self) -> float | None:
        """A faster driving video loses frames."""
        return MAX_GIF_FPS if self.format == "gif" else None

    @property
    def driving_view(self) -> str:
        """What makes one driving video's frames another's, as a part of a file name."""
        crop = "" if self.driving_crop == "centre" else f"-{self.driving_crop}"
        if self.fps is not None:
            return f"{crop}-{self.fps!r}fps"
        return crop if self.max_fps is None else f"{crop}-max{self.max_fps!r}fps"


@dataclass(frozen=True, slots=True)
class CatalogRow(Delivery):
    """One wanted animation, as given: URIs or paths, not yet looked at."""

    line: int
    name: str
    source: str
    driving: str
    motion: Motion
    adapt_scale: bool
    best_frame: bool
    audio: bool


@dataclass(frozen=True, slots=True)
class AnimationItem(Delivery):
    """A catalog row with its inputs found; `item_id` digests all that shapes the output."""

    item_id: str
    name: str
    source: str
    driving: str
    source_sha256: str
    driving_sha256: str
    motion: Motion
    adapt_scale: bool
    best_frame: bool
    audio: bool


@dataclass(frozen=True, slots=True)
class FeatureRecord:
    """A stored source or driving state: what depends on one image or one video alone.

    The state lies in `num_parts` objects, so that it is written and read with flat memory.
    `num_frames_lost` is how many frames of a damaged driving video could not be used.
    """

    feature_id: str
    kind: Literal["source", "driving"]
    sha256: str
    num_parts: int
    num_frames: int
    num_frames_lost: int
    fps: float


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """A video file that was written and read back.

    `credentials` is who signed its content credentials, or `none`. They come after `sha256`, which
    is that of the file without them: two signatures of one file differ. `size_bytes` counts them.
    """

    num_frames: int
    fps: float
    width_px: int
    height_px: int
    size_bytes: int
    sha256: str
    has_audio: bool
    credentials: str = "none"


@dataclass(frozen=True, slots=True)
class AnimationRecord:
    """A finished animation; `key` is relative to the output root.

    `sha256` and `credentials` are as those of `EncodedVideo`.
    """

    item_id: str
    name: str
    source: str
    driving: str
    source_sha256: str
    driving_sha256: str
    motion: Motion
    key: str
    num_frames: int
    num_frames_lost: int
    fps: float
    width_px: int
    height_px: int
    size_bytes: int
    sha256: str
    credentials: str = "none"
    driving_view: str = ""  # see `Delivery`


@dataclass(frozen=True, slots=True)
class CatalogManifest:
    """What a finished catalog holds; its `summary.json`."""

    uri: str
    settings_digest: str
    weights_sha256: str
    num_items: int
    num_frames: int
    num_failures: int


# --- evaluate --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VideoScore:
    """One metric of one video. `num_frames` is how many frames it is the mean of.

    `method` is `model` for the frames under test, `copy` for the baseline that repeats the source,
    `codec` for the true frames after our encoder and a decoder, and `driving` for the driving video
    itself where its motion moves another identity.
    """

    clip_id: str
    name: str
    metric: str
    method: Method
    value: float
    num_frames: int


@dataclass(frozen=True, slots=True)
class ClipScores:
    """All scores of one video, entry by entry: how a worker hands them over."""

    clip_id: str
    name: str
    metrics: tuple[str, ...]
    methods: tuple[str, ...]
    values: tuple[float, ...]
    num_frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FrameScores:
    """One metric of one video frame by frame, NaN where it could not score a frame.

    `values` begin with frame 0 of the driving video, whether or not it counts in the mean; in the
    few_shot setting they are of the person's held-out frames.
    """

    clip_id: str
    name: str
    metric: str
    method: Method
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SetScore:
    """One metric of a whole set of videos of one method: it has no value for a single video.

    `num_windows` is how many frames, or windows of frames, its features are of.
    """

    metric: str
    method: Method
    value: float
    num_videos: int
    num_windows: int


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """One metric of one method over all videos.

    `mean` and `std` are over the per-video means; `pooled` is the mean over all frames of all
    videos, as the papers' code has it (longer videos weigh more). The others are the ends of both
    means' 95 % intervals, bootstrapped over videos; None where there are fewer than two.
    """

    metric: str
    method: Method
    mean: float
    std: float
    pooled: float
    num_videos: int
    num_frames: int
    mean_low: float | None = None
    mean_high: float | None = None
    pooled_low: float | None = None
    pooled_high: float | None = None


@dataclass(frozen=True, slots=True)
class PairedScore:
    """One metric of the model against another method's, video by video.

    Attributes:
        difference: the mean over videos of the model's value minus the other's.
        low, high: its 95 % interval, bootstrapped over videos; None with fewer than two.
        num_better, num_worse: videos in which the model is the better one, and the worse one.
        p_value: of the two-sided sign test over these, in [0, 1].
    """

    metric: str
    against: Method
    difference: float
    low: float | None
    high: float | None
    num_videos: int
    num_better: int
    num_worse: int
    p_value: float


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """What a metric's numbers were made with; numbers compare only where all of it agrees.

    Attributes:
        counts_first: whether frame 0 counts.
        quantise: what became of drawn frames before.
        estimator: what finds faces or bodies for it; empty where nothing does.
        coverage: the metric whose mean is the share of frames in which that found them; empty
            where every frame can be scored.
        of_set: whether it has one value for a whole set of videos.
    """

    name: str
    version: str
    weights_sha256: str | None
    licence: str
    higher_is_better: bool
    counts_first: bool = False
    quantise: Quantise = "none"
    estimator: str = ""
    coverage: str = ""
    of_set: bool = False


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """What a finished evaluation found; its `summary.json`.

    `dataset_id`, `weights_sha256` and `perceptual` (the features that the model was trained
    against) are empty where two folders were compared. `average` is which mean is shown first.
    `setting` and `motion` are what was drawn from what, see `kpmask.config.ScoreSetting`; a cross
    setting's videos are pairs, and a few_shot setting's are people. `sets` are the metrics of the
    whole set.
    """

    uri: str
    settings_digest: str
    dataset_id: str
    weights_sha256: str
    perceptual: str
    num_videos: int
    num_failures: int
    metrics: tuple[MetricInfo, ...]
    summaries: tuple[ScoreSummary, ...]
    paired: tuple[PairedScore, ...] = ()
    average: Average = "videos"
    setting: Setting = "reconstruction"
    motion: Motion = "absolute"
    sets: tuple[SetScore, ...] = ()


# --- compare ---------------------------------------------------------------------------------

# reconstruction: a clip from its own first frame. The others: a source moved by another identity's
# video, in the video's poses or by its motion.
Protocol = Literal["reconstruction", "cross-absolute", "cross-relative"]
# model: what a system drew. Beside it, what needs none: the source repeated (copy), the true frames
# after our encoder (codec), the source's own video (source) and the driving video itself (driving).
ComparedMethod = Literal["model", "copy", "codec", "source", "driving"]


@dataclass(frozen=True, slots=True)
class ComparedScore:
    """One metric of one video (or pair of videos: `clip_id` names both).

    `system`, `seed` and `variant` are empty, 0 and empty for what no system drew; `variant` is
    the ablation that a system was under, else empty.
    """

    protocol: Protocol
    system: str
    seed: int
    variant: str
    clip_id: str
    name: str
    metric: str
    method: ComparedMethod
    value: float
    num_frames: int


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """What a run of a comparison cost; `seconds` are of its steps, as its metrics tell."""

    system: str
    seed: int
    uri: str
    steps: int
    seconds: float
    num_parameters: int
    weights_sha256: str

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps


@dataclass(frozen=True, slots=True)
class ComparedValue:
    """One metric of a row: mean and spread over videos, of which each is the mean of its seeds.

    Attributes:
        seed_std: spread of the seeds' means; None with one seed.
        margin_percent: how much better than the baseline, in percent of the baseline's mean;
            None for the baseline and where it has none.
        margin_low, margin_high: the 95 % interval of the margin, bootstrapped over videos.
        p_value: of the two-sided sign test against the baseline over the videos of both; None
            where there is no margin.
    """

    metric: str
    mean: float
    std: float
    num_videos: int
    seed_std: float | None = None
    margin_percent: float | None = None
    margin_low: float | None = None
    margin_high: float | None = None
    p_value: float | None = None


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """A row of a comparison's table; `system` and `variant` as in `ComparedScore`."""

    protocol: Protocol
    system: str
    variant: str
    method: ComparedMethod
    values: tuple[ComparedValue, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found; its `comparison.json`. `num_runs_left` are not scored yet."""

    uri: str
    settings_digest: str
    dataset_id: str
    budget: str
    batch_size: int
    perceptual: str
    device: str
    precision: str
    baseline: str
    num_train_clips: int
    test_clips: tuple[str, ...]
    held_out: bool
    num_runs_left: int
    metrics: tuple[MetricInfo, ...]
    runs: tuple[ComparedRun, ...]
    rows: tuple[ComparedRow, ...]


# --- every job -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """An item that could not be done. `code` is stable, `cause` is for people.

    `value` is what was measured where a limit was broken.
    """

    item: str
    stage: str
    code: str
    cause: str
    retryable: bool
    attempts: int
    value: float | None = None


# --- records and Arrow -----------------------------------------------------------------------

R = TypeVar("R")

SCHEMA_VERSION: typing.Final = 1


class _ArrowTypes:
    scalars: ClassVar[dict[type, str]] = {
        str: "string",
        int: "int64",
        float: "float64",
        bool: "bool_",
    }


def _arrow_type(annotation: Any) -> tuple[pa.DataType, bool]:  # noqa: ANN401 - a type expression
    """The Arrow type of a field's annotation, and whether it may be null."""
    import pyarrow as pa

    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in typing.get_args(annotation) if a is not type(None))
        return _arrow_type(inner)[0], True
    if origin is Literal:
        return pa.string(), False
    if origin is tuple:
        return pa.list_(_arrow_type(typing.get_args(annotation)[0])[0]), False
    return getattr(pa, _ArrowTypes.scalars[annotation])(), False


def arrow_schema(record_type: type) -> pa.Schema:
    """The Arrow schema of a record type, with its name and schema version as metadata."""
    import pyarrow as pa

    hints = typing.get_type_hints(record_type)
    fields = []
    for field in dataclasses.fields(record_type):
        arrow_type, nullable = _arrow_type(hints[field.name])
        fields.append(pa.field(field.name, arrow_type, nullable=nullable))
    metadata: dict[bytes | str, bytes | str] = {
        "kpmask_record": record_type.__name__,
        "kpmask_schema": str(SCHEMA_VERSION),
    }
    return pa.schema(fields, metadata=metadata)


def to_table(
    records: Iterable[R], record_type: type[R], metadata: Mapping[str, str] | None = None
) -> pa.Table:
    """Records as an Arrow table; `metadata` (a settings digest, say) is added to the schema's."""
    import pyarrow as pa

    schema = arrow_schema(record_type)
    if metadata:
        schema = schema.with_metadata({**(schema.metadata or {}), **metadata})
    names = schema.names
    rows = [{name: getattr(record, name) for name in names} for record in records]
    return pa.Table.from_pylist(rows, schema=schema)


def from_table(table: pa.Table, record_type: type[R]) -> list[R]:
    """The records of an Arrow table; columns that came later than it have their defaults.

    Raises:
        ValueError: the table was written for another record type, or lacks a column.
    """
    written_for = (table.schema.metadata or {}).get(b"kpmask_record", b"").decode()
    if written_for != record_type.__name__:
        raise ValueError(f"a table of {written_for or 'unknown'}, not of {record_type.__name__}")
    names = [name for name in arrow_schema(record_type).names if name in table.column_names]
    missing = sorted(_required(record_type) - set(names))
    if missing:
        raise ValueError(f"columns missing: {', '.join(missing)}")
    return [
        record_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
        for row in table.select(names).to_pylist()
    ]


def _required(record_type: type) -> set[str]:
    fields = dataclasses.fields(record_type)
    return {field.name for field in fields if field.default is dataclasses.MISSING}


def as_dict(record: Any) -> dict[str, Any]:  # noqa: ANN401 - any record above
    """A record as a JSON-ready dict."""
    return dataclasses.asdict(record)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is; `message` is for people (a loss, a failure count)."""

    stage: str
    done: int
    total: int
    message: str = ""

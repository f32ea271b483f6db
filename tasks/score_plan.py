"""What an evaluation is to score: clips of a dataset, pairs and people of it, pairs of videos, or
a catalog's results.

All of it is settled before a worker starts, and what cannot be measured is refused here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kpmask import checkpoint
from kpmask.animate import Transfer
from kpmask.checkpoint import LoadedCheckpoint
from kpmask.config import EvaluateJob, ScoreProtocol
from kpmask.data.layouts import MediaSource, find_sources
from kpmask.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    MediaError,
    RowError,
    StorageError,
)
from kpmask.evaluate import metric_info, set_metric_info
from kpmask.media.roundtrip import CRF
from kpmask.metric_names import SET_METRICS, with_coverage
from kpmask.metrics import Metric, SetMetric, build_metrics, build_set_metrics
from kpmask.records import (
    Average,
    ClipRecord,
    Failure,
    MetricInfo,
    Motion,
    Setting,
    digest,
)
from kpmask.score_settings import HeldOut, held_out, read_pairs, refuse_unfit, spread_pairs
from tasks import storage, weights
from tasks.catalog import failure_of
from tasks.dataset import open_identified_dataset
from tasks.inputs import ID_LENGTH, content_digest, local_media
from tasks.score_catalog import Animation, finished_catalog
from tasks.storage import absolute

STAGE: Final = "evaluate"
MEDIA: Final = "media"  # where previews lie
NUM_PREVIEWS: Final = 200
_PREVIEW: Final = re.compile(rf"{MEDIA}/[0-9a-f]{{{ID_LENGTH}}}-")


@dataclass(frozen=True, slots=True)
class VideoPair:
    """A generated video and the one that it should be; `clip_id` digests both contents."""

    clip_id: str
    name: str
    generated: str
    reference: str


@dataclass(frozen=True, slots=True)
class CrossPair:
    """A clip's first frame, to be moved by another clip; `clip_id` digests both and the motion."""

    clip_id: str
    name: str
    source: ClipRecord
    driving: ClipRecord
    motion: Motion


@dataclass(frozen=True, slots=True)
class HeldOutFrames:
    """A person's held-out frames; `clip_id` digests which they are, and the source's clip."""

    clip_id: str
    name: str
    person: HeldOut


Scored = ClipRecord | VideoPair | CrossPair | HeldOutFrames | Animation


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """What is to be scored, whether a preview of it is wanted, and its name: see `entry_of`."""

    clip: Scored
    preview: bool
    entry: str


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """What is to be scored, and what the scores will depend on."""

    clips: tuple[Scored, ...]
    failures: tuple[Failure, ...]
    metrics: tuple[MetricInfo, ...]
    set_metrics: tuple[SetMetric, ...]
    average: Average
    setting: Setting
    motion: Motion
    dataset_id: str = ""
    weights_sha256: str = ""
    perceptual: str = ""

    @property
    def settings_digest(self) -> str:
        """Of all that shapes a clip's scores, but for the clip."""
        metrics = [dataclasses.asdict(metric) for metric in self.metrics]
        drawn = {"kind": self.setting, "motion": self.motion}
        values = {"weights": self.weights_sha256, "metrics": metrics, "codec_crf": CRF}
        return digest({**values, "setting": drawn})

    def items(self) -> list[ScoreItem]:
        """All that is to be scored; previews are of some that are spread over them."""
        count = min(NUM_PREVIEWS, len(self.clips))
        shown = {k * len(self.clips) // count for k in range(count)}
        settings_digest = self.settings_digest
        return [
            ScoreItem(clip, preview=number in shown, entry=entry_of(settings_digest, clip.clip_id))
            for number, clip in enumerate(self.clips)
        ]


def entry_of(settings_digest: str, clip_id: str) -> str:
    """What a video is called in the journal and among the previews.

    With the settings in it, so that nothing is taken for that of other weights, say.
    """
    return f"{settings_digest[:ID_LENGTH]}-{clip_id}"


def is_preview(key: str) -> bool:
    """Whether this is one of an evaluation's previews, with whatever settings."""
    return _PREVIEW.match(key) is not None


def score_plan(job: EvaluateJob) -> ScorePlan:
    """What a job asks for.

    Raises:
        ConfigError: there is nothing to score, a metric means nothing in the setting or takes more
            videos than there are, an estimator's weights are not here, or the system lacks the
            motion; see `finished_catalog`, too.
        CheckpointError: the weights cannot be read, or draw another size than the clips'.
        DatasetError: there is no dataset, or it lacks clips of the split; or there is no catalog.
        StorageError: a store denies or does not answer.
    """
    refuse_unfit(job.metrics, job.setting.kind)
    protocol = protocol_of(job)
    sets = tuple(build_set_metrics(job.metrics))
    metrics = infos_of(build_metrics(frame_metrics(job.metrics)), sets, protocol)
    planned = ScorePlan(
        clips=(),
        failures=(),
        metrics=metrics,
        set_metrics=sets,
        average=job.protocol.average,
        setting=job.setting.kind,
        motion=job.setting.motion or "absolute",
    )
    planned = _planner(job)(job, planned)
    for metric in sets:
        refuse_few(metric, len(planned.clips))
    return planned


def _planner(job: EvaluateJob) -> Callable[[EvaluateJob, ScorePlan], ScorePlan]:
    if job.catalog is not None:
        return _of_catalog
    return _of_videos if job.checkpoint is None else _of_model


def frame_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """The metrics that are of single frames, with the coverages that all are to be read with."""
    return tuple(name for name in with_coverage(names) if name not in SET_METRICS)


def infos_of(
    metrics: Iterable[Metric], set_metrics: Iterable[SetMetric], protocol: ScoreProtocol
) -> tuple[MetricInfo, ...]:
    """What the numbers of these metrics are made with."""
    return (
        *(metric_info(metric, protocol) for metric in metrics),
        *(set_metric_info(metric, protocol) for metric in set_metrics),
    )


def protocol_of(job: EvaluateJob) -> ScoreProtocol:
    """The job's protocol; of held-out frames the first one is no source, and counts."""
    if job.setting.kind == "few_shot":
        return job.protocol.model_copy(update={"first_frame": "in"})
    return job.protocol


def refuse_few(metric: SetMetric, num_videos: int) -> None:
    """Let a set pass that is large enough for a metric.

    Raises:
        ConfigError: naming the metric, how many videos there are, and how many it takes.
    """
    if num_videos < metric.min_videos:
        raise ConfigError(
            f"{num_videos} videos are too few: it takes {metric.min_videos}, or the value is more "
            "of their number than of what they show",
            subject=metric.name,
            hint="of single videos there are ssim, warping_error, csim_truth_sface and others",
        )


# --- a model's videos ------------------------------------------------------------------------


def _of_model(job: EvaluateJob, planned: ScorePlan) -> ScorePlan:
    assert job.checkpoint is not None
    assert job.data is not None
    loaded = checkpoint.load(weights.local_weights(job.checkpoint))
    Transfer(planned.motion).check(loaded.system)
    dataset, dataset_id = open_identified_dataset(job.data, holdout_fraction=job.holdout_fraction)
    clips = dataset.partition(job.partition)
    if not clips:
        raise DatasetError(
            f"it has no {job.partition} clips", subject=job.data, code="dataset_too_small"
        )
    failures: list[Failure] = []
    choose = {"reconstruction": _whole_clips, "cross": _pairs, "few_shot": _people}
    chosen = choose[job.setting.kind](job, clips, failures)[: job.max_clips]
    _check_sizes(job.checkpoint, loaded, chosen)
    return dataclasses.replace(
        planned,
        clips=tuple(chosen),
        failures=tuple(failures),
        dataset_id=dataset_id,
        weights_sha256=loaded.sha256,
        perceptual=str(loaded.info.get("perceptual", "unknown")),
    )


def _whole_clips(
    job: EvaluateJob, clips: Sequence[ClipRecord], failures: list[Failure]
) -> Sequence[Scored]:
    return clips


def _pairs(
    job: EvaluateJob, clips: Sequence[ClipRecord], failures: list[Failure]
) -> Sequence[Scored]:
    """Pairs of the job's table, or as many as it asks for; rows that make no sense are failures.

    Raises:
        DatasetError: there are no two identities.
        ConfigError: the table has no pair.
    """
    setting = job.setting
    found: Iterable[tuple[ClipRecord, ClipRecord] | RowError] = spread_pairs(
        clips, setting.num_pairs
    )
    if setting.pairs is not None:
        found = read_pairs(_local_table(setting.pairs), clips)
    pairs = []
    for pair in found:
        if isinstance(pair, RowError):
            failures.append(failure_of(pair.subject, STAGE, pair))
            continue
        source, driving = pair
        motion: Motion = setting.motion or "absolute"
        clip_id = digest([source.clip_id, driving.clip_id, motion])[:ID_LENGTH]
        name = f"{source.name} by {driving.name}"
        pairs.append(CrossPair(clip_id, name, source, driving, motion))
    if pairs:
        return pairs
    if setting.pairs is not None:
        first = f"; {failures[0].item}: {failures[0].cause}" if failures else ""
        raise ConfigError(f"it has no pair{first}", subject=setting.pairs, code="nothing_to_do")
    raise DatasetError(
        f"its {job.partition} clips are all of one identity",
        subject=job.data or "",
        code="dataset_too_small",
    )


def _local_table(uri: str) -> Path:
    try:
        return storage.local_copy(absolute(uri))
    except StorageError as error:
        if error.code != "not_found":
            raise
        raise ConfigError("no such table of pairs", subject=uri) from error


def _people(
    job: EvaluateJob, clips: Sequence[ClipRecord], failures: list[Failure]
) -> Sequence[Scored]:
    """Held-out frames of each person; one of whom there is a single frame is a failure."""
    people = []
    for person in held_out(clips, job.setting.num_frames):
        if not person.frames:
            error = MediaError("there is a single frame, and none is held out", code="too_short")
            failures.append(failure_of(person.identity, STAGE, error))
            continue
        chosen = [(clip.clip_id, numbers) for clip, numbers in person.frames]
        clip_id = digest([person.source.clip_id, chosen])[:ID_LENGTH]
        people.append(HeldOutFrames(clip_id, person.identity, person))
    if not people:
        raise DatasetError("nobody has a second frame", code="dataset_too_small")
    return people


def _check_sizes(name: str, loaded: LoadedCheckpoint, chosen: Iterable[Scored]) -> None:
    """Let clips pass that have the model's size.

    Raises:
        CheckpointError: code checkpoint_mismatch.
    """
    side_px = loaded.config.image_size_px
    for clip in (clip for item in chosen for clip in _clips_of(item)):
        if (clip.width_px, clip.height_px) != (side_px, side_px):
            raise CheckpointError(
                f"draws {side_px}x{side_px} px, and clip {clip.name} has "
                f"{clip.width_px}x{clip.height_px}",
                subject=name,
                code="checkpoint_mismatch",
                hint="preprocess to the model's size: a resized clip would have other scores",
            )


def _clips_of(item: Scored) -> Sequence[ClipRecord]:
    if isinstance(item, CrossPair):
        return item.source, item.driving
    if isinstance(item, HeldOutFrames):
        return item.person.source, *(clip for clip, _ in item.person.frames)
    return [item] if isinstance(item, ClipRecord) else []


# --- a finished catalog ----------------------------------------------------------------------


def _of_catalog(job: EvaluateJob, planned: ScorePlan) -> ScorePlan:
    """A catalog's results, and failures of those that it lacks or that cannot be scored."""
    found = finished_catalog(job, stage=STAGE)
    return dataclasses.replace(
        planned,
        clips=found.animations,
        failures=found.failures,
        motion=found.motion,
        weights_sha256=found.weights_sha256,
    )


# --- two folders of videos -------------------------------------------------------------------


def _of_videos(job: EvaluateJob, planned: ScorePlan) -> ScorePlan:
    """Videos with the same name in both folders, and failures of those that stand alone."""
    assert job.generated is not None
    assert job.reference is not None
    generated, reference = (_videos(uri, job.out) for uri in (job.generated, job.reference))
    failures = []
    for mine, other, where in (
        (generated, reference, job.reference),
        (reference, generated, job.generated),
    ):
        for name in sorted(mine.keys() - other.keys()):
            error = MediaError(f"{where} has no video of this name", code="not_found")
            failures.append(failure_of(name, STAGE, error))
    pairs = []
    for name in sorted(generated.keys() & reference.keys())[: job.max_clips]:
        uris = (generated[name], reference[name])
        contents = []
        for uri in uris:
            with local_media(uri) as path:
                contents.append(content_digest(path))
        pairs.append(VideoPair(digest(contents)[:ID_LENGTH], name, *uris))
    kept = _without_twins(pairs, failures)
    return dataclasses.replace(planned, clips=tuple(kept), failures=tuple(failures))


def _without_twins(pairs: Sequence[VideoPair], failures: list[Failure]) -> list[VideoPair]:
    """Pairs with the same two contents count once; the others are failures."""
    kept: dict[str, VideoPair] = {}
    for pair in pairs:
        twin = kept.setdefault(pair.clip_id, pair)
        if twin is not pair:
            error = MediaError(f"the same two videos as {twin.name}", code="inconsistent_frames")
            failures.append(failure_of(pair.name, STAGE, error))
    return list(kept.values())


def _videos(uri: str, out: str) -> Mapping[str, str]:
    """The videos of a folder, URI by name.

    Args:
        out: the evaluation's own place, which may lie in the folder: its previews are none of them.

    Raises:
        ConfigError: there is none.
    """
    root, own = (f"{absolute(place).rstrip('/')}/" for place in (uri, out))
    keys = [info.key for info in storage.open_store(absolute(uri)).list()]
    previews = {
        key
        for key in keys
        if f"{root}{key}".startswith(own) and is_preview(f"{root}{key}".removeprefix(own))
    }
    found: list[MediaSource] = find_sources(key for key in keys if key not in previews)
    if not found:
        raise ConfigError("no videos here", subject=absolute(uri), code="nothing_to_do")
    return {source.name: f"{root}{source.key}" for source in found}

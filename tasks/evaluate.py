"""A checkpoint on a split, or one folder of videos against another -> scores.

- One Ray stage whose item is a clip. A scored clip is in the journal at once; a rerun scores what
  is missing. The table of scores is written last.
- Two folders are matched by their videos' names without suffix. Frame 0 of a true video counts as
  its source, as in reconstruction. Frame counts must agree: scores of videos that are out of step
  would say nothing.
- Beside the model stand a copy of the first frame, and the codec alone: the true frames after the
  encoder that results are stored with.
- The first clips leave short previews behind, from which the page shows the best and the worst.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kpmask import checkpoint
from kpmask.animate import Animator, to_frames, to_tensor
from kpmask.config import EvaluateJob, MediaLimits, MetricName, ScoreProtocol
from kpmask.data.dataset import Dataset
from kpmask.data.layouts import MediaSource, find_sources
from kpmask.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    MediaError,
    RunFailed,
)
from kpmask.evaluate import (
    FramePair,
    metric_info,
    paired_scores,
    reconstruct,
    score_video,
    summarise,
    video_scores,
)
from kpmask.media import decode, images
from kpmask.media.encode import encode
from kpmask.media.probe import probe
from kpmask.media.roundtrip import CRF, through_codec
from kpmask.metrics import build_metrics
from kpmask.records import (
    Average,
    ClipRecord,
    ClipScores,
    Failure,
    MetricInfo,
    Progress,
    ScoreTable,
    VideoScore,
    digest,
)
from kpmask.report import GalleryMedia, evaluation_page
from tasks import storage, weights
from tasks.catalog import failure_of
from tasks.cluster import Worker, ray_session, run_items
from tasks.dataset import open_identified_dataset
from tasks.inputs import ID_LENGTH, content_digest, local_media
from tasks.manifest import (
    Journal,
    check_failures,
    read_table_if_any,
    read_table_metadata,
    write_json,
    write_table,
)
from tasks.storage import ObjectStore, absolute

OnProgress = Callable[[Progress], None]
Frames = NDArray[np.uint8]  # THWC RGB
Frame = NDArray[np.uint8]  # HWC RGB

SCORES: Final = "scores.parquet"
FAILURES: Final = "failures.parquet"
SUMMARY: Final = "summary.json"
PAGE: Final = "index.html"
JOURNAL: Final = "journal"
STAGE: Final = "evaluate"
NUM_PREVIEWS: Final = 24
PREVIEW_FRAMES: Final = 100


@dataclass(frozen=True, slots=True)
class VideoPair:
    """A generated video and the one that it should be; `clip_id` digests both contents."""

    clip_id: str
    name: str
    generated: str
    reference: str


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """A clip to be scored, and whether a preview of it is wanted."""

    clip: ClipRecord | VideoPair
    preview: bool


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """What a worker needs to know."""

    out: str
    checkpoint: str
    data: str
    device: str
    batch_size: int
    metrics: tuple[MetricName, ...]
    protocol: ScoreProtocol
    limits: MediaLimits

    @classmethod
    def of(cls, job: EvaluateJob) -> ScoreSettings:
        return cls(
            out=absolute(job.out),
            checkpoint=weights.reference(job.checkpoint) if job.checkpoint else "",
            data=absolute(job.data) if job.data else "",
            device=job.device,
            batch_size=job.batch_size,
            metrics=job.metrics,
            protocol=job.protocol,
            limits=job.limits,
        )


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """What is to be scored, and what the scores will depend on."""

    clips: tuple[ClipRecord | VideoPair, ...]
    failures: tuple[Failure, ...]
    metrics: tuple[MetricInfo, ...]
    dataset_id: str
    weights_sha256: str
    perceptual: str
    average: Average

    @property
    def settings_digest(self) -> str:
        """Of all that shapes a clip's scores, but for the clip."""
        metrics = [dataclasses.asdict(metric) for metric in self.metrics]
        values = {"weights": self.weights_sha256, "metrics": metrics, "codec_crf": CRF}
        return digest(values)


def evaluate(job: EvaluateJob, *, on_progress: OnProgress | None = None) -> ScoreTable:
    """Score every clip and publish tables, summary and page.

    Raises:
        ConfigError: there is nothing to score.
        CheckpointError: the weights cannot be read, or draw another size than the clips'.
        DatasetError: there is no dataset, or it lacks clips of the split.
        StorageError: a store denies, lacks space or does not answer; what is done is kept.
        RunFailed: more than `max_failed_fraction` of the clips failed.
    """
    planned = _planned(job)
    store = storage.open_store(job.out)
    journal = Journal(store, JOURNAL, ClipScores)
    scored = _earlier(store, planned) | _interrupted(journal, planned)
    items = _items(planned.clips)
    failures = list(planned.failures)
    todo = [item for item in items if item.clip.clip_id not in scored]
    if todo:
        with ray_session():
            for outcome in run_items(
                todo,
                _worker(job),
                (ScoreSettings.of(job),),
                key=lambda item: item.clip.name,
                stage=STAGE,
                cluster=job.cluster,
                on_progress=on_progress,
            ):
                if outcome.result is not None:
                    journal.add(_entry(planned, outcome.result.clip_id), outcome.result)
                    scored[outcome.result.clip_id] = outcome.result
                elif outcome.failure is not None:
                    failures.append(outcome.failure)
    clips = [_named(scored[c.clip_id], c.name) for c in planned.clips if c.clip_id in scored]
    table = _publish(store, planned, clips, failures)
    journal.clear()
    check_failures(failures, len(planned.clips) + len(planned.failures), job.max_failed_fraction)
    if not table.summaries:
        raise RunFailed("no clip could be scored", code="no_output")
    return table


def plan(job: EvaluateJob) -> list[str]:
    """What `evaluate` would do, a line each; nothing is written.

    Raises:
        KpmaskError: as it does.
    """
    planned = _planned(job)
    names = ", ".join(metric.name for metric in planned.metrics)
    return [
        f"{len(planned.clips)} videos by {names}",
        *(f"cannot be done: {f.item}: {f.code}: {f.cause}" for f in planned.failures),
    ]


# --- the plan --------------------------------------------------------------------------------


def _planned(job: EvaluateJob) -> ScorePlan:
    metrics = tuple(metric_info(metric, job.protocol) for metric in build_metrics(job.metrics))
    average = job.protocol.average
    if job.checkpoint is None:
        pairs, failures = _video_pairs(job)
        return ScorePlan(tuple(pairs), tuple(failures), metrics, "", "", "", average)
    loaded = checkpoint.load(weights.local_weights(job.checkpoint))
    clips, dataset_id = _dataset_clips(job)
    side_px = loaded.config.image_size_px
    for clip in clips:
        if (clip.width_px, clip.height_px) != (side_px, side_px):
            raise CheckpointError(
                f"draws {side_px}x{side_px} px, and clip {clip.name} has "
                f"{clip.width_px}x{clip.height_px}",
                subject=job.checkpoint,
                code="checkpoint_mismatch",
                hint="preprocess to the model's size: a resized clip would have other scores",
            )
    perceptual = str(loaded.info.get("perceptual", "unknown"))
    return ScorePlan(tuple(clips), (), metrics, dataset_id, loaded.sha256, perceptual, average)


def _dataset_clips(job: EvaluateJob) -> tuple[list[ClipRecord], str]:
    """The clips of the wanted split, and the dataset's id."""
    assert job.data is not None
    dataset, dataset_id = open_identified_dataset(job.data, holdout_fraction=job.holdout_fraction)
    clips = dataset.partition(job.partition)
    if not clips:
        raise DatasetError(
            f"it has no {job.partition} clips", subject=job.data, code="dataset_too_small"
        )
    return clips[: job.max_clips], dataset_id


def _video_pairs(job: EvaluateJob) -> tuple[list[VideoPair], list[Failure]]:
    """Videos with the same name in both folders, and failures of those that stand alone."""
    assert job.generated is not None
    assert job.reference is not None
    generated, reference = _videos(job.generated), _videos(job.reference)
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
    return _without_twins(pairs, failures)


def _without_twins(
    pairs: Sequence[VideoPair], failures: list[Failure]
) -> tuple[list[VideoPair], list[Failure]]:
    """Pairs with the same two contents count once."""
    kept: dict[str, VideoPair] = {}
    for pair in pairs:
        twin = kept.setdefault(pair.clip_id, pair)
        if twin is not pair:
            error = MediaError(f"the same two videos as {twin.name}", code="inconsistent_frames")
            failures.append(failure_of(pair.name, STAGE, error))
    return list(kept.values()), failures


def _videos(uri: str) -> Mapping[str, str]:
    """The videos of a folder, URI by name.

    Raises:
        ConfigError: there is none.
    """
    uri = absolute(uri)
    found: list[MediaSource] = find_sources(info.key for info in storage.open_store(uri).list())
    if not found:
        raise ConfigError("no videos here", subject=uri, code="nothing_to_do")
    return {source.name: f"{uri.rstrip('/')}/{source.key}" for source in found}


def _items(clips: Iterable[ClipRecord | VideoPair]) -> list[ScoreItem]:
    return [ScoreItem(clip, preview=number < NUM_PREVIEWS) for number, clip in enumerate(clips)]


def _earlier(store: ObjectStore, planned: ScorePlan) -> dict[str, ClipScores]:
    """Scores of a finished evaluation with the same settings."""
    rows = read_table_if_any(store, SCORES, VideoScore)
    if not rows or (
        read_table_metadata(store, SCORES).get("settings_digest") != planned.settings_digest
    ):
        return {}
    by_clip: dict[str, list[VideoScore]] = {}
    for row in rows:
        by_clip.setdefault(row.clip_id, []).append(row)
    return {
        clip_id: ClipScores(
            clip_id=clip_id,
            name=found[0].name,
            metrics=tuple(row.metric for row in found),
            methods=tuple(row.method for row in found),
            values=tuple(row.value for row in found),
            num_frames=tuple(row.num_frames for row in found),
        )
        for clip_id, found in by_clip.items()
    }


def _interrupted(journal: Journal[ClipScores], planned: ScorePlan) -> dict[str, ClipScores]:
    """Scores that an interrupted run with the same settings left behind."""
    done = journal.done()
    entries = {clip.clip_id: _entry(planned, clip.clip_id) for clip in planned.clips}
    return {clip_id: done[entry] for clip_id, entry in entries.items() if entry in done}


def _entry(planned: ScorePlan, clip_id: str) -> str:
    """What a clip's scores are called in the journal: they follow from clip and settings."""
    return f"{planned.settings_digest[:ID_LENGTH]}-{clip_id}"


def _named(clip: ClipScores, name: str) -> ClipScores:
    return dataclasses.replace(clip, name=name)


# --- workers ---------------------------------------------------------------------------------


def _worker(job: EvaluateJob) -> type[Worker[ScoreItem, ClipScores]]:
    return PairWorker if job.checkpoint is None else ClipWorker


class ClipWorker:
    """Reconstructs and scores clips of a dataset; the model is loaded once."""

    def __init__(self, settings: ScoreSettings) -> None:
        self._settings = settings
        self._animator = Animator.load(
            weights.local_weights(settings.checkpoint),
            device=settings.device,
            precision="float32",  # a score is of the weights, not of a processor's rounding
        )
        self._dataset = Dataset((), fetch=storage.open_store(settings.data).local)
        self._scorer = _Scorer(settings)

    def process(self, item: ScoreItem) -> ClipScores:
        """Score one clip.

        Raises:
            DatasetError: what is stored is not what the manifest says.
            ItemError: the model draws pixels that are no numbers.
        """
        clip = item.clip
        assert isinstance(clip, ClipRecord)
        true = itertools.chain.from_iterable(self._chunks(clip))
        with through_codec(true, fps=clip.fps) as codec:
            pairs = reconstruct(self._animator, self._chunks(clip))
            return self._scorer.score(item, pairs, codec=codec, fps=clip.fps)

    def _chunks(self, clip: ClipRecord) -> Iterator[Frames]:
        for start in range(0, clip.num_frames, self._settings.batch_size):
            stop = min(start + self._settings.batch_size, clip.num_frames)
            yield self._dataset.read(clip, slice(start, stop))


class PairWorker:
    """Scores videos against videos."""

    def __init__(self, settings: ScoreSettings) -> None:
        self._settings = settings
        self._scorer = _Scorer(settings)

    def process(self, item: ScoreItem) -> ClipScores:
        """Score one pair of videos.

        Raises:
            MediaError: one cannot be read to its end, or they differ in size or length.
        """
        clip, limits = item.clip, self._settings.limits
        assert isinstance(clip, VideoPair)
        with local_media(clip.generated) as generated, local_media(clip.reference) as reference:
            fps = probe(reference, limits).fps
            pairs = _paired(
                decode.frames(generated, limits),
                decode.frames(reference, limits),
                batch_size=self._settings.batch_size,
                name=clip.name,
            )
            true = (frame.rgb_HWC for frame in decode.frames(reference, limits))
            with through_codec(true, fps=fps) as codec:
                return self._scorer.score(item, pairs, codec=codec, fps=fps)


def _paired(
    generated: Iterator[decode.Frame],
    reference: Iterator[decode.Frame],
    *,
    batch_size: int,
    name: str,
) -> Iterator[FramePair]:
    """Frames of two videos side by side.

    Raises:
        MediaError: inconsistent_frames, when the videos differ in size or length.
    """
    both = itertools.zip_longest(generated, reference)
    while chunk := list(itertools.islice(both, batch_size)):
        if any(frame is None for frames in chunk for frame in frames):
            longer = "true" if chunk[-1][0] is None else "generated"
            raise MediaError(
                f"the {longer} video has more frames", subject=name, code="inconsistent_frames"
            )
        mine, true = ([frame.rgb_HWC for frame in column] for column in zip(*chunk, strict=True))
        if mine[0].shape != true[0].shape:
            sizes = " and ".join(
                f"{image.shape[1]}x{image.shape[0]}" for image in (mine[0], true[0])
            )
            raise MediaError(
                f"the frames differ in size: {sizes}", subject=name, code="inconsistent_frames"
            )
        yield to_tensor(np.stack(mine)), to_tensor(np.stack(true))


class _Scorer:
    """Scores pairs of frames as they come, and keeps the first of them as a preview."""

    def __init__(self, settings: ScoreSettings) -> None:
        self._store = storage.open_store(settings.out)
        self._metrics = build_metrics(settings.metrics)
        self._protocol = settings.protocol

    def score(
        self, item: ScoreItem, pairs: Iterable[FramePair], *, codec: Iterator[Frame], fps: float
    ) -> ClipScores:
        clip = item.clip
        kept: list[tuple[Frames, Frames]] = []
        pairs = _watched(pairs, kept) if item.preview else pairs
        scores = score_video(
            pairs,
            self._metrics,
            clip_id=clip.clip_id,
            name=clip.name,
            protocol=self._protocol,
            codec=codec,
        )
        if item.preview:
            self._show(clip.clip_id, kept, fps)
        return scores

    def _show(self, clip_id: str, kept: Sequence[tuple[Frames, Frames]], fps: float) -> None:
        media = _media(clip_id)
        generated, true = (np.concatenate(column) for column in zip(*kept, strict=True))
        self._store.put(media.source, images.encode_jpeg(true[0], quality=85))
        with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
            for key, frames in ((media.result, generated), (media.driving, true)):
                path = Path(folder) / "preview.mp4"
                encode(path, frames[:PREVIEW_FRAMES], fps=fps)
                self._store.put_file(key, path)


def _watched(pairs: Iterable[FramePair], kept: list[tuple[Frames, Frames]]) -> Iterator[FramePair]:
    """The pairs; the first `PREVIEW_FRAMES` frames are put into `kept` on their way."""
    for generated, reference in pairs:
        if sum(len(frames) for frames, _ in kept) < PREVIEW_FRAMES:
            kept.append((to_frames(generated), to_frames(reference)))
        yield generated, reference


def _media(clip_id: str) -> GalleryMedia:
    """Where a clip's previews lie."""
    return GalleryMedia(
        source=f"media/{clip_id}.jpg",
        driving=f"media/{clip_id}-true.mp4",
        result=f"media/{clip_id}.mp4",
    )


# --- results ---------------------------------------------------------------------------------


def _publish(
    store: ObjectStore,
    planned: ScorePlan,
    clips: Sequence[ClipScores],
    failures: Sequence[Failure],
) -> ScoreTable:
    """Tables, summary and page; the scores last."""
    scores = video_scores(clips)
    failures = sorted(failures, key=lambda f: (f.item, f.stage, f.code))
    table = ScoreTable(
        uri=store.uri,
        settings_digest=planned.settings_digest,
        dataset_id=planned.dataset_id,
        weights_sha256=planned.weights_sha256,
        perceptual=planned.perceptual,
        num_videos=len(clips),
        num_failures=len(failures),
        metrics=planned.metrics,
        summaries=summarise(scores),
        paired=paired_scores(scores, planned.metrics),
        average=planned.average,
    )
    metadata = {"settings_digest": planned.settings_digest}
    write_table(store, FAILURES, failures, Failure, metadata=metadata)
    write_json(store, SUMMARY, table)
    store.put(PAGE, scores_page(store, table, scores, failures).encode())
    write_table(store, SCORES, scores, VideoScore, metadata=metadata)
    return table


def scores_page(
    store: ObjectStore,
    table: ScoreTable,
    scores: Sequence[VideoScore],
    failures: Sequence[Failure],
) -> str:
    """The page of a finished evaluation; it refers to the previews beside it."""
    keys = {info.key for info in store.list("media/")}
    media = {
        clip_id: _media(clip_id)
        for clip_id in {score.clip_id for score in scores}
        if _media(clip_id).result in keys
    }
    return evaluation_page(
        title="Evaluation", table=table, scores=scores, failures=failures, media=media
    )

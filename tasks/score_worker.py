"""The workers of an evaluation: each draws or reads videos and scores them, one after another.

What is too much to be handed over lies in the store when a video's scores come: its curves and its
features, under the journal, and its preview.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kpmask.animate import Animator, choose_device, to_frames, to_tensor
from kpmask.config import EvaluateJob, MediaLimits, MetricName, ScoreProtocol
from kpmask.data.dataset import Dataset
from kpmask.errors import CheckpointError, MediaError
from kpmask.evaluate import FramePair, ScoredVideo, animated, reconstruct, scored_video
from kpmask.media import decode, images
from kpmask.media.encode import encode
from kpmask.media.probe import probe
from kpmask.media.roundtrip import through_codec
from kpmask.metrics import build_metrics, build_set_metrics
from kpmask.records import ClipRecord, ClipScores, FrameScores, MetricInfo
from kpmask.report import GalleryMedia
from tasks import storage, weights
from tasks.cluster import Worker
from tasks.deliver import open_driving
from tasks.inputs import local_media
from tasks.manifest import write_table
from tasks.score_catalog import Animation, Reading, animated_image, checked_result, original
from tasks.score_plan import (
    MEDIA,
    CrossPair,
    HeldOutFrames,
    ScoreItem,
    ScorePlan,
    VideoPair,
    frame_metrics,
    infos_of,
    protocol_of,
)
from tasks.storage import ObjectStore, absolute

Frames = NDArray[np.uint8]  # THWC RGB
Frame = NDArray[np.uint8]  # HWC RGB

CURVES: Final = "journal/frames"
FEATURES: Final = "journal/features"
PREVIEW_FRAMES: Final = 100
HELD_OUT_FPS: Final = 5.0  # of a preview whose frames do not follow one another


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """What a worker needs to know.

    Attributes:
        weights_sha256: of the model's weights, as the run found them; empty: any will do.
        measured: what the run says of its metrics; None: whatever this machine has will do.
    """

    out: str
    checkpoint: str
    data: str
    catalog: str
    device: str
    batch_size: int
    metrics: tuple[MetricName, ...]
    protocol: ScoreProtocol
    limits: MediaLimits
    weights_sha256: str = ""
    measured: tuple[MetricInfo, ...] | None = None

    @classmethod
    def of(cls, job: EvaluateJob) -> ScoreSettings:
        return cls(
            out=absolute(job.out),
            checkpoint=weights.reference(job.checkpoint) if job.checkpoint else "",
            data=absolute(job.data) if job.data else "",
            catalog=absolute(job.catalog) if job.catalog else "",
            device=job.device,
            batch_size=job.batch_size,
            metrics=job.metrics,
            protocol=protocol_of(job),
            limits=job.limits,
        )

    def as_planned(self, planned: ScorePlan) -> ScoreSettings:
        """With what a worker must find on its machine, too."""
        return dataclasses.replace(
            self, weights_sha256=planned.weights_sha256, measured=planned.metrics
        )


def worker_of(job: EvaluateJob) -> type[Worker[ScoreItem, ClipScores]]:
    """What scores a job's items."""
    if job.catalog is not None:
        return CatalogWorker
    return PairWorker if job.checkpoint is None else ClipWorker


class ClipWorker:
    """Draws and scores clips of a dataset, pairs or people of it; the model is loaded once."""

    def __init__(self, settings: ScoreSettings) -> None:
        self._settings = settings
        self._animator = Animator.load(
            weights.local_weights(settings.checkpoint),
            device=settings.device,
            precision="float32",  # a score is of the weights, not of a processor's rounding
        )
        if settings.weights_sha256 not in ("", self._animator.weights_sha256):
            raise CheckpointError(
                "these are not the weights with which the run began", subject=settings.checkpoint
            )
        self._dataset = Dataset((), fetch=storage.open_store(settings.data).local)
        self._scorer = _Scorer(settings)

    def process(self, item: ScoreItem) -> ClipScores:
        """Score one clip, pair or person.

        Raises:
            DatasetError: what is stored is not what the manifest says.
            ItemError: the model draws pixels that are no numbers.
        """
        clip = item.clip
        if isinstance(clip, CrossPair):
            return self._cross(item, clip)
        if isinstance(clip, HeldOutFrames):
            return self._few_shot(item, clip)
        assert isinstance(clip, ClipRecord)
        true = itertools.chain.from_iterable(self._chunks(clip))
        with through_codec(true, fps=clip.fps) as codec:
            pairs = reconstruct(self._animator, self._chunks(clip))
            return self._scorer.score(item, pairs, fps=clip.fps, codec=codec)

    def _cross(self, item: ScoreItem, pair: CrossPair) -> ClipScores:
        source_HWC = self._first(pair.source)
        chunks = self._chunks(pair.driving)
        pairs = animated(self._animator, source_HWC, chunks, motion=pair.motion)
        fps = pair.driving.fps
        return self._scorer.score(item, pairs, fps=fps, source_HWC=source_HWC, also_driving=True)

    def _few_shot(self, item: ScoreItem, held: HeldOutFrames) -> ClipScores:
        source_HWC = self._first(held.person.source)
        size = self._settings.batch_size
        chunks = (
            self._dataset.read(clip, list(numbers[start : start + size]))
            for clip, numbers in held.person.frames
            for start in range(0, len(numbers), size)
        )
        pairs = reconstruct(self._animator, chunks, source_HWC=source_HWC)
        return self._scorer.score(item, pairs, fps=HELD_OUT_FPS, source_HWC=source_HWC)

    def _first(self, clip: ClipRecord) -> Frame:
        first_HWC: Frame = self._dataset.read(clip, slice(0, 1))[0]
        return first_HWC

    def _chunks(self, clip: ClipRecord) -> Iterator[Frames]:
        for start in range(0, clip.num_frames, self._settings.batch_size):
            stop = min(start + self._settings.batch_size, clip.num_frames)
            yield self._dataset.read(clip, slice(start, stop))


class PairWorker:
    """Scores videos against videos."""

    def __init__(self, settings: ScoreSettings) -> None:
        self._settings = settings
        self._device = choose_device(settings.device)
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
                _frames(generated, limits),
                _frames(reference, limits),
                batch_size=self._settings.batch_size,
                name=clip.name,
                device=self._device,
            )
            with through_codec(_frames(reference, limits), fps=fps) as codec:
                return self._scorer.score(item, pairs, fps=fps, codec=codec)


class CatalogWorker:
    """Scores a catalog's results beside the driving frames that the model saw."""

    def __init__(self, settings: ScoreSettings) -> None:
        self._settings = settings
        self._reading = Reading(settings.limits)
        self._store = storage.open_store(settings.catalog)
        self._device = choose_device(settings.device)
        self._scorer = _Scorer(settings)

    def process(self, item: ScoreItem) -> ClipScores:
        """Score one result.

        Raises:
            ItemError: a file is gone, has changed or cannot be read to its end, or the result has
                another length than its driving video.
        """
        clip, reading = item.clip, self._reading
        assert isinstance(clip, Animation)
        made = clip.item
        result = checked_result(self._store, clip)
        side_px = probe(result, reading.limits).width_px
        with (
            original(made.source, made.source_sha256) as source,
            original(made.driving, made.driving_sha256) as driving_path,
        ):
            source_HWC = animated_image(source, made, reading, side_px=side_px)
            driving = open_driving(driving_path, reading, made, side_px=side_px)
            pairs = _paired(
                _frames(result, reading.limits),
                iter(driving),
                batch_size=self._settings.batch_size,
                name=clip.name,
                device=self._device,
                other="driving",
            )
            return self._scorer.score(
                item, pairs, fps=driving.fps, source_HWC=source_HWC, also_driving=True
            )


def _frames(path: Path, limits: MediaLimits) -> Iterator[Frame]:
    return (frame.rgb_HWC for frame in decode.frames(path, limits))


def _paired(
    generated: Iterator[Frame],
    reference: Iterator[Frame],
    *,
    batch_size: int,
    name: str,
    device: torch.device,
    other: str = "true",
) -> Iterator[FramePair]:
    """Frames of two videos side by side: by their numbers, whatever their times.

    Args:
        other: what `reference` is called.

    Raises:
        MediaError: inconsistent_frames, when the videos differ in size or length.
    """
    both = itertools.zip_longest(generated, reference)
    while chunk := list(itertools.islice(both, batch_size)):
        if any(frame is None for frames in chunk for frame in frames):
            longer = other if chunk[-1][0] is None else "generated"
            raise MediaError(
                f"the {longer} video has more frames", subject=name, code="inconsistent_frames"
            )
        mine, true = zip(*chunk, strict=True)
        if mine[0].shape != true[0].shape:
            sizes = " and ".join(
                f"{image.shape[1]}x{image.shape[0]}" for image in (mine[0], true[0])
            )
            raise MediaError(
                f"the frames differ in size: {sizes}", subject=name, code="inconsistent_frames"
            )
        drawn_TCHW = to_tensor(np.stack(mine), device=device)
        yield drawn_TCHW, to_tensor(np.stack(true), device=device)


# --- scoring, and what is left in the store --------------------------------------------------


class _Scorer:
    """Scores pairs of frames as they come, and keeps the first of them as a preview."""

    def __init__(self, settings: ScoreSettings) -> None:
        self._store = storage.open_store(settings.out)
        self._metrics = build_metrics(frame_metrics(settings.metrics))
        self._set_metrics = build_set_metrics(settings.metrics)
        self._protocol = settings.protocol
        if settings.measured is not None:
            found = infos_of(self._metrics, self._set_metrics, self._protocol)
            _check_measured(found, settings.measured)

    def score(
        self,
        item: ScoreItem,
        pairs: Iterable[FramePair],
        *,
        fps: float,
        codec: Iterator[Frame] | None = None,
        source_HWC: Frame | None = None,
        also_driving: bool = False,
    ) -> ClipScores:
        """The scores; all else is in the store by then. Arguments are those of `scored_video`."""
        kept: list[tuple[Frames, Frames]] = []
        scored = scored_video(
            _watched(pairs, kept) if item.preview else pairs,
            self._metrics,
            clip_id=item.clip.clip_id,
            name=item.clip.name,
            protocol=self._protocol,
            codec=codec,
            source_HWC=source_HWC,
            also_driving=also_driving,
            set_metrics=self._set_metrics,
        )
        if item.preview:
            show(self._store, item.entry, kept, fps=fps, source_HWC=source_HWC)
        leave(self._store, item.entry, scored)
        return scored.scores


def _check_measured(found: Sequence[MetricInfo], wanted: Sequence[MetricInfo]) -> None:
    """Let a machine work that measures as the run says that it does.

    Raises:
        CheckpointError: its estimators, say, have other weights.
    """
    for own, info in zip(found, wanted, strict=True):
        if own != info:
            raise CheckpointError(
                f"measured otherwise here than where the run began: version {own.version} and "
                f"{info.version}, weights {_short(own)} and {_short(info)}",
                subject=info.name,
                hint="have the same kpmask, and the same `kpmask weights`, on every machine",
            )


def _short(info: MetricInfo) -> str:
    return info.weights_sha256[:16] if info.weights_sha256 else "none"


def leave(store: ObjectStore, entry: str, scored: ScoredVideo) -> None:
    """Put a video's curves and features into the store."""
    for (metric, side), table_ND in scored.features.items():
        rows_ND = table_ND[:1] if side == "copy" else table_ND  # of which all are equal
        store.put(features_key(entry, metric, side), _npy(rows_ND))
    write_table(store, curves_key(entry), scored.frames, FrameScores)


def curves_key(entry: str) -> str:
    return f"{CURVES}/{entry}.parquet"


def features_key(entry: str, metric: str, side: str) -> str:
    return f"{FEATURES}/{entry}/{metric}-{side}.npy"


def _npy(table_ND: NDArray[np.float64]) -> bytes:
    """A table in NumPy's format, as the networks behind it have it: of 32 bits."""
    file = io.BytesIO()
    np.save(file, table_ND.astype(np.float32), allow_pickle=False)
    return file.getvalue()


# --- previews --------------------------------------------------------------------------------


def show(
    store: ObjectStore,
    entry: str,
    kept: Sequence[tuple[Frames, Frames]],
    *,
    fps: float,
    source_HWC: Frame | None,
) -> None:
    """Put the source, the drawn and the true video's beginning into the store."""
    media = media_of(entry)
    generated, true = (np.concatenate(column) for column in zip(*kept, strict=True))
    picture_HWC = true[0] if source_HWC is None else source_HWC
    store.put(media.source, images.encode_jpeg(picture_HWC, quality=85))
    with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
        for key, frames in ((media.result, generated), (media.driving, true)):
            path = Path(folder) / "preview.mp4"
            encode(path, frames[:PREVIEW_FRAMES], fps=fps)
            store.put_file(key, path)


def media_of(entry: str) -> GalleryMedia:
    """Where an item's previews lie."""
    return GalleryMedia(
        source=f"{MEDIA}/{entry}.jpg",
        driving=f"{MEDIA}/{entry}-true.mp4",
        result=f"{MEDIA}/{entry}.mp4",
    )


def _watched(pairs: Iterable[FramePair], kept: list[tuple[Frames, Frames]]) -> Iterator[FramePair]:
    """The pairs; the first `PREVIEW_FRAMES` frames are put into `kept` on their way."""
    for generated, reference in pairs:
        if sum(len(frames) for frames, _ in kept) < PREVIEW_FRAMES:
            kept.append((to_frames(generated), to_frames(reference)))
        yield generated, reference

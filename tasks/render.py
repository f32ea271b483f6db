"""What the workers of a catalog do: features of one image or video, and one animation.

- Features go to the output store, in parts of a few hundred frames, so that every machine can read
  them, memory stays flat, and a rerun finds them again. They are removed when the catalog is done.
- With the features come the small copies that the gallery shows; the same pass over the driving
  video makes both.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import safetensors.torch
from safetensors import safe_open

from kpmask import provenance
from kpmask.animate import Animator, Frame, Transfer, fit_square, state_tensors
from kpmask.certificates import Signer
from kpmask.compose import cut, source_crop
from kpmask.config import AnimateJob, MediaLimits, Output
from kpmask.media import formats, images
from kpmask.media.encode import encode
from kpmask.models.base import State
from kpmask.records import (
    SOUNDLESS,
    SUFFIXES,
    AnimationItem,
    AnimationRecord,
    Delivery,
    FeatureRecord,
    digest,
)
from tasks import storage
from tasks.deliver import (
    PREVIEW_CRF,
    claim_of,
    delivered,
    driving_preview,
    open_driving,
    publish,
    put_preview,
    result_key,
    source_preview,
    with_sound,
)
from tasks.inputs import ID_LENGTH, local_media
from tasks.storage import ObjectStore, absolute
from tasks.weights import local_weights, reference

FRAMES_PER_PART: Final = 256
FEATURES: Final = "features"


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker needs to know, whichever machine it is on."""

    checkpoint: str
    out: str
    device: str
    batch_size: int
    limits: MediaLimits
    min_driving_frames: int
    output: Output
    signer: Signer | None  # of the content credentials

    @classmethod
    def of(cls, job: AnimateJob) -> WorkerSettings:
        return cls(
            checkpoint=reference(job.checkpoint),
            out=absolute(job.out),
            device=job.device,
            batch_size=job.batch_size,
            limits=job.limits,
            min_driving_frames=job.min_driving_frames,
            output=job.output,
            signer=provenance.open_signer(job.credentials),
        )


PLAIN: Final = Delivery()
Kind = Literal["source", "driving"]
Place = tuple[Kind, str, str]  # kind, content, and how it is cut and paced


@dataclass(frozen=True, slots=True)
class FeatureItem:
    """An image or driving video whose state is wanted."""

    feature_id: str
    kind: Kind
    uri: str
    sha256: str
    delivery: Delivery

    @classmethod
    def of(
        cls, kind: Kind, uri: str, sha256: str, settings: str, delivery: Delivery = PLAIN
    ) -> FeatureItem:
        """Args:
        settings: digest of what shapes every state of the job, the weights among it.
        delivery: how the image is cut, or the video cut and paced.
        """
        wanted = {"place": _place(kind, sha256, delivery), "settings": settings}
        return cls(digest(wanted)[:ID_LENGTH], kind, uri, sha256, delivery)

    @property
    def place(self) -> Place:
        """What tells it from the job's other features."""
        return _place(self.kind, self.sha256, self.delivery)


def source_place(item: AnimationItem) -> Place:
    """Which feature of an image an animation needs."""
    return _place("source", item.source_sha256, item)


def driving_place(item: AnimationItem) -> Place:
    """Which feature of a video an animation needs."""
    return _place("driving", item.driving_sha256, item)


def _place(kind: Kind, sha256: str, delivery: Delivery) -> Place:
    return kind, sha256, delivery.crop if kind == "source" else delivery.driving_view


@dataclass(frozen=True, slots=True)
class RenderItem:
    """An animation and the features that it is made from."""

    item: AnimationItem
    source: FeatureRecord
    driving: FeatureRecord


def part_key(feature_id: str, number: int) -> str:
    """Where a part of a stored state lies."""
    return f"{FEATURES}/{feature_id}/part-{number:05d}.safetensors"


# --- features --------------------------------------------------------------------------------


class FeatureWorker:
    """Source and driving states into the store; the model is loaded once."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._store = storage.open_store(settings.out)
        self._animator = _load(settings)

    def process(self, item: FeatureItem) -> FeatureRecord:
        """Encode one image or video and store its state and its preview.

        Raises:
            MediaError: it cannot be read, or is too short.
        """
        with local_media(item.uri) as path:
            return self._source(item, path) if item.kind == "source" else self._driving(item, path)

    def _source(self, item: FeatureItem, path: Path) -> FeatureRecord:
        settings = self._settings
        image_HWC = images.read_image(path, settings.limits)
        crop_px = source_crop(image_HWC, item.delivery.crop, settings.output, settings.limits)
        parts = _PartWriter(self._store, item.feature_id)
        parts.add(self._animator.encode_source(cut(image_HWC, crop_px)))
        shown_HWC = fit_square(image_HWC, self._animator.image_size_px)
        self._store.put(source_preview(item.sha256), images.encode_jpeg(shown_HWC, quality=85))
        return FeatureRecord(
            feature_id=item.feature_id,
            kind="source",
            sha256=item.sha256,
            num_parts=parts.close(),
            num_frames=1,
            num_frames_lost=0,
            fps=0.0,
        )

    def _driving(self, item: FeatureItem, path: Path) -> FeatureRecord:
        driving = open_driving(
            path, self._settings, item.delivery, side_px=self._animator.image_size_px
        )
        parts = _PartWriter(self._store, item.feature_id)
        with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
            preview = Path(folder) / "preview.mp4"
            frames = self._encoded(driving, parts)
            encode(preview, frames, fps=driving.fps, crf=PREVIEW_CRF)
            key = driving_preview(item.sha256, item.delivery.driving_view)
            self._store.put_file(key, preview)
        return FeatureRecord(
            feature_id=item.feature_id,
            kind="driving",
            sha256=item.sha256,
            num_parts=parts.close(),
            num_frames=driving.num_frames,
            num_frames_lost=driving.num_frames_lost,
            fps=driving.fps,
        )

    def _encoded(self, frames: Iterable[Frame], parts: _PartWriter) -> Iterator[Frame]:
        """The frames themselves; on their way their states go to `parts`."""
        iterator = iter(frames)
        while chunk := list(itertools.islice(iterator, self._settings.batch_size)):
            parts.add(self._animator.encode_driving(chunk))
            yield from chunk


class _PartWriter:
    """States, as they come, in objects of `FRAMES_PER_PART` entries or a few more."""

    def __init__(self, store: ObjectStore, feature_id: str) -> None:
        self._store = store
        self._feature_id = feature_id
        self._states: list[State] = []
        self._num_parts = 0

    def add(self, state: State) -> None:
        self._states.append(state)
        if sum(len(state) for state in self._states) >= FRAMES_PER_PART:
            self._flush()

    def close(self) -> int:
        """Store what is left; the number of parts."""
        if self._states:
            self._flush()
        return self._num_parts

    def _flush(self) -> None:
        state = type(self._states[0]).cat(self._states)
        data = safetensors.torch.save(state_tensors(state))
        self._store.put(part_key(self._feature_id, self._num_parts), data)
        self._states.clear()
        self._num_parts += 1


# --- animations ------------------------------------------------------------------------------


class RenderWorker:
    """Animations from stored features; the model is loaded once."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._store = storage.open_store(settings.out)
        self._animator = _load(settings)

    def process(self, work: RenderItem) -> AnimationRecord:
        """Draw, encode and upload one animation.

        Raises:
            MediaError: encoding or copying the sound failed.
        """
        item = work.item
        transfer = Transfer(item.motion, item.adapt_scale, item.best_frame)
        frames: Iterator[Frame] = self._animator.stream_states(
            self._source(work.source), lambda: self._chunks(work.driving), transfer
        )
        key = result_key(item)
        with (
            tempfile.TemporaryDirectory(prefix="kpmask-") as folder,
            contextlib.ExitStack() as stack,
        ):
            path = Path(folder) / f"result{SUFFIXES[item.format]}"
            if item.paste_back or item.side_by_side:
                source, driven = (
                    stack.enter_context(local_media(u)) for u in (item.source, item.driving)
                )
                side_px = self._animator.image_size_px
                frames = delivered(frames, source, driven, self._settings, item, side_px=side_px)
            video = formats.write(path, frames, fps=work.driving.fps, form=item.format)
            if item.audio:
                with local_media(item.driving) as driving:
                    video, path = with_sound(path, driving, video, self._settings.limits)
            sha256s = (item.source_sha256, item.driving_sha256)
            claim = claim_of(self._animator.weights_sha256, sha256s, item, video)
            video = publish(self._store, key, path, video, claim, self._settings.signer)
            if item.format in SOUNDLESS:  # which browsers do not play as videos
                put_preview(self._store, item, path, video, claim, self._settings.signer)
        return AnimationRecord(
            item_id=item.item_id,
            name=item.name,
            source=item.source,
            driving=item.driving,
            source_sha256=item.source_sha256,
            driving_sha256=item.driving_sha256,
            motion=item.motion,
            key=key,
            num_frames=video.num_frames,
            num_frames_lost=work.driving.num_frames_lost,
            fps=video.fps,
            width_px=video.width_px,
            height_px=video.height_px,
            size_bytes=video.size_bytes,
            sha256=video.sha256,
            credentials=video.credentials,
            driving_view=item.driving_view,
        )

    def _source(self, record: FeatureRecord) -> State:
        path = self._store.local(part_key(record.feature_id, 0))
        return self._animator.source_state(safetensors.torch.load_file(path))

    def _chunks(self, record: FeatureRecord) -> Iterator[State]:
        """The driving states, `batch_size` at a time, out of memory-mapped files."""
        step = self._settings.batch_size
        for number in range(record.num_parts):
            path = self._store.local(part_key(record.feature_id, number))
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                length = next(iter(slices.values())).get_shape()[0]
                for start in range(0, length, step):
                    tensors = {name: part[start : start + step] for name, part in slices.items()}
                    yield self._animator.driving_state(tensors)


def _load(settings: WorkerSettings) -> Animator:
    return Animator.load(local_weights(settings.checkpoint), device=settings.device)

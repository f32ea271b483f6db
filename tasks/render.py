"""What the workers of a catalog do with the model: states of images and videos, and animations.

- A worker owns the model and a few media workers, processes without one: they decode what it
  looks at and encode what it draws. So decoding, drawing and encoding go on at the same time, and
  each has as many processes as it needs. Between them wait a few dozen frames, not more.
- States go to the output store, in parts of a few hundred frames, so that every machine can read
  them, memory stays flat, and a rerun finds them again. They are removed when nothing needs them.
- A worker is given several items at once. The frames of several animations go through the model
  together, so that short videos fill a device.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import safetensors.torch
from safetensors import safe_open

from kpmask import provenance
from kpmask.animate import Animator, Frame, Transfer, best_frame, state_tensors
from kpmask.certificates import Signer
from kpmask.config import AnimateJob, MediaLimits, Output
from kpmask.errors import ItemError, KpmaskError, StorageError
from kpmask.models.base import State
from kpmask.optimize import Wanted
from kpmask.records import AnimationItem, AnimationRecord, Delivery, FeatureRecord, as_dict
from tasks import storage
from tasks.catalog import feature_id
from tasks.lanes import CHUNK_FRAMES, Call, Drawing, Renderer, Slot
from tasks.media_worker import DrivingFacts, LocalMedia, Media, MediaSettings, RemoteMedia
from tasks.storage import ObjectStore, absolute
from tasks.weights import local_weights, reference

FRAMES_PER_PART: Final = 256
FEATURES: Final = "features"
JOURNAL: Final = "journal"
RENDER: Final = "render"
READ_AHEAD: Final = 2  # chunks that a media worker decodes ahead
GPU_MEDIA_WORKERS: Final = 3  # beside a worker: an encoder is slower than a GPU
CPU_MEDIA_WORKERS: Final = 1


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker needs to know, whichever machine it is on."""

    checkpoint: str
    out: str
    device: str
    precision: Wanted
    batch_size: int | None
    limits: MediaLimits
    min_driving_frames: int
    output: Output
    signer: Signer | None  # of the content credentials
    media_workers: int  # 0: the worker decodes and encodes by itself
    cpus_per_media_worker: float

    @classmethod
    def of(cls, job: AnimateJob) -> WorkerSettings:
        on_gpu, media = job.cluster.gpus_per_worker > 0, job.media_workers
        usual = GPU_MEDIA_WORKERS if on_gpu else CPU_MEDIA_WORKERS
        return cls(
            checkpoint=reference(job.checkpoint),
            out=absolute(job.out),
            device=job.device,
            precision=job.precision,
            batch_size=job.batch_size,
            limits=job.limits,
            min_driving_frames=job.min_driving_frames,
            output=job.output,
            signer=provenance.open_signer(job.credentials),
            media_workers=usual if media.per_worker is None else media.per_worker,
            cpus_per_media_worker=float(on_gpu) if media.cpus is None else media.cpus,
        )

    @property
    def also_cpus(self) -> float:
        """What a worker's media workers take."""
        return self.media_workers * self.cpus_per_media_worker


# --- items -----------------------------------------------------------------------------------

PLAIN: Final = Delivery()
Kind = Literal["source", "driving"]


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
        return cls(feature_id(kind, sha256, delivery, settings), kind, uri, sha256, delivery)


def features_of(item: AnimationItem, settings: str) -> tuple[FeatureItem, FeatureItem]:
    """The states that an animation is made from: its image's and its driving video's."""
    return (
        FeatureItem.of("source", item.source, item.source_sha256, settings, item),
        FeatureItem.of("driving", item.driving, item.driving_sha256, settings, item),
    )


@dataclass(frozen=True, slots=True)
class RenderItem:
    """An animation and the features that it is made from."""

    item: AnimationItem
    source: FeatureRecord
    driving: FeatureRecord


Work = FeatureItem | RenderItem
Made = FeatureRecord | AnimationRecord


def name_of(work: Work) -> str:
    return work.uri if isinstance(work, FeatureItem) else work.item.name


def stage_of(work: Work) -> str:
    return FEATURES if isinstance(work, FeatureItem) else RENDER


# --- stored states ---------------------------------------------------------------------------


def part_key(feature_id: str, number: int) -> str:
    """Where a part of a stored state lies."""
    return f"{FEATURES}/{feature_id}/part-{number:05d}.safetensors"


def record_key(feature_id: str) -> str:
    """Where the record of a stored state lies: written last, so that what has it is whole."""
    return f"{FEATURES}/{feature_id}/record.json"


def stored_feature(store: ObjectStore, feature_id: str) -> FeatureRecord | None:
    """The record of a state that is there, whole."""
    try:
        return FeatureRecord(**json.loads(store.get(record_key(feature_id))))
    except StorageError as error:
        if error.code != "not_found":
            raise
        return None


def stored_features(store: ObjectStore) -> Iterator[FeatureRecord]:
    """The states that are there, whole."""
    for info in store.list(f"{FEATURES}/"):
        if info.key.endswith("/record.json"):
            yield FeatureRecord(**json.loads(store.get(info.key)))


def remove_feature(store: ObjectStore, record: FeatureRecord) -> None:
    """Remove a state that nothing needs any more; its record goes first."""
    store.delete(record_key(record.feature_id))
    for number in range(record.num_parts):
        store.delete(part_key(record.feature_id, number))


class _PartWriter:
    """States, as they come, in objects of `FRAMES_PER_PART` entries or a few more."""

    def __init__(self, store: ObjectStore, item: FeatureItem) -> None:
        self._store = store
        self._item = item
        self._states: list[State] = []
        self._num_parts = 0

    def add(self, state: State) -> None:
        self._states.append(state)
        if sum(len(state) for state in self._states) >= FRAMES_PER_PART:
            self._flush()

    def close(self, facts: DrivingFacts) -> FeatureRecord:
        """Store what is left, and the record."""
        if self._states:
            self._flush()
        record = FeatureRecord(
            feature_id=self._item.feature_id,
            kind=self._item.kind,
            sha256=self._item.sha256,
            num_parts=self._num_parts,
            num_frames=facts.num_frames,
            num_frames_lost=facts.num_frames_lost,
            fps=facts.fps,
        )
        self._store.put(record_key(record.feature_id), json.dumps(as_dict(record)).encode())
        return record

    def _flush(self) -> None:
        state = type(self._states[0]).cat(self._states)
        data = safetensors.torch.save(state_tensors(state))
        self._store.put(part_key(self._item.feature_id, self._num_parts), data)
        self._states.clear()
        self._num_parts += 1


# --- the worker ------------------------------------------------------------------------------

ONE_IMAGE: Final = DrivingFacts(num_frames=1, num_frames_lost=0, fps=0.0)


class ModelWorker:
    """States and animations; the model is loaded once."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._store = storage.open_store(settings.out)
        weights = local_weights(settings.checkpoint)
        self._animator = Animator.load(
            weights, device=settings.device, precision=settings.precision
        )
        self._batch_size = settings.batch_size or self._animator.usual_batch_size
        self._slots = [Slot(self._new_media) for _ in range(max(settings.media_workers, 1))]

    def _new_media(self) -> Media:
        settings = self._settings
        wanted = MediaSettings(
            out=settings.out,
            limits=settings.limits,
            min_driving_frames=settings.min_driving_frames,
            output=settings.output,
            signer=settings.signer,
            side_px=self._animator.image_size_px,
            weights_sha256=self._animator.weights_sha256,
            journal=JOURNAL,
        )
        if not settings.media_workers:
            return LocalMedia.start(wanted)
        return RemoteMedia.start(wanted, num_cpus=settings.cpus_per_media_worker)

    def process(self, bundle: Sequence[Work]) -> Sequence[Made | KpmaskError]:
        """States, or animations; for each its record, or why there is none.

        Raises:
            StorageError: the store denies, lacks space or does not answer.
        """
        features = [work for work in bundle if isinstance(work, FeatureItem)]
        animations = [work for work in bundle if isinstance(work, RenderItem)]
        assert not (features and animations), "a bundle is of one kind"
        try:
            return self._animations(animations) if animations else self._features(features)
        except KpmaskError:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Have the media workers drop what is open: the next bundle finds them idle."""
        for slot in self._slots:
            slot.call("abandon")

    # --- states

    def _features(self, items: Sequence[FeatureItem]) -> list[FeatureRecord | KpmaskError]:
        """Each state that is stored is told about, even if the store refuses the next one."""
        if len(items) == 1 and (found := stored_feature(self._store, items[0].feature_id)):
            return [found]  # by a worker that died before it could tell
        # Of all images at once, so that they are decoded ahead.
        images = {
            item.feature_id: (slot, slot.call("read_source", item.uri, item.sha256, item.delivery))
            for item, slot in zip(items, itertools.cycle(self._slots), strict=False)
            if item.kind == "source"
        }
        made: list[FeatureRecord | KpmaskError] = []
        for item in items:
            try:
                read = images.get(item.feature_id)
                made.append(self._driving(item) if read is None else self._source(item, *read))
            except ItemError as error:
                made.append(error)
            except StorageError as error:
                self._abandon()
                return [*made, *[error] * (len(items) - len(made))]
        return made

    def _source(self, item: FeatureItem, slot: Slot, read: Call) -> FeatureRecord:
        image_HWC: Frame = slot.result(read)
        parts = _PartWriter(self._store, item)
        parts.add(self._animator.encode_source(image_HWC))
        return parts.close(ONE_IMAGE)

    def _driving(self, item: FeatureItem) -> FeatureRecord:
        slot = self._slots[0]
        parts = _PartWriter(self._store, item)
        batch_size = self._batch_size
        try:
            slot.result(slot.call("open_driving", item.uri, item.sha256, item.delivery))
            for state in self._animator.encode_chunks(self._frames(slot), batch_size=batch_size):
                parts.add(state)
            return parts.close(slot.result(slot.call("close_driving")))
        except ItemError:
            slot.call("abandon")
            raise

    def _frames(self, slot: Slot) -> Iterator[Frame]:
        """The frames of the open driving video; the next ones are decoded meanwhile."""
        ahead = deque(slot.call("read", CHUNK_FRAMES) for _ in range(READ_AHEAD))
        while len(frames_THWC := slot.result(ahead.popleft())):
            ahead.append(slot.call("read", CHUNK_FRAMES))
            yield from frames_THWC
        while ahead:
            slot.result(ahead.popleft())

    # --- animations

    def _animations(self, works: Sequence[RenderItem]) -> list[AnimationRecord | ItemError]:
        renderer = Renderer(self._animator, self._slots, batch_size=self._batch_size)
        num_deaths = self._num_media_deaths()
        made = renderer.run(map(self._drawing, works))
        for slot, flushed in [(slot, slot.call("flush")) for slot in self._slots]:
            slot.result(flushed)
        if self._num_media_deaths() > num_deaths:
            # Nobody knows what it had noted; what is noted twice does no harm.
            records = [found for found in made if isinstance(found, AnimationRecord)]
            self._slots[0].result(self._slots[0].call("note", records))
        return made

    def _num_media_deaths(self) -> int:
        return sum(slot.num_deaths for slot in self._slots)

    def _drawing(self, work: RenderItem) -> Drawing:
        item = work.item
        transfer = Transfer(item.motion, item.adapt_scale, item.best_frame)
        source = self._stored_source(work.source)
        initial = None
        if item.best_frame:
            initial = best_frame(source, self._chunks(work.driving))
        record = work.driving
        facts = DrivingFacts(record.num_frames, record.num_frames_lost, record.fps)
        return Drawing(item, facts, source, self._chunks(record), initial, transfer)

    def _stored_source(self, record: FeatureRecord) -> State:
        path = self._store.local(part_key(record.feature_id, 0))
        return self._animator.source_state(safetensors.torch.load_file(path))

    def _chunks(self, record: FeatureRecord) -> Iterator[State]:
        """The driving states, `batch_size` at a time, out of memory-mapped files."""
        step = self._batch_size
        for number in range(record.num_parts):
            path = self._store.local(part_key(record.feature_id, number))
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                length = next(iter(slices.values())).get_shape()[0]
                for start in range(0, length, step):
                    tensors = {name: part[start : start + step] for name, part in slices.items()}
                    yield self._animator.driving_state(tensors)

"""The CPU side of a catalog's model worker: media into square frames, drawn frames into results.

- A model worker keeps a few of these beside it, as actors. They hold no model and import no torch,
  so that each is small and the model waits neither for a decoder nor for an encoder.
- Frames cross as arrays. Both directions are bounded: a reader reads when it is asked to, and a
  writer that is behind makes `add` wait.
- A result goes out last, after its poster and its preview: where it is, all of it is.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kpmask.certificates import Signer
from kpmask.compose import Frame, cut, source_crop
from kpmask.config import MediaLimits, Output
from kpmask.errors import WorkerError
from kpmask.media import formats, images
from kpmask.media.encode import encode
from kpmask.records import (
    SOUNDLESS,
    SUFFIXES,
    AnimationItem,
    AnimationRecord,
    Delivery,
    EncodedVideo,
)
from kpmask.report.gallery import poster, poster_key
from tasks import storage
from tasks.actors import Reply, Variables, death_cause, kill, reply_of
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
from tasks.inputs import local_media
from tasks.parts import PartWriter
from tasks.scratch import scratch_folder, sweep_scratch
from tasks.storage import ObjectStore

Frames = NDArray[np.uint8]  # THWC RGB

SCRATCH: Final = "media"
CHUNKS_AHEAD: Final = 2  # that wait for a writer
PREVIEW_QUALITY: Final = 85


@dataclass(frozen=True, slots=True)
class MediaSettings:
    """What a media worker needs to know, whichever machine it is on.

    Attributes:
        out: URI of the catalog.
        side_px: of the model's frames.
        weights_sha256: of the model, for what results say of themselves.
        journal: prefix of the parts that say what is finished, in `out`.
    """

    out: str
    limits: MediaLimits
    min_driving_frames: int
    output: Output
    signer: Signer | None
    side_px: int
    weights_sha256: str
    journal: str


@dataclass(frozen=True, slots=True)
class DrivingFacts:
    """What is known of a driving video once it was read to its end."""

    num_frames: int
    num_frames_lost: int
    fps: float


class MediaWorker:
    """One video that is read and one that is written at a time; both may be open.

    After an error the caller does `abandon`: what was open is of no use any more. Methods raise
    `ItemError` where the item is at fault and `StorageError` where the store is.
    """

    def __init__(self, settings: MediaSettings) -> None:
        sweep_scratch(SCRATCH)  # of workers that were killed
        self._settings = settings
        self._store = storage.open_store(settings.out)
        self._parts = PartWriter(self._store, settings.journal, AnimationRecord)
        self._reading: _Reading | None = None
        self._writing: tuple[_Writing, _Film] | None = None

    # --- images

    def read_source(self, uri: str, sha256: str, delivery: Delivery) -> Frame:
        """What is animated of an image, uint8 HWC of `side_px` a side; its preview is stored."""
        settings = self._settings
        with local_media(uri) as path:
            image_HWC = images.read_image(path, settings.limits)
        crop_px = source_crop(image_HWC, delivery.crop, settings.output, settings.limits)
        shown_HWC = _squared(image_HWC, settings.side_px)
        data = images.encode_jpeg(shown_HWC, quality=PREVIEW_QUALITY)
        self._store.put(source_preview(sha256), data)
        return _squared(cut(image_HWC, crop_px), settings.side_px)

    # --- driving videos

    def open_driving(self, uri: str, sha256: str, delivery: Delivery) -> None:
        """Start to read a driving video; one that was open is dropped."""
        self._drop_reading()
        key = driving_preview(sha256, delivery.driving_view)
        self._reading = _Reading(self._settings, uri, delivery, key)

    def read(self, count: int) -> Frames:
        """The next frames, uint8 THWC, at most `count`; none at the end. Not to be written to.

        Raises:
            MediaError: the video is damaged or too short, which may show at its end only.
        """
        if self._reading is None:
            raise ValueError("no driving video is open")
        return self._reading.read(count)

    def close_driving(self) -> DrivingFacts:
        """Store the preview of the video, which was read to its end, and tell about it."""
        if self._reading is None:
            raise ValueError("no driving video is open")
        try:
            return self._reading.finish(self._store)
        finally:
            self._drop_reading()

    def _drop_reading(self) -> None:
        if self._reading is not None:
            self._reading.close()
        self._reading = None

    # --- results

    def begin(self, item: AnimationItem, driving: DrivingFacts) -> None:
        """Start to write a result; one that was open is dropped."""
        self._drop_writing()
        writing = _Writing(self._settings, self._store, item, driving)
        self._writing = writing, _Film(writing.write)

    def add(self, frames_THWC: Frames) -> None:
        """Hand over the next drawn frames, uint8 of `side_px` a side.

        Waits while `CHUNKS_AHEAD` chunks lie before the writer. Raises what the writer raised.
        """
        if self._writing is None:
            raise ValueError("no result is open")
        self._writing[1].add(frames_THWC)

    def finish(self) -> AnimationRecord:
        """Publish the result, poster and preview first, and note that it is there."""
        if self._writing is None:
            raise ValueError("no result is open")
        writing, film = self._writing
        try:
            return self._noted(writing.publish(film.finish()))
        finally:
            self._drop_writing()

    def deliver(
        self, item: AnimationItem, driving: DrivingFacts, frames_THWC: Frames
    ) -> AnimationRecord:
        """`begin`, `add` and `finish` of a result whose frames are all there, without a thread."""
        self._drop_writing()
        writing = _Writing(self._settings, self._store, item, driving)
        try:
            return self._noted(writing.publish(writing.write(iter(frames_THWC))))
        finally:
            writing.close()

    def _noted(self, record: AnimationRecord) -> AnimationRecord:
        self._parts.add(record)
        return record

    def _drop_writing(self) -> None:
        if self._writing is not None:
            writing, film = self._writing
            film.drop()
            writing.close()
        self._writing = None

    # --- both

    def abandon(self) -> None:
        """Drop what is open, of reading and of writing; no file of it stays."""
        self._drop_reading()
        self._drop_writing()

    def flush(self) -> None:
        """Store what is still to be noted of finished results."""
        self._parts.flush()

    def note(self, records: Iterable[AnimationRecord]) -> None:
        """Note finished results of a media worker that died before it had noted all of its own."""
        for record in records:
            self._parts.add(record)
        self._parts.flush()


def _squared(image_HWC: Frame, side_px: int) -> Frame:
    return images.resize(images.square_crop(image_HWC), (side_px, side_px))


class _Reading:
    """A driving video that is being read, and the preview that is made of it meanwhile."""

    def __init__(self, settings: MediaSettings, uri: str, delivery: Delivery, key: str) -> None:
        self._key = key
        with ExitStack() as stack:
            path = stack.enter_context(local_media(uri))
            folder = stack.enter_context(scratch_folder(SCRATCH))
            self._driving = open_driving(path, settings, delivery, side_px=settings.side_px)
            self._frames = iter(self._driving)
            self._none_THWC = np.empty((0, settings.side_px, settings.side_px, 3), np.uint8)
            self._preview = folder / "preview.mp4"
            self._film = _Film(self._encode)
            self._stack = stack.pop_all()

    def _encode(self, frames: Iterator[Frame]) -> EncodedVideo:
        return encode(self._preview, frames, fps=self._driving.fps, crf=PREVIEW_CRF)

    def read(self, count: int) -> Frames:
        frames = list(itertools.islice(self._frames, count))
        if not frames:
            return self._none_THWC
        frames_THWC = np.stack(frames)
        frames_THWC.setflags(write=False)  # the preview is still to be made of it
        self._film.add(frames_THWC)
        return frames_THWC

    def finish(self, store: ObjectStore) -> DrivingFacts:
        driving = self._driving
        if not driving.num_frames:
            raise ValueError("the driving video was not read to its end")
        self._film.finish()
        store.put_file(self._key, self._preview)
        return DrivingFacts(driving.num_frames, driving.num_frames_lost, driving.fps)

    def close(self) -> None:
        self._film.drop()
        self._stack.close()


class _Writing:
    """A result on its way: in a folder of its own, then in the store."""

    def __init__(
        self,
        settings: MediaSettings,
        store: ObjectStore,
        item: AnimationItem,
        driving: DrivingFacts,
    ) -> None:
        self._settings, self._store, self._item, self._driving = settings, store, item, driving
        self._poster = b""
        with ExitStack() as stack:
            folder = stack.enter_context(scratch_folder(SCRATCH))
            self._path = folder / f"result{SUFFIXES[item.format]}"
            if item.paste_back or item.side_by_side:
                self._source = stack.enter_context(local_media(item.source))
            if item.audio or item.side_by_side or item.paste_back:
                self._driven = stack.enter_context(local_media(item.driving))
            self._stack = stack.pop_all()

    def write(self, frames: Iterator[Frame]) -> EncodedVideo:
        """Compose and encode the frames that were drawn."""
        item = self._item
        if item.paste_back or item.side_by_side:
            side_px = self._settings.side_px
            frames = delivered(
                frames, self._source, self._driven, self._settings, item, side_px=side_px
            )
        frames = self._with_poster(frames)
        return formats.write(self._path, frames, fps=self._driving.fps, form=item.format)

    def _with_poster(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """The frames; the first of them becomes the poster."""
        for frame_HWC in frames:
            self._poster = self._poster or poster(frame_HWC)
            yield frame_HWC

    def publish(self, video: EncodedVideo) -> AnimationRecord:
        """Add the sound, label and upload what was written, and all that is shown with it."""
        settings, store, item, path = self._settings, self._store, self._item, self._path
        if item.audio:
            video, path = with_sound(path, self._driven, video, settings.limits)
        sha256s = (item.source_sha256, item.driving_sha256)
        claim = claim_of(settings.weights_sha256, sha256s, item, video)
        store.put(poster_key(item.item_id), self._poster)
        if item.format in SOUNDLESS:  # which browsers do not play as videos
            put_preview(store, item, path, video, claim, settings.signer)
        key = result_key(item)
        return self._record(key, publish(store, key, path, video, claim, settings.signer))

    def _record(self, key: str, video: EncodedVideo) -> AnimationRecord:
        item = self._item
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
            num_frames_lost=self._driving.num_frames_lost,
            fps=video.fps,
            width_px=video.width_px,
            height_px=video.height_px,
            size_bytes=video.size_bytes,
            sha256=video.sha256,
            credentials=video.credentials,
            driving_view=item.driving_view,
        )

    def close(self) -> None:
        self._stack.close()


class _Dropped(Exception):
    """Ends a film's thread that nobody waits for."""


class _Film:
    """Frames that come in chunks, and a thread that makes a file of them meanwhile."""

    def __init__(self, make: Callable[[Iterator[Frame]], EncodedVideo]) -> None:
        self._make = make
        self._chunks: deque[Frames] = deque()
        self._changed = threading.Condition()
        self._ended = self._dropped = False
        self._made: Future[EncodedVideo] = Future()
        self._thread = threading.Thread(target=self._run, name="film", daemon=True)
        self._thread.start()

    def add(self, frames_THWC: Frames) -> None:
        """Hand over a chunk, once there is room; raises what the thread raised."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._chunks) < CHUNKS_AHEAD or self._made.done())
            if self._made.done():
                raise self._made.exception() or ValueError("frames after the last one")
            self._chunks.append(frames_THWC)
            self._changed.notify_all()

    def finish(self) -> EncodedVideo:
        """What was made, once it is; raises what the thread raised."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()
        return self._made.result()

    def drop(self) -> None:
        """End the thread, wherever it is."""
        with self._changed:
            self._dropped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._made.set_result(self._make(self._frames()))
        except Exception as error:  # noqa: BLE001 - it is raised where somebody waits for it
            self._made.set_exception(error)
        with self._changed:
            self._changed.notify_all()

    def _frames(self) -> Iterator[Frame]:
        while (chunk_THWC := self._next()) is not None:
            yield from chunk_THWC

    def _next(self) -> Frames | None:
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self._ended or self._dropped)
            if self._dropped:
                raise _Dropped
            if not self._chunks:
                return None
            chunk_THWC = self._chunks.popleft()
            self._changed.notify_all()
            return chunk_THWC


# --- in a process of its own, or not ---------------------------------------------------------

Ref = Any  # of a call that was started


class Media(Protocol):
    """A `MediaWorker`, wherever it runs. Calls are carried out one after another, in order."""

    def call(self, method: str, *args: Any) -> Ref:  # noqa: ANN401 - the method's own types
        """Start a call of a method of `MediaWorker`."""
        ...

    def result(self, ref: Ref) -> Any:  # noqa: ANN401 - the method's own type
        """What the call returned, once it did.

        Raises:
            KpmaskError: what it raised.
            WorkerError: bug, where that was no error of ours; worker_died, where the process is
                gone, and with it what was open.
        """
        ...

    def ready(self, ref: Ref) -> bool:
        """Whether `result` would return, or raise, at once."""
        ...

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        ...


class _Host:
    """The actor: holds a worker, and answers with `Reply`."""

    def __init__(self, variables: Variables, settings: MediaSettings) -> None:
        os.environ.update(variables.values)
        self._settings = settings
        self._worker: MediaWorker | None = None

    def call(self, method: str, *args: Any) -> Reply:  # noqa: ANN401 - the method's own types
        return reply_of(lambda: getattr(self._made(), method)(*args))

    def _made(self) -> MediaWorker:
        """The worker, made by the first call: its answer says if that fails."""
        if self._worker is None:
            self._worker = MediaWorker(self._settings)
        return self._worker


class RemoteMedia:
    """`Media` in an actor, which ends with the process that started it."""

    def __init__(self, actor: Any) -> None:  # noqa: ANN401 - an ActorHandle
        self._actor = actor

    @classmethod
    def start(cls, settings: MediaSettings, *, num_cpus: float) -> Self:
        """An actor on this node if it has room, so that frames stay in one machine's memory."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node_id = ray.get_runtime_context().get_node_id()
        # Without the last it would wait for this node, however much room there is elsewhere.
        strategy: Any = NodeAffinitySchedulingStrategy(
            node_id, soft=True, _spill_on_unavailable=True
        )
        host: Any = ray.remote(
            num_cpus=num_cpus, max_restarts=0, max_task_retries=0, scheduling_strategy=strategy
        )(_Host)
        return cls(host.remote(Variables.ours(), settings))

    def call(self, method: str, *args: Any) -> Ref:  # noqa: ANN401 - as `Media` says
        return self._actor.call.remote(method, *args)

    def result(self, ref: Ref) -> Any:  # noqa: ANN401 - as `Media` says
        import ray
        from ray import exceptions

        try:
            reply: Any = ray.get(ref)
        except exceptions.RayTaskError as error:  # the answer could not be sent, say
            cause = f"{type(error.cause).__name__}: {error.cause}"
            raise WorkerError(cause, code="bug") from error
        except exceptions.RayError as error:
            raise WorkerError(death_cause(error), retryable=True) from error
        return _value_of(reply)

    def ready(self, ref: Ref) -> bool:
        import ray

        return bool(ray.wait([ref], timeout=0)[0])

    def kill(self) -> None:
        kill(self._actor)


class LocalMedia:
    """`Media` in this process: a call is over when `call` returns."""

    def __init__(self, settings: MediaSettings) -> None:
        self._host = _Host(Variables({}), settings)

    @classmethod
    def start(cls, settings: MediaSettings, *, num_cpus: float = 0) -> Self:
        """`num_cpus` is for `RemoteMedia`, which takes them from others."""
        return cls(settings)

    def call(self, method: str, *args: Any) -> Ref:  # noqa: ANN401 - as `Media` says
        return self._host.call(method, *args)

    def result(self, ref: Ref) -> Any:  # noqa: ANN401 - as `Media` says
        return _value_of(ref)

    def ready(self, ref: Ref) -> bool:
        return True

    def kill(self) -> None:
        self._host.call("abandon")


def _value_of(reply: Reply) -> Any:  # noqa: ANN401 - the method's own type
    if reply.kind == "result":
        return reply.value
    if reply.kind == "bug":
        raise WorkerError(reply.value, code="bug")
    raise reply.value

"""A catalog, or one pair -> animations.

- The results of a catalog are named by the digest of all that shapes them. A rerun lists them,
  subtracts them and makes the rest.
- Two Ray stages: `features` (every image and driving video once), then `render` (every animation,
  ordered by driving video). A finished item is in the journal at once; its video was uploaded
  before. The manifest is written last, sorted by id, so that an interrupted run ends in the same
  bytes as another.
- A pair needs neither Ray nor a manifest and starts at once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Final

from kpmask.animate import Animator, Frame, Transfer
from kpmask.compose import cut, source_crop
from kpmask.config import AnimateJob
from kpmask.driving import DrivingVideo
from kpmask.errors import ConfigError
from kpmask.media import formats, images
from kpmask.records import (
    MAX_GIF_FPS,
    SOUNDLESS,
    SUFFIXES,
    AnimationItem,
    AnimationRecord,
    CatalogManifest,
    Delivery,
    EncodedVideo,
    Failure,
    FeatureRecord,
    Progress,
)
from kpmask.report import GalleryMedia, gallery_page, poster_key
from kpmask.report.gallery import POSTERS
from tasks import storage
from tasks.catalog import CatalogPlan, content_digest, plan_catalog
from tasks.cluster import ray_session, run_items
from tasks.deliver import (
    claim_of,
    credentials_key,
    delivered,
    driving_preview,
    open_driving,
    publish,
    result_preview,
    source_preview,
    with_sound,
)
from tasks.inputs import local_media
from tasks.manifest import (
    Journal,
    check_failures,
    read_table_if_any,
    write_json,
    write_table,
)
from tasks.render import (
    FEATURES,
    FeatureItem,
    FeatureWorker,
    Place,
    RenderItem,
    RenderWorker,
    WorkerSettings,
    driving_place,
    part_key,
    source_place,
)
from tasks.storage import ObjectStore, absolute
from tasks.weights import local_weights

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]

MANIFEST: Final = "manifest.parquet"
FAILURES: Final = "failures.parquet"
SUMMARY: Final = "summary.json"
PAGE: Final = "index.html"
JOURNAL: Final = "journal/render"
FEATURE_JOURNAL: Final = "journal/features"
DELETE_THREADS: Final = 16
PROGRESS_EVERY_FRAMES: Final = 8


# --- a catalog -------------------------------------------------------------------------------


def animate_catalog(
    job: AnimateJob, *, on_progress: OnProgress | None = None, dry_run: bool = False
) -> CatalogManifest:
    """Make every animation of a catalog, or of a grid of images and videos.

    With `dry_run` nothing is written or drawn: `num_items` is what the catalog would hold.

    Raises:
        ConfigError: there is nothing to do, a column is wrong, or the motion is not supported.
        CheckpointError: the weights cannot be read.
        StorageError: a store denies, lacks space or does not answer; what is done is kept.
        RunFailed: more than `max_failed_fraction` of the items failed; the others are there.
    """
    plan = plan_catalog(job)
    store = storage.open_store(job.out)
    if dry_run:
        return _manifest(store, plan, [], plan.failures, num_items=len(plan.items))
    run = _CatalogRun(job, plan, store)
    finished = run.finished()
    todo = [item for item in plan.items if item.item_id not in finished]
    made, failures = run.make(todo, on_progress) if todo else ({}, [])
    records = sorted({**finished, **made}.values(), key=lambda record: record.item_id)
    manifest = run.publish(records, [*plan.failures, *failures])
    check_failures(
        [*plan.failures, *failures],
        len(plan.items) + len(plan.failures),
        job.max_failed_fraction,
    )
    return manifest


def plan(job: AnimateJob) -> list[str]:
    """What `animate_catalog` or `animate_pair` would do, a line each; nothing is written.

    Raises:
        KpmaskError: as they do.
    """
    if job.source is not None:
        return [f"animate {job.source} by {job.driving} into {job.out}"]
    planned = plan_catalog(job)
    finished = _CatalogRun(job, planned, storage.open_store(job.out)).finished()
    num_sources = len({item.source_sha256 for item in planned.items})
    num_drivings = len({item.driving_sha256 for item in planned.items})
    return [
        f"{len(planned.items)} animations of {num_sources} images by {num_drivings} videos",
        f"{len(finished)} are there already, {len(planned.items) - len(finished)} to do",
        *(f"cannot be done: {f.item}: {f.code}: {f.cause}" for f in planned.failures),
    ]


class _CatalogRun:
    """One run over a planned catalog."""

    def __init__(self, job: AnimateJob, plan: CatalogPlan, store: ObjectStore) -> None:
        self._job = job
        self._plan = plan
        self._store = store
        self._journal = Journal(store, JOURNAL, AnimationRecord)
        self._feature_journal = Journal(store, FEATURE_JOURNAL, FeatureRecord)
        self._settings = WorkerSettings.of(job)

    def finished(self) -> dict[str, AnimationRecord]:
        """Records, by id, of the planned items that an earlier run made and that are there."""
        known = {r.item_id: r for r in self._earlier()} | self._journal.done()
        sizes_bytes = {info.key: info.size_bytes for info in self._store.list()}
        return {
            # Names and paths are this catalog's own; the content is what the id says.
            item.item_id: dataclasses.replace(
                known[item.item_id], name=item.name, source=item.source, driving=item.driving
            )
            for item in self._plan.items
            if item.item_id in known and _is_there(known[item.item_id], sizes_bytes)
        }

    def _earlier(self) -> list[AnimationRecord]:
        return read_table_if_any(self._store, MANIFEST, AnimationRecord) or []

    def make(
        self, todo: Sequence[AnimationItem], on_progress: OnProgress | None
    ) -> tuple[dict[str, AnimationRecord], list[Failure]]:
        """Make these items; their records by id, and the failures."""
        with ray_session():
            features, failures = self._features(todo, on_progress)
            works = [work for item in todo if (work := _render_item(item, features)) is not None]
            records: dict[str, AnimationRecord] = {}
            for outcome in run_items(
                works,
                RenderWorker,
                (self._settings,),
                key=lambda work: work.item.name,
                stage="render",
                cluster=self._job.cluster,
                on_progress=on_progress,
            ):
                if outcome.result is not None:
                    self._journal.add(outcome.result.item_id, outcome.result)
                    records[outcome.result.item_id] = outcome.result
                elif outcome.failure is not None:
                    failures.append(outcome.failure)
        return records, failures

    def _features(
        self, todo: Sequence[AnimationItem], on_progress: OnProgress | None
    ) -> tuple[dict[Place, FeatureRecord], list[Failure]]:
        """Features by place, and a failure of each item that lacks one."""
        wanted = self._wanted_features(todo)
        known = self._known_features()
        features: dict[Place, FeatureRecord] = {
            w.place: known[w.feature_id] for w in wanted if w.feature_id in known
        }
        broken: dict[Place, Failure] = {}
        for outcome in run_items(
            [w for w in wanted if w.feature_id not in known],
            FeatureWorker,
            (self._settings,),
            key=lambda feature: feature.uri,
            stage=FEATURES,
            cluster=self._job.cluster,
            on_progress=on_progress,
        ):
            place = outcome.item.place
            if outcome.result is not None:
                self._feature_journal.add(outcome.item.feature_id, outcome.result)
                features[place] = outcome.result
            elif outcome.failure is not None:
                broken[place] = outcome.failure
        return features, _blamed(todo, broken)

    def _known_features(self) -> dict[str, FeatureRecord]:
        """Features that an interrupted run left behind, whole."""
        keys = {info.key for info in self._store.list(f"{FEATURES}/")}
        return {
            feature_id: record
            for feature_id, record in self._feature_journal.done().items()
            if all(part_key(feature_id, number) in keys for number in range(record.num_parts))
        }

    def _wanted_features(self, todo: Sequence[AnimationItem]) -> list[FeatureItem]:
        """Each image and each driving video once (for each way that it is cut and paced); the
        videos first, which take longest.
        """
        digest = self._plan.settings_digest
        drivings = {
            driving_place(item): FeatureItem.of(
                "driving", item.driving, item.driving_sha256, digest, item
            )
            for item in todo
        }
        sources = {
            source_place(item): FeatureItem.of(
                "source", item.source, item.source_sha256, digest, item
            )
            for item in todo
        }
        return [*drivings.values(), *sources.values()]

    def publish(
        self, records: Sequence[AnimationRecord], failures: Sequence[Failure]
    ) -> CatalogManifest:
        """Tables, summary and page; the manifest last. Then what only the run needed is removed."""
        store, metadata = self._store, {"settings_digest": self._plan.settings_digest}
        failures = sorted(failures, key=lambda f: (f.item, f.stage, f.code))
        manifest = _manifest(store, self._plan, records, failures, num_items=len(records))
        write_table(store, FAILURES, failures, Failure, metadata=metadata)
        write_json(store, SUMMARY, manifest)
        store.put(PAGE, gallery(store, manifest, records, failures).encode())
        write_table(store, MANIFEST, records, AnimationRecord, metadata=metadata)
        self._journal.clear()
        self._feature_journal.clear()
        keys = [info.key for info in store.list(f"{FEATURES}/")]
        with ThreadPoolExecutor(DELETE_THREADS) as pool:
            list(pool.map(store.delete, keys))
        return manifest


def gallery(
    store: ObjectStore,
    manifest: CatalogManifest,
    records: Iterable[AnimationRecord],
    failures: Iterable[Failure],
) -> str:
    """The page of a finished catalog; it refers to the files beside it."""
    posters = any(True for _ in store.list(f"{POSTERS}/"))
    return gallery_page(
        title="Animations",
        manifest=manifest,
        records=records,
        failures=failures,
        media=functools.partial(item_media, posters=posters),
    )


def gallery_media(records: Iterable[AnimationRecord]) -> dict[str, GalleryMedia]:
    """What a page shows of each item, by its id."""
    return {record.item_id: item_media(record) for record in records}


def item_media(record: AnimationRecord, *, posters: bool = False) -> GalleryMedia:
    """What a page shows of an item: keys relative to the catalog.

    With `posters`, items have such pictures beside them; where one lacks its own, the page makes
    do without.
    """
    return GalleryMedia(
        source=source_preview(record.source_sha256),
        driving=driving_preview(record.driving_sha256, record.driving_view),
        result=result_preview(record),
        poster=poster_key(record.item_id) if posters else "",
        file=record.key,
    )


def _manifest(
    store: ObjectStore,
    plan: CatalogPlan,
    records: Sequence[AnimationRecord],
    failures: Sequence[Failure],
    *,
    num_items: int,
) -> CatalogManifest:
    return CatalogManifest(
        uri=store.uri,
        settings_digest=plan.settings_digest,
        weights_sha256=plan.weights_sha256,
        num_items=num_items,
        num_frames=sum(record.num_frames for record in records),
        num_failures=len(failures),
    )


def _is_there(record: AnimationRecord, sizes_bytes: dict[str, int]) -> bool:
    """Whether the result is in the store as it was recorded, and what the gallery shows with it."""
    previews = (
        source_preview(record.source_sha256),
        driving_preview(record.driving_sha256, record.driving_view),
        result_preview(record),
        *filter(None, [credentials_key(record.key, record.credentials)]),
    )
    whole = sizes_bytes.get(record.key) == record.size_bytes
    return whole and all(key in sizes_bytes for key in previews)


def _render_item(item: AnimationItem, features: dict[Place, FeatureRecord]) -> RenderItem | None:
    source = features.get(source_place(item))
    driving = features.get(driving_place(item))
    return None if source is None or driving is None else RenderItem(item, source, driving)


def _blamed(todo: Sequence[AnimationItem], broken: dict[Place, Failure]) -> list[Failure]:
    """A failure for each item whose image or driving video has none; the image's comes first."""
    failures = []
    for item in todo:
        failure = broken.get(source_place(item)) or broken.get(driving_place(item))
        if failure is not None:
            cause = f"{failure.item}: {failure.cause}"
            failures.append(dataclasses.replace(failure, item=item.name, cause=cause))
    return failures


# --- one pair --------------------------------------------------------------------------------


def animate_pair(job: AnimateJob, *, on_progress: OnProgress | None = None) -> EncodedVideo:
    """Animate one image by one video into one file, frame by frame.

    Raises:
        ConfigError: `out` has no name or format that is known, or the motion is not supported.
        CheckpointError: the weights cannot be read.
        MediaError: the image or the video cannot be used.
        StorageError: something is not there, or the result cannot be written.
    """
    assert job.source is not None and job.driving is not None
    delivery = delivery_of_pair(job)
    store, key = storage.open_object(absolute(job.out))
    settings = WorkerSettings.of(job)
    animator = Animator.load(local_weights(job.checkpoint), device=job.device)
    Transfer(job.motion, job.adapt_scale, job.best_frame).check(animator.system)
    side_px = animator.image_size_px
    with (
        local_media(absolute(job.source)) as source,
        local_media(absolute(job.driving)) as driving_path,
        tempfile.TemporaryDirectory(prefix="kpmask-") as folder,
    ):
        image_HWC = images.read_image(source, job.limits)
        crop_px = source_crop(image_HWC, delivery.crop, job.output, job.limits)
        driving = open_driving(driving_path, settings, delivery, side_px=side_px)
        frames = animator.stream(
            cut(image_HWC, crop_px),
            driving,
            motion=job.motion,
            adapt_scale=job.adapt_scale,
            best_frame=job.best_frame,
            batch_size=job.batch_size,
        )
        if delivery.paste_back or delivery.side_by_side:
            frames = delivered(frames, source, driving_path, settings, delivery, side_px=side_px)
        path = Path(folder) / f"result{SUFFIXES[delivery.format]}"
        frames = _counted(frames, driving, on_progress)
        video = formats.write(path, frames, fps=driving.fps, form=delivery.format)
        if job.audio:
            video, path = with_sound(path, driving_path, video, job.limits)
        sha256s = (content_digest(source), content_digest(driving_path))
        claim = claim_of(animator.weights_sha256, sha256s, delivery, video)
        video = publish(store, key, path, video, claim, settings.signer)
    if driving.num_frames_lost:
        log.warning("%s is damaged: %d frames lost", job.driving, driving.num_frames_lost)
    return video


def delivery_of_pair(job: AnimateJob) -> Delivery:
    """How a pair's result is delivered, its format by the name of `out`.

    Raises:
        ConfigError: the name means no format, or another than `output.format`; sound is wanted of
            what has none; a GIF is to be too fast.
    """
    suffix = PurePosixPath(job.out).suffix.lower()
    named = next((form for form, known in SUFFIXES.items() if known == suffix), None)
    form = job.output.format or named
    if named is None or named != form:
        wanted = ", ".join(SUFFIXES.values()) if form is None else SUFFIXES[form]
        raise ConfigError(f"the result of one pair is a file {wanted}", subject="out")
    if job.audio and form in SOUNDLESS:
        raise ConfigError(f"a {suffix} file has no sound", subject="audio")
    if form == "gif" and (job.output.fps or 0) > MAX_GIF_FPS:
        raise ConfigError(f"a gif has at most {MAX_GIF_FPS:g} frames/s", subject="output.fps")
    return dataclasses.replace(job.output.delivery(), format=form)


def _counted(
    frames: Iterator[Frame], driving: DrivingVideo, on_progress: OnProgress | None
) -> Iterator[Frame]:
    expected = driving.num_frames_expected or 0
    for number, frame in enumerate(frames, start=1):
        yield frame
        if on_progress and (number % PROGRESS_EVERY_FRAMES == 0 or number == expected):
            on_progress(Progress("animate", number, max(expected, number)))

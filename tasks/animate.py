"""A catalog, or one pair -> animations.

- The results of a catalog are named by the digest of all that shapes them. A rerun lists them,
  subtracts them and makes the rest.
- What is to be made, and what became of it, is a table on this machine's disk (`CatalogBook`), so
  that memory does not grow with the catalog. What the workers do next, `CatalogWork` says.
- A worker notes what it has finished in parts of a table, in the store, after it has uploaded it.
  The manifest is written last, out of all parts and sorted by id, so that an interrupted run ends
  in the same bytes as another; then the parts are removed.
- Two runs of one catalog take turns: the second finds that everything is done.
- A pair needs neither Ray nor a manifest and starts at once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Final

from kpmask.animate import Animator, Frame, Transfer
from kpmask.compose import cut, source_crop
from kpmask.config import AnimateJob, Cluster
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
from tasks.catalog import CatalogPlan, planned_catalog
from tasks.catalog_book import CatalogBook
from tasks.catalog_work import CatalogWork
from tasks.cluster import Outcome, num_fitting, ray_session, run_bundles, with_gpus
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
from tasks.inputs import content_digest, local_media
from tasks.lease import Lease, lease
from tasks.manifest import check_counts, iter_table_if_any, write_json, write_table
from tasks.outage import patiently
from tasks.parts import read_parts
from tasks.render import (
    FEATURES,
    JOURNAL,
    RENDER,
    FeatureItem,
    Made,
    ModelWorker,
    Work,
    WorkerSettings,
    name_of,
    stage_of,
)
from tasks.scratch import scratch_folder, sweep_scratch
from tasks.storage import ObjectStore, absolute
from tasks.weights import local_weights

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]

MANIFEST: Final = "manifest.parquet"
FAILURES: Final = "failures.parquet"
SUMMARY: Final = "summary.json"
PAGE: Final = "index.html"
LEASE: Final = ".state/lease"
SCRATCH: Final = "catalog"
DELETE_THREADS: Final = 16
DELETE_BATCH: Final = 1000
MAX_TOLD: Final = 20  # failures in the text of a plan
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
        RunFailed: more than `max_failed_fraction` of the items failed; the others are there. Or
            another run took this one's place.
    """
    store = storage.open_store(job.out)
    sweep_scratch(SCRATCH)
    with scratch_folder(SCRATCH) as folder, planned_catalog(job, folder) as plan:
        if dry_run:
            counts = plan.book.counts()
            return _manifest(store, plan, counts.num_items, 0, counts.num_failures)
        with lease(store, LEASE, on_wait=log.warning) as held:
            return _CatalogRun(job, plan, store, held, on_progress).run()


def plan(job: AnimateJob) -> list[str]:
    """What `animate_catalog` or `animate_pair` would do, a line each; nothing is written.

    Raises:
        KpmaskError: as they do.
    """
    if job.source is not None:
        return [f"animate {job.source} by {job.driving} into {job.out}"]
    store = storage.open_store(job.out)
    with scratch_folder(SCRATCH) as folder, planned_catalog(job, folder) as planned:
        book = planned.book
        _take_stock(book, store)
        counts, todo = book.counts(), book.num_todo()
        told = itertools.islice(book.failures(), MAX_TOLD)
        more = counts.num_failures - MAX_TOLD
        return [
            f"{counts.num_items} animations of {counts.num_sources} images "
            f"by {counts.num_drivings} videos",
            f"{counts.num_items - todo} are there already, {todo} to do",
            *(f"cannot be done: {f.item}: {f.code}: {f.cause}" for f in told),
            *([f"and {more} more that cannot be done"] if more > 0 else []),
        ]


class _CatalogRun:
    """One run over a planned catalog."""

    def __init__(
        self,
        job: AnimateJob,
        plan: CatalogPlan,
        store: ObjectStore,
        held: Lease,
        on_progress: OnProgress | None,
    ) -> None:
        self._job = job
        self._plan = plan
        self._book = plan.book
        self._store = store
        self._held = held
        self._on_progress = on_progress or (lambda progress: None)
        self._totals: dict[str, int] = {}  # by stage, as the next three
        self._num_over: Counter[str] = Counter()
        self._num_failed: Counter[str] = Counter()

    def run(self) -> CatalogManifest:
        outage_s = self._job.cluster.outage_s
        patiently(lambda: _take_stock(self._book, self._store), outage_s=outage_s)
        if self._book.num_todo():
            with ray_session():
                self._make()
        manifest = patiently(self._publish, outage_s=outage_s)
        codes, first = self._book.lost()
        total = manifest.num_items + manifest.num_failures
        check_counts(codes, first, total, self._job.max_failed_fraction)
        return manifest

    # --- making

    def _make(self) -> None:
        cluster = with_gpus(self._job.cluster, self._job.device)
        job = self._job.model_copy(update={"cluster": cluster})
        settings = _fitting(WorkerSettings.of(job), cluster)
        num_todo = self._book.num_todo()
        also_cpus = settings.also_cpus
        work = CatalogWork(
            self._book,
            self._store,
            settings_digest=self._plan.settings_digest,
            num_workers=cluster.num_workers or int(num_fitting(cluster, also_cpus)),
            first_bundle=max(1, settings.media_workers),
            on_lost=self._lost,
        )
        self._totals = {FEATURES: work.num_features, RENDER: num_todo}
        with closing(work):
            outcomes: Iterator[Outcome[Work, Made]] = run_bundles(
                work.bundles(),
                ModelWorker,
                (settings,),
                key=name_of,
                stage=stage_of,
                cluster=cluster,
                total=work.num_features + num_todo,
                also_cpus=also_cpus,
            )
            for outcome in outcomes:
                self._held.check()
                self._settle(work, outcome)

    def _settle(self, work: CatalogWork, outcome: Outcome[Work, Made]) -> None:
        """Note what became of a state or an animation."""
        item, made, failure = outcome.item, outcome.result, outcome.failure
        if isinstance(item, FeatureItem):
            found = made if failure is None else failure
            assert isinstance(found, FeatureRecord | Failure)
            work.feature_over(item, found)
        else:
            if failure is not None:
                self._book.set_failed(item.item.item_id, failure)
            else:
                assert isinstance(made, AnimationRecord)
                self._book.set_done(made)
            work.animation_over(item, made=failure is None)
        self._tell(stage_of(item), failed=failure is not None)

    def _lost(self, item: AnimationItem, failure: Failure) -> None:
        """Note an animation whose image or driving video cannot be used."""
        self._book.set_failed(item.item_id, failure)
        self._tell(RENDER, failed=True)

    def _tell(self, stage: str, *, failed: bool) -> None:
        self._num_over[stage] += 1
        self._num_failed[stage] += failed
        message = f"{self._num_failed[stage]} failed" if self._num_failed[stage] else ""
        self._on_progress(Progress(stage, self._num_over[stage], self._totals[stage], message))

    # --- publishing

    def _publish(self) -> CatalogManifest:
        """Tables, summary and page; the manifest last. Then what only the run needed is removed."""
        self._held.check()
        store, book = self._store, self._book
        metadata = {"settings_digest": self._plan.settings_digest}
        manifest = _manifest(store, self._plan, *book.totals())
        write_table(store, FAILURES, book.failures(), Failure, metadata=metadata)
        write_json(store, SUMMARY, manifest)
        page = gallery(store, manifest, book.records(), book.failures())
        store.put(PAGE, page.encode())
        write_table(store, MANIFEST, book.records(), AnimationRecord, metadata=metadata)
        for prefix in (JOURNAL, FEATURES):
            _remove_all(store, f"{prefix}/")
        return manifest


def _fitting(settings: WorkerSettings, cluster: Cluster) -> WorkerSettings:
    """The settings; media workers take no processor for themselves where there are too few."""
    if num_fitting(cluster, settings.also_cpus) >= 1:
        return settings
    return dataclasses.replace(settings, cpus_per_media_worker=0.0)


def _take_stock(book: CatalogBook, store: ObjectStore) -> None:
    """Find what earlier runs made and what is still there of it."""
    store.sweep()
    book.add_records(iter_table_if_any(store, MANIFEST, AnimationRecord))
    book.add_records(read_parts(store, JOURNAL, AnimationRecord))
    book.check_present(store.list(), _shown_with)


def _shown_with(record: AnimationRecord) -> list[str]:
    """Where the things lie that belong to a result."""
    keys = [
        source_preview(record.source_sha256),
        driving_preview(record.driving_sha256, record.driving_view),
        result_preview(record),
        poster_key(record.item_id),
    ]
    beside = credentials_key(record.key, record.credentials)
    return keys if beside is None else [*keys, beside]


def _remove_all(store: ObjectStore, prefix: str) -> None:
    keys = (info.key for info in store.list(prefix))
    with ThreadPoolExecutor(DELETE_THREADS) as pool:
        # In batches, since a pool holds all that it is given.
        while batch := list(itertools.islice(keys, DELETE_BATCH)):
            list(pool.map(store.delete, batch))


def gallery(
    store: ObjectStore,
    manifest: CatalogManifest,
    records: Iterable[AnimationRecord],
    failures: Iterable[Failure],
    *,
    home: str | None = None,
) -> str:
    """The page of a finished catalog; it refers to the files beside it.

    Args:
        home: link of an overview page.
    """
    posters = any(True for _ in store.list(f"{POSTERS}/"))
    return gallery_page(
        title="Animations",
        manifest=manifest,
        records=records,
        failures=failures,
        media=functools.partial(item_media, posters=posters),
        home=home,
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
    store: ObjectStore, plan: CatalogPlan, num_items: int, num_frames: int, num_failures: int
) -> CatalogManifest:
    return CatalogManifest(
        uri=store.uri,
        settings_digest=plan.settings_digest,
        weights_sha256=plan.weights_sha256,
        num_items=num_items,
        num_frames=num_frames,
        num_failures=num_failures,
    )


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
    weights = local_weights(job.checkpoint)
    animator = Animator.load(weights, device=job.device, precision=job.precision)
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

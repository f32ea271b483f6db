"""A dataset's tables, page and manifest, written in the order that keeps every reader whole.

    failures.parquet  index.html  previews/  changes.json  stats.json
    manifest.parquet  without it there is no dataset, and with it all that a reader needs is there
    versions.json     what was published; `complete` adds what a run was killed before it could
    versions/<n>.parquet  older manifests, whose shards are kept, as many as were asked for

Clips and failures are streamed: memory is flat, however many there are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, Final

from kpmask.data.dataset import CHANGES, FAILURES, MANIFEST, STATS, VERSIONS, version_key
from kpmask.data.layouts import IMAGE_SUFFIXES
from kpmask.errors import StorageError
from kpmask.records import ClipRecord, DatasetChanges, DatasetManifest, Failure, digest
from kpmask.report.dataset import DatasetSummary, dataset_page
from kpmask.report.previews import PREVIEWS, preview_key
from tasks.manifest import iter_table, read_json, read_table_metadata, write_json, write_table
from tasks.shard_worker import PreviewBatch, PreviewedClip, Previewer
from tasks.storage import ObjectStore

PAGE: Final = "index.html"
OUR_SHARD: Final = re.compile(r"(train|test)/shard-[0-9a-f-]+\.arrow")

# Draws the strips of clips that are not there yet.
DrawPreviews = Callable[[Sequence[PreviewedClip]], None]


class ListDigest:
    """`kpmask.records.digest` of a list, item by item."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"[")
        self._first = True

    def add(self, value: Any) -> None:  # noqa: ANN401 - any JSON value
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        self._hash.update((text if self._first else f",{text}").encode())
        self._first = False

    def hexdigest(self) -> str:
        done = self._hash.copy()
        done.update(b"]")
        return done.hexdigest()


@dataclass(frozen=True)
class Content:
    """All that a dataset is to hold. `clips`, by split and name, and `failures` are read more than
    once. `changes` are those from the dataset before, without version and id; `folders_before` are
    the clips' folders that it has in the layout of folders.
    """

    clips: Callable[[], Iterable[ClipRecord]]
    failures: Callable[[], Iterable[Failure]]
    settings_digest: str
    changes: Mapping[str, int]
    metadata: Mapping[str, str] = field(default_factory=dict)  # more, for the tables
    keep_versions: int = 0
    folders_before: Sequence[str] = ()


def publish(
    store: ObjectStore, content: Content, *, draw_previews: DrawPreviews | None = None
) -> tuple[DatasetManifest, DatasetChanges]:
    """Write a dataset over the one that there may be; its images are in place.

    Raises:
        StorageError: the store does not answer.
    """
    complete(store)
    summary = DatasetSummary()
    manifest = _summarised(store, content, summary)
    previews = _drawn(store, summary.shown, draw_previews or _draw_here(store))
    metadata = {
        "settings_digest": manifest.settings_digest,
        "dataset_id": manifest.dataset_id,
        **content.metadata,
    }
    last = _last_version(store)
    is_new = last.get("mark") != _mark(metadata)  # or else an old one is mended
    changes = DatasetChanges(
        version=last["version"] + is_new, dataset_id=manifest.dataset_id, **content.changes
    )
    page = dataset_page(
        title=PurePosixPath(store.uri).name,
        manifest=manifest,
        summary=summary,
        changes=changes,
        previews=previews,
    )
    write_table(store, FAILURES, content.failures(), Failure, metadata=metadata)
    store.put(PAGE, page.encode())
    write_json(store, CHANGES, changes)
    write_json(store, STATS, manifest)
    if is_new:
        _keep_version(store, content.keep_versions)
    else:  # what was to follow it did not come
        store.delete(version_key(last["version"]))
    write_table(store, MANIFEST, content.clips(), ClipRecord, metadata=metadata)
    complete(store)
    _remove_old(store, content, set(previews.values()))
    return manifest, changes


def remove_old(store: ObjectStore, content: Content) -> None:
    """Remove what `publish` removes at its end, where a run was killed before it could."""
    summary = DatasetSummary()
    for clip in content.clips():
        summary.add(clip)
    _remove_old(store, content, {preview_key(clip.clip_id) for clip in summary.shown})


def _summarised(store: ObjectStore, content: Content, summary: DatasetSummary) -> DatasetManifest:
    found, num_clips, num_frames = ListDigest(), {"train": 0, "test": 0}, 0
    for clip in content.clips():
        found.add([clip.clip_id, clip.partition, clip.identity])
        num_clips[clip.partition] += 1
        num_frames += clip.num_frames
        summary.add(clip)
    num_failures = 0
    for failure in content.failures():
        num_failures += 1
        summary.add_failure(failure)
    return DatasetManifest(
        uri=store.uri,
        dataset_id=found.hexdigest(),
        settings_digest=content.settings_digest,
        num_train=num_clips["train"],
        num_test=num_clips["test"],
        num_frames=num_frames,
        num_failures=num_failures,
    )


# --- previews --------------------------------------------------------------------------------


def _draw_here(store: ObjectStore) -> DrawPreviews:
    previewer = Previewer(store.uri, as_folders=False)
    return lambda clips: previewer.process(PreviewBatch(tuple(clips)))


def _drawn(store: ObjectStore, shown: Sequence[ClipRecord], draw: DrawPreviews) -> dict[str, str]:
    """The strips of the clips that the page shows, by clip id; what lacks is drawn."""
    keys = {clip.clip_id: preview_key(clip.clip_id) for clip in shown}
    there = {info.key for info in store.list(f"{PREVIEWS}/")}
    lacking = [clip for clip in shown if keys[clip.clip_id] not in there]
    if lacking:
        draw([PreviewedClip(c.clip_id, c.shard, c.row, c.num_frames) for c in lacking])
    return keys


# --- versions --------------------------------------------------------------------------------


def _versions(store: ObjectStore) -> list[dict[str, Any]]:
    try:
        found = read_json(store, VERSIONS)
    except StorageError as error:
        if error.code != "not_found":
            raise
        return []
    return list(found)


def _last_version(store: ObjectStore) -> dict[str, Any]:
    return max(_versions(store), key=lambda v: int(v["version"]), default={"version": 0})


def complete(store: ObjectStore) -> None:
    """Note the manifest that there is among the versions; to be called before any change.

    Raises:
        StorageError: the store does not answer.
    """
    if not all(store.exists(key) for key in (MANIFEST, STATS, CHANGES)):
        return
    versions, metadata = _versions(store), read_table_metadata(store, MANIFEST)
    changes, stats = read_json(store, CHANGES), read_json(store, STATS)
    last = _last_version(store)
    # What is written before a manifest may be of one that did not come.
    its_own = metadata.get("dataset_id") == changes["dataset_id"] == stats["dataset_id"]
    if its_own and changes["version"] > last["version"] and _mark(metadata) != last.get("mark"):
        write_json(store, VERSIONS, [*versions, _version(stats, changes, _mark(metadata))])


def _mark(metadata: Mapping[str, str]) -> str:
    """What tells a manifest from the one before it."""
    names = sorted(set(metadata) & {"settings_digest", "dataset_id", "content"})
    return digest([[name, metadata[name]] for name in names])[:16]


def _version(stats: Mapping[str, Any], changes: Mapping[str, Any], mark: str) -> dict[str, Any]:
    return {
        "version": changes["version"],
        "dataset_id": stats["dataset_id"],
        "num_clips": stats["num_train"] + stats["num_test"],
        "num_failures": stats["num_failures"],
        "clips_added": changes["clips_added"],
        "clips_removed": changes["clips_removed"],
        "mark": mark,
    }


def _keep_version(store: ObjectStore, count: int) -> None:
    """Copy the manifest that is about to be replaced; forget the oldest copies."""
    versions = _versions(store)
    if count and versions and store.exists(MANIFEST):
        store.put(version_key(versions[-1]["version"]), store.get(MANIFEST))
    kept = {version_key(v["version"]) for v in versions[-count:]} if count else set()
    for info in list(store.list("versions/")):
        if info.key not in kept:
            store.delete(info.key)


def _remove_old(store: ObjectStore, content: Content, previews: set[str]) -> None:
    """Remove images and strips that neither this dataset nor a kept version of it uses."""
    used = {clip.shard for clip in content.clips()}
    for info in store.list("versions/"):
        used |= {clip.shard for clip in iter_table(store, info.key, ClipRecord)}
    for split in ("train", "test"):
        for info in list(store.list(f"{split}/shard-")):
            if OUR_SHARD.fullmatch(info.key) and info.key not in used:
                store.delete(info.key)
    for folder in set(content.folders_before) - used:
        for info in list(store.list(f"{folder}/")):
            if PurePosixPath(info.key).suffix in IMAGE_SUFFIXES:
                store.delete(info.key)
    for info in list(store.list(f"{PREVIEWS}/")):
        if info.key not in previews:
            store.delete(info.key)


def published(
    store: ObjectStore, *, content: str, settings_digest: str
) -> tuple[DatasetManifest, DatasetChanges] | None:
    """The dataset as it is and no changes, if it is whole and made of that content."""
    if not all(store.exists(key) for key in (STATS, FAILURES, PAGE, CHANGES, MANIFEST)):
        return None
    for key in (MANIFEST, FAILURES):  # the latter is the first that is written of a new one
        metadata = read_table_metadata(store, key)
        if (metadata.get("content"), metadata.get("settings_digest")) != (content, settings_digest):
            return None
    manifest = DatasetManifest(**read_json(store, STATS))
    if manifest.uri != store.uri:
        return None
    counts = {f.name: 0 for f in fields(DatasetChanges) if f.name not in {"version", "dataset_id"}}
    counts["clips_kept"] = manifest.num_train + manifest.num_test
    version = int(read_json(store, CHANGES)["version"])
    return manifest, DatasetChanges(version=version, dataset_id=manifest.dataset_id, **counts)

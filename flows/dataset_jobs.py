"""What `kpmask dataset` calls, and the lines that it prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows import console
from flows.jobs import as_result
from kpmask import config
from kpmask.records import DatasetManifest

if TYPE_CHECKING:
    from kpmask.data.stored import DatasetInfo
    from tasks.export import ExportManifest
    from tasks.verify import Verified

__all__ = ["as_result"]

MAX_SHOWN = 20


def info(uri: str) -> DatasetInfo:
    from tasks.verify import dataset_info

    return dataset_info(uri)


def info_lines(found: DatasetInfo) -> list[str]:
    """A table of the splits, and a line for everything else."""
    columns = ["", "clips", "identities", "videos", "frames", "seconds"]
    rows = []
    for split in found.splits:
        numbers = split.num_clips, split.num_identities, split.num_videos, split.num_frames
        rows.append([split.partition, *map(str, numbers), f"{split.seconds:.1f}"])
    shortest, longest = found.num_frames
    lines = [
        console.table(columns, rows),
        "",
        f"size: {found.size_bytes / 1e6:.1f} MB of {found.image_format or 'unreadable'} images",
        f"clips: {_counted(found.sizes_px)} px; {shortest} to {longest} frames; "
        f"{_counted(found.fps)} fps",
        f"failures: {_counted(found.failures) or 'none'}",
        f"dataset_id: {found.dataset_id}",
        f"settings: {found.settings_digest}",
    ]
    if found.changes is not None:
        c = found.changes
        lines.append(
            f"version: {c.version}; last run: {c.clips_added} clips added, {c.clips_removed} "
            f"removed, {c.clips_kept} kept; {c.failures_new} failures new, {c.failures_gone} gone"
        )
    return lines


def _counted(counts: dict[str, int], limit: int = 6) -> str:
    """`a`, or `a (2), b (1)` where there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    named = [f"{value} ({count})" for value, count in list(counts.items())[:limit]]
    return ", ".join([*named, *(["..."] if len(counts) > limit else [])])


def verify(uri: str, *, workers: int | None, quiet: bool) -> Verified:
    from tasks.verify import verify_dataset

    cluster = config.Cluster(num_workers=workers)
    with console.progress_bars(quiet=quiet) as report:
        return verify_dataset(uri, cluster=cluster, on_progress=report)


def verify_lines(found: Verified) -> list[str]:
    """What is wrong, and what could be checked."""
    lines = []
    if found.problems:
        rows = [[p.item, p.code, p.cause] for p in found.problems]
        lines += [_left_table(["item", "code", "cause"], rows), ""]
    for key in found.leftovers[:MAX_SHOWN]:
        lines.append(f"left over, and named by no record: {key}")
    if len(found.leftovers) > MAX_SHOWN:
        lines.append(f"and {len(found.leftovers) - MAX_SHOWN} more")
    lines.append(
        f"{found.num_clips} clips, {found.num_frames} frames decoded; {found.num_hashed} clips "
        "have every pixel of their record"
    )
    unhashed = found.num_checked - found.num_hashed
    if unhashed:
        lines.append(f"{unhashed} clips are JPEG: sizes and numbers checked, pixels cannot be")
    verdict = f"{len(found.problems)} things are wrong" if found.problems else "whole"
    return [*lines, f"dataset: {found.uri}: {verdict}"]


def _left_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table of texts."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in [columns, ["-" * w for w in widths], *rows]
    )


def plan_export(job: config.ExportJob) -> list[str]:
    from tasks.export import export_dataset

    planned = export_dataset(job, dry_run=True)
    return [
        f"{planned.num_train} train and {planned.num_test} test clips, {planned.num_frames} frames",
        f"as {planned.form} into {planned.uri}",
    ]


def export(job: config.ExportJob, *, quiet: bool) -> ExportManifest:
    from tasks.export import export_dataset

    with console.progress_bars(quiet=quiet) as report:
        return export_dataset(job, on_progress=report)


def export_lines(made: ExportManifest) -> list[str]:
    worst = "" if made.min_psnr_db is None else f", {made.min_psnr_db:.1f} dB PSNR or better"
    return [
        f"{made.num_train} train and {made.num_test} test clips, {made.num_frames} frames; "
        f"{made.num_failures} failures",
        f"{made.num_files} files, {made.size_bytes / 1e6:.1f} MB, "
        f"{'lossless' if made.lossless else 'lossy'}{worst}",
        f"export: {made.uri}",
    ]


def import_job(
    resolved: config.PreprocessJob, source: str, *, form: str, size_px: int | None, fps: float
) -> config.ImportJob:
    """An import with what it shares with the preparation of raw videos."""
    return config.validated(
        config.ImportJob,
        {
            "source": source,
            "form": form,
            "size_px": size_px,
            "fps": fps,
            "test_fraction": resolved.clips.test_fraction,
            **resolved.model_dump(
                mode="json",
                include={"out", "storage", "limits", "cluster", "max_failed_fraction"},
            ),
        },
    )


def plan_import(job: config.ImportJob) -> list[str]:
    from tasks.imports import import_dataset

    planned = import_dataset(job, dry_run=True)
    what = "tars" if job.form == "webdataset" else "clips"
    return [
        f"{planned.num_train} train and {planned.num_test} test {what} found",
        f"{planned.num_failures} files and rows refused",
        f"into {planned.uri}",
    ]


def import_(job: config.ImportJob, *, quiet: bool) -> DatasetManifest:
    from tasks.imports import import_dataset

    with console.progress_bars(quiet=quiet) as report:
        return import_dataset(job, on_progress=report)


def import_lines(made: DatasetManifest) -> list[str]:
    return [
        f"{made.num_train} train and {made.num_test} test clips, {made.num_frames} frames; "
        f"{made.num_failures} failures",
        f"dataset: {made.uri}",
    ]

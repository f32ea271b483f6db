"""What a run of preprocess changed, in words: for the terminal, the log and the report."""

from __future__ import annotations

from kpmask.records import DatasetChanges


def has_changed(changes: DatasetChanges) -> bool:
    """Whether a clip or a failure came or went. (A new version may also only split otherwise.)"""
    clips = changes.clips_added + changes.clips_removed
    videos = changes.videos_added + changes.videos_removed
    return clips + videos + changes.failures_new + changes.failures_gone > 0


def change_line(changes: DatasetChanges) -> str:
    """What changed, in one line."""
    if has_changed(changes):
        parts = [
            f"{_many(changes.clips_added, 'clip')} added, {changes.clips_removed:,} removed, "
            f"{changes.clips_kept:,} kept",
            f"videos: {changes.videos_added:,} added, {changes.videos_removed:,} removed",
            f"failures: {changes.failures_new:,} new, {changes.failures_gone:,} gone",
        ]
    else:
        parts = [f"nothing new, nothing gone, {_many(changes.clips_kept, 'clip')} kept"]
    if changes.retried:
        parts.append(f"{_many(changes.retried, 'failed video')} tried again")
    if changes.waiting:
        parts.append(f"{_many(changes.waiting, 'failed video')} waiting for a later try")
    return f"version {changes.version}: {'; '.join(parts)}"


def change_table(changes: DatasetChanges) -> list[str]:
    """The same as a Markdown table."""
    rows = [
        ("clips", changes.clips_added, changes.clips_removed, f"{changes.clips_kept:,}"),
        ("videos with clips", changes.videos_added, changes.videos_removed, ""),
        ("failures", changes.failures_new, changes.failures_gone, ""),
    ]
    lines = [f"| {name} | {new:,} | {gone:,} | {kept} |" for name, new, gone, kept in rows]
    return ["| | added | removed | kept |", "|---|---|---|---|", *lines]


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

"""The demonstration's inputs and its front page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kpmask.demo import write_demo_catalog, write_demo_videos
from kpmask.records import Progress


@dataclass(frozen=True)
class DemoInputs:
    metadata: Path
    raw: Path
    catalog: Path


def draw_inputs(folder: Path, *, on_progress: Callable[[Progress], None]) -> DemoInputs:
    """Draw the videos and the catalog; what is there already is kept."""
    metadata = write_demo_videos(folder, on_progress=on_progress)
    catalog = write_demo_catalog(folder, folder)
    return DemoInputs(metadata=metadata, raw=folder / "raw", catalog=catalog)

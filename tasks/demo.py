"""The demonstration's inputs and its front page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kpmask.demo import write_demo_catalog, write_demo_videos
from kpmask.records import (
    AnimationRecord,
    CatalogManifest,
    DatasetManifest,
    Failure,
    Progress,
    RunManifest,
    ScoreTable,
    StepMetrics,
)
from kpmask.report import Command, GalleryMedia, Link, demo_page
from tasks import train_folder
from tasks.animate import gallery_media
from tasks.manifest import read_table, read_table_if_any
from tasks.storage import ObjectStore, open_store

NUM_VIDEOS: Final = 36
SEED: Final = 0  # the bundled weights were trained on videos of another
PAGE: Final = "index.html"
DATASET: Final = "dataset"
RUN: Final = "run"
ANIMATIONS: Final = "animations"
EVALUATION: Final = "evaluation"
OWN_EVALUATION: Final = "evaluation-own"
VIDEOS: Final = "videos"
MANIFEST: Final = "manifest.parquet"
FAILURES: Final = "failures.parquet"


@dataclass(frozen=True)
class DemoInputs:
    """Files of the generated material."""

    metadata: Path
    raw: Path
    catalog: Path

    @classmethod
    def of(cls, folder: Path) -> DemoInputs:
        """What `draw_inputs` leaves in a folder."""
        return cls(folder / "metadata.csv", folder / "raw", folder / "catalog.csv")


def draw_inputs(
    folder: Path,
    *,
    num_videos: int = NUM_VIDEOS,
    seed: int = SEED,
    varied: bool = False,
    on_progress: Callable[[Progress], None],
) -> DemoInputs:
    """Draw the videos and the catalog; what is there already is kept."""
    write_demo_videos(
        folder, num_videos=num_videos, seed=seed, varied=varied, on_progress=on_progress
    )
    write_demo_catalog(folder, folder, num_videos=num_videos, seed=seed, varied=varied)
    return DemoInputs.of(folder)


def publish_page(
    out: Path,
    *,
    dataset: DatasetManifest,
    run: RunManifest,
    catalog: CatalogManifest,
    scores: ScoreTable,
    own_scores: ScoreTable,
    seconds: Mapping[str, float],
) -> Path:
    """Write the front page of a demonstration, over its parts in `out`'s folders.

    `scores` are the bundled weights', `own_scores` the training's.
    """
    store = open_store(str(out))
    records = read_table(store, f"{ANIMATIONS}/{MANIFEST}", AnimationRecord)
    page = demo_page(
        title="kpmask demonstration",
        dataset=dataset,
        run=run,
        catalog=catalog,
        records=sorted(records, key=lambda record: record.name),
        media=_below(ANIMATIONS, gallery_media(records)),
        table=scores,
        own_table=own_scores,
        failures=list(_failures(store)),
        metrics=read_table(store, f"{RUN}/{train_folder.METRICS}", StepMetrics),
        samples=[info.key for info in store.list(f"{RUN}/{train_folder.SAMPLES}/")],
        links=[
            Link(label=name, path=f"{name}/{PAGE}")
            for name in (DATASET, ANIMATIONS, EVALUATION, RUN, OWN_EVALUATION)
        ],
        commands=_commands(out),
        seconds=seconds,
    )
    store.put(PAGE, page.encode())
    return out / PAGE


def _below(folder: str, media: Mapping[str, GalleryMedia]) -> dict[str, GalleryMedia]:
    """The same media, seen from the folder above."""
    return {
        item_id: GalleryMedia(
            **{
                field.name: path and f"{folder}/{path}"
                for field in dataclasses.fields(found)
                for path in [getattr(found, field.name)]
            }
        )
        for item_id, found in media.items()
    }


def _failures(store: ObjectStore) -> Iterable[Failure]:
    for part in (DATASET, ANIMATIONS, EVALUATION, OWN_EVALUATION):
        yield from read_table_if_any(store, f"{part}/{FAILURES}", Failure) or ()


def _commands(out: Path) -> list[Command]:
    inputs = DemoInputs.of(out / VIDEOS)
    weights = out / RUN / train_folder.WEIGHTS
    return [
        Command(
            label="Animate a picture of your own with the weights that come with kpmask",
            text="kpmask animate --checkpoint demo --source PICTURE.jpg "
            f"--driving {inputs.catalog.parent / 'drivings'}/VIDEO.mp4 --out moving.mp4",
        ),
        Command(
            label="See what your own training makes of the same pictures",
            text=f"kpmask animate --checkpoint {weights} --catalog {inputs.catalog} --out mine",
        ),
        Command(
            label="Cut your own videos into a dataset",
            text="kpmask preprocess --videos FOLDER --out data/mine --set clips.size_px=64",
        ),
        Command(
            label="Train on it",
            text="kpmask train --preset demo --data data/mine --out runs/mine",
        ),
    ]

"""A catalog of many rows, a hundredth of them bad, planned and gone through in one process.

    python -m tests.support.big_catalog FOLDER NUM_ROWS

Prints what it came to, and how much more memory it took at most than a catalog of a few rows.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from kpmask import checkpoint
from kpmask.config import AnimateJob, Credentials, MediaLimits
from kpmask.data.catalog import MAX_CELL_CHARS
from kpmask.media import images
from kpmask.media.encode import encode
from kpmask.models import build_system
from kpmask.records import AnimationItem, AnimationRecord
from tasks.catalog import CatalogPlan, planned_catalog
from tasks.catalog_book import CatalogBook
from tasks.storage import ObjectInfo
from tests.support.models import CIRCLES
from tests.support.peak import peak_bytes

NUM_SOURCES = 8
NUM_DRIVINGS = 4
GOOD = {"name": "", "motion": "", "crop": ""}
# What is wrong with a row, and with what code it fails.
KINDS = (
    ("path_escape", lambda cells: cells | {"source": "../s0.png"}),
    ("bad_row", lambda cells: cells | {"motion": "sideways"}),
    ("not_found", lambda cells: cells | {"source": "absent.png"}),
    ("duplicate_name", lambda cells: cells | {"name": "NAME 0"}),
    ("duplicate_row", lambda cells: row(0) | {"name": ""}),
    ("bad_row", lambda cells: cells | {"name": "n" * (MAX_CELL_CHARS + 1)}),
    ("bad_row", lambda cells: cells | {"more": "a cell"}),
    ("bad_row", lambda cells: cells | {"source": ""}),
)


def row(number: int) -> dict[str, str]:
    """The cells of a good row; no two are alike. Every third has a name."""
    side_px = 1 + number // (NUM_SOURCES * NUM_DRIVINGS)
    return {
        "source": f"s{number % NUM_SOURCES}.png",
        "driving": f"v{number // NUM_SOURCES % NUM_DRIVINGS}.mp4",
        "name": "" if number % 3 else f"name {number}",
        "motion": "",
        "crop": f"0-0-{side_px}-{side_px}",
    }


def kind_of(number: int) -> int | None:
    """Which of `KINDS` a row is."""
    return number // 100 % len(KINDS) if number % 100 == 7 else None


def expected_codes(num_rows: int) -> dict[str, int]:
    kinds = [kind for i in range(num_rows) if (kind := kind_of(i)) is not None]
    return dict(Counter(KINDS[kind][0] for kind in kinds))


def write_table(path: Path, num_rows: int) -> None:
    with path.open("w") as file:
        file.write("source,driving,name,motion,crop\n")
        for number in range(num_rows):
            kind = kind_of(number)
            cells = row(number) if kind is None else KINDS[kind][1](row(number))
            file.write(",".join(cells.values()) + "\n")


def write_media(folder: Path) -> None:
    torch.manual_seed(0)
    checkpoint.save(folder / "w.safetensors", build_system(CIRCLES), {})
    noise = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    for number in range(NUM_SOURCES):
        image = np.roll(noise[0], number, axis=0)
        (folder / f"s{number}.png").write_bytes(images.encode_png(image))
    for number in range(NUM_DRIVINGS):
        encode(folder / f"v{number}.mp4", np.roll(noise, number, axis=1), fps=25)


def job_of(folder: Path, catalog: Path) -> AnimateJob:
    return AnimateJob(
        checkpoint=str(folder / "w.safetensors"),
        out=str(folder / "out"),
        catalog=str(catalog),
        credentials=Credentials(enabled=False),
        limits=MediaLimits(min_side_px=16),
    )


def record_of(item: AnimationItem) -> AnimationRecord:
    return AnimationRecord(
        item_id=item.item_id,
        name="earlier name",
        source=item.source,
        driving=item.driving,
        source_sha256=item.source_sha256,
        driving_sha256=item.driving_sha256,
        motion=item.motion,
        key=f"{item.item_id}.mp4",
        num_frames=3,
        num_frames_lost=0,
        fps=25.0,
        width_px=32,
        height_px=32,
        size_bytes=100,
        sha256=item.item_id * 2,
    )


def objects_of(book: CatalogBook) -> Iterator[ObjectInfo]:
    """All results but every thousandth, in the order of their keys; then a preview of each."""
    for number, record in enumerate(book.records()):
        if number % 1000:
            yield ObjectInfo(record.key, record.size_bytes, "e")
    for record in book.records():
        yield ObjectInfo(f"media/{record.item_id}.mp4", 10, "e")


def go_through(plan: CatalogPlan) -> dict[str, object]:
    """What a run does with its book, other than work."""
    book = plan.book
    book.add_records(record_of(item) for item in book.items())
    num_lost = book.check_present(objects_of(book), lambda record: [f"media/{record.item_id}.mp4"])
    num_todo = book.num_todo()
    for item in book.todo():
        book.set_done(record_of(item))
    return {
        "counts": book.counts(),
        "num_lost": num_lost,
        "num_todo": num_todo,
        "totals": book.totals(),
        "codes": dict(Counter(failure.code for failure in book.failures())),
        "num_names": book._one("SELECT COUNT(DISTINCT lower(name)) FROM item"),
    }


def main(folder: Path, num_rows: int) -> None:
    write_media(folder)
    found: dict[str, object] = {}
    peaks = []
    for name, count in (("few", 1000), ("many", num_rows)):
        write_table(folder / f"{name}.csv", count)
        (folder / name).mkdir()
        with planned_catalog(job_of(folder, folder / f"{name}.csv"), folder / name) as plan:
            found = go_through(plan)
        peaks.append(peak_bytes())
    sys.stdout.write(json.dumps(found | {"growth_bytes": peaks[1] - peaks[0]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

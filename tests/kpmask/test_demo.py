"""The drawn videos against what other readers find in them."""

from __future__ import annotations

import csv
import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kpmask.config import MediaLimits
from kpmask.data.catalog import RowDefaults, iter_catalog
from kpmask.demo import write_demo_catalog, write_demo_videos
from kpmask.demo.figures import MOTIONS, OUTLINE
from kpmask.demo.videos import BOX, FORMATS, film, plan_takes
from kpmask.errors import MediaError
from kpmask.media.probe import probe
from kpmask.records import CatalogRow, Progress
from tasks.demo import NUM_VIDEOS as NUM_SHOWN
from tasks.demo import SEED
from tests.support.metadata import read_metadata

NUM_VIDEOS = 6  # three people; one is held out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    write_demo_videos(out, num_videos=NUM_VIDEOS)
    return out


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def decoded(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_the_plan_holds_people_out_and_varies_everything() -> None:
    takes = plan_takes(24, seed=0)
    train = {take.person_id for take in takes if take.partition == "train"}
    test = {take.person_id for take in takes if take.partition == "test"}
    assert (len(train), len(test)) == (9, 3)
    assert not train & test
    assert all(sum(t.person_id == person for t in takes) == 2 for person in train | test)
    assert len({take.video_id for take in takes}) == 24
    seen = {take.motion for take in takes if take.partition == "train"}
    assert seen >= {take.motion for take in takes if take.partition == "test"}
    assert len({take.codec for take in takes}) == len(FORMATS)
    assert {take.fps for take in takes} >= {15, 24, 25, 30, Fraction(30000, 1001)}
    assert len({take.size_px for take in takes}) >= 5
    skins = {take.person.look.skin for take in takes if take.partition == "train"}
    assert skins >= {take.person.look.skin for take in takes if take.partition == "test"}


def test_another_seed_gives_other_videos() -> None:
    first, other = plan_takes(4, seed=0)[0], plan_takes(4, seed=1)[0]
    assert first.person != other.person
    assert not np.array_equal(next(film(first)), next(film(other)))


# --- what the bundled weights are trained on -------------------------------------------------

TRAINING = {"num_videos": 240, "seed": 1, "varied": True}  # as `make weights` draws them


def test_nobody_of_the_demonstration_is_in_the_training_of_the_bundled_weights() -> None:
    """No person, no set of clothes, no place and no take of it; and no name of a held-out one."""
    shown, training = plan_takes(NUM_SHOWN, seed=SEED), plan_takes(**TRAINING)
    for own in (
        lambda take: take.person.look,
        lambda take: take.person.body,
        lambda take: take.seed,  # which the scene follows from
        lambda take: (take.person.look.shirt, take.person.look.trousers),
    ):
        assert not {own(take) for take in shown} & {own(take) for take in training}


def test_the_weights_target_draws_videos_of_its_own() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.partition("\nweights:")[2].partition("\n\n")[0]
    assert "--varied" in recipe
    found = dict(re.findall(r"^WEIGHTS_(VIDEOS|SEED) \?= (\d+)$", makefile, flags=re.MULTILINE))
    assert found == {"VIDEOS": str(TRAINING["num_videos"]), "SEED": str(TRAINING["seed"])}
    assert TRAINING["seed"] != SEED


def test_varied_takes_vary() -> None:
    takes = plan_takes(**TRAINING)
    test = [take for take in takes if take.partition == "test"]
    assert len({take.video_id for take in takes}) == 240 and len(test) == 20
    assert {take.motion for take in takes} == set(MOTIONS)
    people = {take.person_id: take.person for take in takes}.values()
    assert len(people) == 120
    for part in ("skin", "shirt", "trousers"):
        assert len({getattr(person.look, part) for person in people}) > 110
    shirts = np.array([person.look.shirt for person in people])
    assert (shirts.min(0) < 30).all() and (shirts.max(0) > 220).all()
    heights = [take.stage.height_px / (take.box_px[2] - take.box_px[0]) for take in takes]
    assert max(heights) / min(heights) > 1.25
    middles = [
        (take.stage.x_px - take.box_px[0]) / (take.box_px[2] - take.box_px[0]) for take in takes
    ]
    assert max(middles) - min(middles) > 0.1


def test_varied_people_stay_in_their_box() -> None:
    """What moves is drawn within the box, whole: hardly anything reaches its edge."""
    for take in plan_takes(**TRAINING)[::40]:
        left, top, right, bottom = take.box_px
        frames = [f[top:bottom, left:right] for f in itertools.islice(film(take), 0, None, 6)]
        moved_HW = np.ptp(np.stack(frames).astype(np.int16), axis=0).max(-1) > 60
        assert moved_HW.mean() > 0.03, take.video_id
        edge = np.concatenate(
            [moved_HW[:2].ravel(), moved_HW[:, :2].ravel(), moved_HW[:, -2:].ravel()]
        )
        assert edge.mean() < 0.02, take.video_id


def test_limbs_are_legible_at_64_px() -> None:
    for take in plan_takes(24, seed=0):
        outlined = min(take.person.body.arm_width, take.person.body.leg_width) + 2 * OUTLINE
        assert outlined / BOX * 64 >= 4


def test_files_are_what_the_table_says(folder: Path) -> None:
    codecs = {"libx264": "h264", "libx265": "hevc", "libvpx-vp9": "vp9", "mpeg4": "mpeg4"}
    for take, row in zip(
        plan_takes(NUM_VIDEOS, 0), rows_of(folder / "metadata.csv")[:NUM_VIDEOS], strict=True
    ):
        path = folder / "raw" / take.file_name
        with av.open(path) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name.removeprefix("lib") in (
                codecs[FORMATS[take.codec][0]],
                "vpx-vp9",
            )
            assert (stream.width, stream.height) == take.size_px
            assert float(stream.average_rate or 0) == pytest.approx(float(take.fps), abs=0.01)
            count = sum(1 for _ in container.decode(video=0))
        assert count == take.num_frames
        # The span lies inside the file, in the table's own rate.
        assert 0 <= int(row["start"]) < int(row["end"])
        assert int(row["end"]) / float(row["fps"]) <= count / float(take.fps) + 0.05


def test_some_rows_speak_of_a_reference_of_another_size_and_rate(folder: Path) -> None:
    takes = plan_takes(NUM_VIDEOS, 0)
    rows = rows_of(folder / "metadata.csv")
    differ = [
        take.video_id
        for take, row in zip(takes, rows, strict=False)
        if (int(row["width"]), int(row["height"])) != take.size_px
    ]
    assert 0 < len(differ) < len(takes)


def test_what_moves_lies_inside_the_box_and_moves_a_lot(folder: Path) -> None:
    for take, row in zip(
        plan_takes(NUM_VIDEOS, 0), rows_of(folder / "metadata.csv")[:NUM_VIDEOS], strict=True
    ):
        video_THWC = decoded(folder / "raw" / take.file_name).astype(np.int16)
        moved_HW = (np.ptp(video_THWC, axis=0).max(axis=-1) > 60).nonzero()
        scale = take.size_px[0] / int(row["width"])
        left, top, right, bottom = (int(side) * scale for side in row["bbox"].split("-"))
        assert moved_HW[1].min() >= left - 2
        assert moved_HW[1].max() <= right + 2
        assert moved_HW[0].min() >= top - 2
        assert moved_HW[0].max() <= bottom + 2
        inside = len(moved_HW[0]) / ((right - left) * (bottom - top))
        assert inside > 0.08, take.video_id


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    write_demo_videos(tmp_path, num_videos=NUM_VIDEOS, on_progress=told.append)
    assert [progress.done for progress in told] == list(range(1, NUM_VIDEOS + 1))
    first = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    again = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert again == first
    # What is there already stays as it is; what was lost is drawn again.
    told.clear()
    assert write_demo_videos(tmp_path, num_videos=NUM_VIDEOS, on_progress=told.append)
    assert told == []
    lost = tmp_path / "raw" / plan_takes(NUM_VIDEOS, 0)[0].file_name
    lost.unlink()
    write_demo_videos(tmp_path, num_videos=NUM_VIDEOS)
    assert lost.read_bytes() == first[lost.name]


def test_two_rows_are_broken(folder: Path) -> None:
    rows, failures = read_metadata(folder / "metadata.csv")
    assert len(rows) == NUM_VIDEOS + 1
    assert [failure.code for failure in failures] == ["bad_row"]
    with pytest.raises(MediaError) as caught:
        probe(folder / "raw" / "damaged-tape.mp4", MediaLimits())
    assert caught.value.code in {"truncated", "container_unreadable", "no_frames"}


def test_the_catalog_animates_held_out_people_with_others_motion(tmp_path: Path) -> None:
    # Four people are needed for two to be held out.
    write_demo_videos(tmp_path, num_videos=16)
    catalog = write_demo_catalog(tmp_path, tmp_path, num_videos=16, num_drivings=2, size_px=96)
    found = list(iter_catalog(catalog, RowDefaults()))
    *good, missing = [row for row in found if isinstance(row, CatalogRow)]
    assert len(found) == len(good) + 1
    assert not Path(missing.source).exists()
    assert len(good) >= 2
    held_out = {t.person_id for t in plan_takes(16, 0) if t.partition == "test"}
    for row in good:
        person, driver = Path(row.source).stem, Path(row.driving).stem.split("-")[0]
        assert {person, driver} <= held_out
        assert person != driver
        with Image.open(row.source) as image:
            assert image.size == (96, 96)
        video_THWC = decoded(Path(row.driving))
        assert video_THWC.shape[1:] == (96, 96, 3)
        take = next(t for t in plan_takes(16, 0) if t.video_id == Path(row.driving).stem)
        wanted_s = take.end_s - take.start_s
        assert len(video_THWC) / float(take.fps) == pytest.approx(wanted_s, abs=0.15)


def test_a_source_is_the_first_frame_of_its_row(folder: Path, tmp_path: Path) -> None:
    write_demo_catalog(folder, tmp_path, num_videos=NUM_VIDEOS, num_drivings=1, size_px=128)
    (path,) = (tmp_path / "sources").iterdir()
    take = [t for t in plan_takes(NUM_VIDEOS, 0) if t.person_id == path.stem][-1]
    with Image.open(path) as image:
        found_HWC = np.asarray(image, dtype=np.float32)
    first = math.ceil(take.start_s * take.fps)
    drawn = Image.fromarray(list(film(take))[first]).crop(take.box_px)
    drawn_HWC = np.asarray(drawn.resize((128, 128), Image.Resampling.BOX), dtype=np.float32)
    assert np.abs(found_HWC - drawn_HWC).mean() < 8
    (driving,) = (tmp_path / "drivings").iterdir()
    assert driving.stem.split("-")[0] != path.stem

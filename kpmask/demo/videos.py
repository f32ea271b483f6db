"""Raw videos of drawn people with a metadata table, and a catalog to animate.

- Everything follows from the seed: the same seed gives the same bytes.
- Files differ in codec, container, frame rate and size; for a third of them the table speaks of a
  reference video of another rate and size, as the published tables do.
- A person is one identity with one body and one set of clothes; a quarter of the people are held
  out for testing.
- Two rows are broken on purpose (a damaged file, a span that ends before it starts), so that there
  is something to report.
"""

from __future__ import annotations

import csv
import io
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Final

import av
import numpy as np
from PIL import Image

from kpmask.config import MediaLimits
from kpmask.demo.figures import (
    MOTIONS,
    SKINS,
    Person,
    Stage,
    draw_person,
    random_person,
    varied_person,
)
from kpmask.demo.scenes import draw_scene
from kpmask.media.decode import frames
from kpmask.media.encode import encode
from kpmask.records import Partition, Progress

# fmt: off
NAMES: Final = (
    "ada", "bruno", "chidi", "dora", "emil", "fatima", "goran", "hana", "igor", "june", "kofi",
    "lena", "milo", "nadia", "oskar", "priya", "quinn", "rosa", "sami", "tove", "uma", "viktor",
    "wren", "xenia", "yusuf", "zoe",
)
# fmt: on
FORMATS: Final = (
    ("libx264", ".mp4", {"preset": "superfast", "crf": "19"}),
    ("libx264", ".mkv", {"preset": "superfast", "crf": "19"}),
    ("libx265", ".mp4", {"preset": "ultrafast", "crf": "21"}),
    ("libvpx-vp9", ".webm", {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0"}),
    ("mpeg4", ".avi", {"qmin": "3", "qmax": "5"}),
)
RATES: Final = (Fraction(25), Fraction(30000, 1001), Fraction(24), Fraction(30), Fraction(15))
SIZES_PX: Final = ((320, 240), (360, 480), (480, 360), (360, 640), (400, 300), (320, 320))
REFERENCES: Final = (None, None, (Fraction(30), 2.0), None, (Fraction(25), 1.5), None)

BOX: Final = 1.42  # side of the box in standing heights: arms up and a hop fit
OVERSAMPLE: Final = 3
COLUMNS: Final = (
    "video_id",
    "start",
    "end",
    "bbox",
    "fps",
    "width",
    "height",
    "partition",
    "person_id",
)


def _rng(seed: int | str) -> random.Random:
    """Numbers that follow from a seed (and are for pictures, not for secrets)."""
    return random.Random(seed)  # noqa: S311


@dataclass(frozen=True, slots=True)
class Take:
    """One video to film: who does what, where, and how it is stored."""

    video_id: str
    person_id: str
    partition: Partition
    motion: str
    seed: int
    person: Person
    size_px: tuple[int, int]
    fps: Fraction
    codec: int  # an index of FORMATS
    duration_s: float
    start_s: float
    end_s: float
    reference: tuple[Fraction, float] | None  # its rate, and its size over the file's
    varied: bool = False  # the person's size and place, the scene and the motion, too

    @property
    def file_name(self) -> str:
        return self.video_id + FORMATS[self.codec][1]

    @property
    def num_frames(self) -> int:
        return math.ceil(self.duration_s * self.fps)

    @property
    def box_px(self) -> tuple[int, int, int, int]:
        """A square around the person that also holds raised arms; left, top, right, bottom."""
        rng = _rng(self.seed)
        width, height = self.size_px
        side = round(min(width, height) * rng.uniform(0.9, 0.96))
        left = round((width - side) * rng.uniform(0.35, 0.65))
        top = round((height - side) * rng.uniform(0.6, 0.9))
        return left, top, left + side, top + side

    @property
    def stage(self) -> Stage:
        left, top, right, bottom = self.box_px
        side = bottom - top
        scale, shift, lift = self._place
        x_px = (left + right) / 2 + shift * side
        return Stage(scale * side / BOX, x_px, bottom - lift * side)

    @property
    def _place(self) -> tuple[float, float, float]:
        """Size of the person over the largest that fits; steps aside and up, in sides."""
        if not self.varied:
            return 1.0, 0.0, 0.07
        rng = _rng(f"{self.seed}/place")
        scale = rng.uniform(0.76, 0.99)
        room = 0.5 * (1.0 - scale)  # to stay in the box with arms and a leg spread
        return scale, rng.uniform(-room, room), rng.uniform(0.04, 0.04 + 0.7 * (1.0 - scale))


def plan_takes(num_videos: int, seed: int, *, varied: bool = False) -> list[Take]:
    """The videos to film: two of each person, some people (at least one) for testing.

    Motions go round, so that each is seen in training and every held-out person does something
    that others did too.

    Args:
        varied: people from outside the palettes, of all sizes, before scenes of all kinds, and a
            twelfth of them for testing, not a quarter: to train what is shown on others.
    """
    num_people = max(2, (num_videos + 1) // 2)
    num_test = max(1, num_people // (12 if varied else 4))
    motions, takes = list(MOTIONS), []
    skins = _rng(seed).sample(SKINS, len(SKINS))
    for index in range(num_videos):
        who, turn = index % num_people, index // num_people
        rng = _rng(f"{seed}/{who}/{turn}")
        name = NAMES[who % len(NAMES)] + (str(who // len(NAMES) + 1) if who >= len(NAMES) else "")
        motion = motions[(who + turn * 3) % len(motions)]
        duration_s = rng.uniform(3.0, 3.5)
        takes.append(
            Take(
                video_id=f"{name}-{motion}" + (f"-{turn}" if turn > 1 else ""),
                person_id=name,
                partition="test" if who >= num_people - num_test else "train",
                motion=motion,
                seed=rng.getrandbits(32),
                person=varied_person(_rng(f"{seed}/{who}"))
                if varied
                else random_person(_rng(f"{seed}/{who}"), skins[who % len(skins)]),
                size_px=SIZES_PX[index % len(SIZES_PX)],
                fps=RATES[(index + turn) % len(RATES)],
                codec=(index + turn) % len(FORMATS),
                duration_s=duration_s,
                start_s=rng.choice((0.0, 0.0, 0.2)),
                end_s=duration_s - rng.choice((0.0, 0.1)),
                reference=REFERENCES[index % len(REFERENCES)],
                varied=varied,
            )
        )
    return takes


# --- pictures --------------------------------------------------------------------------------


def film(take: Take) -> Iterator[np.ndarray]:
    """The frames of a take, uint8 HWC RGB.

    Only the box around the person is drawn anew for each frame, three times as large as it is
    shown, and averaged.
    """
    rng = _rng(take.seed)
    width, height = (side * OVERSAMPLE for side in take.size_px)
    stage = take.stage
    ground_px = round(stage.y_px * OVERSAMPLE)
    scene = draw_scene(rng, (width, height), ground_px, varied=take.varied)
    still = scene.reduce(OVERSAMPLE)
    left, top = take.box_px[:2]
    set_ = scene.crop(tuple(side * OVERSAMPLE for side in take.box_px))  # type: ignore[arg-type]
    close = Stage(
        stage.height_px * OVERSAMPLE,
        (stage.x_px - left) * OVERSAMPLE,
        (stage.y_px - top) * OVERSAMPLE,
    )
    tempo_hz, phase, size = rng.uniform(0.6, 0.95), rng.uniform(0, math.tau), rng.uniform(0.9, 1.1)
    arms = None
    if take.varied:
        size *= rng.uniform(0.7, 1.0)
        arms = MOTIONS[rng.choice(list(MOTIONS))]
    for index in range(take.num_frames):
        time_s = float(index / take.fps)
        angle = phase + math.tau * tempo_hz * time_s
        pose = MOTIONS[take.motion](angle, size)
        if arms is not None:
            other = arms(angle, size)
            pose = replace(pose, shoulders=other.shoulders, elbows=other.elbows)
        drawn = set_.copy()
        draw_person(drawn, close, take.person, pose)
        frame = still.copy()
        frame.paste(drawn.reduce(OVERSAMPLE), (left, top))
        yield np.asarray(frame)


def _write_video(path: Path, take: Take) -> None:
    """Encode a take; the name appears when the file is whole."""
    codec, suffix, options = FORMATS[take.codec]
    part = path.with_name(f".tmp-{path.stem}{suffix}")
    extra = {"x265-params": "pools=none:frame-threads=1:log-level=none"} if "265" in codec else {}
    with av.open(part, "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=take.fps, options={**options, **extra})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = take.size_px
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for image_HWC in film(take):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image_HWC, format="rgb24")))
        container.mux(stream.encode())
    part.replace(path)


# --- the table -------------------------------------------------------------------------------


def _row(take: Take) -> list[str]:
    rate, scale = take.reference or (take.fps, 1.0)
    box = "-".join(str(round(side * scale)) for side in take.box_px)
    width, height = (round(side * scale) for side in take.size_px)
    start, end = (round(time_s * rate) for time_s in (take.start_s, take.end_s))
    values = [take.video_id, start, end, box, f"{float(rate):g}", width, height, take.partition]
    return [*map(str, values), take.person_id]


def _broken_rows(takes: Sequence[Take]) -> list[list[str]]:
    good = _row(takes[0])
    backwards = [good[0], "60", "20", *good[3:]]
    return [["damaged-tape", *good[1:]], backwards]


def _table(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".tmp-{path.name}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_demo_videos(
    out: Path,
    *,
    num_videos: int = 24,
    seed: int = 0,
    varied: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Draw the demonstration's raw videos and their metadata table.

    Args:
        out: a folder; gets `raw/<video_id>.<ext>` and, last, `metadata.csv`. When it already holds
            exactly these, nothing is done.
        num_videos: good ones; there are two of each person.
        seed: which people, clothes, places and motions.
        varied: see `plan_takes`.
        on_progress: told after each video.

    Returns:
        The metadata table's path.
    """
    takes = plan_takes(num_videos, seed, varied=varied)
    table = _table([*map(_row, takes), *_broken_rows(takes)], COLUMNS)
    metadata, raw = out / "metadata.csv", out / "raw"
    names = [take.file_name for take in takes] + ["damaged-tape.mp4"]
    whole = metadata.is_file() and metadata.read_text(encoding="utf-8") == table
    if whole and all((raw / name).is_file() for name in names):
        return metadata
    raw.mkdir(parents=True, exist_ok=True)
    metadata.unlink(missing_ok=True)
    for done, take in enumerate(takes, start=1):
        _write_video(raw / take.file_name, take)
        if on_progress is not None:
            on_progress(Progress("videos", done, len(takes), take.video_id))
    # An MP4 cut before its index, as a broken download leaves it.
    whole_file = next(raw / t.file_name for t in takes if t.file_name.endswith(".mp4"))
    (raw / "damaged-tape.mp4").write_bytes(whole_file.read_bytes()[:20_000])
    _write_text(metadata, table)
    return metadata


# --- the catalog -----------------------------------------------------------------------------


def write_demo_catalog(
    videos: Path,
    out: Path,
    *,
    num_videos: int = 24,
    seed: int = 0,
    varied: bool = False,
    num_sources: int = 3,
    num_drivings: int = 4,
    size_px: int = 256,
) -> Path:
    """Cut images and driving videos out of the held-out people's videos, and list them in pairs.

    Args:
        videos: the folder that `write_demo_videos` filled.
        num_videos, seed, varied: as it was told.
        out: gets `sources/*.png`, `drivings/*.mp4` (square, `size_px`) and, last, `catalog.csv`
            with the columns `source,driving,name` (paths relative to the table).
        num_sources: people to animate; nobody drives an image of their own.
        num_drivings: videos to drive with.

    Returns:
        The catalog's path. One of its rows names a file that does not exist.
    """
    takes = plan_takes(num_videos, seed, varied=varied)
    test = [take for take in takes if take.partition == "test"]
    sources = list({take.person_id: take for take in test}.values())[:num_sources]
    # A single held-out person takes the motion of others.
    drivings = _varied(
        test if len(sources) > 1 else [t for t in takes if t not in test], num_drivings
    )
    for folder in (out / "sources", out / "drivings"):
        folder.mkdir(parents=True, exist_ok=True)
    for take in sources:
        first = next(_cut(videos, take, size_px))
        Image.fromarray(first).save(out / "sources" / f"{take.person_id}.png")
    for take in drivings:
        encode(out / "drivings" / f"{take.video_id}.mp4", _cut(videos, take, size_px), fps=take.fps)
    rows = [
        [
            f"sources/{s.person_id}.png",
            f"drivings/{d.video_id}.mp4",
            f"{s.person_id}-as-{d.video_id}",
        ]
        for d in drivings
        for s in sources
        if s.person_id != d.person_id
    ]
    rows.append(["sources/nobody.png", rows[0][1], "nobody-at-all"])
    catalog = out / "catalog.csv"
    _write_text(catalog, _table(rows, ("source", "driving", "name")))
    return catalog


def _varied(takes: Sequence[Take], count: int) -> list[Take]:
    """Up to `count` takes, each of another motion as long as there are any."""
    first = {take.motion: take for take in reversed(takes)}
    chosen = [take for take in takes if first[take.motion] is take]
    return (chosen + [take for take in takes if take not in chosen])[:count]


def _cut(videos: Path, take: Take, size_px: int) -> Iterator[np.ndarray]:
    path = videos / "raw" / take.file_name
    found = frames(
        path,
        MediaLimits(),
        start_s=take.start_s,
        end_s=take.end_s,
        crop_px=take.box_px,
        size_px=(size_px, size_px),
    )
    return (frame.rgb_HWC for frame in found)

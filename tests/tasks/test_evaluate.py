"""Evaluation end to end: against slow loops, with what cannot be scored, and reruns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from kpmask import Animator
from kpmask.config import ScoreProtocol
from kpmask.data.dataset import Dataset
from kpmask.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    ItemError,
    MediaError,
    RunFailed,
)
from kpmask.evaluate import reconstruct
from kpmask.media import images
from kpmask.media.encode import encode
from kpmask.metric_names import PICTURE_METRICS
from kpmask.models import build_system
from kpmask.records import (
    ClipRecord,
    Failure,
    Progress,
    ScoreSummary,
    VideoScore,
    from_table,
    to_table,
)
from tasks.evaluate import evaluate, plan
from tasks.score_plan import ScoreItem, VideoPair, entry_of
from tasks.score_worker import PairWorker, ScoreSettings, media_of
from tests.support.evaluations import (
    MODEL,
    job_of,
    make_dataset,
    model_job,
    some_frames,
    write_weights,
)
from tests.support.inline import inline_evaluation


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_weights(folder / "w.safetensors")
    make_dataset(folder / "data")
    return folder


def read_scores(out: Path) -> list[VideoScore]:
    return from_table(pq.read_table(out / "scores.parquet"), VideoScore)


def by_hand(inputs: Path) -> dict[tuple[str, str], list[np.ndarray]]:
    """L1 of every frame of each test clip, by (metric, method)."""
    animator = Animator.load(inputs / "w.safetensors", device="cpu", precision="plain")
    dataset = Dataset.from_folder(inputs / "data")
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for record in dataset.partition("test"):
        true = dataset.read(record)
        with torch.inference_mode():
            state = animator.encode_source(true[0])
            drawn = [animator.render(state, animator.encode_driving([frame]))[0] for frame in true]
        generated = np.stack([image.permute(1, 2, 0).double().numpy() for image in drawn])
        true = true / 255
        for method, frames in (("model", generated), ("copy", np.stack([true[0]] * len(true)))):
            errors = np.abs(frames - true).mean((1, 2, 3))
            found.setdefault(("l1_with_first", method), []).append(errors)
            found.setdefault(("l1", method), []).append(errors[1:])
    return found


@pytest.fixture(scope="module")
def scored(inputs: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("scores") / "out"
    seen: list[Progress] = []
    return out, evaluate(model_job(inputs, out), on_progress=seen.append), seen


def test_scores_are_those_of_a_slow_loop(scored: Any, inputs: Path) -> None:
    out, table, _ = scored
    rows = {(row.clip_id, row.metric, row.method): row for row in read_scores(out)}
    summaries = {(s.metric, s.method): s for s in table.summaries}
    for (metric, method), videos in by_hand(inputs).items():
        for number, errors in enumerate(videos):
            if len(errors) == 0:  # a clip of one frame has no frame but the first
                assert (f"test{number}", metric, method) not in rows
                continue
            row = rows[f"test{number}", metric, method]
            assert row.value == pytest.approx(errors.mean(), abs=2e-6)
            assert row.num_frames == len(errors)
        means = [errors.mean() for errors in videos if len(errors)]
        summary = summaries[metric, method]
        assert summary.mean == pytest.approx(np.mean(means), abs=2e-6)
        assert summary.std == pytest.approx(np.std(means), abs=2e-6)
        assert summary.pooled == pytest.approx(np.concatenate(videos).mean(), abs=2e-6)
        assert summary.num_videos == len(means)
        assert summary.num_frames == sum(len(errors) for errors in videos)


def test_every_metric_stands_beside_the_copy_and_the_codec(scored: Any) -> None:
    _, table, _ = scored
    names = list(PICTURE_METRICS)
    assert {(s.metric, s.method) for s in table.summaries} == {
        (name, method) for name in names for method in ("model", "copy", "codec")
    }
    assert [row.metric for row in table.paired] == names
    means = {(s.metric, s.method): s.mean for s in table.summaries}
    assert means["l1", "codec"] < 0.5 * means["l1", "copy"]
    assert means["psnr", "codec"] > 25
    assert [info.name for info in table.metrics] == names
    assert (table.num_videos, table.num_failures) == (3, 0)
    assert (table.perceptual, table.dataset_id) == ("none", "d" * 64)


def test_the_page_and_the_summary_are_there(scored: Any) -> None:
    out, table, _ = scored
    summary = json.loads((out / "summary.json").read_text())
    assert summary["weights_sha256"] == table.weights_sha256
    assert [ScoreSummary(**s) for s in summary["summaries"]] == list(table.summaries)
    page = (out / "index.html").read_text()
    media = media_of(entry_of(table.settings_digest, "test0"))
    assert media.result in page
    assert (out / media.driving).is_file()
    assert not [p for p in (out / "journal").rglob("*") if p.is_file()]


def test_a_rerun_scores_nothing_again(scored: Any, inputs: Path) -> None:
    out, table, seen = scored
    assert len(seen) == 3
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    again: list[Progress] = []
    assert evaluate(model_job(inputs, out), on_progress=again.append) == table
    assert again == []
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_another_protocol_is_another_score(scored: Any, inputs: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(scored[0], tmp_path / "out"))
    again: list[Progress] = []
    pooled = model_job(inputs, out, protocol=ScoreProtocol(average="frames"))
    table = evaluate(pooled, on_progress=again.append)
    assert again == []  # both means are there: it is only another page
    assert (table.summaries, table.average) == (scored[1].summaries, "frames")
    assert table.settings_digest == scored[1].settings_digest
    protocol = ScoreProtocol(first_frame="in", quantise="truncate")
    table = evaluate(model_job(inputs, out, protocol=protocol), on_progress=again.append)
    assert len(again) == 3
    assert {(m.counts_first, m.quantise) for m in table.metrics} == {(True, "truncate")}
    rows = {(row.clip_id, row.metric, row.method): row for row in read_scores(out)}
    assert rows["test2", "l1", "model"].num_frames == 1  # a clip of one frame has a score now
    assert rows["test0", "l1", "copy"].num_frames == 11


def test_a_model_that_draws_no_numbers_is_told_of(inputs: Path) -> None:
    system = build_system(MODEL)
    for parameter in system.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    with pytest.raises(ItemError, match="no numbers"):
        list(reconstruct(Animator(system, device="cpu"), [some_frames(3)]))


def test_what_cannot_be_evaluated(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DatasetError, match="no finished dataset"):
        evaluate(model_job(inputs, out, data=str(tmp_path)))
    other = make_dataset(tmp_path / "large", side_px=48)
    with pytest.raises(CheckpointError) as caught:
        evaluate(model_job(inputs, out, data=str(other)))
    assert caught.value.code == "checkpoint_mismatch"
    records = Dataset.from_folder(inputs / "data").partition("train")
    (tmp_path / "train").mkdir()
    pq.write_table(to_table(records, ClipRecord), tmp_path / "train" / "manifest.parquet")
    (tmp_path / "train" / "stats.json").write_text('{"dataset_id": "x"}')
    with pytest.raises(DatasetError, match="no test clips"):
        evaluate(model_job(inputs, out, data=str(tmp_path / "train")))
    assert not out.exists()


def test_the_plan_is_counted(inputs: Path, tmp_path: Path) -> None:
    assert plan(model_job(inputs, tmp_path, max_clips=2, metrics=("l1", "ssim"))) == [
        "2 videos by l1, ssim"
    ]


# --- two folders -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated and true videos: equal, different, out of step, of another size, alone."""
    root = tmp_path_factory.mktemp("folders")
    for side in ("generated", "reference"):
        (root / side).mkdir()
    videos: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "different": (some_frames(9, seed=1), some_frames(9)),
        "longer": (some_frames(10), some_frames(9)),
        "larger": (some_frames(9, side_px=48), some_frames(9)),
    }
    for name, pair in videos.items():
        for side, frames in zip(("generated", "reference"), pair, strict=True):
            encode(root / side / f"{name}.mp4", frames, fps=25, crf=0)
    # lossless on both sides, and of two kinds
    stack = np.concatenate(list(some_frames(6)), axis=1)
    (root / "generated" / "equal.png").write_bytes(images.encode_png(stack))
    (root / "reference" / "equal").mkdir()
    for number, frame in enumerate(some_frames(6)):
        path = root / "reference" / "equal" / f"{number:03d}.png"
        path.write_bytes(images.encode_png(frame))
    encode(root / "generated" / "alone.mp4", some_frames(3), fps=25)
    encode(root / "reference" / "missing.mp4", some_frames(3), fps=25)
    return root


def test_folders_are_matched_by_name(ray_cluster: None, folders: Path, tmp_path: Path) -> None:
    job = job_of(
        tmp_path,
        generated=str(folders / "generated"),
        reference=str(folders / "reference"),
        max_failed_fraction=0.7,
    )
    table = evaluate(job)
    failures = from_table(pq.read_table(tmp_path / "failures.parquet"), Failure)
    assert {f.item: f.code for f in failures} == {
        "alone": "not_found",
        "missing": "not_found",
        "longer": "inconsistent_frames",
        "larger": "inconsistent_frames",
    }
    values = {(row.name, row.metric, row.method): row.value for row in read_scores(tmp_path)}
    assert values["equal", "l1_with_first", "model"] == 0
    assert values["equal", "ssim", "model"] == pytest.approx(1)
    assert values["equal", "l1", "copy"] > 0.01
    assert 0 < values["equal", "l1", "codec"] < 0.05
    expected = np.abs(some_frames(9, seed=1)[1:] / 255 - some_frames(9)[1:] / 255).mean()
    # x264 stores half the colour, even without loss
    assert values["different", "l1", "model"] == pytest.approx(expected, abs=0.02)
    assert (table.num_videos, table.weights_sha256, table.dataset_id) == (2, "", "")


@pytest.mark.parametrize("place", ["scores", "."])
def test_scores_may_lie_beside_the_videos_that_they_are_of(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_evaluation(monkeypatch)
    for side in ("made", "true"):
        (tmp_path / side).mkdir()
        encode(tmp_path / side / "a.mp4", some_frames(4), fps=25)
    job = job_of(
        tmp_path / "made" / place,
        generated=str(tmp_path / "made"),
        reference=str(tmp_path / "true"),
        metrics=("l1",),
    )
    first = evaluate(job)
    assert (tmp_path / "made" / place / "media").is_dir()
    assert (first.num_videos, first.num_failures) == (1, 0)
    assert evaluate(job) == first  # its previews are no videos to be scored


def test_frames_are_matched_by_number_whatever_the_rate(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.mp4" for name in ("slow", "fast", "true")]
    for path, fps, seed in zip(paths, (10, 50, 25), (1, 1, 0), strict=True):
        encode(path, some_frames(7, seed=seed), fps=fps, crf=0)
    settings = ScoreSettings.of(job_of(tmp_path, generated="a", reference="b"))
    slow, fast = (
        PairWorker(settings).process(
            ScoreItem(VideoPair("id", "n", str(path), str(paths[2])), preview=False, entry="e")
        )
        for path in paths[:2]
    )
    assert slow == fast
    assert set(slow.num_frames) == {6, 7}


def test_too_few_scores_fail_the_run(folders: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    encode(lonely / "other.mp4", some_frames(3), fps=25)
    job = job_of(tmp_path / "out", generated=str(lonely), reference=str(folders / "reference"))
    with pytest.raises(RunFailed) as caught:
        evaluate(job)
    assert caught.value.code == "too_many_failures"
    with pytest.raises(ConfigError) as empty:
        evaluate(job.model_copy(update={"generated": str(tmp_path / "nothing")}))
    assert empty.value.code == "nothing_to_do"


@pytest.mark.parametrize(
    ("name", "code"), [("longer", "inconsistent_frames"), ("larger", "inconsistent_frames")]
)
def test_videos_out_of_step_are_refused(
    folders: Path, tmp_path: Path, name: str, code: str
) -> None:
    settings = ScoreSettings.of(job_of(tmp_path, generated="a", reference="b"))
    uris = [str(folders / side / f"{name}.mp4") for side in ("generated", "reference")]
    with pytest.raises(MediaError) as caught:
        PairWorker(settings).process(
            ScoreItem(VideoPair("id", name, *uris), preview=True, entry="e")
        )
    assert caught.value.code == code
    with pytest.raises(MediaError) as swapped:
        PairWorker(settings).process(
            ScoreItem(VideoPair("id", name, *uris[::-1]), preview=True, entry="e")
        )
    assert swapped.value.code == code
    assert list(tmp_path.iterdir()) == []

"""The training job: what it leaves, going on after a kill, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from kpmask import checkpoint
from kpmask.config import TrainJob, resolve_job, validated
from kpmask.data.shards import ShardWriter
from kpmask.errors import ConfigError, DatasetError, RunFailed
from kpmask.records import ClipRecord, DatasetManifest, Progress, StepMetrics, ValidationScore
from kpmask.train import Worker
from kpmask.validation import Validation
from tasks import outbox, train_folder
from tasks import train as driver
from tasks.manifest import read_table, write_json, write_table
from tasks.report import rebuild_page
from tasks.storage import ObjectStore, open_store
from tasks.train import plan, train, train_here
from tasks.train_worker import samplers
from tests.support.flaky import flaky_proxy
from tests.support.pages import Page
from tests.support.weed import Weed

SIDE_PX = 32
NUM_STEPS = 16  # of the debug preset's two phases


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def frame(number: int, index: int, side_px: int) -> bytes:
    """A square that moves to the right over a plain background."""
    image = np.full((side_px, side_px, 3), 50 * number, np.uint8)
    image[4 + number : 14 + number, 2 + 2 * index : 10 + 2 * index] = (220, 60, 30 * number)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def make_dataset(
    root: Path,
    *,
    num_train: int = 4,
    num_test: int = 2,
    num_frames: int = 6,
    side_px: int = SIDE_PX,
) -> str:
    records = []
    for partition, count in (("train", num_train), ("test", num_test)):
        shard = f"{partition}/shard-00000.arrow"
        with ShardWriter(root / shard) as writer:
            for number in range(count):
                name = f"{partition}{number}"
                row = writer.add(name, 25.0, [frame(number, i, side_px) for i in range(num_frames)])
                records.append(
                    ClipRecord(
                        clip_id=name,
                        name=name,
                        partition=partition,
                        identity=name,
                        video_id=name,
                        shard=shard,
                        row=row,
                        num_frames=num_frames,
                        fps=25.0,
                        width_px=side_px,
                        height_px=side_px,
                        start_s=0.0,
                        end_s=0.24,
                        crop_px=(0, 0, side_px, side_px),
                        clamped=False,
                        num_frames_lost=0,
                        sha256="0" * 64,
                    )
                )
    store = open_store(str(root))
    write_table(store, "manifest.parquet", records, ClipRecord)
    stats = DatasetManifest(
        str(root), "d" * 64, "s" * 64, num_train, num_test, num_frames * len(records), 0
    )
    write_json(store, "stats.json", stats)
    return str(root)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


def job(data: str, out: Path | str, **overrides: Any) -> TrainJob:
    settings = {"phases.0.ema_decay": 0.9, "phases.1.accumulate": 2, **overrides}
    texts = [f"{key}={value}" for key, value in settings.items()]
    flags = {"data": data, "out": str(out)}
    return resolve_job(TrainJob, preset="debug", overrides=texts, flags=flags)


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed; not to be changed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_here(job(data, out))
    torch.set_num_threads(threads)
    return out


def losses(out: Path) -> list[tuple[str, int, float, tuple[float, ...]]]:
    return losses_in(open_store(str(out)))


def losses_in(store: ObjectStore) -> list[tuple[str, int, float, tuple[float, ...]]]:
    rows = read_table(store, "metrics.parquet", StepMetrics)
    return [(m.phase, m.step, m.loss, m.term_values) for m in rows]


def scores(out: Path) -> list[ValidationScore]:
    return read_table(open_store(str(out)), "validation.parquet", ValidationScore)


def tree(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def assert_same_run(out: Path, whole: Path) -> None:
    """Equal losses, scores, weights and samples, to the last bit."""
    assert losses(out) == losses(whole)
    assert scores(out) == scores(whole)
    assert tree(out) == tree(whole)
    for name in tree(whole):
        if name.endswith((".safetensors", ".png", "run.json")):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name
        elif name.endswith("state.pt"):
            one, other = (torch.load(root / name, weights_only=True) for root in (out, whole))
            assert one.pop("precision") == other.pop("precision")
            torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- what a run leaves -----------------------------------------------------------------------


def test_what_a_run_leaves(finished: Path, data: str) -> None:
    steps = [(phase, step) for phase in ("fomm", "keypoint-mask") for step in range(1, 9)]
    assert [row[:2] for row in losses(finished)] == steps
    metrics = read_table(open_store(str(finished)), "metrics.parquet", StepMetrics)
    assert metrics[3].epoch == 4 * 4 / (4 * 8)  # 4 steps of 4 pairs; 4 identities 8 times
    rates = [m.learning_rate for m in metrics[:8]]
    assert rates == pytest.approx([2e-4] * 4 + [2e-5] * 3 + [2e-6])
    assert sum(metrics[0].term_values) == pytest.approx(metrics[0].loss)
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["num_steps"] == NUM_STEPS
    assert manifest["perceptual"] == "efficientnet-lite0"
    assert manifest["dataset_id"] == "d" * 64
    loaded = checkpoint.load(finished / "weights.safetensors", system="keypoint-mask")
    assert loaded.sha256 == manifest["weights_sha256"]
    assert loaded.info["perceptual"] == "efficientnet-lite0"
    assert [p["steps"] for p in loaded.info["phases"]] == [8, 8]
    first = checkpoint.load(finished / "phases" / "fomm.safetensors", system="fomm")
    before = first.system.get_submodule("detector").state_dict()
    after = loaded.system.get_submodule("detector").state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = validated(TrainJob, tomllib.loads((finished / "config.toml").read_text())["train"])
    assert again == job(data, finished)


def test_scores_on_test_clips_while_training(finished: Path, data: str) -> None:
    rows = scores(finished)
    metrics = {f"{copy}{name}" for copy in ("", "copy_") for name in ("l1", "l1_moving", "ssim")}
    assert {row.metric for row in rows} == metrics
    steps = dict.fromkeys((row.phase, row.step) for row in rows)
    assert list(steps) == [("fomm", 4), ("fomm", 8), ("keypoint-mask", 4), ("keypoint-mask", 8)]
    assert {row.num_clips for row in rows} == {2}
    # They are the evaluation's scores, here of the weights that were published.
    loaded = checkpoint.load(finished / "weights.safetensors")
    opened = train_folder.open_data(job(data, finished))
    validation = Validation(opened.dataset.read, opened.test, device="cpu")
    again = validation.scores(loaded.system, phase="keypoint-mask", step=8)
    assert [(r.metric, pytest.approx(r.value, abs=1e-6)) for r in again] == [
        (r.metric, r.value) for r in rows[-len(again) :]
    ]
    page = (finished / "index.html").read_text()
    assert "Scores on test clips" in page
    assert "L1 on moving pixels" in page


def test_scores_of_the_average_and_at_their_own_rhythm(data: str, tmp_path: Path) -> None:
    train_here(job(data, tmp_path, **{"validate_every_steps": 3, "phases.0.max_steps": 7}))
    steps = dict.fromkeys((row.phase, row.step) for row in scores(tmp_path))
    assert [step for phase, step in steps if phase == "fomm"] == [3, 6, 7]


def test_without_test_clips_there_are_no_scores(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", num_test=0)
    train_here(job(data, tmp_path / "out"))
    assert "validation.parquet" not in tree(tmp_path / "out")
    assert "Scores on test clips" not in (tmp_path / "out" / "index.html").read_text()
    assert "samples/fomm-step-000008.png" in tree(tmp_path / "out")


def test_clips_of_one_frame(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", num_frames=1)
    train_here(job(data, tmp_path / "out"))
    assert np.isfinite([row[2] for row in losses(tmp_path / "out")]).all()
    assert "validation.parquet" not in tree(tmp_path / "out")


def test_fewer_clips_than_workers(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", num_train=1)
    wanted = job(data, tmp_path / "out", num_workers=2)
    opened = train_folder.open_data(wanted)
    shares = [samplers(wanted, opened, Worker(rank=rank, count=2))[0].batch(0) for rank in (0, 1)]
    together = samplers(wanted, opened, Worker())[0].batch(0)
    assert [*shares[0], *shares[1]] == together
    assert len(shares[0]) == 2


def test_pictures_of_a_run(finished: Path) -> None:
    with Image.open(finished / "samples" / "keypoint-mask-step-000008.png") as strip:
        # Five pairs; source, driving, two masks, prediction; tiles of at least 128 px.
        assert strip.size == (5 * 128, 5 * 128)
        tiles = np.asarray(strip).reshape(5, 128, 5, 128, 3).swapaxes(1, 2)
    assert (tiles[:3, 0] != tiles[:3, 1]).any(axis=(1, 2, 3)).all()  # another frame
    assert (tiles[:, 2:4, ..., 0] == tiles[:, 2:4, ..., 1]).all()  # masks are gray
    assert (finished / "loss.svg").read_text().startswith("<svg")
    page = (finished / "index.html").read_text()
    assert "samples/keypoint-mask-step-000008.png" in page
    assert "efficientnet-lite0" in page
    assert "model.safetensors" in page and "checkpoint to go on from" in page


def test_a_page_that_is_made_again_is_the_same(finished: Path) -> None:
    before = (finished / "index.html").read_text()
    assert "Scores on test clips" in before
    rebuild_page(str(finished))
    again = (finished / "index.html").read_text()
    assert again == before


def test_only_the_two_newest_checkpoints_are_kept(finished: Path) -> None:
    names = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert names == ["keypoint-mask-step-000004", "keypoint-mask-step-000008"]


def test_a_finished_run_returns_at_once(finished: Path, data: str) -> None:
    before = {p: (finished / p).stat().st_mtime_ns for p in tree(finished)}
    manifest = train(job(data, finished))
    assert manifest.num_steps == NUM_STEPS
    assert {p: (finished / p).stat().st_mtime_ns for p in tree(finished)} == before


def test_progress_counts_all_steps(data: str, tmp_path: Path) -> None:
    seen: list[Progress] = []
    train_here(job(data, tmp_path), on_progress=seen.append)
    assert seen[-1].done == seen[-1].total == NUM_STEPS
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    for part in ("keypoint-mask 8/8", "loss ", "samples/s", "0:00 left"):
        assert part in seen[-1].message


def test_the_plan_writes_nothing(data: str, tmp_path: Path) -> None:
    lines = plan(job(data, tmp_path / "out"))
    assert lines[0] == "phase fomm (fomm): 8 steps of 4 pairs from 4 identities"
    assert not (tmp_path / "out").exists()


# --- going on --------------------------------------------------------------------------------

KILLED = """
    import os, signal, sys, torch
    torch.set_num_threads(1)
    from kpmask import train as trainer_module
    from kpmask.config import TrainJob
    from tasks.train import train_here

    job, deadly = TrainJob.model_validate_json(sys.argv[1]), int(sys.argv[2])
    count = 0
    step = trainer_module.Trainer.step

    def counted(self, batch):
        global count
        if count == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return step(self, batch)

    trainer_module.Trainer.step = counted
    train_here(job)
"""


def _killed_at(wanted: TrainJob, deadly_step: int) -> None:
    script = textwrap.dedent(KILLED)
    command = [sys.executable, "-c", script, wanted.model_dump_json(), str(deadly_step)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.mark.parametrize("deadly_step", [3, 6, 8, 14])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    deadly_step: int, data: str, finished: Path, tmp_path: Path
) -> None:
    wanted = job(data, tmp_path / "out")
    _killed_at(wanted, deadly_step)
    assert not (tmp_path / "out" / "manifest.json").exists()
    seen: list[Progress] = []
    train_here(wanted, on_progress=seen.append)
    assert_same_run(tmp_path / "out", finished)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _unfinished(path: Path) -> None:
    (path.parent / "checkpoint.json").unlink()


@pytest.mark.parametrize("damage", [_cut, Path.unlink, _unfinished])
def test_a_damaged_checkpoint_costs_only_its_steps(
    damage: Callable[[Path], object], data: str, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "manifest.json").unlink()
    damage(out / "checkpoints" / "keypoint-mask-step-000008" / "model.safetensors")
    train_here(job(data, out))
    assert_same_run(out, finished)


def test_another_place_and_another_rhythm_change_nothing(
    data: str, finished: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(data, tmp_path / "elsewhere")
    out = tmp_path / "out"
    train_here(job(str(moved), out, checkpoint_every_steps=3))
    assert losses(out) == losses(finished)
    name = "weights.safetensors"
    assert (out / name).read_bytes() == (finished / name).read_bytes()


# --- a store that is gone --------------------------------------------------------------------


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(outbox, "LONGEST_PAUSE_S", 0.2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.mark.usefixtures("short_pauses")
def test_a_store_that_refuses_checkpoints_for_a_while(
    data: str, finished: Path, s3: str, s3_server: Weed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flaky_proxy(s3_server.endpoint) as proxy:
        proxy.faults = ["503", "reset", "503", "503", "lost-answer", "503"]
        proxy.matches = lambda method, path: method == "PUT" and "/checkpoints/" in path
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        train_here(job(data, f"{s3}/run"))
        assert not proxy.faults
        assert_same_weights(f"{s3}/run", finished)


@pytest.mark.usefixtures("short_pauses")
def test_a_store_that_dies_and_comes_back_while_training(
    data: str, finished: Path, s3: str, s3_server: Weed
) -> None:
    back: list[threading.Thread] = []

    def crash(progress: Progress) -> None:
        if not back:
            s3_server.kill()
            back.append(threading.Timer(1.0, s3_server.start))
            back[0].start()

    train_here(job(data, f"{s3}/run"), on_progress=crash)
    back[0].join()
    assert_same_weights(f"{s3}/run", finished)


def assert_same_weights(uri: str, finished: Path) -> None:
    store = open_store(uri)
    assert store.get("weights.safetensors") == (finished / "weights.safetensors").read_bytes()
    for name in ("metrics.parquet", "validation.parquet"):
        assert store.exists(name)
    assert losses_in(store) == losses(finished)
    names = {info.key for info in store.list("samples/")}
    assert names == {f"samples/{p.name}" for p in (finished / "samples").iterdir()}


# --- TensorBoard -----------------------------------------------------------------------------


def events(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Every series of the run's event file, by tag."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard here"
    )
    found = accumulator.EventAccumulator(str(out / "tensorboard"), {"scalars": 0})
    found.Reload()
    tags = found.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_events_hold_every_step_once_after_a_kill(
    data: str, finished: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="no tensorboard here")
    wanted = job(data, tmp_path / "out", tensorboard="true")
    _killed_at(wanted, 14)
    train_here(wanted)
    found = events(tmp_path / "out")
    for phase, start in (("fomm", 0), ("keypoint-mask", 8)):
        rows = [row for row in losses(finished) if row[0] == phase]
        assert found[f"{phase}/loss/total"] == [
            (start + step, pytest.approx(loss, rel=1e-6)) for _, step, loss, _ in rows
        ]
        moving = [r for r in scores(finished) if (r.phase, r.metric) == (phase, "l1_moving")]
        assert found[f"{phase}/validation/l1_moving"] == [
            (start + row.step, pytest.approx(row.value, rel=1e-6)) for row in moving
        ]
    assert "fomm/loss/equivariance_value" in found
    assert "fomm/training/learning_rate" in found


def test_events_without_tensorboard_are_refused_before_anything_starts(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="TensorBoard is not installed") as error:
        train(job(data, tmp_path / "out", tensorboard="true"))
    assert "kpmask[tensorboard]" in error.value.hint
    assert not (tmp_path / "out").exists()


# --- what is refused -------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(data: str, finished: Path) -> None:
    other = job(data, finished, **{"phases.fomm.learning_rate": 0.5, "seed": 3})
    with pytest.raises(ConfigError) as error:
        train(other)
    assert "phases.fomm.learning_rate was 0.0002, is 0.5" in str(error.value)
    assert "seed was 0, is 3" in str(error.value)
    assert "--no-resume" in error.value.hint


def test_another_dataset_is_refused(finished: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "data")
    stats = Path(other) / "stats.json"
    stats.write_text(stats.read_text().replace("d" * 64, "e" * 64))
    with pytest.raises(ConfigError, match=r"dataset_id was 'ddd.* is 'eee"):
        train(job(other, finished))


def test_no_resume_starts_over(data: str, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "mine.txt").write_text("not of the run")
    short = {"phases.0.max_steps": 2, "phases.1.max_steps": 2, "resume": "false"}
    manifest = train_here(job(data, out, **short))
    assert manifest.num_steps == 4
    assert [row[1] for row in losses(out)] == [1, 2, 1, 2]
    names = {p.name for p in (out / "samples").iterdir()}
    assert "fomm-step-000008.png" not in names
    assert (out / "mine.txt").exists()


@pytest.mark.parametrize(
    ("shape", "overrides", "code", "text"),
    [
        ({"num_train": 0}, {}, "dataset_too_small", "no training clips"),
        ({"num_train": 1}, {"num_repeats": 3}, "dataset_too_small", "1 training identities"),
        ({"side_px": 48}, {}, "dataset_invalid", "48x48 px, and the model takes 32x32 px"),
    ],
)
def test_a_dataset_that_cannot_be_trained_on(
    shape: dict[str, int], overrides: dict[str, Any], code: str, text: str, tmp_path: Path
) -> None:
    data = make_dataset(tmp_path / "data", **shape)
    with pytest.raises(DatasetError, match=text) as error:
        train(job(data, tmp_path / "out", **overrides))
    assert error.value.code == code
    assert not (tmp_path / "out").exists()


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        train(job(str(tmp_path / "nothing"), tmp_path / "out"))
    assert "kpmask preprocess" in error.value.hint


def test_a_loss_that_is_not_finite_ends_the_run(data: str, tmp_path: Path) -> None:
    wild = job(data, tmp_path, **{"phases.0.learning_rate": 1e30, "checkpoint_every_steps": 1})
    with pytest.raises(RunFailed, match=r"phase 'fomm', step \d") as error:
        train_here(wild)
    assert error.value.code == "training_failed"
    picture, kept = sorted((tmp_path / "failed").iterdir())
    assert f"kept in failed/{kept.name}" in str(error.value)
    batch = safetensors.torch.load_file(kept)
    assert batch["source_BCHW"].shape == (4, 3, SIDE_PX, SIDE_PX)
    with Image.open(picture) as strip:
        assert strip.size == (2 * 128, 4 * 128)
    assert (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "manifest.json").exists()
    page = Page((tmp_path / "index.html").read_text())
    assert f"failed/{picture.name}" in [image["src"] for image in page.of("img")]
    assert "This run stopped" in page.text and "stopped here" in page.text


# --- Ray -------------------------------------------------------------------------------------

DRIVER = """
    import sys
    from kpmask.config import TrainJob
    from tasks.train import train

    def show(progress):
        print("progress", progress.done, progress.message, flush=True)

    try:
        print(train(TrainJob.model_validate_json(sys.argv[1]), on_progress=show))
    except KeyboardInterrupt:
        sys.exit(130)
"""


def _driver(wanted: TrainJob) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), wanted.model_dump_json()]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def _interrupted(wanted: TrainJob) -> None:
    """Start a training and press Ctrl-C, which every process of it hears, as soon as it trains."""
    driver = _driver(wanted)
    assert driver.stdout is not None
    seen = []
    for line in driver.stdout:
        seen.append(line)
        if line.startswith("progress"):
            os.killpg(driver.pid, signal.SIGINT)
            break
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130, "".join([*seen, output])


def _training_pids() -> list[int]:
    """The processes of Ray Train's workers on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if path.read_bytes().startswith(b"ray::RayTrainWorker"):
                found.append(int(path.parent.name))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_a_run_goes_on_exactly_after_ctrl_c_and_after_a_worker_was_killed(tmp_path: Path) -> None:
    """Two workers and a single clip: fewer clips than workers."""
    data = make_dataset(tmp_path / "data", num_train=1)
    steps = {"phases.0.max_steps": 100, "phases.1.max_steps": 8, "num_repeats": 40}
    rhythm = {"checkpoint_every_steps": 10, "validate_every_steps": 20, "sample_every_steps": 500}
    settings = {"num_workers": 2, **steps, **rhythm}
    out = tmp_path / "disturbed"
    _interrupted(job(data, out, **settings | {"checkpoint_every_steps": 200}))
    (left,) = (out / "checkpoints").iterdir()
    stopped_at = json.loads((left / "checkpoint.json").read_text())["step"]
    assert 0 < stopped_at < 100
    before = losses(out)
    assert len(before) == stopped_at
    seen: list[Progress] = []
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        seen.append(progress)
        if not killed and progress.done > stopped_at + 10:  # of which there is a checkpoint
            killed.append(_training_pids()[-1])
            os.kill(killed[0], signal.SIGKILL)

    manifest = train(job(data, out, **settings), on_progress=kill)
    assert killed
    assert seen[0].done > stopped_at
    assert manifest.num_steps == seen[-1].done == seen[-1].total == 108
    rows = losses(out)
    assert rows[:stopped_at] == before
    assert [row[1] for row in rows] == [*range(1, 101), *range(1, 9)]
    assert np.mean([row[2] for row in rows[90:100]]) < np.mean([row[2] for row in rows[:10]])
    train(job(data, tmp_path / "whole", **settings))
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_a_run_goes_on_with_the_workers_that_can_be_had(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine is gone together with its worker: from then on Ray has one CPU less."""
    there = {"CPU": 2.0}
    monkeypatch.setattr(driver, "_resources", lambda: dict(there))
    monkeypatch.setattr(driver, "LOSS_PATIENCE_S", 1.0)

    def lose(progress: Progress) -> None:
        if there["CPU"] == 2 and progress.done > 15:
            there["CPU"] = 1.0
            os.kill(_training_pids()[-1], signal.SIGKILL)

    settings = {"phases.0.max_steps": 80, "phases.1.max_steps": 8, "min_workers": 1}
    wanted = job(data, tmp_path, num_workers=2, checkpoint_every_steps=10, **settings)
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.log, "warning", lambda text, *values: seen.append(text % values))
        train(wanted, on_progress=lose)
    assert there["CPU"] == 1
    assert ["1 of 2" in text for text in seen] == [True]
    rows = losses(tmp_path)
    assert [row[1] for row in rows] == [*range(1, 81), *range(1, 9)]
    with pytest.raises(ConfigError, match="min_workers 3 is more than num_workers 2"):
        job(data, tmp_path, num_workers=2, min_workers=3)


@pytest.mark.parametrize(
    ("batch_size", "least", "there", "wanted"),
    [(12, 1, 4, 4), (12, 1, 3, 3), (20, 1, 3, 2), (12, 2, 2, 2)],
)
def test_the_number_of_workers_to_go_on_with(
    batch_size: int, least: int, there: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LOSS_PATIENCE_S", 0.0)
    monkeypatch.setattr(driver, "POLL_S", 0.01)
    room = [0.0, there * 2.0]  # none at first: it is waited for
    monkeypatch.setattr(driver, "_resources", lambda: {"CPU": room.pop(0) if room[1:] else room[0]})
    sizes = {f"phases.{i}.batch_size": batch_size for i in range(2)}
    asked = job(
        "data", "out", num_workers=4, min_workers=least, **sizes, **{"phases.1.accumulate": 1}
    )
    assert driver._count_to_be_had(asked, threads=2) == wanted


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_errors_come_back_from_ray_as_they_were_raised(data: str, tmp_path: Path) -> None:
    many = {"num_workers": 3, "phases.0.batch_size": 6, "phases.1.batch_size": 6}
    with pytest.raises(ConfigError, match="3 workers need 3 CPUs, and Ray has 2"):
        train(job(data, tmp_path / "many", **many))
    with pytest.raises(RunFailed, match="phase 'fomm', step") as error:
        train(job(data, tmp_path / "wild", **{"phases.0.learning_rate": 1e30}))
    assert error.value.code == "training_failed"


def test_a_run_in_an_object_store(data: str, finished: Path, s3: str) -> None:
    wanted = job(data, f"{s3}/run")
    train_here(wanted)
    store = open_store(wanted.out)
    assert [info.key for info in store.list()] == tree(finished)
    assert store.get("weights.safetensors") == (finished / "weights.safetensors").read_bytes()
    assert train(wanted).weights_sha256 == train_here(wanted).weights_sha256

"""Other identities' motion and held-out frames, end to end: against slow loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from kpmask import Animator
from kpmask.animate import to_tensor
from kpmask.config import ScoreSetting
from kpmask.data.dataset import Dataset
from kpmask.errors import ConfigError, DatasetError
from kpmask.metrics.identity import csim
from kpmask.metrics.motion import akd_motion
from kpmask.metrics.ssim import ssim
from kpmask.records import FrameScores, from_table
from tasks.evaluate import plan
from tests.support import estimators
from tests.support.evaluations import (
    MODEL,
    failures_of,
    make_dataset,
    model_job,
    scored,
    write_weights,
)
from tests.support.inline import inline_evaluation

CIRCLES = MODEL.model_copy(update={"mask": "circles"})
LENGTHS = {"test": (11, 5, 6, 1, 9), "train": (4,)}
IDENTITIES = {"test0": "ann", "test1": "bob", "test2": "ann", "test3": "eve", "test4": "ann"}
OF_FACES = ("csim_source_sface", "akd_motion_facemesh", "akd_facemesh", "mkr_facemesh")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_weights(folder / "w.safetensors", CIRCLES)
    write_weights(folder / "heatmap.safetensors", MODEL)
    make_dataset(folder / "data", lengths=LENGTHS, identities=IDENTITIES)
    return folder


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in this process, with estimators that need no weights."""
    inline_evaluation(monkeypatch)
    estimators.use(monkeypatch)


def clips(inputs: Path) -> tuple[Dataset, dict[str, Any]]:
    dataset = Dataset.from_folder(inputs / "data")
    return dataset, {record.clip_id: record for record in dataset.partition("test")}


# --- another identity's motion ---------------------------------------------------------------


@pytest.mark.parametrize("motion", ["absolute", "relative"])
def test_cross_scores_are_those_of_animated_videos(
    inputs: Path, tmp_path: Path, motion: Any
) -> None:
    setting = ScoreSetting(kind="cross", motion=motion, num_pairs=4)
    job = model_job(inputs, tmp_path, setting=setting, metrics=OF_FACES, batch_size=3)
    table, rows = scored(job)
    assert (table.setting, table.motion, table.num_videos) == ("cross", motion, 4)
    names = sorted({name for name, _, _ in rows})
    assert len(names) == 3  # of a video of one frame, which is left out, there is nothing to say
    dataset, records = clips(inputs)
    animator = Animator.load(inputs / "w.safetensors", device="cpu", precision="plain")
    points, colour = estimators.Centroids(), estimators.Colour()
    for name in names:
        source_id, driving_id = (text.split()[-1] for text in name.split(" by "))
        assert IDENTITIES[source_id] != IDENTITIES[driving_id]
        source = dataset.read(records[source_id])[0]
        driving = dataset.read(records[driving_id])
        drawn = animator.animate(source, driving, motion=motion, batch_size=64)
        frozen = np.stack([source] * len(driving))
        for method, frames in (("model", drawn), ("copy", frozen), ("driving", driving)):
            expected = {
                "csim_source_sface": csim(
                    colour.estimate(np.stack([source] * len(frames))), colour.estimate(frames)
                ),
                "akd_motion_facemesh": akd_motion(
                    points.estimate(driving).points_TK2,
                    points.estimate(frames).points_TK2,
                    points.estimate(source[None]).points_TK2[0],
                    most_px=(31, 31),
                ),
            }
            for metric, values in expected.items():
                row = rows[name, metric, method]
                assert row.value == pytest.approx(np.nanmean(values[1:]), abs=2e-3)
                assert row.num_frames == len(driving) - 1
    assert {method for _, _, method in rows} == {"model", "copy", "driving"}
    # coverages come along
    assert {"coverage_facemesh", "coverage_source_sface"} <= {info.name for info in table.metrics}
    assert "copy of the source" in (tmp_path / "index.html").read_text()


def test_the_motion_of_the_driving_video_itself_is_right_but_for_its_size(
    inputs: Path, tmp_path: Path
) -> None:
    setting = ScoreSetting(kind="cross", num_pairs=4)
    _, rows = scored(model_job(inputs, tmp_path, setting=setting, metrics=OF_FACES))
    driving = [
        r.value for (_, m, method), r in rows.items() if (m, method) == (OF_FACES[2], "driving")
    ]
    assert driving and max(driving) == 0  # akd: the driving points themselves
    own = [r.value for (_, m, method), r in rows.items() if (m, method) == (OF_FACES[0], "copy")]
    assert min(own) == pytest.approx(1)  # the source's face is the source's


def test_pairs_come_from_a_table_and_bad_rows_are_failures(inputs: Path, tmp_path: Path) -> None:
    table_file = tmp_path / "pairs.csv"
    table_file.write_text(
        "source,driving\ntest0,name of test1\nname of test1,test2\ntest0,test2\nnobody,test1\n"
    )
    setting = ScoreSetting(kind="cross", pairs=str(table_file))
    job = model_job(inputs, tmp_path / "out", setting=setting, metrics=("akd_facemesh",))
    assert plan(job) == [
        "2 pairs of two identities by akd_facemesh, coverage_facemesh",
        "cannot be done: line 4: bad_row: source and driving are both of 'ann'",
        "cannot be done: line 5: bad_row: source: no clip is called 'nobody' in this split",
    ]
    table, rows = scored(job)
    assert {name for name, _, _ in rows} == {
        "name of test0 by name of test1",
        "name of test1 by name of test2",
    }
    assert (table.num_videos, table.num_failures) == (2, 2)
    assert failures_of(tmp_path / "out")["line 5"][0] == "bad_row"
    table_file.write_text("source,driving\nnobody,test1\n")
    with pytest.raises(ConfigError, match="it has no pair; line 2: source: no clip is called"):
        plan(job)
    for wrong in (tmp_path / "none.csv", inputs / "w.safetensors"):
        setting = ScoreSetting(kind="cross", pairs=str(wrong))
        with pytest.raises(ConfigError):
            plan(job.model_copy(update={"setting": setting}))


def test_another_motion_is_another_score(inputs: Path, tmp_path: Path) -> None:
    found = []
    for motion in ("absolute", "relative", "relative"):
        setting = ScoreSetting(kind="cross", motion=motion, num_pairs=3)
        job = model_job(inputs, tmp_path, setting=setting, metrics=("akd_facemesh",))
        found.append(scored(job))  # in one place, one after the other
    (absolute, first), (relative, second), (again, third) = found
    assert absolute.settings_digest != relative.settings_digest == again.settings_digest
    model = [key for key in first if key[2] == "model" and key[1] == "akd_facemesh"]
    assert [first[key].value for key in model] != [second[key].value for key in model]
    assert second == third


def test_what_cannot_be_had_is_refused_at_once(inputs: Path, tmp_path: Path) -> None:
    relative = ScoreSetting(kind="cross", motion="relative")
    heatmap = str(inputs / "heatmap.safetensors")
    with pytest.raises(ConfigError, match="supports absolute, not 'relative'"):
        plan(model_job(inputs, tmp_path, checkpoint=heatmap, setting=relative, metrics=OF_FACES))
    with pytest.raises(ConfigError, match=r"l1.*there are .*akd_motion_ESTIMATOR") as unnamed:
        plan(model_job(inputs, tmp_path, setting=relative))  # nobody named metrics
    assert "--metrics csim_source_sface" in unnamed.value.hint
    alone = make_dataset(
        tmp_path / "alone", identities=dict.fromkeys(("test0", "test1", "test2"), "x")
    )
    job = model_job(inputs, tmp_path / "out", data=str(alone), setting=relative, metrics=OF_FACES)
    with pytest.raises(DatasetError, match="all of one identity"):
        plan(job)
    assert not (tmp_path / "out").exists()


# --- held-out frames -------------------------------------------------------------------------


def test_few_shot_scores_are_those_of_the_held_out_frames(inputs: Path, tmp_path: Path) -> None:
    setting = ScoreSetting(kind="few_shot", num_frames=6)
    metrics = ("l1", "ssim", "csim_truth_sface")
    job = model_job(inputs, tmp_path, setting=setting, metrics=metrics, batch_size=2)
    table, rows = scored(job)
    dataset, records = clips(inputs)
    # ann's first clip gives the source; of the 6 + 9 frames of her others, 6 that are spread
    places = [("test2", n) for n in range(6)] + [("test4", n) for n in range(9)]
    held = {
        "ann": ("test0", [places[(2 * k + 1) * 15 // 12] for k in range(6)]),
        "bob": ("test1", [("test1", 3), ("test1", 4)]),  # a single clip: its second half
    }
    animator = Animator.load(inputs / "w.safetensors", device="cpu", precision="plain")
    for name, (source_id, frames) in held.items():
        source = dataset.read(records[source_id])[0]
        true = np.stack([dataset.read(records[clip_id])[n] for clip_id, n in frames])
        with torch.inference_mode():
            state = animator.encode_source(source)
            drawn = animator.render(state, animator.encode_driving(true))
        row = rows[name, "l1", "model"]
        difference = drawn.permute(0, 2, 3, 1).numpy() - true / 255.0
        assert row.value == pytest.approx(np.abs(difference).mean(), abs=2e-6)
        assert row.num_frames == len(frames)
        similar = ssim(drawn.double(), to_tensor(true).double()).mean()
        assert rows[name, "ssim", "model"].value == pytest.approx(float(similar), abs=1e-6)
        frozen = np.abs(source / 255.0 - true / 255.0).mean()
        assert rows[name, "l1", "copy"].value == pytest.approx(frozen, abs=2e-6)
    assert {name for name, _, _ in rows} == {"ann", "bob"}
    assert {method for _, _, method in rows} == {"model", "copy"}
    assert table.setting == "few_shot"
    assert {info.counts_first for info in table.metrics} == {True}
    assert failures_of(tmp_path) == {
        "eve": ("too_short", "there is a single frame, and none is held out")
    }
    curves = from_table(pq.read_table(tmp_path / "frames.parquet"), FrameScores)
    assert {(c.name, len(c.values)) for c in curves} == {("ann", 6), ("bob", 2)}


def test_few_shot_has_nothing_over_time(inputs: Path, tmp_path: Path) -> None:
    setting = ScoreSetting(kind="few_shot")
    with pytest.raises(
        ConfigError, match=r"^metrics: l1_with_first, temporal_error, flicker"
    ) as no:
        plan(model_job(inputs, tmp_path, setting=setting))
    assert "--metrics ssim" in no.value.hint
    lines = plan(model_job(inputs, tmp_path, setting=setting, metrics=("ssim",)))
    assert lines[0] == ("2 people's held-out frames, with none to fine-tune on (#FT = 0), by ssim")

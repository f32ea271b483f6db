"""Comparisons: budgets, pairs, margins, strips and the page, against hand computation."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kpmask.compare import (
    comparison_rows,
    planned_lengths,
    split_steps,
    steps_within,
    training_seconds,
    with_budget,
)
from kpmask.compare_pictures import MIN_TILE_PX, StripRow, moving_strip, still_strip
from kpmask.config import CompareJob, TrainJob, compared_systems, preset_names, resolve_job
from kpmask.data.dataset import with_holdout
from kpmask.errors import ConfigError
from kpmask.records import (
    ClipRecord,
    ComparedRow,
    ComparedRun,
    ComparedScore,
    ComparedValue,
    Comparison,
    MetricInfo,
    StepMetrics,
)
from kpmask.report import Curve, Strip, comparison_curves_svg, comparison_page
from kpmask.report import comparison as comparison_module
from kpmask.report.comparison import comparison_tables, loss_course

PAIRS_PER_EPOCH = 32


def train_job(system: str = "heatmap", **overrides: Any) -> TrainJob:
    texts = [f"{key}={value}" for key, value in overrides.items()]
    flags = {"data": "d", "out": "o"}
    return resolve_job(TrainJob, preset="debug", overrides=texts, flags=flags, systems=[system])


def compare_job(*systems: str, **flags: Any) -> CompareJob:
    flags = {"data": "d", "out": "o", **flags}
    return resolve_job(CompareJob, preset="debug", flags=flags, systems=systems or ["fomm"])


def clip(name: str, identity: str, partition: Any = "train") -> ClipRecord:
    return ClipRecord(
        clip_id=name,
        name=f"name of {name}",
        partition=partition,
        identity=identity,
        video_id=name,
        shard="train/shard.arrow",
        row=0,
        num_frames=5,
        fps=25.0,
        width_px=32,
        height_px=32,
        start_s=0.0,
        end_s=0.2,
        crop_px=(0, 0, 32, 32),
        clamped=False,
        num_frames_lost=0,
        sha256="0" * 64,
    )


# --- budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "steps", "wanted"),
    [
        ((1500, 3500), 500, (150, 350)),
        ((1500, 3500), 5000, (1500, 3500)),
        ((8, 8), 5, (3, 2)),
        ((1, 999), 10, (1, 9)),
        ((1, 999), 2, (1, 1)),
        ((5,), 7, (7,)),
    ],
)
def test_steps_are_split_in_proportion(
    lengths: tuple[int, ...], steps: int, wanted: tuple[int, ...]
) -> None:
    assert split_steps(lengths, steps) == wanted


def test_every_split_sums_up() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths = random.integers(1, 5000, size=random.integers(1, 5)).tolist()
        steps = int(random.integers(len(lengths), 9000))
        shares = split_steps(lengths, steps)
        assert sum(shares) == steps and min(shares) >= 1
        exact = [length * steps / sum(lengths) for length in lengths]
        # At most the one that a small part is short of, and rounding.
        assert max(abs(a - b) for a, b in zip(shares, exact, strict=True)) <= len(lengths)


def test_too_few_steps_for_the_phases() -> None:
    with pytest.raises(ConfigError, match="1 steps are too few for 2 phases"):
        split_steps((5, 5), 1)


@pytest.mark.parametrize("steps", [5, 16, 400])
def test_a_job_with_a_budget_has_exactly_that(steps: int) -> None:
    job = train_job(**{"phases.0.epochs": 1})  # 8 steps, and could be no more
    planned = with_budget(job, steps, pairs_per_epoch=PAIRS_PER_EPOCH)
    lengths = planned_lengths(planned, pairs_per_epoch=PAIRS_PER_EPOCH)
    assert sum(lengths) == steps
    assert abs(lengths[0] - lengths[1]) <= 1
    same = planned.model_copy(update={"phases": job.phases})
    assert same == job  # nothing but the phases


def test_a_late_loss_keeps_its_place() -> None:
    job = train_job("refined")
    begins = job.phases[0].losses.refinement_from_epoch
    (phase,) = with_budget(job, 80, pairs_per_epoch=PAIRS_PER_EPOCH).phases
    assert phase.losses.refinement_from_epoch == pytest.approx(10 * begins)  # of 8 steps


def test_steps_that_fit_into_minutes() -> None:
    # 3 of 10 steps take 2 s, 7 take 1 s: 1.3 s on average, and 60 s hold 46 of them.
    assert steps_within(1, lengths=(3, 7), seconds_per_step=(2.0, 1.0)) == 46
    with pytest.raises(ConfigError, match="too few for 2 phases") as error:
        steps_within(0.01, lengths=(3, 7), seconds_per_step=(2.0, 1.0))
    assert error.value.subject == "minutes"


def step(phase: str, number: int, rate: float, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(phase, number, 0.0, 1e-4, loss, ("l",), (loss,), rate)


def test_training_seconds_are_those_of_the_metrics() -> None:
    # 10 steps of 4 at 8/s, 5 at 4/s, and 10 steps of 2 at 2/s.
    rows = [step("a", 10, 8.0), step("a", 15, 4.0), step("b", 10, 2.0)]
    assert training_seconds(rows, {"a": 4, "b": 2}) == 5 + 5 + 10


# --- settings --------------------------------------------------------------------------------


def test_presets_are_compared_without_the_adversarial_one(tmp_path: Path) -> None:
    names = compared_systems("actions64")
    assert {"fomm", "heatmap", "circles", "refined", "monkey-net", "x2face", "kpmask-plus"} == set(
        names
    )
    for preset in preset_names():
        flags = {"data": "d", "out": "o", "batch_size": 16}
        systems = compared_systems(preset)
        job = resolve_job(CompareJob, preset=preset, systems=systems, flags=flags)
        assert [system.name for system in job.systems] == systems
    mine = tmp_path / "mine.toml"
    mine.write_text("[train]\nseed = 3\n")
    with pytest.raises(ConfigError, match="one system only"):
        compared_systems(str(mine))


@pytest.mark.parametrize(
    ("systems", "flags", "message"),
    [
        (["fomm", "heatmp"], {}, "no system 'heatmp'; it has: heatmap"),
        (["fomm", "fomm"], {}, "systems repeat"),
        (["fomm"], {"seeds": [1, 1]}, "seeds repeat"),
        (["fomm"], {"steps": 5, "minutes": 1}, "steps or minutes, not both"),
        (["fomm"], {"steps": 0}, "greater than 0"),
        (["fomm"], {"minutes": -1}, "greater than 0"),
        (["fomm", "heatmap"], {"steps": 1}, "too few for the 2 phases of 'heatmap'"),
        (["fomm"], {"train": {"num_workers": 2}}, "one worker"),
        (["fomm"], {"holdout_fraction": 1.0}, "less than 1"),
        (["fomm"], {"metrics": ["beauty"]}, "beauty"),
    ],
)
def test_wrong_settings(systems: list[str], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_job(*systems, **flags)


def test_systems_must_agree_in_batch_and_image_size() -> None:
    flags = {"data": "d", "out": "o"}

    def with_override(text: str, **more: Any) -> CompareJob:
        return resolve_job(
            CompareJob,
            preset="debug",
            systems=["fomm", "x2face"],
            overrides=[text],
            flags={**flags, **more},
        )

    with pytest.raises(ConfigError, match=r"differ in batch_size \(\[4, 8\]\): set batch_size"):
        with_override("systems.fomm.phases.fomm.batch_size=8")
    assert with_override("systems.fomm.phases.fomm.batch_size=8", batch_size=4).batch_size == 4
    with pytest.raises(ConfigError, match=r"differ in image_size_px: \[32, 64\]"):
        with_override("systems.fomm.phases.fomm.model.image_size_px=64")


# --- clips -----------------------------------------------------------------------------------


def test_holdout_splits_identities_and_is_the_same_every_time() -> None:
    clips = [clip(f"{i}-{j}", f"person {i}") for i in range(20) for j in range(3)]
    held = with_holdout(clips, 0.2)
    sides = {side: {c.identity for c in held if c.partition == side} for side in ("train", "test")}
    assert not sides["train"] & sides["test"]
    assert sides["train"] | sides["test"] == {c.identity for c in clips}
    assert len(sides["test"]) == 4
    assert with_holdout(clips[::-1], 0.2) == held[::-1]
    # Nothing but the side changes: the frames stay where they are.
    assert [dataclasses.replace(c, partition="train") for c in held] == clips


def test_holdout_leaves_a_test_split_alone() -> None:
    clips = [clip("a", "a"), clip("b", "b"), clip("c", "c", "test")]
    assert with_holdout(clips, 0.9) == clips
    assert with_holdout(clips[:2], 0.0) == clips[:2]
    only = [clip("a", "a"), clip("b", "a")]
    assert with_holdout(only, 0.5) == only


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.5, 2), (1.0, 2)])
def test_holdout_leaves_somebody_on_either_side(fraction: float, count: int) -> None:
    held = with_holdout([clip(name, name) for name in "abc"], fraction)
    assert [c.partition for c in held].count("test") == count


# --- margins ---------------------------------------------------------------------------------


def score(
    system: str, clip_id: str, value: float, *, metric: str = "l1", seed: int = 0, **more: Any
) -> ComparedScore:
    values: dict[str, Any] = {
        "protocol": "reconstruction",
        "system": system,
        "seed": seed,
        "variant": "",
        "clip_id": clip_id,
        "name": clip_id,
        "metric": metric,
        "method": "model" if system else "copy",
        "value": value,
        "num_frames": 5,
        **more,
    }
    return ComparedScore(**values)


def rows_of(scores: list[ComparedScore]) -> dict[str, ComparedRow]:
    higher = {"l1": False, "ssim": True}
    rows = comparison_rows(scores, baseline="fomm", higher_is_better=higher)
    return {row.system or row.method: row for row in rows}


def test_margins_as_the_papers_count_them() -> None:
    # Paper 002, table 2: 0.063 for FOMM and 0.045 for the heatmap are 28.5 % better.
    rows = rows_of([score("fomm", "a", 0.063), score("heatmap", "a", 0.045)])
    (value,) = rows["heatmap"].values
    assert value.margin_percent == pytest.approx(100 * 18 / 63)
    assert rows["fomm"].values[0].margin_percent is None


def test_margins_count_better_whichever_way_a_metric_goes() -> None:
    scores = [score("fomm", c, 0.5, metric="ssim") for c in "ab"]
    scores += [score("heatmap", c, 0.6, metric="ssim") for c in "ab"]
    (value,) = rows_of(scores)["heatmap"].values
    assert value.margin_percent == pytest.approx(20)
    assert (value.margin_low, value.margin_high) == pytest.approx((20, 20))


def test_means_are_over_videos_of_their_means_over_seeds() -> None:
    scores = [score("fomm", "a", 0.2), score("fomm", "b", 0.4)]
    scores += [score("x", "a", v, seed=s) for s, v in ((0, 0.1), (1, 0.2))]
    scores += [score("x", "b", v, seed=s) for s, v in ((0, 0.3), (1, 0.6))]
    rows = rows_of([score("", "a", 0.7), score("", "b", 0.9), *scores])
    (value,) = rows["x"].values
    assert value.mean == pytest.approx((0.15 + 0.45) / 2)
    assert value.std == pytest.approx(0.15)
    assert value.seed_std == pytest.approx(0.1)  # of 0.2 and 0.4
    assert value.num_videos == 2
    assert value.margin_percent == pytest.approx(0)
    assert rows["fomm"].values[0].seed_std is None
    assert rows["copy"].values[0].mean == pytest.approx(0.8)
    assert list(rows) == ["copy", "fomm", "x"]


def test_margins_have_the_sign_test_beside_them() -> None:
    better, worse = dict.fromkeys("abcdefg", 0.1), dict.fromkeys("hi", 0.4)
    scores = [score("fomm", clip, 0.2) for clip in "abcdefghijk"]
    scores += [score("x", clip, value) for clip, value in (better | worse | {"j": 0.2}).items()]
    rows = rows_of(scores)  # j is a tie, and k has no value of x's
    tail = (1 + 9 + 36) / 2**9  # two or fewer of nine
    assert rows["x"].values[0].p_value == pytest.approx(2 * tail)
    assert rows["fomm"].values[0].p_value is None


def test_no_margin_without_a_baseline_or_over_nothing() -> None:
    assert rows_of([score("x", "a", 0.1)])["x"].values[0].margin_percent is None
    for base in ((0.0, 0.0), (0.5, -0.5)):  # cosines may have any sign
        scores = [score("fomm", clip, v) for clip, v in zip("ab", base, strict=True)]
        rows = rows_of([*scores, score("x", "a", 0.1), score("x", "b", 0.1)])
        assert rows["x"].values[0].margin_percent is None


def test_ablations_are_rows_of_their_own() -> None:
    scores = [score("fomm", "a", 0.2), score("r", "a", 0.1), score("r", "a", 0.3, variant="no_id")]
    rows = comparison_rows(scores, baseline="fomm", higher_is_better={"l1": False})
    assert [(row.system, row.variant) for row in rows] == [("fomm", ""), ("r", ""), ("r", "no_id")]
    assert rows[2].values[0].margin_percent == pytest.approx(-50)


# --- strips ----------------------------------------------------------------------------------


def plain(level: int, count: int) -> np.ndarray:
    """Frames of 32 px that tell their number."""
    return np.stack([np.full((32, 32, 3), level + t, np.uint8) for t in range(count)])


def test_a_still_strip() -> None:
    rows = [
        StripRow("source", [plain(200, 1), plain(210, 1)]),
        StripRow("driving", [plain(0, 10), plain(50, 20)]),
        StripRow("a system", [plain(100, 10), plain(150, 20)]),
    ]
    image_HWC = still_strip(rows)
    tile = MIN_TILE_PX
    assert image_HWC.shape[0] == 3 * tile
    tiles = image_HWC[:, -4 * tile :].reshape(3, tile, 4, tile, 3)[:, 0, :, 0, 0]
    # Two frames of each clip, at 0.35 and 0.7 of its length.
    assert tiles.tolist() == [[200, 200, 210, 210], [3, 7, 57, 64], [103, 107, 157, 164]]
    labels = image_HWC[:, : -4 * tile]
    assert all((labels[i * tile : (i + 1) * tile] < 128).any() for i in range(3))
    assert (labels[:4] == 255).all()


def test_a_moving_strip_is_as_long_as_its_shortest_video() -> None:
    rows = [
        StripRow("source", [plain(200, 1), plain(210, 1)]),
        StripRow("a", [plain(0, 10), plain(50, 4)]),
    ]
    frames = list(moving_strip(rows))
    assert len(frames) == 4
    assert len({frame.shape for frame in frames}) == 1
    assert [int(frame[-1, -1, 0]) for frame in frames] == [50, 51, 52, 53]


# --- page ------------------------------------------------------------------------------------


def value(metric: str, mean: float, **more: Any) -> ComparedValue:
    return ComparedValue(metric=metric, mean=mean, std=0.01, num_videos=3, **more)


@pytest.fixture
def comparison() -> Comparison:
    margin = {"margin_percent": 25.0, "margin_low": 20.5, "margin_high": 30.0}
    rows = [
        ComparedRow("reconstruction", "", "", "copy", (value("l1", 0.04),)),
        ComparedRow("reconstruction", "fomm", "", "model", (value("l1", 0.03),)),
        ComparedRow("reconstruction", "refined", "", "model", (value("l1", 0.02, **margin),)),
        ComparedRow("cross-absolute", "", "", "driving", (value("foreground_iou", 1.0),)),
        ComparedRow("cross-absolute", "fomm", "", "model", (value("foreground_iou", 0.5),)),
        ComparedRow("cross-relative", "fomm", "", "model", (value("foreground_iou", 0.4),)),
        ComparedRow("reconstruction", "refined", "none", "model", (value("l1", 0.025),)),
        ComparedRow("cross-absolute", "refined", "none", "model", (value("foreground_iou", 0.6),)),
        ComparedRow("reconstruction", "refined", "no_id", "model", (value("l1", 0.02),)),
    ]
    runs = tuple(
        ComparedRun(name, 0, f"o/runs/{name}", 500, 150.0, 1_500_000, "f" * 64)
        for name in ("fomm", "refined")
    )
    metrics = tuple(
        MetricInfo(name, "1", None, "Apache-2.0", up)
        for name, up in (("l1", False), ("foreground_iou", True))
    )
    return Comparison(
        uri="o",
        settings_digest="5" * 64,
        dataset_id="d" * 64,
        budget="500 steps a system",
        batch_size=8,
        perceptual="efficientnet-lite0",
        device="CPU, 2 threads",
        precision="bfloat16",
        baseline="fomm",
        num_train_clips=9,
        test_clips=("one", "<b>two</b>", "three"),
        held_out=True,
        num_runs_left=1,
        metrics=metrics,
        runs=runs,
        rows=tuple(rows),
    )


def test_tables(comparison: Comparison) -> None:
    tables = {table.name: table for table in comparison_tables(comparison)}
    assert list(tables) == ["reconstruction", "cross", "ablations-refined"]
    first = tables["reconstruction"]
    assert [row.label for row in first.rows] == ["copy of the source", "fomm", "refined"]
    assert [row.cells[0].best for row in first.rows] == [False, False, True]
    assert first.rows[1].run == comparison.runs[0]
    labels = [row.label for row in tables["cross"].rows]
    assert labels == ["the driving video itself", "fomm", "fomm (relative)"]
    ablations = tables["ablations-refined"]
    assert [row.label for row in ablations.rows] == ["whole", "no_id"]
    assert [m.name for m in ablations.metrics] == ["l1", "foreground_iou"]
    whole, no_id = ablations.rows
    assert [cell.value and cell.value.mean for cell in whole.cells] == [0.025, 0.6]
    assert [cell.value and cell.value.mean for cell in no_id.cells] == [0.02, None]


def test_values_that_leave_frames_out_are_best_only_where_as_much_was_found(
    comparison: Comparison,
) -> None:
    names = ("akd_movenet_found", "akd_movenet", "coverage_movenet")
    infos = tuple(
        MetricInfo(name, "1", "a" * 64, "MIT", up, estimator="movenet", coverage=cover)
        for name, up, cover in zip(
            names, (False, False, True), (names[2], names[2], ""), strict=True
        )
    )

    def marks(coverages: tuple[float, float]) -> list[list[bool]]:
        rows = [
            ComparedRow(
                "reconstruction",
                system,
                "",
                "model",
                (value(names[0], mean), value(names[1], mean), value(names[2], share)),
            )
            for system, mean, share in zip(("fomm", "refined"), (2.0, 1.0), coverages, strict=True)
        ]
        table = comparison_tables(dataclasses.replace(comparison, metrics=infos, rows=tuple(rows)))[
            0
        ]
        assert tuple(row.cells[0].coverage for row in table.rows) == coverages
        assert all(row.cells[2].coverage is None for row in table.rows)
        return [[cell.best for cell in row.cells] for row in table.rows]

    assert marks((0.98, 0.98)) == [[False, False, False], [True, True, False]]
    assert marks((0.98, 0.5)) == [[False, False, True], [False, True, False]]


def test_joints_that_were_lost_are_no_merit(comparison: Comparison) -> None:
    """Every frame is covered, and one system loses the joints that are hard to place."""
    names = ("akd_movenet_found", "coverage_movenet", "mkr_movenet")
    infos = tuple(
        MetricInfo(name, "1", "a" * 64, "MIT", up, estimator="movenet", coverage=cover)
        for name, up, cover in zip(names, (False, True, False), (names[1], "", ""), strict=True)
    )

    def marks(missed: tuple[float, float]) -> list[bool]:
        rows = tuple(
            ComparedRow(
                "reconstruction",
                system,
                "",
                "model",
                tuple(value(n, v) for n, v in zip(names, (mean, 1.0, share), strict=True)),
            )
            for system, mean, share in zip(("fomm", "refined"), (2.0, 1.0), missed, strict=True)
        )
        (table,) = comparison_tables(dataclasses.replace(comparison, metrics=infos, rows=rows))
        return [row.cells[0].best for row in table.rows]

    assert marks((0.02, 0.4)) == [False, False]
    assert marks((0.02, 0.025)) == [False, True]


def test_equal_means_are_best_alike_and_nothing_is_where_all_are(comparison: Comparison) -> None:
    def marks(*means: float) -> list[bool]:
        rows = tuple(
            ComparedRow("reconstruction", f"system-{n}", "", "model", (value("l1", mean),))
            for n, mean in enumerate(means)
        )
        runs = tuple(dataclasses.replace(comparison.runs[0], system=row.system) for row in rows)
        (table,) = comparison_tables(dataclasses.replace(comparison, rows=rows, runs=runs))
        return [row.cells[0].best for row in table.rows]

    assert marks(0.2, 0.1, 0.1) == [False, True, True]
    assert marks(0.1, 0.1) == [False, False]
    assert marks(0.1) == [False]


def test_page(comparison: Comparison) -> None:
    curves = [
        Curve("fomm", [step("fomm", n, 8.0, 5.0 / n) for n in range(1, 9)], [(4, 0.2), (8, 0.1)]),
        Curve("heatmap", [step("a", 1, 8.0), step("a", 2, 8.0), step("b", 1, 8.0)]),
    ]
    svg = comparison_curves_svg(curves)
    assert ET.fromstring(svg).get("role") == "img" and "heatmap" in svg and "held-out clips" in svg
    page = comparison_page(
        title="Comparison",
        comparison=comparison,
        curves=curves,
        strips=[Strip("Reconstruction", "strip.png", "strip.mp4")],
    )
    for text in ("0.0300", "+25.0 %", "[+20.5, +30.0]", "1.50 M", "0.300", "strip.png"):
        assert text in page, text
    assert "&lt;b&gt;two&lt;/b&gt;" in page and "<b>two</b>" not in page
    assert "This comparison is going on" in page
    assert "every system was trained with one" in page
    runs = (*comparison.runs, dataclasses.replace(comparison.runs[0], seed=7))
    page_of_two = comparison_page(
        title="Comparison",
        comparison=dataclasses.replace(comparison, runs=runs),
        curves=[],
        strips=[],
    )
    assert "that is the spread of the seeds" in page_of_two
    loss, held_out = (json.loads(text) for text in re.findall(r'json">(.*?)</script>', page))
    assert loss["steps"] == list(range(1, 9))
    values = {line["label"]: line["values"] for line in loss["lines"]}
    assert values["fomm"] == [pytest.approx(5 / n, rel=1e-5) for n in range(1, 9)]
    assert values["heatmap"] == [1, 1, 1, *[None] * 5]
    assert [line["values"] for line in held_out["lines"]] == [[0.2, 0.1], [None, None]]
    assert len(set(re.findall(r'data-line="\d" fill="none" stroke="(#\w+)"', page))) == 2


def test_between_its_own_steps_a_run_is_interpolated() -> None:
    rng = np.random.default_rng(0)
    own = {label: sorted(rng.choice(500, 40, replace=False).tolist()) for label in "ab"}
    losses = {label: rng.uniform(1, 9, 40).tolist() for label in "ab"}
    curves = [
        Curve(
            label,
            [step("x", at, 8.0, loss) for at, loss in zip(own[label], losses[label], strict=True)],
        )
        for label in "ab"
    ]
    (panel,) = comparison_module._panels(curves)
    assert list(panel.steps) == sorted({*own["a"], *own["b"]})
    for line in panel.lines:
        at, loss = own[line.label], losses[line.label]
        for here, value in zip(panel.steps, line.values, strict=True):
            if here < at[0] or here > at[-1]:
                assert math.isnan(value)
                continue
            after = next(n for n, other in enumerate(at) if other >= here)
            if at[after] == here:
                assert value == loss[after]
                continue
            share = (here - at[after - 1]) / (at[after] - at[after - 1])
            assert value == pytest.approx(loss[after - 1] * (1 - share) + loss[after] * share)


def test_no_curves() -> None:
    assert comparison_curves_svg([]) == ""


def test_curves_run_on_over_phases() -> None:
    rows: Iterator[StepMetrics] = (
        step(phase, number, 1.0, loss)
        for phase, number, loss in (("a", 5, 3.0), ("a", 10, 2.0), ("b", 5, 9.0))
    )
    assert loss_course(list(rows)) == [(5, 3.0), (10, 2.0), (15, 9.0)]

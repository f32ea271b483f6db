"""The comparison as a command and as a flow: its stages, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import tasks.compare
import tasks.compare_plan
from flows import compare as compare_flows
from flows import engine, jobs
from flows.cli import app
from kpmask.config import CompareJob, resolve_job
from kpmask.errors import RunFailed
from kpmask.records import ComparedRow, ComparedRun, ComparedValue, Comparison, MetricInfo


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="kpmask")


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


def comparison_at(out: str) -> Comparison:
    margin = {"margin_percent": 20.0, "margin_low": 11.5, "margin_high": 28.0}
    values = {
        "": ComparedValue("l1", 0.04, 0.01, 3, **margin),
        "fomm": ComparedValue("l1", 0.05, 0.01, 3),
    }
    rows = [
        ComparedRow("reconstruction", s, "", "model" if s else "copy", (value,))
        for s, value in values.items()
    ]
    return Comparison(
        uri=out,
        settings_digest="5" * 64,
        dataset_id="d" * 64,
        budget="6 steps a system",
        batch_size=4,
        perceptual="efficientnet-lite0",
        device="CPU, 2 threads",
        precision="float32",
        baseline="fomm",
        num_train_clips=9,
        test_clips=("one", "two", "three"),
        held_out=True,
        num_runs_left=0,
        metrics=(MetricInfo("l1", "1", None, "Apache-2.0", higher_is_better=False),),
        runs=(ComparedRun("fomm", 0, f"{out}/runs/fomm", 6, 3.0, 1000, "f" * 64),),
        rows=tuple(rows),
    )


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of stages as they are called; nothing is done."""
    called: list[str] = []

    def prepare(job: CompareJob, *, on_progress: Any) -> tuple[str, ...]:
        called.append(f"prepare {job.steps}")
        return tuple(system.name for system in job.systems)

    def one(verb: str) -> Any:
        return lambda job, name, *, on_progress: called.append(f"{verb} {name}")

    def publish(job: CompareJob) -> Comparison:
        called.append("publish")
        return comparison_at(job.out)

    monkeypatch.setattr(tasks.compare_plan, "prepare", prepare)
    monkeypatch.setattr(tasks.compare, "train_run", one("train"))
    monkeypatch.setattr(tasks.compare, "score_run", one("score"))
    monkeypatch.setattr(tasks.compare, "publish", publish)
    return called


# --- the flow --------------------------------------------------------------------------------


def compare_job(out: Path, *systems: str) -> CompareJob:
    flags = {"data": "d", "out": str(out), "steps": 6}
    return resolve_job(CompareJob, preset="debug", systems=systems, flags=flags)


def test_the_table_is_published_after_every_run(stages: list[str], tmp_path: Path) -> None:
    job = compare_job(tmp_path, "fomm", "heatmap")
    found = engine.run_flow(compare_flows.compare_flow, job)
    assert found == comparison_at(str(tmp_path))
    each = [[f"train {name}", f"score {name}", "publish"] for name in ("fomm", "heatmap")]
    assert stages == ["prepare 6", *each[0], *each[1]]


def test_an_error_of_a_run_ends_the_flow(
    stages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: CompareJob, name: str, *, on_progress: Any) -> None:
        raise RunFailed("the loss is not finite any more", code="training_failed")

    monkeypatch.setattr(tasks.compare, "train_run", broken)
    with pytest.raises(RunFailed, match="not finite"):
        engine.run_flow(compare_flows.compare_flow, compare_job(tmp_path, "fomm", "heatmap"))
    assert stages == ["prepare 6"]


def test_policy_of_every_stage() -> None:
    for stage in (
        compare_flows.prepare_stage,
        compare_flows.train_stage,
        compare_flows.score_stage,
        compare_flows.publish_stage,
    ):
        assert stage.retries == 2
        assert stage.retry_condition_fn is engine.worth_retrying
        assert stage.timeout_seconds
        assert stage.persist_result is False


# --- the command -----------------------------------------------------------------------------


def test_what_the_command_prints(stages: list[str], tmp_path: Path) -> None:
    base = ("compare", "--preset", "debug", "--data", "d", "--out", str(tmp_path), "--steps", "6")
    result = run(*base, "--systems", "fomm, heatmap")
    assert result.exit_code == 0, result.output
    assert [line.split() for line in result.stdout.splitlines()[3:5]] == [
        ["copy", "of", "the", "source", "0.0400", "±", "0.0100", "-", "-", "-"],
        ["fomm", "0.0500", "±", "0.0100", "6", "3", "0.500"],
    ]
    assert "+20.0 [+11.5, +28.0]" in result.stdout
    assert "scored on 3 clips held out by identity" in result.stdout
    stages.clear()
    as_json = json.loads(run(*base, "--json").stdout)
    assert as_json["rows"][1]["values"][0]["mean"] == 0.05
    names = {stage.removeprefix("train ") for stage in stages if stage.startswith("train ")}
    assert names == {"fomm", "heatmap", "circles", "refined", "monkey-net", "x2face", "kpmask-plus"}


def test_flags_reach_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CompareJob] = []

    def planned(job: CompareJob) -> list[str]:
        seen.append(job)
        return ["budget: 3 minutes"]

    monkeypatch.setattr(jobs, "plan_compare", planned)
    base = ("compare", "--preset", "debug", "--data", "d", "--out", "o", "--dry-run")
    result = run(
        *base,
        *("--systems", "fomm", "--minutes", "3", "--seeds", "0,4", "--device", "cpu"),
        *("--set", "train.num_repeats=7", "--set", "systems.fomm.phases.fomm.batch_size=2"),
    )
    assert result.exit_code == 0, result.output
    assert "# budget: 3 minutes" in result.stdout
    (job,) = seen
    assert (job.minutes, job.seeds, job.device, job.train.num_repeats) == (3, (0, 4), "cpu", 7)
    assert job.systems[0].phases[0].batch_size == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "debug", "--systems", "fomm,nope"], "no system 'nope'; it has: heatmap"),
        (["--preset", "debug", "--systems", ""], "no system ''"),
        ([], "give --preset"),
        (["--preset", "debug", "--seeds", "1,x"], "--seeds: '1,x' is not numbers"),
        (["--preset", "debug", "--steps", "1"], "steps 1 are too few for the 2 phases"),
        (["--preset", "debug", "--steps", "9", "--minutes", "1"], "not both"),
        (["--preset", "debug", "--device", "tpu"], "device"),
        (["--preset", "vox256", "--steps", "9"], "set batch_size"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], said: str) -> None:
    assert said in refused("compare", "--data", "d", "--out", "o", *arguments)


def test_a_preset_of_one_system_has_nothing_to_compare(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text("[train]\nseed = 3\n")
    base = ("compare", "--data", "d", "--out", "o", "--preset", str(preset))
    assert "one system only" in refused(*base)


def test_train_takes_one_of_a_presets_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(jobs, "plan_train", lambda job: seen.append(job) or [])
    base = ("train", "--data", "d", "--out", "o")
    result = run(*base, "--preset", "debug", "--system", "refined", "--dry-run")
    assert result.exit_code == 0, result.output
    assert [phase.model.system for phase in seen[0].phases] == ["refined-mask"]
    assert "no system 'nope'" in refused(*base, "--preset", "debug", "--system", "nope")
    assert "give --preset" in refused(*base, "--system", "fomm")

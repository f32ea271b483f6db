"""The command line: what it refuses, with which words and which exit status, and what it prints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.score_lines import score_lines
from kpmask import bundled, config
from kpmask.records import (
    DatasetChanges,
    DatasetManifest,
    Method,
    MetricInfo,
    ScoreSummary,
    ScoreTable,
    SetScore,
)

KPMASK = str(Path(sys.executable).with_name("kpmask"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="kpmask")


def refused(*arguments: str) -> str:
    """What a command says on standard error when it is wrong (status 2)."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture
def videos(tmp_path: Path) -> str:
    (tmp_path / "videos").mkdir()
    return str(tmp_path / "videos")


def test_help_imports_nothing_heavy() -> None:
    """--help must answer at once; these are what would make it wait."""
    heavy = {"torch", "ray", "prefect", "av", "boto3", "pyarrow", "numpy", "matplotlib", "rich"}
    code = (
        "import sys; from typer.testing import CliRunner; import flows.cli;"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


COMMANDS = (
    ["demo"],
    ["preprocess"],
    ["train"],
    ["animate"],
    ["evaluate"],
    ["compare"],
    ["report"],
    ["inspect"],
    ["dataset", "info"],
    ["dataset", "verify"],
    ["dataset", "export"],
    ["dataset", "import"],
    ["checkpoint", "import"],
    ["checkpoint", "info"],
    ["checkpoint", "list"],
    ["checkpoint", "release"],
    ["deploy"],
    ["doctor"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"kpmask {' '.join(command)}" in result.stdout.split("Examples:")[1]


@pytest.mark.parametrize("job", ["preprocess", "train", "animate", "evaluate", "compare"])
def test_every_job_takes_the_common_options(job: str) -> None:
    text = run(job, "--help").stdout
    for option in ("--preset", "--job", "--set", "--dry-run", "--json", "--out"):
        assert option in text


def test_unknown_preset(videos: str) -> None:
    said = refused("preprocess", "--videos", videos, "--out", "x", "--preset", "nope")
    assert "no preset 'nope'" in said
    assert all(name in said for name in config.preset_names())


def test_unknown_key_of_a_preset(videos: str, tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text("[preprocess.clips]\nsize = 64\n")
    said = refused("preprocess", "--videos", videos, "--out", "x", "--preset", str(preset))
    assert "clips.size: no such setting" in said
    assert "size_px" in said
    preset.write_text("[preproces]\n")
    said = refused("preprocess", "--videos", videos, "--out", "x", "--preset", str(preset))
    assert "unknown table 'preproces'" in said


def test_unknown_set_key_and_wrong_value(videos: str) -> None:
    base = ("preprocess", "--videos", videos, "--out", "x")
    assert "clips.sixe_px: no such setting" in refused(*base, "--set", "clips.sixe_px=64")
    said = refused(*base, "--set", "clips.fit=round")
    assert "clips.fit" in said and "'round'" in said and "square" in said
    assert "greater than 0" in refused(*base, "--set", "clips.size_px=-1")
    assert "not key=value" in refused(*base, "--set", "clips.size_px")
    said = refused(
        "train", "--data", "d", "--out", "x", "--preset", "debug", "--set", "phases.fom.max_steps=2"
    )
    assert "allowed: fomm" in said


def test_inputs_that_exclude_each_other(videos: str) -> None:
    assert "exactly one of" in refused("preprocess", "--out", "x")
    assert "exactly one of" in refused(
        "preprocess", "--out", "x", "--videos", videos, "--metadata", "m.csv"
    )
    assert "source goes with driving" in refused(
        "animate", "--checkpoint", "c", "--out", "x", "--source", "s.png"
    )
    assert "generated with reference" in refused("evaluate", "--out", "x", "--generated", "g")


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.safetensors", tmp_path / "text.safetensors"
    empty.touch()
    text.write_text("not weights" * 100)
    for path in (empty, text, tmp_path / "absent.safetensors"):
        said = refused("checkpoint", "info", str(path))
        assert path.name in said and "code: checkpoint_invalid" in said


def test_import_asks_how_warps_count_pixels(tmp_path: Path) -> None:
    import torch

    from kpmask.models import build_system
    from kpmask.upstream import export_upstream

    for name, system in (("fomm", "fomm"), ("heatmap", "keypoint-mask")):
        (phase,) = config.load_preset("debug", systems=[name])["train"]["phases"][-1:]
        built = build_system(config.validated(config.Phase, phase).model)
        torch.save(export_upstream(built), tmp_path / f"{system}.pth.tar")
    out = str(tmp_path / "fomm.safetensors")
    imported = ("checkpoint", "import", str(tmp_path / "fomm.pth.tar"), "--out", out)
    for option, wanted in (("--no-align-corners", False), ("--align-corners", True)):
        assert run(*imported, option).exit_code == 0
        found = json.loads(run("checkpoint", "info", out, "--json").stdout)
        assert found["config"]["align_corners"] is wanted
    other = str(tmp_path / "keypoint-mask.pth.tar")
    said = refused("checkpoint", "import", other, "--out", out, "--align-corners")
    assert "a keypoint-mask system warps nothing" in said


def test_a_dry_run_prints_a_job_that_can_be_run_again(videos: str, tmp_path: Path) -> None:
    metadata = tmp_path / "m.csv"
    metadata.write_text("video_id,start,end,bbox,fps,width,height,partition\n")
    base = ("preprocess", "--videos", videos, "--out", str(tmp_path / "out"), "--preset", "debug")
    (Path(videos) / "a.mp4").write_bytes(b"x")
    result = run(*base, "--dry-run")
    assert result.exit_code == 0, result.output
    job = tomllib.loads(result.stdout)
    assert config.validated(config.PreprocessJob, job).clips.size_px == 32
    assert not (tmp_path / "out").exists()
    retry = tomllib.loads(run(*base, "--dry-run", "--retry-now").stdout)["retry"]
    assert (retry["backoff_s"], retry["max_attempts"]) == (0, 0)


def test_doctor_tells_scripts_too() -> None:
    result = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == int(any(c["verdict"] == "bad" for c in checks.values()))
    assert checks["packages"]["verdict"] == "ok"
    assert checks["ffmpeg"]["found"].startswith("ffmpeg version")


def test_doctor_finds_servers_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:secret@127.0.0.1:9")
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stdout.count("does not answer") == 3
    assert "secret" not in result.stdout


# --- bundled weights -------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of bundled weights with one entry; the file is none that could be loaded."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    path = folder / "small.safetensors"
    path.write_bytes(b"weights")
    described = {
        "sha256": hashlib.sha256(b"weights").hexdigest(),
        "size_bytes": 7_000_000,
        "system": "keypoint-mask",
        "image_size_px": 64,
        "parameters": 1234567,
        "info": {"seed": 0},
    }
    bundled.enter(path, "small", described, command="make weights", scores={"l1": 0.02})
    monkeypatch.setenv(bundled.VARIABLE, str(folder))
    return folder


def test_the_list_of_bundled_weights(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run("checkpoint", "list").stdout
    sha256 = bundled.entries()["small"].sha256
    for found in ("small: keypoint-mask, 64 px", "7.0 MB", sha256, "make weights", "l1 0.0200"):
        assert found in text
    listed = json.loads(run("checkpoint", "list", "--json").stdout)
    assert listed["small"]["made"] == {"seed": 0}
    monkeypatch.setenv(bundled.VARIABLE, str(bundle / "none"))
    assert "no weights are bundled here" in run("checkpoint", "list").stdout


def test_doctor_verifies_the_bundled_weights(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights() -> dict[str, str]:
        checks = json.loads(run("doctor", "--json").stdout)
        (found,) = [check for check in checks if check["name"] == "weights"]
        return found

    assert weights()["verdict"] == "ok"
    assert "small (keypoint-mask, 64 px)" in weights()["found"]
    (bundle / "small.safetensors").write_bytes(b"others")
    assert weights()["verdict"] == "bad"
    assert "small: is not the file that was released" in weights()["found"]
    (bundle / "index.toml").write_text("[")
    assert weights()["verdict"] == "bad"
    monkeypatch.setenv(bundled.VARIABLE, str(bundle / "none"))
    assert weights()["verdict"] == "note"


def test_an_unknown_name_tells_the_known_ones(bundle: Path) -> None:
    said = refused("checkpoint", "info", "demmo")
    assert "bundled weights: small" in said and "./demmo" in said
    assert "code: weights_unavailable" in said


def test_videos_alone_may_be_of_other_people(tmp_path: Path) -> None:
    base = ("demo", "--videos-only", "--num-videos", "2", "--seed", "5", "--json", "--out")
    result = run(*base, str(tmp_path / "a"))
    assert result.exit_code == 0, result.output
    varied = run(*base, str(tmp_path / "b"), "--varied")
    assert varied.exit_code == 0, varied.output
    tables = [Path(json.loads(r.stdout)["metadata"]) for r in (result, varied)]
    rows = [table.read_text().splitlines() for table in tables]
    assert [len(found) for found in rows] == [5, 5]  # a heading, two videos, two broken rows
    videos = [sorted((table.parent / "raw").iterdir()) for table in tables]
    assert videos[0][0].name == videos[1][0].name
    assert videos[0][0].read_bytes() != videos[1][0].read_bytes()
    for option in (("--num-videos", "4"), ("--seed", "1"), ("--varied",)):
        assert "goes with --videos-only" in refused("demo", "--out", str(tmp_path), *option)


def test_ctrl_c_is_130(tmp_path: Path) -> None:
    """A real process, a real signal: one line, no traceback, status 130."""
    command = [KPMASK, "demo", "--videos-only", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the first video is done
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said and "Interrupted" in said


# --- schedules -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ((), ("0 3 * * *", None)),
        (("--cron", "*/5 * * * *"), ("*/5 * * * *", None)),
        (("--every", "600"), (None, 600.0)),
    ],
)
def test_when_a_deployment_is_due(
    options: tuple[str, ...],
    wanted: tuple[str | None, float | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows import deploy

    asked: list[tuple[object, object]] = []

    def register(jobs: object, **settings: object) -> list[deploy.Registered]:
        asked.append((settings["cron"], settings["every_s"]))
        return [deploy.Registered("preprocess/kpmask", "kpmask", "some time", "http://ui")]

    monkeypatch.setattr(deploy, "register", register)
    (tmp_path / "job.toml").write_text('[preprocess]\nvideos = "v"\nout = "o"\n')
    result = run("deploy", "--job", str(tmp_path / "job.toml"), *options)
    assert result.exit_code == 0, result.output
    assert asked == [wanted]
    assert "some time" in result.stdout


def test_a_schedule_that_cannot_be() -> None:
    assert "not both" in refused("deploy", "--cron", "* * * * *", "--every", "60")
    assert "0.5 s is not between" in refused("deploy", "--every", "0.5")
    assert "a schedule needs the whole preprocess job" in refused("deploy", "--every", "60")


def test_what_a_run_changed_is_printed(videos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import jobs

    manifest = DatasetManifest("/data", "d", "s", 3, 1, 96, 1)
    changes = DatasetChanges(2, "d", 2, 0, 2, 2, 0, 0, 0, 1, 0)
    monkeypatch.setattr(jobs, "run_preprocess", lambda job, quiet: (manifest, changes))
    base = ("preprocess", "--videos", videos, "--out", "/data")
    line = (
        "version 2: 2 clips added, 0 removed, 2 kept; videos: 2 added, 0 removed; "
        "failures: 0 new, 0 gone; 1 failed video tried again"
    )
    assert line in run(*base).stdout.splitlines()
    found = json.loads(run(*base, "--json").stdout)
    assert (found["num_train"], found["changes"]["version"]) == (3, 2)
    assert found["changes"]["videos_added"] == 2


def test_the_table_of_scores_says_what_its_numbers_are_over() -> None:
    def summary(metric: str, method: Method, mean: float, low: float | None) -> ScoreSummary:
        high = None if low is None else low + 0.01
        ends = {"pooled_low": low, "pooled_high": high}
        return ScoreSummary(metric, method, 0.7, 0.0, mean, 3, 30, **ends)

    table = ScoreTable(
        uri="o",
        settings_digest="s",
        dataset_id="",
        weights_sha256="",
        perceptual="",
        num_videos=3,
        num_failures=1,
        metrics=(
            MetricInfo("l1", "1", None, "", higher_is_better=False, quantise="round"),
            MetricInfo("psnr", "1", None, "", higher_is_better=True, quantise="round"),
            MetricInfo("l1_with_first", "1", None, "", False, counts_first=True, quantise="round"),
        ),
        summaries=(
            summary("l1", "model", 0.04, 0.035),
            summary("l1", "codec", 0.0001, None),
            summary("psnr", "model", 25.5907, 20.5),
        ),
        average="frames",
    )
    text = "\n".join(score_lines(table))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["model", "codec"]
    assert ["l1", "(down)", "0.0400", "[0.0350,", "0.0450]", "1.00e-04"] in lines
    assert ["psnr", "(up)", "25.59", "[20.50,", "20.51]", "-"] in lines
    over = "drawn frames rounded to 8 bits, mean over all frames together"
    assert f"l1, psnr: frame 0 left out, {over}".split() in lines
    assert f"l1_with_first: frame 0 counted, {over}".split() in lines
    assert "3 videos; 1 failures" in text


def covered(name: str, coverage: str, **values: Any) -> MetricInfo:
    return MetricInfo(
        *(name, "1+4", "ab" * 32, "Apache-2.0", False),
        estimator="facemesh",
        coverage=coverage,
        **values,
    )


@pytest.mark.parametrize(("coverage", "is_marked"), [(0.995, True), (0.985, False)])
def test_the_table_of_scores_has_coverage_beside_each_value(
    coverage: float, is_marked: bool
) -> None:
    means = {
        ("akd_facemesh", "model"): 3.0,
        ("akd_facemesh", "copy"): 4.5,
        ("akd_facemesh_found", "model"): 2.0,
        ("akd_facemesh_found", "copy"): 4.5,
        ("coverage_facemesh", "model"): coverage,
        ("coverage_facemesh", "copy"): 1.0,
    }
    methods: dict[str, Method] = {"model": "model", "copy": "copy"}
    table = ScoreTable(
        *("o", "s", "d", "w", "none", 3, 0),
        metrics=(
            covered("akd_facemesh", "coverage_facemesh"),
            covered("akd_facemesh_found", "coverage_facemesh"),
            dataclasses.replace(covered("coverage_facemesh", ""), higher_is_better=True),
            covered("frechet_sface", "coverage_facemesh", of_set=True),
        ),
        summaries=tuple(
            ScoreSummary(metric, methods[method], mean, 0.0, mean, 3, 30)
            for (metric, method), mean in means.items()
        ),
        sets=(SetScore("frechet_sface", "model", 0.5, 3, 30),),
        setting="cross",
        motion="relative",
    )
    text = "\n".join(score_lines(table))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    share = f"{100 * coverage:.3g} %"
    star = "*" if is_marked else ""  # of frames that were found, only where as many were
    assert f"akd_facemesh (down) 3.000* {share} 4.500 100 %" in lines
    assert f"akd_facemesh_found (down) 2.000{star} {share} 4.500 100 %" in lines
    assert f"frechet_sface (down) 0.5000 {share} -" in lines
    assert "by facemesh, version 4, weights abababababababab, Apache-2.0" in lines
    assert any(line.startswith("another identity's motion, relative") for line in lines)


def test_settings_of_an_evaluation_have_flags(tmp_path: Path) -> None:
    base = ("evaluate", "--checkpoint", "demo", "--data", str(tmp_path), "--out", "x")
    assert "csim_source_sface" in refused(*base, "--setting", "cross", "--dry-run")
    assert "not 'sideways'" in refused(*base, "--setting", "sideways")
    assert "motion is for kind = cross" in refused(*base, "--motion", "relative")
    both = ("--pairs", "p.csv", "--num-pairs", "3")
    assert "num_pairs or pairs" in refused(*base, "--setting", "cross", *both)
    few = ("--setting", "few_shot", "--metrics", "flicker", "--dry-run")
    assert "flicker: is over frames that follow one another" in refused(*base, *few)

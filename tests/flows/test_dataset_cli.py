"""`kpmask dataset`: what it prints, refuses and returns."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from kpmask.media.encode import encode

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["dataset", *arguments], prog_name="kpmask")
    assert "Traceback" not in result.output
    return result


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of 40 px, one of them damaged."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for split, name in (("train", "ann#1"), ("test", "bob#1")):
        (folder / split).mkdir()
        frames_THWC = rng.integers(0, 256, (6, 40, 40, 3), np.uint8)
        encode(folder / split / f"{name}.mp4", frames_THWC, fps=25.0)
    (folder / "train" / "bad.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def data(videos: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    out = tmp_path_factory.mktemp("cli") / "data"
    said = ok("import", str(videos), "--from", "mp4", "--out", str(out), "--workers", "1")
    assert "1 train and 1 test clips, 12 frames; 1 failures" in said
    return out


def test_info(data: Path) -> None:
    said = ok("info", str(data))
    for found in ("train", "test", "25 fps", "40x40 px", "png images", "not_media", "version: 1"):
        assert found in said
    told = json.loads(ok("info", str(data), "--json"))
    assert [split["num_frames"] for split in told["splits"]] == [6, 6]
    assert told["dataset_id"] in said and told["failures"] == {"not_media": 1}


def test_verify_of_a_whole_dataset_is_status_0(data: Path) -> None:
    said = ok("verify", str(data), "--workers", "1")
    assert "2 clips, 12 frames decoded; 2 clips have every pixel of their record" in said
    assert said.strip().endswith("whole")


def test_verify_of_a_damaged_one_is_status_1(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    next((copy / "train").glob("*.arrow")).unlink()
    result = run("verify", str(copy), "--workers", "1")
    assert result.exit_code == 1
    assert "missing_file" in result.stdout and "ann#1" in result.stdout
    assert "1 things are wrong" in result.stdout
    result = run("verify", str(copy), "--workers", "1", "--json")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert (problem["stage"], problem["code"]) == ("verify", "missing_file")


def test_export_and_import(data: Path, tmp_path: Path) -> None:
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    told = json.loads(
        ok("export", str(data), "--out", out, "--as", "webdataset", "--workers", "1", "--json")
    )
    assert (told["num_train"], told["lossless"], told["form"]) == (1, True, "webdataset")
    ok(
        "import",
        out,
        "--out",
        back,
        "--from",
        "webdataset",
        "--workers",
        "1",
        "--layout",
        "folders",
    )
    assert (Path(back) / "test" / "bob#1" / "0000005.png").exists()
    ids = [json.loads(ok("info", uri, "--json"))["dataset_id"] for uri in (str(data), back)]
    assert ids[0] == ids[1]
    said = ok("export", str(data), "--out", f"{out}4", "--as", "mp4", "--quality", "30")
    assert "lossy, " in said and "dB PSNR or better" in said


def test_dry_runs_tell_the_job(data: Path, videos: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    said = ok("export", str(data), "--out", out, "--as", "mp4", "--split", "test", "--dry-run")
    job = tomllib.loads(said)
    assert (job["form"], job["partition"], job["crf"]) == ("mp4", "test", 18)
    assert "# 0 train and 1 test clips, 6 frames" in said
    base = ("import", str(videos), "--out", out, "--from", "mp4", "--dry-run")
    assert "size_px" not in tomllib.loads(ok(*base))
    preset = tomllib.loads(ok(*base, "--preset", "debug", "--set", "storage.image_format=jpeg"))
    assert (preset["size_px"], preset["storage"]["image_format"]) == (32, "jpeg")
    assert tomllib.loads(ok(*base, "--preset", "debug", "--size-px", "48"))["size_px"] == 48
    assert not Path(out).exists()


def test_wrong_commands_are_status_2(data: Path, videos: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for arguments, said in (
        (("export", str(data), "--out", out, "--as", "zip"), "zip"),
        (("export", str(data), "--out", out, "--as", "mp4", "--quality", "99"), "or equal to 51"),
        (("import", str(videos), "--out", out, "--from", "webdataset"), "nothing of the form"),
        (("import", str(videos), "--out", out, "--from", "mp4", "--set", "a=1"), "no such setting"),
        (("import", str(tmp_path), "--out", str(data), "--from", "mp4"), "nothing of the form"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert said in result.stderr
    result = run("info", str(tmp_path / "none"))
    assert result.exit_code == 1 and "no finished dataset" in result.stderr

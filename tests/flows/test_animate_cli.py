"""`kpmask animate`: how a result is cut and delivered, as flags and as settings."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from kpmask.optimize.choice import WANTED

PAIR = ("--checkpoint", "demo", "--source", "s.png", "--driving", "d.mp4", "--out", "o.gif")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["animate", *PAIR, *arguments], prog_name="kpmask")


def test_flags_are_settings_of_the_output() -> None:
    flags = ("--crop", "face", "--driving-crop", "1-2-30-40", "--paste-back", "--side-by-side")
    by_flags = run(*flags, "--format", "gif", "--fps", "12.5", "--dry-run", "--json")
    assert by_flags.exit_code == 0, by_flags.output
    sets = ("crop=face", "driving_crop=1-2-30-40", "paste_back=true", "side_by_side=true")
    overrides = [f"--set=output.{text}" for text in (*sets, "format=gif", "fps=12.5")]
    by_settings = run(*overrides, "--dry-run", "--json")
    assert json.loads(by_flags.stdout) == json.loads(by_settings.stdout)
    assert '"crop": "face"' in json.dumps(json.loads(by_flags.stdout))
    # a flag goes over a setting, and the part's other settings stay
    both = run(
        "--set=output.fps=9", "--set=output.feather=0.2", "--fps", "8", "--dry-run", "--json"
    )
    text = json.dumps(json.loads(both.stdout))
    assert '"fps": 8.0' in text
    assert '"feather": 0.2' in text


def test_precision_is_what_loading_takes() -> None:
    for wanted in WANTED:
        shown = run("--precision", wanted, "--dry-run", "--json")
        assert json.loads(shown.stdout)["job"]["precision"] == wanted
    assert json.loads(run("--dry-run", "--json").stdout)["job"]["precision"] == "auto"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--precision", "float16"), "'auto', 'float32', 'bfloat16' or 'plain'"),
        (("--format", "avi"), "'mp4', 'webm', 'gif' or 'png'"),
        (("--crop", "nose"), "crop 'nose' is not centre, auto, face, person"),
        (("--crop", "30-0-20-9"), "no area"),
        (("--fps", "0"), "greater than or equal to 0.1"),
        (("--fps", "60", "--format", "gif"), "at most 50"),
        (("--set", "output.no_subject=guess"), "'fail' or 'centre'"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())

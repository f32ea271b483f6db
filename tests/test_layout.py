"""The house rules that a reader relies on: who may import whom, and what is packaged."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
PACKAGES = ("kpmask", "tasks", "flows")

# What each package must not import, anywhere, not even inside a function.
FORBIDDEN = {
    "kpmask": {"tasks", "flows", "prefect", "ray", "boto3", "botocore", "yt_dlp", "httpx"},
    "tasks": {"flows", "prefect"},
    "flows": {"ray", "torch", "boto3", "botocore", "av"},
}


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level names that a file imports, at any depth, and the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield (node.module or "").partition(".")[0], node.lineno


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(package)
        for name, line in imports_of(path)
        if name in FORBIDDEN[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_imports_the_tests(package: str) -> None:
    named = {name for path in sources(package) for name, _ in imports_of(path)}
    assert "tests" not in named


def test_imports_are_found_at_every_depth(tmp_path: Path) -> None:
    source = "import a.b\ndef f():\n  if 1:\n    from c.d import e\nclass G:\n  import h as i\n"
    (tmp_path / "x.py").write_text(source)
    assert sorted(imports_of(tmp_path / "x.py")) == [("a", 1), ("c", 4), ("h", 6)]


def loaded_by(module: str) -> set[str]:
    code = f"import {module}, sys; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("module", ["kpmask.config", "kpmask.records", "kpmask.errors"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    """`kpmask --help` and wrong settings answer at once because of this."""
    assert loaded_by(module) & {"torch", "av", "numpy", "pyarrow", "prefect", "ray"} == set()


def test_packages_on_disk_are_the_packages_that_are_built() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = found["packages"]["find"]["include"]
    assert patterns == [f"{package}*" for package in PACKAGES]
    built = set(find_packages(str(ROOT), include=patterns))
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for path in sources(package)
    }
    assert built == on_disk, "a folder without __init__.py is not built"


def test_every_data_file_is_packaged() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {
        path
        for package, patterns in found["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package).glob(pattern)
    }
    data = {
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert data == packaged

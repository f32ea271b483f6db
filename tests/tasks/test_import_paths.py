"""Workers run this package, whatever lies in the folder in which a command was typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHERE = """
import ray
from tasks.cluster import ray_session

@ray.remote
def where():
    import flows, kpmask, own, tasks
    return [module.__file__ for module in (kpmask, tasks, flows, own)]

with ray_session(num_cpus=1):
    print(*ray.get(where.remote()), sep="\\n")
"""


@pytest.mark.slow
def test_a_folder_with_modules_of_the_same_names_shadows_nothing(tmp_path: Path) -> None:
    """`tasks.py` is what many a project has, and Ray puts the driver's folder first."""
    for name in ("kpmask", "tasks", "flows"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('somebody else is imported')\n")
    (tmp_path / "own.py").touch()
    done = subprocess.run(
        [sys.executable, "-P", "-c", WHERE],  # as a console script: without the folder itself
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *ours, own = (Path(line).parent for line in done.stdout.split())
    assert {path.parent for path in ours} == {ROOT}
    assert own == tmp_path, "what users bring is still found"

"""Catalogs in this process, for tests of what a run decides."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from kpmask.config import AnimateJob
from kpmask.records import AnimationItem, Failure
from tasks.catalog import planned_catalog
from tests.support.inline import run_bundles_inline


def inline_catalogs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have catalogs made here, decoded and encoded by the worker itself, for the test."""
    monkeypatch.setattr("tasks.animate.run_bundles", run_bundles_inline)
    monkeypatch.setattr("tasks.animate.ray_session", nullcontext)
    monkeypatch.setattr("tasks.animate.with_gpus", lambda cluster, device: cluster)
    monkeypatch.setattr("tasks.animate.num_fitting", lambda cluster, also_cpus: 1.0)
    monkeypatch.setattr("tasks.render.CPU_MEDIA_WORKERS", 0)


@dataclass(frozen=True, slots=True)
class WholePlan:
    """What a catalog asks for, all of it in memory: items in their turn, and failures."""

    weights_sha256: str
    settings_digest: str
    items: tuple[AnimationItem, ...]
    failures: tuple[Failure, ...]


def whole_plan(job: AnimateJob) -> WholePlan:
    """Of a small catalog; raises what `planned_catalog` does."""
    with (
        tempfile.TemporaryDirectory(prefix="kpmask-") as folder,
        planned_catalog(job, Path(folder)) as plan,
    ):
        items, failures = tuple(plan.book.items()), tuple(plan.book.failures())
        return WholePlan(plan.weights_sha256, plan.settings_digest, items, failures)

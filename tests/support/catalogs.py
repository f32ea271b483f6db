"""Catalogs in this process, for tests of what a run decides."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from tests.support.inline import run_bundles_inline


def inline_catalogs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have catalogs made here, decoded and encoded by the worker itself, for the test."""
    monkeypatch.setattr("tasks.animate.run_bundles", run_bundles_inline)
    monkeypatch.setattr("tasks.animate.ray_session", nullcontext)
    monkeypatch.setattr("tasks.animate.with_gpus", lambda cluster, device: cluster)
    monkeypatch.setattr("tasks.animate.num_fitting", lambda cluster, also_cpus: 1.0)
    monkeypatch.setattr("tasks.render.CPU_MEDIA_WORKERS", 0)

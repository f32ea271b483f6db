"""Fixtures that every test may use."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# Before anything imports the parts: no telemetry, and no state in the user's home.
os.environ.update(
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    RAY_USAGE_STATS_ENABLED="0",
)

DEV_DATA = Path(__file__).parents[2] / "shared" / "data" / "dev"


@pytest.fixture
def dev_data() -> Path:
    """The internal folder of real media beside the checkout."""
    if not DEV_DATA.is_dir():
        pytest.skip("the internal media folder is not beside this checkout")
    return DEV_DATA


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Every test starts from the same random state and leaves none behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield

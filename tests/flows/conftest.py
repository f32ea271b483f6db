"""Fixtures of the flows' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.prefect_server import PrefectServer


@pytest.fixture(scope="session")
def api_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API of a Prefect server with its schedulers."""
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    server.start()
    yield server.url
    server.stop()

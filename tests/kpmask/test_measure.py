"""Which tables may be joined."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kpmask import evaluate
from kpmask.errors import ConfigError
from kpmask.measure import same_measure, same_tables
from kpmask.records import MetricInfo, ScoreTable

AKD = MetricInfo(
    name="akd_facemesh",
    version="1+2",
    weights_sha256="ab" * 32,
    licence="Apache-2.0",
    higher_is_better=False,
    estimator="facemesh",
    coverage="coverage_facemesh",
)
L1 = MetricInfo(
    name="l1", version="1", weights_sha256=None, licence="Apache-2.0", higher_is_better=False
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "1+3"),
        ("weights_sha256", "cd" * 32),
        ("weights_sha256", None),
        ("estimator", "fan"),
        ("coverage", "coverage_fan"),
        ("counts_first", True),
        ("quantise", "truncate"),
        ("higher_is_better", True),
        ("of_set", True),
    ],
)
def test_what_shapes_a_number_must_agree(field: str, value: Any) -> None:
    other = dataclasses.replace(AKD, **{field: value})
    with pytest.raises(ConfigError, match=f"{field} is .* and .*") as caught:
        same_measure([L1, AKD], [other, L1])
    assert caught.value.subject == "akd_facemesh"
    assert evaluate.same_measure is same_measure


def test_what_does_not_shape_it_may_differ() -> None:
    same_measure([L1, AKD], [dataclasses.replace(AKD, licence="MIT")])
    same_measure([AKD], [L1])  # nothing that both have
    compared = {field.name for field in dataclasses.fields(MetricInfo)} - {"name", "licence"}
    assert len(compared) == 8, "a new field must be thought of in the test above"


def table(**values: Any) -> ScoreTable:
    given: dict[str, Any] = {
        "uri": "here",
        "settings_digest": "0",
        "dataset_id": "d",
        "weights_sha256": "w",
        "perceptual": "none",
        "num_videos": 1,
        "num_failures": 0,
        "metrics": (L1, AKD),
        "summaries": (),
    }
    return ScoreTable(**(given | values))


def test_tables_of_one_setting_join() -> None:
    same_tables({"a": table(), "b": table(motion="relative"), "c": table(weights_sha256="x")})
    with pytest.raises(ConfigError, match="reconstruction and cross relative") as caught:
        same_tables({"a": table(), "b": table(setting="cross", motion="relative")})
    assert caught.value.subject == "a and b"
    with pytest.raises(ConfigError, match="cross absolute and cross relative"):
        same_tables({"a": table(setting="cross"), "b": table(setting="cross", motion="relative")})
    newer = dataclasses.replace(L1, version="2")
    with pytest.raises(ConfigError, match="version is 1 and 2"):
        same_tables({"a": table(), "b": table(), "c": table(metrics=(newer,))})
    # Though neither has anything to say against the one between them.
    with pytest.raises(ConfigError, match="version is 1 and 2"):
        same_tables({"a": table(), "b": table(metrics=(AKD,)), "c": table(metrics=(newer,))})

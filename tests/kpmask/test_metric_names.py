"""What metrics are called, and what is said of a name that is none."""

from __future__ import annotations

import pytest

from kpmask.metric_names import (
    METRICS,
    SPELLED,
    coverage_of,
    estimator_of,
    kind_of,
    known_metric,
)


@pytest.mark.parametrize("name", METRICS)
def test_every_name_is_spelled_out(name: str) -> None:
    assert known_metric(name) == name
    assert kind_of(name) in SPELLED
    assert estimator_of(name) in SPELLED
    assert coverage_of(name) in ("", *METRICS)


def test_a_wrong_name_is_told_from_those_that_are_near() -> None:
    with pytest.raises(ValueError, match=r"akd_facemesh or .*, perhaps") as caught:
        known_metric("akd_facemsh")
    assert SPELLED in str(caught.value)
    with pytest.raises(ValueError, match=r"no metric 'zzz'\. There are l1"):
        known_metric("zzz")

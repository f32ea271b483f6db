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
    missed_of,
)


@pytest.mark.parametrize("name", METRICS)
def test_every_name_is_spelled_out(name: str) -> None:
    assert known_metric(name) == name
    assert kind_of(name) in SPELLED
    assert estimator_of(name) in SPELLED
    assert coverage_of(name) in ("", *METRICS)


def test_what_leaves_points_out_is_read_with_how_many() -> None:
    assert missed_of("akd_movenet_found") == "mkr_movenet"
    assert missed_of("akd_motion_openposeone_found") == "mkr_openposeone"
    for name in ("akd_movenet", "csim_truth_sface_found", "l1", "mkr_movenet"):
        assert missed_of(name) == "", name
    assert {missed_of(name) for name in METRICS} <= {"", *METRICS}


def test_a_wrong_name_is_told_from_those_that_are_near() -> None:
    with pytest.raises(ValueError, match=r"akd_facemesh or .*, perhaps") as caught:
        known_metric("akd_facemsh")
    assert SPELLED in str(caught.value)
    with pytest.raises(ValueError, match=r"no metric 'zzz'\. There are l1"):
        known_metric("zzz")

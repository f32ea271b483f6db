"""Mutated files of every container and codec: clips, or failures with a code, and nothing else.

Each is cut in a process of its own with a limit of memory and time: a crash of a library, a hang
or a gigabyte is seen, and the next file is tried. `python -m tests.bench.fuzz` runs as many as
one likes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fuzz import Cutter, Outcome, campaign, make_seeds, mutated, table


@pytest.mark.parametrize(
    "count", [66, pytest.param(1500, marks=pytest.mark.long)], ids=["some", "many"]
)
def test_damage_gives_clips_or_codes(count: int, tmp_path: Path) -> None:
    trials = list(campaign(tmp_path, range(count), seed=7))
    assert all(trial.outcome.is_good for trial in trials), table(trials)
    # It is neither too hard nor too soft: some are cut all the same, others in many ways not.
    shares = sum("clips" in trial.outcome.codes for trial in trials) / count
    assert 0.2 < shares < 0.8
    assert len({code for trial in trials for code in trial.outcome.codes}) >= 6


def test_good_files_are_cut(tmp_path: Path) -> None:
    paths = make_seeds(tmp_path / "good")
    with Cutter() as cutter:
        for path in paths:
            outcome = cutter.cut(path, tmp_path / "cut")
            assert outcome.is_good, (path.name, outcome)
            assert set(outcome.codes) <= {"clips", "too_short"}, (path.name, outcome.codes)
            assert "clips" in outcome.codes


def test_mutations_follow_from_their_number() -> None:
    seeds = [bytes(range(256)) * 4, b"\0\0\0\x10moov" * 100]
    files = [mutated(seeds, number, seed=1) for number in range(200)]
    assert files == [mutated(seeds, number, seed=1) for number in range(200)]
    assert files != [mutated(seeds, number, seed=2) for number in range(200)]
    assert sum(data != seeds[which] for which, _, data in files) > 190
    assert all(data for _, _, data in files)


def _crash(path: Path, folder: Path) -> tuple[str, ...]:
    import ctypes

    ctypes.string_at(0)
    raise AssertionError


def test_the_cutter_survives_a_crash(tmp_path: Path) -> None:
    """And tells of memory, of unknown codes and of exceptions."""
    path = make_seeds(tmp_path / "good")[0]
    with Cutter(work=_crash) as cutter:
        assert cutter.cut(path, tmp_path / "cut").codes == ("crash -11",)
        assert cutter.cut(path, tmp_path / "cut").codes == ("crash -11",)
    assert not Outcome(("crash -11",)).is_good
    assert not Outcome(("clips", "TypeError")).is_good
    assert not Outcome(("clips",), peak_bytes=2**30).is_good
    assert not Outcome(()).is_good
    assert Outcome(("clips", "truncated"), peak_bytes=2**28).is_good

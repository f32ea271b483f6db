"""Which clips are drawn from which, and which metrics mean anything then."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kpmask.config import ScoreSetting, validated
from kpmask.errors import ConfigError, RowError
from kpmask.metric_names import METRICS, SET_METRICS
from kpmask.records import ClipRecord
from kpmask.score_settings import held_out, read_pairs, refuse_unfit, spread_pairs, suits


def clip(clip_id: str, identity: str, *, num_frames: int = 10, name: str = "") -> ClipRecord:
    return ClipRecord(
        clip_id=clip_id,
        name=name or f"{identity}-{clip_id}",
        partition="test",
        identity=identity,
        video_id=identity,
        shard="test/shard-00000.arrow",
        row=0,
        num_frames=num_frames,
        fps=25.0,
        width_px=32,
        height_px=32,
        start_s=0.0,
        end_s=1.0,
        crop_px=(0, 0, 32, 32),
        clamped=False,
        num_frames_lost=0,
        sha256="0" * 64,
    )


# --- pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 40, 1000])
def test_pairs_are_spread_over_sources_and_drivers(count: int) -> None:
    clips = [clip(f"c{n}", f"person {n}") for n in range(8)]
    pairs = spread_pairs(clips, count)
    ids = [(a.clip_id, b.clip_id) for a, b in pairs]
    assert len(ids) == len(set(ids)) == min(count, 8 * 7)
    for side in (0, 1):
        times = Counter(pair[side] for pair in ids)
        uses = [times[c.clip_id] for c in clips]
        assert max(uses) - min(uses) <= 1
    random.shuffle(clips)
    assert [(a.clip_id, b.clip_id) for a, b in spread_pairs(clips, count)] == ids


def test_pairs_are_of_two_identities_or_there_are_none() -> None:
    clips = [clip(f"c{n}", f"person {n % 2}") for n in range(6)]
    pairs = spread_pairs(clips, 1000)
    assert len(pairs) == 2 * 3 * 3
    assert all(a.identity != b.identity for a, b in pairs)
    assert spread_pairs([clip("a", "one"), clip("b", "one")], 5) == []
    assert spread_pairs([], 5) == []
    # There are a billion pairs of them, which would take hours to go through.
    assert spread_pairs([clip(f"c{n}", "one") for n in range(50_000)], 5) == []


def test_a_table_of_pairs_is_not_trusted(tmp_path: Path) -> None:
    clips = [
        clip("id-a", "ann", name="walk"),
        clip("id-b", "bob", name="run"),
        clip("id-c", "bob", name="twice"),
        clip("id-d", "eve", name="twice"),
    ]
    table = tmp_path / "pairs.csv"
    table.write_text(
        "driving,source\n"
        "run,walk\n"
        "id-d,id-b\n"
        "nobody,walk\n"
        "twice,walk\n"
        "id-c,run\n"
        "id-b,id-a\n"
        "run\n"
        f"{'x' * 200_000},walk\n"
        "id-d,walk\n"
    )
    found = list(read_pairs(table, clips))
    pairs = [(p[0].clip_id, p[1].clip_id) for p in found if not isinstance(p, RowError)]
    assert pairs == [("id-a", "id-b"), ("id-b", "id-d"), ("id-a", "id-d")]
    errors = [e for e in found if isinstance(e, RowError)]
    assert [(e.subject, e.code, e.cause) for e in errors] == [
        ("line 4", "bad_row", "driving: no clip is called 'nobody' in this split"),
        ("line 5", "bad_row", "driving: 2 clips are called 'twice' in this split"),
        ("line 6", "bad_row", "source and driving are both of 'bob'"),
        ("line 7", "duplicate_row", "the pair is there already"),
        ("line 8", "bad_row", "1 cells, and 2 columns"),
        ("line 9", "bad_row", "the line has more than 131072 characters"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "source\na\n", "source,driving,colour\na,b,red\n", "source,source\na,b\n"),
        "source,driving,source\na,b,c\n",
    ],
)
def test_a_table_without_the_columns_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(ConfigError, match="the columns source and driving"):
        list(read_pairs(tmp_path / "pairs.csv", []))
    with pytest.raises(ConfigError):
        list(read_pairs(tmp_path / "none.csv", []))


# --- held-out frames -------------------------------------------------------------------------


def test_held_out_frames_are_spread_over_the_other_clips() -> None:
    clips = [
        clip("3", "ann", name="c", num_frames=30),
        clip("1", "ann", name="a", num_frames=99),
        clip("2", "ann", name="b", num_frames=10),
    ]
    for order in (clips, clips[::-1]):
        (ann,) = held_out(order, 8)
        assert (ann.identity, ann.source.clip_id) == ("ann", "1")
        frames = {c.clip_id: numbers for c, numbers in ann.frames}
        # 40 frames in a row, one in the middle of each eighth
        assert frames == {"2": (2, 7), "3": (2, 7, 12, 17, 22, 27)}


def test_a_single_clip_gives_its_second_half_and_a_single_frame_nothing() -> None:
    people = held_out(
        [clip("1", "ann", num_frames=9), clip("2", "bob", num_frames=1), clip("3", "al")], 32
    )
    assert [(p.identity, [numbers for _, numbers in p.frames]) for p in people] == [
        ("al", [(5, 6, 7, 8, 9)]),
        ("ann", [(5, 6, 7, 8)]),
        ("bob", []),
    ]


# --- metrics ---------------------------------------------------------------------------------


def test_what_compares_pixels_is_refused_for_another_identity() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_unfit(("l1", "csim_source_sface", "csim_truth_sface"), "cross")
    assert caught.value.cause.startswith("l1, csim_truth_sface: ")
    for kind in ("akd_motion", "mkr", "coverage_source", "csim_source", "jitter"):
        assert f" {kind}_ESTIMATOR" in caught.value.cause
    assert "akd_motion_movenet_found" in caught.value.hint
    fit = {name for name in METRICS if suits(name, "cross")}
    assert not fit & {"l1", "ssim", "flicker", "aed_sq_sface", "csim_truth_sface", *SET_METRICS}
    refuse_unfit(sorted(fit), "cross")


def test_what_is_over_time_is_refused_for_held_out_frames() -> None:
    refuse_unfit(("l1", "ssim", "csim_truth_sface", "akd_facemesh"), "few_shot")
    for name in ("temporal_error", "jitter_facemesh_found", "akd_motion_movenet", "l1_with_first"):
        with pytest.raises(ConfigError, match=f"^metrics: {name}: "):
            refuse_unfit(("ssim", name), "few_shot")
    refuse_unfit(METRICS, "reconstruction")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"motion": "relative"}, "motion is for kind = cross, not reconstruction"),
        ({"kind": "few_shot", "pairs": "p.csv"}, "pairs is for kind = cross, not few_shot"),
        ({"kind": "cross", "num_frames": 8}, "num_frames is for kind = few_shot, not cross"),
        ({"kind": "cross", "pairs": "p.csv", "num_pairs": 9}, "give num_pairs or pairs"),
        ({"kind": "cross", "num_pairs": 0}, "greater than 0"),
    ],
)
def test_what_means_nothing_in_a_setting_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validated(ScoreSetting, values)

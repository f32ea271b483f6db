"""The page of an evaluation: what it says, and how clips are looked at in a browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from kpmask.errors import ConfigError
from kpmask.evaluate import paired_scores, summarise
from kpmask.media.encode import encode
from kpmask.metric_names import METRICS, SET_METRICS, coverage_of, estimator_of
from kpmask.records import (
    FrameScores,
    Method,
    MetricInfo,
    ScoreTable,
    SetScore,
    VideoScore,
)
from kpmask.report import GalleryMedia, evaluation_page, score_clips, score_plots
from kpmask.report import evaluation as page_module
from kpmask.report.evaluation import compared_rows, method_rows
from kpmask.report.metric_labels import GROUPS, metric_label
from kpmask.report.page import figure
from kpmask.report.published import PUBLISHED, PublishedTable, differences
from tests.support.chromium import Chromium
from tests.support.pages import Page

SHA = "ab12" * 16
HOSTILE = "</script><script>alert(1)</script>\" onload='x \u202egnp.\u202c & é"
NUM_CLIPS = 9
NUM_FRAMES = 24
FPS = 12.0
SIDE_PX = 64
HIGHER = ("psnr", "ssim", "csim", "coverage")
METHODS: tuple[Method, ...] = ("model", "copy", "codec")


def info(name: str, **changes: Any) -> MetricInfo:
    made = MetricInfo(
        name=name,
        version="1+2" if estimator_of(name) else "1",
        weights_sha256=SHA if estimator_of(name) else None,
        licence="Apache-2.0",
        higher_is_better=name.startswith(HIGHER),
        estimator=estimator_of(name),
        coverage=coverage_of(name),
        of_set=name == "frechet_sface",
    )
    return dataclasses.replace(made, **changes)


def value_of(name: str, method: Method, number: int, frame: int) -> float:
    """Any formula, but for each metric another order of the clips."""
    worse = {"model": 1.0, "copy": 2.5, "codec": 0.1}[method]
    wave = 1 + 0.5 * math.sin(0.4 * frame + number)
    if name.startswith("coverage"):
        return 1.0 if (frame + number) % 20 or method == "codec" else 0.0
    if name.startswith(HIGHER):
        return 0.95 - 0.03 * worse * wave - 0.02 * ((number * 4) % NUM_CLIPS)
    return 0.01 * worse * wave * (1 + (number * (2 if "akd" in name else 5)) % NUM_CLIPS)


NAMES = ("l1", "ssim", "akd_facemesh", "akd_facemesh_found", "coverage_facemesh")


def frame_scores(names: tuple[str, ...] = NAMES) -> list[FrameScores]:
    return [
        FrameScores(
            clip_id=f"{number:032x}",
            name=f"clip-{number}",
            metric=name,
            method=method,
            values=tuple(
                math.nan
                if "found" in name and frame == 7
                else value_of(name, method, number, frame)
                for frame in range(NUM_FRAMES)
            ),
        )
        for number in range(NUM_CLIPS)
        for name in names
        for method in METHODS
    ]


def evaluation(
    names: tuple[str, ...] = NAMES, **changes: Any
) -> tuple[ScoreTable, list[VideoScore], list[FrameScores]]:
    """A table that follows from its videos' scores, and they from those of frames."""
    frames = frame_scores(tuple(name for name in names if name != "frechet_sface"))
    scores = [
        VideoScore(
            clip_id=row.clip_id,
            name=row.name,
            metric=row.metric,
            method=row.method,
            value=float(np.nanmean(row.values[1:])),
            num_frames=NUM_FRAMES - 1,
        )
        for row in frames
    ]
    infos = tuple(info(name) for name in names)
    table = ScoreTable(
        uri="e/x",
        settings_digest=SHA,
        dataset_id=SHA,
        weights_sha256=SHA,
        perceptual="vgg19",
        num_videos=NUM_CLIPS,
        num_failures=0,
        metrics=infos,
        summaries=summarise(scores),
        paired=paired_scores(scores, infos),
    )
    return dataclasses.replace(table, **changes), scores, frames


def media_of(number: int) -> GalleryMedia:
    return GalleryMedia(f"m/{number}.jpg", f"m/{number}-true.mp4", f"m/{number}.mp4")


MEDIA = {f"{number:032x}": media_of(number) for number in range(NUM_CLIPS)}


def page_of(names: tuple[str, ...] = NAMES, **changes: Any) -> str:
    table, scores, frames = evaluation(names)
    values = {"table": table, "scores": scores, "frames": frames, "media": MEDIA, **changes}
    return evaluation_page(title="x", failures=[], **values)


def data_of(html: str) -> dict[str, Any]:
    text = Page(html).data["evaluation-data"]
    found: dict[str, Any] = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    return found


def ranked(name: str) -> list[int]:
    """Clips, the worst first."""
    _, scores, _ = evaluation()
    mine = {s.name: s.value for s in scores if (s.metric, s.method) == (name, "model")}
    order = sorted(mine, key=lambda clip: mine[clip], reverse=not name.startswith(HIGHER))
    return [int(clip.removeprefix("clip-")) for clip in order]


# --- labels ----------------------------------------------------------------------------------

COMING = (
    *("akd_fan", "akd_openpose_found", "mkr_openpose", "aed_sq_openface", "csim_truth_arcface"),
    *("aed_l2_reid", "akd_motion_facemesh", "lpips_alex", "fid", "fvd", "frechet_sface"),
)


def test_every_metric_has_a_label_a_text_and_a_group() -> None:
    names = [*METRICS, *SET_METRICS, *COMING]
    labels = {name: metric_label(name) for name in names}
    for name, label in labels.items():
        assert label.label != name, name
        assert label.text.endswith("."), name
        assert label.unit in {"", "px", "px/frame²", "dB"}, name
        assert label.group in GROUPS
        assert "{" not in label.text
        # A sentence on what was missed, or on what was left out: one of them.
        assert ("coverage" in label.text) == name.endswith("_found") or name.startswith("coverage")
    assert len({label.label for label in labels.values()}) == len(set(names))


def test_a_name_that_is_not_known_is_shown_as_it_is() -> None:
    for name in ("sharpness", "akd_unheard", "unheard_facemesh"):
        assert metric_label(name).label == name


# --- published numbers -----------------------------------------------------------------------

# The papers print how much better theirs is than FOMM, in percent: from their tables, not from
# what was typed off them.
IMPROVEMENTS = {
    ("Image Animation with Keypoint Mask", "Tai-Chi-HD"): {"AKD": 19.2, "AED": 15.5, "L1": 28.5},
    ("Image Animation with Refined Masking", "Tai-Chi-HD"): {
        "L1": 25.4,
        "AKD": 38.2,
        "MKR": 58.3,
        "AED": 17.9,
    },
    ("Image Animation with Refined Masking", "VoxCeleb"): {"L1": 20.9, "AKD": -2.7, "AED": 7.1},
    ("Image Animation with Refined Masking", "RoboNet"): {"L1": 22.2},
}


def published(paper: str, dataset: str) -> PublishedTable:
    (found,) = [t for t in PUBLISHED if (t.paper, t.dataset) == (paper, dataset)]
    return found


@pytest.mark.parametrize(("paper", "dataset"), list(IMPROVEMENTS))
def test_published_numbers_give_the_published_improvements(paper: str, dataset: str) -> None:
    table = published(paper, dataset)
    rows = {method: scores for (method, _), scores in table.rows.items()}
    own = rows["keypoint mask" if "Keypoint" in paper else "refined masking"]
    assert set(IMPROVEMENTS[paper, dataset]) == {metric.name for metric in table.metrics}
    for metric, printed in IMPROVEMENTS[paper, dataset].items():
        theirs = rows["FOMM"][metric].value
        # Half a digit of what is printed: 15.57 % stands there as 15.5.
        assert 100 * (theirs - own[metric].value) / theirs == pytest.approx(printed, abs=0.1)


def test_people_chose_one_of_four() -> None:
    votes = [table for table in PUBLISHED if table.table == "Table 3"]
    assert len(votes) == 3
    for table in votes:
        for metric in ("Quality", "Motion"):
            shares = [scores[metric].value for scores in table.rows.values()]
            assert sum(shares) == 100
            assert all(share % 4 == 0 for share in shares)  # of 25 people


def test_more_pictures_to_tune_on_are_no_worse() -> None:
    table = published("Image Animation with Refined Masking", "VoxCeleb1, few shots")
    for method in ("X2Face", "Pix2PixHD", "FSAL"):
        for metric in ("SSIM", "CSIM"):
            values = [table.rows[method, f"#FT = {n}"][metric].value for n in (1, 8, 32)]
            assert values == sorted(values)
    ours = table.rows["refined masking", "#FT = 0"]
    assert ours["SSIM"].value == max(
        score.value for score in table.scores if score.metric == "SSIM"
    )


def test_rows_said_to_be_copied_are_the_same() -> None:
    copied = [score for table in PUBLISHED for score in table.scores if score.same_as]
    assert len(copied) == 9
    for score in copied:
        paper, _, number = score.same_as.rpartition(", ")
        (found,) = [
            other
            for table in PUBLISHED
            if (table.paper, table.table, table.dataset) == (paper, number, score.dataset)
            for other in table.scores
            if (other.method, other.metric) == (score.method, score.metric)
        ]
        assert found.value == score.value


PAPER_L1 = info("l1_with_first", counts_first=True)


def test_ours_stands_below_theirs_only_where_it_is_made_the_same_way() -> None:
    taichi = published("Image Animation with Refined Masking", "Tai-Chi-HD")
    l1 = taichi.metrics[0]
    table, scores, _ = evaluation(("l1",))
    alike = dataclasses.replace(
        table,
        metrics=(PAPER_L1,),
        summaries=summarise(dataclasses.replace(s, metric="l1_with_first") for s in scores),
        average="frames",
    )
    assert differences(l1, alike) == []
    html = evaluation_page(title="x", table=alike, scores=[], failures=[])
    assert html.count('<tbody class="ours">') == 4  # Tai-Chi-HD of both papers, VoxCeleb, RoboNet
    bodies = re.findall(r'<tbody class="theirs">.*?</tbody>', html, re.S)
    assert len(bodies) == len(PUBLISHED)
    assert not any("this model" in body for body in bodies)
    (mine,) = [s for s in alike.summaries if s.method == "model"]
    row = re.search(r'<tbody class="ours">.*?</tbody>', html, re.S)
    assert row is not None
    assert figure(mine.pooled) in row[0]

    unlike = {
        "average": dataclasses.replace(alike, average="videos"),
        "setting": dataclasses.replace(alike, setting="cross"),
        "first": dataclasses.replace(alike, metrics=(info("l1_with_first"),)),
        "rounded": dataclasses.replace(
            alike, metrics=(dataclasses.replace(PAPER_L1, quantise="round"),)
        ),
        "other": table,
    }
    words = {
        "average": "that of the videos' means",
        "setting": "this evaluation of another identity's motion",
        "first": "frame 0",
        "rounded": "rounded to 8 bits",
        "other": "it takes L1 with first (l1_with_first)",
    }
    for name, other in unlike.items():
        (reason,) = differences(l1, other)
        assert words[name] in reason
        html = evaluation_page(title="x", table=other, scores=[], failures=[])
        assert '<tbody class="ours">' not in html


def test_another_estimator_is_said_to_be_another() -> None:
    table, scores, frames = evaluation()
    vox = published("Image Animation with Refined Masking", "VoxCeleb")
    (reason,) = differences(vox.metrics[1], table)
    assert reason == "theirs is by face-alignment, 68 points; AKD FaceMesh finds something else"
    page = Page(evaluation_page(title="x", table=table, scores=scores, failures=[], frames=frames))
    assert f"Nothing of ours beside it: {reason}." in page.text


def test_published_numbers_are_printed_as_the_papers_print_them() -> None:
    text = Page(page_of()).text
    for words in ("17.654", "0.080", "6.862", "6.872", "0.130", "0.70", "88", "#FT = 0"):
        assert words in text


# --- tables ----------------------------------------------------------------------------------


def best_of(table: ScoreTable) -> dict[str, list[str]]:
    """The names of the methods that are marked, by metric."""
    return {
        metric.name: [row.name for row in method_rows(table) if row.cells[place].best]
        for place, metric in enumerate(table.metrics)
    }


def covered(table: ScoreTable, model: float, copy: float) -> ScoreTable:
    shares = {"model": model, "copy": copy}
    return dataclasses.replace(
        table,
        summaries=tuple(
            dataclasses.replace(s, mean=shares.get(s.method, 1.0))
            if s.metric.startswith("coverage")
            else s
            for s in table.summaries
        ),
    )


def test_found_frames_alone_have_no_best_where_coverages_differ() -> None:
    table, _, _ = evaluation()
    alike = best_of(covered(table, 0.98, 0.97))
    assert alike["akd_facemesh"] == alike["akd_facemesh_found"] == ["this model"]
    apart = best_of(covered(table, 0.96, 0.98))
    assert apart["akd_facemesh"] == ["this model"]
    assert apart["akd_facemesh_found"] == []
    assert apart["coverage_facemesh"] == ["copy of the source"]
    without = dataclasses.replace(
        table, summaries=tuple(s for s in table.summaries if not s.metric.startswith("cov"))
    )
    assert best_of(without)["akd_facemesh_found"] == []


def test_lost_joints_are_no_merit() -> None:
    """A frame counts as covered as soon as one joint of it was found."""
    names = ("akd_movenet_found", "mkr_movenet", "coverage_movenet")
    table = covered(evaluation(names)[0], 1, 1)
    alike = means(table, "mkr_movenet", model=0.101, copy=0.1)
    assert best_of(alike)["akd_movenet_found"] == ["this model"]
    apart = means(table, "mkr_movenet", model=0.4, copy=0.1)
    assert best_of(apart)["akd_movenet_found"] == []


def means(table: ScoreTable, metric: str, **values: float) -> ScoreTable:
    """The table with other means of a metric, by method."""
    return dataclasses.replace(
        table,
        summaries=tuple(
            dataclasses.replace(s, mean=values[s.method])
            if s.metric == metric and s.method in values
            else s
            for s in table.summaries
        ),
    )


@pytest.mark.parametrize(
    ("metric", "copy_is_best"),
    [
        *(("l1", True), ("temporal_error", True), ("csim_truth_sface", True)),
        *(("flicker", False), ("csim_source_sface", False), ("csim_source_sface_found", False)),
    ],
)
def test_a_copy_is_not_the_best_of_what_it_is_by_nature(metric: str, copy_is_best: bool) -> None:
    table, _, _ = evaluation((metric, "coverage_sface", "coverage_source_sface"))
    good, bad = (0.9, 0.1) if metric.startswith(HIGHER) else (0.1, 0.9)
    for coverage in ("coverage_sface", "coverage_source_sface"):
        table = means(table, coverage, model=1, copy=1)
    wins = means(table, metric, model=bad, copy=good, codec=bad)
    assert best_of(wins)[metric] == (["copy of the source"] if copy_is_best else [])
    # Systems are rivals of each other all the same.
    two = compared_rows({"one": wins, "two": means(table, metric, model=good, copy=good)})
    marked = [row.name for row in two if row.cells[0].best]
    assert marked == ["two", *(["copy of the source"] if copy_is_best else [])]


def test_where_all_are_equal_none_is_the_best() -> None:
    table, _, _ = evaluation()
    assert best_of(means(table, "l1", model=0.5, copy=0.5, codec=0.1))["l1"] == []


def tiles_of(html: str) -> list[tuple[str, str]]:
    """Value and label."""
    (tiles,) = re.findall(r'<ul class="tiles">(.*?)</ul>', html, re.S)
    return re.findall(r"<b>(.*?)</b><span>(.*?)</span>", tiles)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (
            (
                *("l1_with_first", "psnr", "flicker", "l1", "mkr_facemesh", "akd_facemesh_found"),
                *("akd_facemesh", "csim_truth_sface", "aed_sq_sface", "ssim", "coverage_facemesh"),
            ),
            ["l1", "ssim", "akd_facemesh_found", "csim_truth_sface"],
        ),
        (("psnr", "akd_motion_facemesh", "aed_l2_sface"), ["akd_motion_facemesh", "aed_l2_sface"]),
        (("coverage_facemesh", "psnr", "flicker"), ["psnr", "flicker"]),
    ],
)
def test_tiles_are_of_what_matters(names: tuple[str, ...], wanted: list[str]) -> None:
    table, scores, _ = evaluation(names, setting="cross")
    found = tiles_of(evaluation_page(title="x", table=table, scores=scores, failures=[]))
    assert found[0] == (str(NUM_CLIPS), "pairs")
    mine = {s.metric: figure(s.mean) for s in table.summaries if s.method == "model"}
    labels = {name: metric_label(name) for name in wanted}
    assert found[1:-1] == [
        (mine[name], f"{label.label}, {label.unit}" if label.unit else label.label)
        for name, label in labels.items()
    ]
    assert found[-1] == ("0", "failures")


def test_a_codec_is_spoken_of_where_there_is_one() -> None:
    table, scores, _ = evaluation(("l1",), setting="few_shot")

    def lead(table: ScoreTable) -> str:
        html = evaluation_page(title="x", table=table, scores=scores, failures=[])
        return Page(html).text.partition("Summary")[0]

    assert "and that of the codec" in lead(table)
    rows = tuple(s for s in table.summaries if s.method != "codec")
    without = lead(dataclasses.replace(table, summaries=rows, num_videos=1))
    assert "codec" not in without and "1person" in without


def test_a_tile_is_of_sets_where_there_is_nothing_of_identities() -> None:
    table, scores, _ = evaluation(("l1", "frechet_sface"))
    table = dataclasses.replace(table, sets=(SetScore("frechet_sface", "model", 0.31, 300, 7200),))
    found = tiles_of(evaluation_page(title="x", table=table, scores=scores, failures=[]))
    assert found[2] == ("0.3100", "Fréchet SFace")


def test_an_estimator_that_found_nothing_has_no_numbers_and_no_best() -> None:
    table, scores, _ = evaluation()
    lost = dataclasses.replace(
        table,
        summaries=tuple(s for s in table.summaries if not s.metric.startswith("akd")),
        paired=(),
    )
    assert best_of(lost)["akd_facemesh"] == best_of(lost)["akd_facemesh_found"] == []
    left = [score for score in scores if not score.metric.startswith("akd")]
    html = evaluation_page(title="x", table=lost, scores=left, failures=[], media=MEDIA)
    assert "no video" not in html
    data = data_of(html)
    assert all(clip["values"][2] is None for clip in data["clips"])


def test_coverage_stands_beside_an_estimators_value() -> None:
    table, scores, _ = evaluation()
    html = evaluation_page(title="x", table=covered(table, 0.976, 1), scores=scores, failures=[])
    row = re.search(r'aria-label="Faces: MediaPipe FaceMesh".*?<tbody>(.*?)</tr>', html, re.S)
    assert row is not None
    cells = re.findall(r"<td.*?</td>", row[1])
    assert ["of 98 %" in cell for cell in cells] == [True, True, False]
    pictures = re.search(r'aria-label="Pictures and motion".*?</table>', html, re.S)
    assert pictures is not None
    assert "of 98 %" not in pictures[0]


def test_a_number_says_what_it_was_made_with() -> None:
    text = Page(page_of()).text
    # Once below the table, and once for each metric with all of the digest.
    assert text.count(f"Estimator facemesh, version 1+2, weights {SHA[:16]}, Apache-2.0.") == 1
    assert text.count(f"Estimator facemesh, version 1+2, weights {SHA}, Apache-2.0.") == 3
    assert text.count("Version 1, Apache-2.0.") == 3


def test_what_most_numbers_share_is_said_once() -> None:
    infos = (info("l1"), info("l1_with_first", counts_first=True), info("ssim"), info("psnr"))
    table, scores, _ = evaluation(("l1",))
    table = dataclasses.replace(table, metrics=infos)
    text = Page(evaluation_page(title="x", table=table, scores=scores, failures=[])).text
    rest = "frames as they are drawn, mean of the videos' means"
    assert f"Frame 0 left out, {rest}; L1 with first: frame 0 counted, {rest}." in text


def test_the_model_is_held_against_the_copy_video_by_video() -> None:
    table, scores, _ = evaluation(("l1", "ssim"))
    html = evaluation_page(title="x", table=table, scores=scores, failures=[])
    body = re.search(r'<tbody class="paired">(.*?)</tbody>', html, re.S)
    assert body is not None
    differences, counts = (re.findall(r"<td.*?</td>", row) for row in body[1].split("</tr>")[:2])
    for cells, name in ((0, "l1"), (1, "ssim")):
        found = {m: [s.value for s in scores if (s.metric, s.method) == (name, m)] for m in METHODS}
        apart = np.array(found["model"]) - np.array(found["copy"])
        assert f"{apart.mean():+.4f}" in differences[cells]
        better = int((apart > 0).sum() if name == "ssim" else (apart < 0).sum())
        assert f">{better}, {NUM_CLIPS - better} " in counts[cells]
        p_value = (
            2
            * 0.5**NUM_CLIPS
            * sum(math.comb(NUM_CLIPS, k) for k in range(min(better, NUM_CLIPS - better) + 1))
        )
        assert f"p = {figure(min(1.0, p_value))}" in counts[cells]


def test_sets_are_columns_too() -> None:
    names = ("l1", "coverage_sface", "frechet_sface")
    table, scores, _ = evaluation(names)
    sets = tuple(
        SetScore("frechet_sface", method, value, 300, 7200)
        for method, value in (("model", 0.31), ("copy", 0.44), ("codec", 0.02))
    )
    table = dataclasses.replace(table, sets=sets)
    html = evaluation_page(title="x", table=table, scores=scores, failures=[])
    found = re.search(r'aria-label="Whole sets of videos".*?</table>', html, re.S)
    assert found is not None
    assert "0.3100" in found[0]
    assert "7 200 samples<br>of 300 videos" in found[0]
    assert best_of(table)["frechet_sface"] == ["this model"]
    heads = re.search(r'<table class="sortable each">.*?</thead>', html, re.S)
    assert heads is not None
    assert "Fréchet" not in heads[0]  # no single video has one
    assert "one value for all videos" in Page(html).text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "reconstruction protocol"),
        ({"setting": "cross"}, "in its poses"),
        ({"setting": "cross", "motion": "relative"}, "by its motion from frame 0 on"),
        ({"setting": "few_shot"}, "#FT = 0"),
        ({"dataset_id": "", "weights_sha256": ""}, "the true one of the same name"),
    ],
)
def test_the_setting_is_said_in_words(changes: dict[str, Any], words: str) -> None:
    table, scores, _ = evaluation(("l1",), **changes)
    html = evaluation_page(title="x", table=table, scores=scores, failures=[])
    assert words in Page(html).text.partition("Summary")[0]


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("version", "2"),
        ("weights_sha256", "cd" * 32),
        ("estimator", "other"),
        ("counts_first", True),
        ("quantise", "round"),
    ],
)
def test_numbers_that_are_made_otherwise_are_not_compared(what: str, value: Any) -> None:
    table, _, _ = evaluation()
    metrics = (dataclasses.replace(table.metrics[0], **{what: value}), *table.metrics[1:])
    with pytest.raises(ConfigError, match=what):
        compared_rows({"a": table, "b": dataclasses.replace(table, metrics=metrics)})


def test_other_videos_are_not_compared() -> None:
    table, _, _ = evaluation()
    for changes in ({"setting": "cross"}, {"dataset_id": "other"}):
        with pytest.raises(ConfigError, match="do not compare"):
            compared_rows({"a": table, "b": dataclasses.replace(table, **changes)})
    rows = compared_rows({"a": table, "b": table})
    assert [row.name for row in rows] == ["a", "b", "copy of the source", "the codec alone"]


# --- plots -----------------------------------------------------------------------------------


def axis_of(plot: score_plots.ScorePlot) -> np.poly1d:
    """Values by x, from where the ticks stand."""
    dots = {dot.value: dot.x for dot in plot.dots}
    return np.poly1d(np.polyfit(list(dots.values()), list(dots), 1))


def plot_of(count: int, **changes: Any) -> score_plots.ScorePlot:
    random = np.random.default_rng(count)
    scores = [
        VideoScore(f"{n}", f"clip-{n}", "l1", method, float(value), 9)
        for method in METHODS
        for n, value in enumerate(random.gamma(2, 0.02, count))
    ]
    plot = score_plots.score_plot(
        "L1", "", higher_is_better=False, scores=scores, summaries=summarise(scores), links={},
        **changes,
    )  # fmt: skip
    assert plot is not None
    values = {m: [s.value for s in scores if s.method == m] for m in METHODS}
    value_at = axis_of(plot)
    assert value_at(plot.x_mean) == pytest.approx(np.mean(values["model"]), abs=2e-5)
    for lane in plot.lanes:
        found = [lane.x_low, lane.x_first, lane.x_median, lane.x_third, lane.x_high]
        wanted = np.percentile(values[lane.method], [0, 25, 50, 75, 100])
        assert value_at(np.array(found)) == pytest.approx(wanted, abs=2e-5)
        assert lane.mean == pytest.approx(np.mean(values[lane.method]))
    return plot


@pytest.mark.parametrize("count", [2, 3, 40])
def test_boxes_hold_the_quartiles(count: int) -> None:
    assert [lane.method for lane in plot_of(count).lanes] == ["copy", "codec"]


def test_many_dots_are_thinned_and_keep_the_ends() -> None:
    whole, thin = plot_of(500), plot_of(500, max_dots=50)
    assert len(thin.dots) == 50
    assert (thin.dots[0], thin.dots[-1]) == (whole.dots[0], whole.dots[-1])
    assert thin.num_videos == 500
    values = [dot.value for dot in whole.dots]
    assert values == sorted(values)


def test_dots_lead_to_the_clip_or_else_to_the_row() -> None:
    some = {clip: media for clip, media in MEDIA.items() if int(clip, 16) < 3}
    page = Page(page_of(("l1",), media=some))
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    dots = [link["href"] for link in page.of("a", tabindex="-1")]
    assert sorted(dots) == sorted(
        [f"#clip-{n}" for n in range(3)] + [f"#video-{n}" for n in range(3, NUM_CLIPS)]
    )
    assert {dot[1:] for dot in dots} <= ids
    cut = Page(page_of(("l1",), media={}, limit=4))
    assert sorted(link["href"] for link in cut.of("a", tabindex="-1")) == [
        f"#video-{n}" for n in range(4)
    ]
    assert len(cut.of("circle")) == NUM_CLIPS


# --- clips -----------------------------------------------------------------------------------


def seen_in(html: str) -> list[str]:
    return [item["aria-label"] for item in Page(html).of("article") if "hidden" not in item]


def test_without_a_script_the_worst_and_best_are_seen() -> None:
    order = [f"clip-{number}" for number in ranked("l1")]
    html = page_of()
    assert seen_in(html) == [order[0], order[-1], order[1], order[-2]]
    for word in ("worst: L1", "best: L1", "2nd worst: L1", "2nd best: L1"):
        assert word in Page(html).text
    assert seen_in(page_of(("ssim", "l1"))) == [
        f"clip-{ranked('ssim')[place]}" for place in (0, -1, 1, -2)
    ]
    only = {f"{3:032x}": media_of(3)}
    assert seen_in(page_of(media=only)) == ["clip-3"]
    assert seen_in(page_of(media={})) == []


@pytest.mark.browser
@pytest.mark.parametrize("name", ["l1", "ssim"])
def test_clips_of_one_value_come_in_the_same_order_with_and_without_a_script(
    name: str, folder: Path, browser: Chromium
) -> None:
    table, scores, frames = evaluation((name,))
    alike = [dataclasses.replace(score, value=0.5) for score in scores]
    html = page_of(table=table, scores=alike, frames=frames)
    path = folder / "alike.html"
    path.write_text(html, encoding="utf-8")
    browser.open(path)
    assert browser.evaluate(SEEN_NAMES) == seen_in(html)


def test_the_data_holds_each_frame_that_counts() -> None:
    data = data_of(page_of())
    curves = {(m, c, method): values for m, c, method, values in data["curves"]}
    assert {method for _, _, method in curves} == {"model", "copy"}
    for place, name in enumerate(NAMES):
        for number in range(NUM_CLIPS):
            found = curves[place, number, "model"]
            wanted = [value_of(name, "model", number, frame) for frame in range(NUM_FRAMES)]
            assert found[0] is None  # frame 0 is not counted
            at = [frame for frame in range(1, NUM_FRAMES) if "found" not in name or frame != 7]
            assert [found[n] for n in at] == pytest.approx([wanted[n] for n in at], rel=1e-3)
            if "found" in name:
                assert found[7] is None
    assert {clip["frames"] for clip in data["clips"]} == {NUM_FRAMES}


def test_curves_are_of_the_frames_that_previews_have() -> None:
    data = data_of(page_of(preview_frames=10))
    assert {(clip["frames"], clip["of"]) for clip in data["clips"]} == {(10, NUM_FRAMES)}
    assert {len(values) for *_, values in data["curves"]} == {10}
    table, scores, frames = evaluation(("l1",))
    counted = (info("l1", counts_first=True),)
    table = dataclasses.replace(table, metrics=counted)
    data = data_of(page_of(table=table, scores=scores, frames=frames))
    assert all(values[0] is not None for *_, values in data["curves"])


def test_curves_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_clips, "MAX_CURVE_VALUES", 20 * NUM_FRAMES)
    data = data_of(page_of())
    assert len(data["curves"]) == 20
    kept = [(metric, clip) for metric, clip, _, _ in data["curves"]]
    assert kept == sorted(kept)  # the first metrics' curves are kept
    assert {clip["frames"] for clip in data["clips"]} == {NUM_FRAMES}


def test_many_videos_by_many_metrics_stay_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MAX_CELLS", 4 * len(NAMES) + 2)
    page = Page(page_of())
    rows = [row for row in page.of("tr") if row.get("id", "").startswith("video-")]
    assert len(rows) == 4
    assert f"The first 4 of {NUM_CLIPS}" in page.text


def test_hostile_names_stay_in_their_places() -> None:
    def html(name: str) -> str:
        _, scores, frames = evaluation()
        return page_of(
            scores=[dataclasses.replace(s, name=f"{name}{s.name}") for s in scores],
            frames=[dataclasses.replace(f, name=f"{name}{f.name}") for f in frames],
            media={clip: GalleryMedia(name, f"{name}.mp4", f"{name}.mp4") for clip in MEDIA},
            note=name,
        )

    plain, page = Page(html("plain")), Page(html(HOSTILE))
    assert [(t, list(a)) for t, a in page.elements] == [(t, list(a)) for t, a in plain.elements]
    assert len(page.programs()) == 1
    assert data_of(html(HOSTILE))["clips"][0]["name"].startswith(HOSTILE)
    assert all(urlsplit(link).scheme in {"", "data"} for link in page.links())


# --- a browser -------------------------------------------------------------------------------


@pytest.fixture
def browser(chromium: Chromium) -> Iterator[Chromium]:
    chromium.point(None)
    # Cards stand still from the start: each test says what plays.
    emulate(chromium, prefers_reduced_motion="reduce")
    yield chromium
    chromium.call("Emulation.setEmulatedMedia", media="", features=[])
    chromium.call("Emulation.setScriptExecutionDisabled", value=False)


def emulate(browser: Chromium, media: str = "", **features: str) -> None:
    pairs = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
    browser.call("Emulation.setEmulatedMedia", media=media, features=pairs)


def level(number: int, frame: int) -> int:
    """The grey of a clip's frame: no two neighbours look alike."""
    return 20 + (frame * 9 + number * 5) % 216


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips whose frames are told apart by their grey: the source is a video too."""
    out = tmp_path_factory.mktemp("evaluation")
    (out / "m").mkdir()
    for number in range(NUM_CLIPS):
        frames = [
            np.full((SIDE_PX, SIDE_PX, 3), level(number, frame), np.uint8)
            for frame in range(NUM_FRAMES)
        ]
        encode(out / "m" / f"{number}.mp4", iter(frames), fps=FPS)
        for other in (f"{number}-true.mp4", f"{number}-source.mp4"):
            (out / "m" / other).hardlink_to(out / "m" / f"{number}.mp4")
        Image.fromarray(frames[0]).save(out / "m" / f"{number}.jpg")
    moving = {
        clip: dataclasses.replace(found, source=found.source.replace(".jpg", "-source.mp4"))
        for clip, found in MEDIA.items()
    }
    (out / "index.html").write_text(page_of(media=moving), encoding="utf-8")
    return out


@pytest.fixture
def page(folder: Path) -> Path:
    return folder / "index.html"


SEEN = "[...document.querySelectorAll('#clips > article:not([hidden])')]"
SEEN_NAMES = f"{SEEN}.map((card) => card.querySelector('h3').textContent)"
SEEN_LINES = f"{SEEN}.map((card) => card.querySelector('[data-line]').textContent)"
FIRST = "document.querySelector('#clips > article')"
TIMES = f"[...{FIRST}.querySelectorAll('video')].map((v) => v.currentTime)"
READY = f"[...{FIRST}.querySelectorAll('video')].every((v) => v.readyState >= 2 && !v.seeking)"
# Beside it the screen: a phone shows a page that is too wide from further away.
WIDTH = "document.documentElement.scrollWidth"
TOLD = f"{FIRST}.querySelector('[data-frame]').textContent"


def choose(browser: Chromium, selector: str, value: str) -> None:
    browser.evaluate(
        f"(() => {{ const s = document.querySelector('{selector}'); s.value = '{value}';"
        " s.dispatchEvent(new Event('change')); })()"
    )


def at_clips(browser: Chromium) -> None:
    browser.evaluate(f"{FIRST}.scrollIntoView({{ block: 'start', behavior: 'instant' }})")
    browser.wait_for(READY)


def spot(browser: Chromium, frame: int) -> tuple[float, float]:
    """Where on the screen a frame of the first card's curve is, by the ends of its axis."""
    line = f"{FIRST}.querySelector('.timeline .axis').getBoundingClientRect()"
    left, right, y = browser.evaluate(f"(b => [b.left, b.right, b.top])({line})")
    return left + (right - left) * frame / (NUM_FRAMES - 1), y - 20


def mouse(browser: Chromium, kind: str, at: tuple[float, float]) -> None:
    browser.call(
        "Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1
    )


def click(browser: Chromium, at: tuple[float, float]) -> None:
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        mouse(browser, kind, at)


def frame_shown(browser: Chromium) -> list[int]:
    """The greys in the middle of the first card's three videos, as they are on the screen."""
    boxes = browser.evaluate(
        f"[...{FIRST}.querySelectorAll('figure')].map((f) => f.getBoundingClientRect())"
        ".map((b) => [b.x + b.width / 2, b.y + b.height / 2])"
    )
    # A busy browser without a screen may leave a frame unpainted until something else changes.
    browser.evaluate(
        "document.querySelectorAll('video').forEach((v) => "
        "{ v.style.outline = v.style.outline ? '' : '1px solid transparent'; })"
    )
    browser.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 60, 1)))")
    shot = browser.call("Page.captureScreenshot", format="png")["data"]
    image = Image.open(io.BytesIO(base64.b64decode(shot))).convert("L")
    return [int(np.asarray(image.getpixel((int(x), int(y))))) for x, y in boxes]


def is_at(browser: Chromium, number: int, frame: int) -> None:
    """Wait until all three videos of the first card are at a frame, and show it."""
    browser.wait_for(f"{TIMES}.every((t) => Math.floor(t * {FPS}) === {frame}) && {READY}")
    assert len(browser.evaluate(TIMES)) == 3
    # An encoder changes greys a little; the next frame's is 9 away.
    wanted = pytest.approx([level(number, frame)] * 3, abs=4)
    for _ in range(50):  # a busy machine paints later than it says to have found the frame
        if frame_shown(browser) == wanted:
            return
    assert frame_shown(browser) == wanted


@pytest.mark.browser
def test_the_worst_and_best_follow_the_metric(browser: Chromium, page: Path) -> None:
    browser.open(page)
    for place, name in enumerate(NAMES[:3]):
        choose(browser, "[data-metric]", str(place))
        order = [f"clip-{number}" for number in ranked(name)]
        assert browser.evaluate(SEEN_NAMES) == [order[0], order[-1], order[1], order[-2]]
        lines = browser.evaluate(SEEN_LINES)
        assert [line.split(":")[0] for line in lines] == ["worst", "best", "2nd worst", "2nd best"]
    choose(browser, "[data-metric]", "1")
    choose(browser, "[data-pairs]", "1000")
    assert browser.evaluate(SEEN_NAMES) == [f"clip-{number}" for number in ranked("ssim")]
    choose(browser, "[data-pairs]", "1")
    assert len(browser.evaluate(SEEN_NAMES)) == 2
    assert {urlsplit(url).scheme for url in browser.requests} <= {"file", "data"}
    assert browser.complaints == []


@pytest.mark.browser
def test_small_numbers_read_as_they_do_in_tables(browser: Chromium, folder: Path) -> None:
    values = [0.0, 1.234e-5, 9.999e-4, 0.05, 1.0, 26.98, 123.4, 54321.0, -0.1234]
    table, scores, frames = evaluation(("l1",))
    by_clip = {f"clip-{number}": value for number, value in enumerate(values)}
    path = folder / "small.html"
    path.write_text(
        page_of(
            table=table,
            scores=[dataclasses.replace(s, value=by_clip[s.name]) for s in scores],
            frames=frames,
        ),
        encoding="utf-8",
    )
    browser.open(path)
    choose(browser, "[data-pairs]", "1000")
    lines = dict(zip(browser.evaluate(SEEN_NAMES), browser.evaluate(SEEN_LINES), strict=True))
    for name, value in by_clip.items():
        assert lines[name].endswith(f"L1 {figure(value)}")


@pytest.mark.browser
def test_a_frame_of_the_curve_is_that_frame_of_all_three(browser: Chromium, page: Path) -> None:
    browser.open(page)
    at_clips(browser)
    worst = ranked("l1")[0]
    is_at(browser, worst, 0)  # Chromium forgets a frame that is sought before it showed the first
    for frame in (5, 17, 0, NUM_FRAMES - 1):
        click(browser, spot(browser, frame))
        is_at(browser, worst, frame)
        want = figure(value_of("l1", "model", worst, frame))
        told = browser.evaluate(TOLD)
        # Frame 0 is no part of the mean.
        assert told == "frame 0" if frame == 0 else told.startswith(f"frame {frame}: {want}, copy")
    # The pointer alone leads there too; what played before plays on when it leaves.
    mouse(browser, "mouseMoved", spot(browser, 11))
    is_at(browser, worst, 11)
    browser.evaluate(f"{FIRST}.querySelector('[data-toggle]').click()")
    mouse(browser, "mouseMoved", spot(browser, 3))
    is_at(browser, worst, 3)
    browser.point(None)
    browser.wait_for(f"[...{FIRST}.querySelectorAll('video')].every((v) => !v.paused)")


@pytest.mark.browser
def test_keys_go_from_frame_to_frame(browser: Chromium, page: Path) -> None:
    browser.open(page)
    at_clips(browser)
    worst = ranked("l1")[0]
    browser.evaluate(f"{FIRST}.querySelector('.timeline').focus()")
    for key, frame in (
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", NUM_FRAMES - 1),
        ("ArrowRight", NUM_FRAMES - 1),
    ):
        browser.press(key)
        is_at(browser, worst, frame)
        slider = f"{FIRST}.querySelector('[role=slider]')"
        assert browser.evaluate(f"{slider}.getAttribute('aria-valuenow')") == str(frame)


@pytest.mark.browser
def test_one_button_plays_all_three_in_step(browser: Chromium, page: Path) -> None:
    browser.open(page)
    at_clips(browser)
    paused = f"[...{FIRST}.querySelectorAll('video')].map((v) => v.paused)"
    assert browser.evaluate(paused) == [True] * 3  # less motion is wanted
    browser.evaluate(f"{FIRST}.querySelector('.timeline').focus()")
    browser.press(" ")
    browser.wait_for(f"{paused}.every((p) => !p) && {TIMES}.every((t) => t > 0.3)")
    # One that is put out of step comes back; the cursor goes along.
    browser.evaluate(f"{FIRST}.querySelector('video').currentTime = 0")
    browser.wait_for(f"((t) => Math.max(...t) - Math.min(...t))({TIMES}) < 0.1")
    before = browser.evaluate(TOLD)
    browser.wait_for(f"{TOLD} !== {json.dumps(before)}")
    browser.press(" ")
    browser.wait_for(f"{paused}.every((p) => p) && {READY}")
    frames = {int(t * FPS) for t in browser.evaluate(TIMES)}
    assert len(frames) == 1  # still, all of them show the same one
    assert browser.evaluate(TOLD).partition(":")[0] == f"frame {frames.pop()}"
    browser.evaluate(f"{FIRST}.querySelector('[data-toggle]').focus()")
    browser.press("Enter")
    browser.wait_for(f"{paused}.every((p) => !p)")
    browser.evaluate("document.querySelector('[data-all]').click()")
    browser.wait_for("[...document.querySelectorAll('video')].every((v) => v.paused)")


@pytest.mark.browser
def test_a_dot_leads_to_its_clip_by_mouse_and_by_keys(browser: Chromium, page: Path) -> None:
    browser.open(page)
    dots = "[...document.querySelectorAll('.strip-plot')][0].querySelectorAll('a')"
    assert browser.evaluate(f"[...{dots}].filter((a) => a.tabIndex === 0).length") == 1
    browser.evaluate(f"{dots}[0].focus()")
    for _ in range(3):
        browser.press("ArrowRight")
    number = ranked("l1")[::-1][3]  # the lowest value first
    told = "document.querySelector('.strip-plot [data-dot]').textContent"
    assert browser.evaluate(told).startswith(f"clip-{number}: ")
    assert f"clip-{number}" not in browser.evaluate(SEEN_NAMES)
    browser.press("Enter")
    browser.wait_for(f"{SEEN_NAMES}[0] === 'clip-{number}'")
    assert f"{NUM_CLIPS - 3} of {NUM_CLIPS} from the worst" in browser.evaluate(SEEN_LINES)[0]
    assert browser.evaluate(f"{FIRST}.contains(document.activeElement)")
    other = browser.evaluate(SEEN_NAMES)[-1]
    browser.evaluate(
        "[...document.querySelectorAll('table.each a')]"
        f".find((a) => a.textContent === {json.dumps(other)}).click()"
    )
    browser.wait_for(f"{SEEN_NAMES}[0] === {json.dumps(other)}")
    assert browser.complaints == []


@pytest.mark.browser
def test_a_link_opens_its_clip(browser: Chromium, page: Path) -> None:
    number = ranked("l1")[4]  # in the middle: not seen at first
    browser.open(page)
    browser.call("Page.navigate", url=f"{page.as_uri()}?#clip-{number}")
    browser.wait_for(f"document.readyState === 'complete' && {SEEN_NAMES}[0] === 'clip-{number}'")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [1280, 360])
def test_it_fits_the_screen(browser: Chromium, page: Path, width_px: int, scheme: str) -> None:
    emulate(browser, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    browser.open(page, width_px=width_px)
    assert browser.evaluate(WIDTH) <= width_px
    browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    choose(browser, "[data-pairs]", "1000")
    assert browser.evaluate(WIDTH) <= width_px
    at_clips(browser)
    axis = f"(b => [b.left, b.right])({FIRST}.querySelector('.axis').getBoundingClientRect())"
    left, right = browser.evaluate(axis)
    assert 0 < left < right - 100 < right <= width_px


@pytest.mark.browser
def test_hostile_names_do_nothing(browser: Chromium, folder: Path) -> None:
    _, scores, frames = evaluation()
    names = {s.name: f"{HOSTILE}{s.name}" for s in scores}
    html = page_of(
        scores=[dataclasses.replace(s, name=names[s.name]) for s in scores],
        frames=[dataclasses.replace(f, name=names[f.name]) for f in frames],
    )
    path = folder / "hostile.html"
    path.write_text(html, encoding="utf-8")
    browser.open(path)
    choose(browser, "[data-metric]", "2")
    choose(browser, "[data-pairs]", "1000")
    assert browser.evaluate("document.querySelectorAll('script').length") == 2
    assert HOSTILE in browser.evaluate(SEEN_NAMES)[0]
    browser.evaluate("document.querySelector('.strip-plot a').focus()")
    told = browser.evaluate("document.querySelector('.strip-plot [data-dot]').textContent")
    assert told.startswith(HOSTILE)
    assert browser.evaluate("document.title") == "x · kpmask"
    assert {urlsplit(url).scheme for url in browser.requests} <= {"file", "data"}
    assert browser.complaints == []


@pytest.mark.browser
def test_on_paper_everything_is_open_and_nothing_can_be_pressed(
    browser: Chromium, page: Path
) -> None:
    browser.open(page)
    at_clips(browser)
    open_now = "[...document.querySelectorAll('details')].map((d) => d.open)"
    before = browser.evaluate(open_now)
    assert not all(before)
    emulate(browser, media="print")
    browser.wait_for(f"{open_now}.every(Boolean)")
    visible = (
        "[...document.querySelectorAll('select, [data-toggle], [data-all]')]"
        ".filter((e) => e.checkVisibility()).length"
    )
    assert browser.evaluate(visible) == 0
    for selector in (".strip-plot svg", ".timeline svg", "table.each", ".published table"):
        assert browser.evaluate(f"document.querySelector('{selector}').checkVisibility()")
    assert browser.evaluate(
        "[...document.querySelectorAll('.scroll')]"
        ".every((e) => getComputedStyle(e).overflowX === 'visible')"
    )
    emulate(browser)
    browser.wait_for(
        f"JSON.stringify({open_now}) === '{json.dumps(before, separators=(',', ':'))}'"
    )


@pytest.mark.browser
def test_without_a_script_there_are_tables_and_stills(browser: Chromium, page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page)
    tree = browser.call("DOM.getDocument", depth=-1, pierce=True)
    root = tree["root"]["nodeId"]

    def count(selector: str) -> int:
        found = browser.call("DOM.querySelectorAll", nodeId=root, selector=selector)
        return len(found["nodeIds"])

    assert count("table tbody tr") > 20
    assert count("#clips > article:not([hidden]) video[controls]") == 12
    assert count("noscript style") == 1
    assert count("[data-toggle][hidden]") == NUM_CLIPS


@pytest.mark.browser
def test_a_video_that_is_not_there_is_said_to_be(browser: Chromium, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    media = {clip: GalleryMedia("", "bad.mp4", "bad.mp4") for clip in MEDIA}
    (tmp_path / "index.html").write_text(page_of(media=media), encoding="utf-8")
    browser.open(tmp_path / "index.html")
    browser.evaluate(f"{FIRST}.scrollIntoView()")
    words = "This browser cannot play this file."
    browser.wait_for(f"{FIRST}.textContent.includes('{words}')")
    browser.evaluate(f"{FIRST}.querySelector('.timeline').focus()")
    browser.press("ArrowRight")  # the curve can be read without the video
    assert browser.evaluate(TOLD).startswith("frame 1: ")

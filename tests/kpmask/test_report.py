"""Pages: parsed by another reader, links followed, hostile names, and a real browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import pytest
from PIL import Image

from kpmask.media.encode import encode
from kpmask.records import (
    AnimationRecord,
    CatalogManifest,
    ClipRecord,
    DatasetManifest,
    Failure,
    MetricInfo,
    PairedScore,
    RunManifest,
    ScoreSummary,
    ScoreTable,
    StepMetrics,
    VideoScore,
)
from kpmask.report import (
    Command,
    DatasetSummary,
    GalleryMedia,
    Link,
    dataset_page,
    demo_page,
    evaluation_page,
    gallery_page,
    loss_curve_svg,
    picture_uri,
    relative_url,
    run_page,
)
from kpmask.report.page import figure, num
from tests.support.chromium import Chromium
from tests.support.pages import FITS, Page

SHA = "ab12" * 16
HOSTILE = '<script>alert(1)</script>" onload="x\' & é #?%41'


def clip(index: int, **changes: Any) -> ClipRecord:
    record = ClipRecord(
        clip_id=f"{index:064x}",
        name=f"clip-{index}",
        partition="test" if index % 4 == 3 else "train",
        identity=f"person-{index % 4}",
        video_id=f"video-{index % 5}",
        shard="train/shard-00000.arrow",
        row=index,
        num_frames=20 + 7 * index,
        fps=25.0,
        width_px=64,
        height_px=64,
        start_s=0.0,
        end_s=1.0,
        crop_px=(0, 0, 100 + index, 90),
        clamped=index == 1,
        num_frames_lost=2 if index == 2 else 0,
        sha256=SHA,
    )
    return dataclasses.replace(record, **changes)


def animation(index: int, **changes: Any) -> AnimationRecord:
    record = AnimationRecord(
        item_id=f"{index:064x}",
        name=f"item-{index}",
        source=f"images/face-{index}.png",
        driving=f"videos/dance-{9 - index}.mp4",
        source_sha256=f"{index:064x}",
        driving_sha256=SHA,
        motion="absolute",
        key=f"{index:064x}.mp4",
        num_frames=10 + index,
        num_frames_lost=0,
        fps=25.0,
        width_px=64,
        height_px=64,
        size_bytes=1000 - index,
        sha256=SHA,
    )
    return dataclasses.replace(record, **changes)


def failure(item: str = "row 7", code: str = "bad_row") -> Failure:
    return Failure(item, "metadata", code, f"a cause of {item}", retryable=False, attempts=1)


def summary(clips: Iterable[ClipRecord], failures: Iterable[Failure]) -> DatasetSummary:
    found = DatasetSummary()
    for record in clips:
        found.add(record)
    for lost in failures:
        found.add_failure(lost)
    return found


def steps(phase: str = "detector", count: int = 30) -> list[StepMetrics]:
    return [
        StepMetrics(
            phase=phase,
            step=10 * (index + 1),
            epoch=index / 10,
            learning_rate=2e-4,
            loss=30 * math.exp(-index / 10) + 1,
            term_names=("perceptual", "equivariance"),
            term_values=(20 * math.exp(-index / 10), 1.0),
            samples_per_s=20.0,
        )
        for index in range(count)
    ]


DATASET = DatasetManifest(
    "data/x", SHA, SHA, num_train=6, num_test=2, num_frames=400, num_failures=1
)
RUN = RunManifest("runs/x", "x", SHA, SHA, "keypoint-mask", "efficientnet-lite0", 300, 1.5, SHA)
CATALOG = CatalogManifest("made/x", SHA, SHA, num_items=3, num_frames=33, num_failures=1)


def score_table(num_videos: int = 5) -> tuple[ScoreTable, list[VideoScore]]:
    infos = tuple(MetricInfo(n, "1", None, "Apache-2.0", n == "ssim") for n in ("l1", "ssim"))
    scores = []
    for number in range(num_videos):
        for info, base in zip(infos, (0.04, 0.8), strict=True):
            worse = 0.02 if info.name == "l1" else -0.1
            for method, value in (("model", base), ("copy", base + worse)):
                value += 0.003 * number
                row = VideoScore(f"{number:064x}", f"clip-{number}", info.name, method, value, 9)  # type: ignore[arg-type]
                scores.append(row)
    summaries = []
    for info in infos:
        for method in ("model", "copy"):
            found = [s.value for s in scores if (s.metric, s.method) == (info.name, method)]
            mean, std = float(np.mean(found)), float(np.std(found))
            summaries.append(ScoreSummary(info.name, method, mean, std, mean, 5, 45))  # type: ignore[arg-type]
    table = ScoreTable("e/x", SHA, SHA, SHA, "vgg19", num_videos, 0, infos, tuple(summaries))
    return table, scores


def all_pages(**hostile: str) -> dict[str, str]:
    """Every page; `name` (when given) stands wherever a stranger's text can come in."""
    name = hostile.get("name", "plain")
    media = {
        f"{index:064x}": GalleryMedia(f"m/{name}-s.png", f"m/{name}-d.mp4", f"m/{name}-r.mp4")
        for index in range(3)
    }
    records = [
        animation(index, name=f"{name}-{index}", source=f"in/{name}.png", driving=f"in/{name}.mp4")
        for index in range(3)
    ]
    failures = [Failure(name, name, name, name, retryable=True, attempts=2)]
    clips = [clip(i, name=f"{name}-{i}", identity=f"{name}-{i % 4}") for i in range(8)]
    previews = {c.clip_id: f"thumbs/{name}.jpg" for c in clips}
    table, scores = score_table()
    scores = [dataclasses.replace(score, name=f"{name}-{score.name}") for score in scores]
    metrics = [dataclasses.replace(s, phase=name, term_names=(name, "b")) for s in steps()]
    samples = [f"samples/{name}-000100.png", f"samples/{name}-000200.png"]
    return {
        "dataset.html": dataset_page(
            title=name,
            manifest=dataclasses.replace(DATASET, uri=name),
            summary=summary(clips, failures),
            changes=None,
            previews=previews,
            home="index.html",
        ),
        "run.html": run_page(
            title=name, manifest=RUN, settings_toml=name, metrics=metrics, samples=samples
        ),
        "gallery.html": gallery_page(
            title=name,
            manifest=CATALOG,
            records=records,
            failures=failures,
            media=lambda record: media[record.item_id],
        ),
        "evaluation.html": evaluation_page(
            title=name, table=table, scores=scores, failures=failures, media=media, note=name
        ),
        "index.html": demo_page(
            title=name,
            dataset=DATASET,
            run=RUN,
            catalog=CATALOG,
            records=records,
            media=media,
            table=table,
            failures=failures,
            metrics=metrics,
            samples=samples,
            links=[Link(name, "gallery.html")],
            commands=[Command(name, f"kpmask {name}")],
            seconds={name: 3.0},
        ),
    }


# --- links -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "a/b.mp4",
        "a#b.mp4",
        "a?b=c.mp4",
        "100%41.png",
        "a b\t\n.png",
        "é/日本語/🦊.mp4",
        "\"quotes'<b>.png",
        "back\\slash.png",
        "javascript:alert(1)",
        "c:/x.png",
        "data:text/html,<script>alert(1)</script>",
        "https://elsewhere.example/x.png",
        "a&amp;b.png",
    ],
)
def test_a_relative_link_leads_to_that_very_file(path: str) -> None:
    found = urljoin("file:///folder/page.html", relative_url(path))
    parts = urlsplit(found)
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("file", "", "", "")
    assert unquote(parts.path) == f"/folder/{path}".replace("//", "/")


def test_absolute_paths_and_pictures_inside() -> None:
    assert urlsplit(relative_url("/a b/c#d.png")) == urlsplit("file:///a%20b/c%23d.png")
    assert urlsplit(relative_url("//elsewhere/x.png")).netloc == ""
    inside = "data:image/png;base64,AAAA"
    assert relative_url(inside) == inside


def test_a_picture_comes_back_from_its_uri() -> None:
    ramp_HW = np.linspace(0, 255, 200 * 100).reshape(100, 200)
    image_HWC = np.stack([ramp_HW, ramp_HW[::-1], ramp_HW], axis=-1).astype(np.uint8)
    uri = picture_uri(image_HWC, width_px=100)
    data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    with Image.open(io.BytesIO(data)) as found:
        found_HWC = np.asarray(found, dtype=np.float32)
    assert found_HWC.shape == (50, 100, 3)
    wanted_HWC = image_HWC.reshape(50, 2, 100, 2, 3).mean(axis=(1, 3))
    assert np.abs(found_HWC - wanted_HWC).mean() < 3


# --- every page ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", HOSTILE])
def test_pages_are_sound_and_nothing_gets_out_of_its_place(name: str) -> None:
    plain = {file: Page(html) for file, html in all_pages().items()}
    for file, html in all_pages(name=name).items():
        page = Page(html)
        # Whatever the names are, the elements are the same ones with the same attributes.
        assert [(tag, list(attrs)) for tag, attrs in page.elements] == [
            (tag, list(attrs)) for tag, attrs in plain[file].elements
        ]
        assert name in page.text
        assert len(page.programs()) == 1
        assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on")]
        ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
        assert len(ids) == len(set(ids))
        for _, attrs in page.elements:
            for key in ("for", "aria-labelledby"):
                assert key not in attrs or attrs[key] in ids, attrs
        assert all(image.get("alt") for image in page.of("img"))
        assert all(video.get("aria-label") for video in page.of("video"))


@pytest.mark.parametrize("name", ["plain", HOSTILE])
def test_links_resolve_and_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    pages = all_pages(name=name)
    files = {"s.png", "d.mp4", "r.mp4"}
    wanted = {f"m/{name}-{suffix}" for suffix in files} | {f"thumbs/{name}.jpg", *pages}
    wanted |= {f"samples/{name}-000100.png", f"samples/{name}-000200.png"}
    for place in wanted:  # the hostile name has a slash, so it makes folders too
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    for file, html in pages.items():
        for link in Page(html).links():
            if link.startswith("#") or link == "data:,":
                continue
            parts = urlsplit(urljoin((tmp_path / file).as_uri(), link))
            assert (parts.scheme, parts.netloc) == ("file", "")
            assert Path(unquote(parts.path)).is_file(), link


def test_pages_follow_from_their_records_alone() -> None:
    assert all_pages() == all_pages()


def test_the_demonstration_compares_two_models() -> None:
    """Once each model, once the baseline that they share, the best of all three marked."""
    table, _ = score_table()
    better = dataclasses.replace(
        table,
        summaries=tuple(
            dataclasses.replace(s, mean=s.mean / 4) if s.method == "model" else s
            for s in table.summaries
        ),
    )
    html = demo_page(
        title="x",
        dataset=DATASET,
        run=RUN,
        catalog=CATALOG,
        records=[],
        media={},
        table=table,
        own_table=better,
    )
    rows = re.findall(r'<tr><th scope="row" class="name">(.*?)</th>(.*?)</tr>', html)
    names = [name for name, _ in rows]
    steps = f"your own training, {num(RUN.num_steps)} steps"
    assert names == ["the bundled weights", steps, "copy of the source"]
    lower = next(i for i, m in enumerate(table.metrics) if not m.higher_is_better)
    cells = [re.findall(r'<td class="(.*?)">(.*?)</td>', row) for _, row in rows]
    assert ["best" in row[lower][0] for row in cells] == [False, True, False]
    name = table.metrics[lower].name
    (mine,) = [s for s in better.summaries if (s.method, s.metric) == ("model", name)]
    assert cells[1][lower][1] == figure(mine.mean)


def test_pages_of_nothing() -> None:
    table = ScoreTable("e/x", SHA, "", "", "", 0, 0, (), ())
    for html in (
        dataset_page(
            title="x", manifest=DATASET, summary=summary([], []), changes=None, previews={}
        ),
        run_page(title="x", manifest=None, settings_toml="", metrics=[]),
        gallery_page(title="x", manifest=CATALOG, records=[], failures=[]),
        evaluation_page(title="x", table=table, scores=[], failures=[]),
        demo_page(
            title="x",
            dataset=DATASET,
            run=RUN,
            catalog=CATALOG,
            records=[],
            media={},
            table=table,
        ),
    ):
        Page(html)


def test_a_long_list_is_cut_and_says_so() -> None:
    table, scores = score_table()
    failures = [failure(f"row {index}") for index in range(1005)]
    page = Page(evaluation_page(title="x", table=table, scores=scores, failures=failures))
    assert "1 005 items could not be done" in page.text
    assert "row 999" in page.text
    assert "row 1000" not in page.text
    assert "bad_row × 1 005" in page.text


# --- what the pages say ----------------------------------------------------------------------


def test_the_better_method_is_marked() -> None:
    table, scores = score_table()
    html = evaluation_page(title="x", table=table, scores=scores, failures=[])
    best = [part.split("<span")[0].strip() for part in html.split('<td class="n best">')[1:]]
    assert best == ["0.0460", "0.8060"]  # the model's means: 0.04 and 0.8, and 0.003 * (0..4)
    copy_wins = dataclasses.replace(
        table,
        summaries=tuple(
            dataclasses.replace(s, mean=0.001 if s.metric == "l1" else 0.99)
            if s.method == "copy"
            else s
            for s in table.summaries
        ),
    )
    html = evaluation_page(title="x", table=copy_wins, scores=scores, failures=[])
    best = [part.split("<span")[0].strip() for part in html.split('<td class="n best">')[1:]]
    assert best == ["0.0010", "0.9900"]


def with_codec(table: ScoreTable) -> ScoreTable:
    """The table with a codec's row, better than all others, and intervals."""
    rows = [
        ScoreSummary(info.name, "codec", 0.999 if info.higher_is_better else 0.001, 0, 0.5, 5, 45)
        for info in table.metrics
    ]
    summaries = tuple(
        dataclasses.replace(s, pooled=s.mean / 2, mean_low=0.0311, mean_high=0.0977)
        for s in table.summaries
    )
    return dataclasses.replace(table, summaries=(*summaries, *rows))


def test_the_codec_is_shown_and_never_the_best() -> None:
    table, scores = score_table()
    html = evaluation_page(title="x", table=with_codec(table), scores=scores, failures=[])
    assert '<th scope="row" class="name">the codec alone</th>' in html
    best = re.findall(r'<td class="n best">([\d.]+)', html)
    assert best == re.findall(
        r'<td class="n best">([\d.]+)',
        evaluation_page(title="x", table=table, scores=scores, failures=[]),
    )
    assert "0.0010" not in best and "0.9990" not in best


def test_numbers_have_their_protocol_and_interval_beside_them() -> None:
    table, scores = score_table()
    html = evaluation_page(title="x", table=with_codec(table), scores=scores, failures=[])
    line = "Frame 0 left out, frames as they are drawn, mean of the videos' means."
    assert html.replace("&#39;", "'").count(line) == 3  # below the table, and of each metric
    assert "0.0311–0.0977" in html
    infos = [
        dataclasses.replace(info, counts_first=True, quantise="truncate") for info in table.metrics
    ]
    pooled = dataclasses.replace(
        with_codec(table),
        metrics=tuple(infos),
        average="frames",
        paired=(PairedScore("l1", "copy", -0.0123, -0.02, -0.01, 5, 4, 1, 0.375),),
    )
    html = evaluation_page(title="x", table=pooled, scores=scores, failures=[])
    line = "Frame 0 counted, drawn frames cut off to 8 bits, mean over all frames together."
    assert html.count(line) == 3
    assert f'<td class="n best">{pooled.summaries[0].pooled:.4f}' in html
    assert "0.0311" not in html  # is the other mean's
    text = re.sub(r"<.*?>", "", html)
    assert "4, 1 p = 0.3750" in text
    assert "-0.0123 -0.0200to -0.0100" in text


def test_dots_stand_where_their_values_are() -> None:
    table, scores = score_table(num_videos=4)
    html = evaluation_page(title="x", table=table, scores=scores, failures=[])
    circles = [float(a["cx"]) for a in Page(html).of("circle")][:4]  # the plot of L1
    values = [s.value for s in scores if s.metric == "l1" and s.method == "model"]
    slope = np.polyfit(values, circles, 1)
    assert np.allclose(np.polyval(slope, values), circles, atol=0.02)
    assert slope[0] > 0
    assert all(14 <= x <= 346 for x in circles)


def test_not_a_number_does_not_break_a_page() -> None:
    table, scores = score_table()
    broken = [dataclasses.replace(s, value=math.nan) for s in scores]
    summaries = tuple(dataclasses.replace(s, mean=math.nan) for s in table.summaries)
    table = dataclasses.replace(table, summaries=summaries)
    assert "nan" not in Page(
        evaluation_page(title="x", table=table, scores=broken, failures=[])
    ).text.replace("naninf", "")
    metrics = [dataclasses.replace(s, loss=math.nan) for s in steps()]
    Page(run_page(title="x", manifest=None, settings_toml="", metrics=metrics))


def test_the_loss_curve_is_sound_and_the_same_each_time() -> None:
    metrics = steps("detector") + steps("$x_1$ <b>&")
    svg = loss_curve_svg(metrics)
    assert svg == loss_curve_svg(metrics)
    texts = [element.text or "" for element in ET.fromstring(svg).iter() if element.text]
    assert {"detector", "$x_1$ <b>&", "step"} <= {text.strip() for text in texts}
    assert "mathdefault" not in svg
    assert "http" not in "".join(Page(svg).links())
    assert loss_curve_svg([]) == ""


# --- a browser -------------------------------------------------------------------------------


@pytest.fixture
def browser(chromium: Chromium) -> Chromium:
    """With the mouse in the corner."""
    chromium.point(None)
    return chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every page with its pictures and videos; one file name is as bad as a name can be."""
    out = tmp_path_factory.mktemp("pages")
    name = "a #1? 100%41 é"
    noise = np.random.default_rng(0).integers(0, 255, (200, 64, 64, 3), dtype=np.uint8)
    for place in ("m", "samples", "thumbs"):
        (out / place).mkdir()
    for file in ("m/{}-s.png", "samples/{}-000100.png", "samples/{}-000200.png", "thumbs/{}.jpg"):
        Image.fromarray(noise[0]).save(out / file.format(name))
    encode(out / f"m/{name}-d.mp4", iter(noise), fps=25)
    encode(out / f"m/{name}-r.mp4", iter(noise), fps=25)
    for file, html in all_pages(name=name).items():
        (out / file).write_text(html, encoding="utf-8")
    return out


PAGES = ("index.html", "dataset.html", "run.html", "gallery.html", "evaluation.html")


@pytest.mark.browser
@pytest.mark.parametrize("width_px", [1280, 360])
@pytest.mark.parametrize("file", PAGES)
def test_a_browser_shows_it(browser: Chromium, folder: Path, file: str, width_px: int) -> None:
    browser.open(folder / file, width_px=width_px)
    # What is on the screen has been fetched from the folder; nothing is wider than the screen.
    browser.wait_for("[...document.images].every((i) => i.loading === 'lazy' || i.complete)")
    assert browser.evaluate(FITS)
    assert {urlsplit(url).scheme for url in browser.requests} <= {"file", "data"}
    assert browser.complaints == []


@pytest.mark.browser
def test_results_play_together(browser: Chromium, folder: Path) -> None:
    browser.open(folder / "index.html")
    # What can be seen plays, and what belongs together is at the same time.
    first = "document.querySelector('#results li')"
    browser.wait_for(f"{first}.querySelector('.result video').currentTime > 0.3")
    apart = (
        f"(([a, b]) => Math.abs(a.currentTime - b.currentTime))({first}.querySelectorAll('video'))"
    )
    browser.evaluate(f"{first}.querySelector('video').currentTime = 5")
    assert browser.evaluate(apart) > 1
    browser.wait_for(f"{apart} < 0.15", timeout_s=3)
    # Pause by the button, by keyboard.
    browser.evaluate(f"{first}.querySelector('[data-play]').focus()")
    browser.press("Enter")
    browser.wait_for(f"{first}.querySelector('.result video').paused")
    label = browser.evaluate(f"{first}.querySelector('[data-play]').getAttribute('aria-label')")
    assert label.startswith("Play ")
    browser.press("Enter")
    browser.wait_for(f"!{first}.querySelector('.result video').paused")
    browser.evaluate("document.querySelector('[data-play-all]').click()")
    browser.wait_for("[...document.querySelectorAll('video')].every((v) => v.paused)")


@pytest.mark.browser
def test_tables_sort(browser: Chromium, folder: Path) -> None:
    browser.open(folder / "evaluation.html")
    column = (
        "[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows]"
        ".map((r) => Number(r.cells[1].dataset.value))"
    )
    button = "document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells[1]"
    browser.evaluate(f"{button}.querySelector('button').click()")
    assert browser.evaluate(column) == sorted(browser.evaluate(column))
    browser.evaluate(f"{button}.querySelector('button').click()")
    assert browser.evaluate(column) == sorted(browser.evaluate(column), reverse=True)
    assert browser.evaluate(f"{button}.getAttribute('aria-sort')") == "descending"


@pytest.mark.browser
def test_a_video_that_cannot_be_shown_is_said_to_be(
    browser: Chromium, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    bad = GalleryMedia("", "bad.mp4", "bad.mp4")
    table, scores = score_table()
    pages = (
        evaluation_page(
            title="x", table=table, scores=scores, failures=[], media={f"{0:064x}": bad}
        ),
        gallery_page(
            title="x",
            manifest=CATALOG,
            records=[animation(0)],
            failures=[],
            media=lambda _: bad,
        ),
    )
    text = "This browser cannot play this file."
    for html in pages:
        (tmp_path / "index.html").write_text(html, encoding="utf-8")
        browser.open(tmp_path / "index.html")
        browser.evaluate("document.querySelector('.item, .tile').scrollIntoView()")
        browser.wait_for(f"document.querySelector('.item, .tile').textContent.includes('{text}')")


@pytest.mark.browser
def test_a_script_that_is_not_ours_does_not_run(browser: Chromium, tmp_path: Path) -> None:
    html = run_page(title="x", manifest=None, settings_toml="", metrics=[])
    html = html.replace("</main>", "<script>document.title = 'taken'</script></main>")
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    browser.open(tmp_path / "index.html")
    assert browser.evaluate("document.title") == "x · kpmask"
    assert any("Content Security Policy" in text for text in browser.complaints)

"""One page of every kind, with the pictures and videos that it refers to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from kpmask.media.encode import encode
from kpmask.records import (
    AnimationRecord,
    CatalogManifest,
    ClipRecord,
    ComparedMethod,
    ComparedRow,
    ComparedRun,
    ComparedValue,
    Comparison,
    DatasetChanges,
    DatasetManifest,
    Failure,
    FrameScores,
    Method,
    MetricInfo,
    Protocol,
    RunManifest,
    ScoreSummary,
    ScoreTable,
    StepMetrics,
    ValidationScore,
    VideoScore,
)
from kpmask.report import (
    Command,
    Curve,
    DatasetSummary,
    FoundJob,
    GalleryMedia,
    KeptWeights,
    Link,
    Strip,
    comparison_page,
    dataset_page,
    demo_page,
    evaluation_page,
    gallery_page,
    overview_page,
    run_page,
)
from kpmask.report.study import scores_page, study_page
from kpmask.study import QUESTIONS, Answer, Study, StudyItem, make_study, score_answers

SHA: Final = "ab12" * 16
HOME: Final = "overview.html"
NUM_CLIPS: Final = 12
SIDE_PX: Final = 64
METHODS: Final[tuple[Method, ...]] = ("model", "copy")
COPY: Final[ComparedMethod] = "copy"

DATASET: Final = DatasetManifest("data/set", SHA, SHA, 9, 3, 700, 2)
RUN: Final = RunManifest("runs/x", "x", SHA, SHA, "keypoint-mask", "vgg19", 600, 1.5, SHA)
CATALOG: Final = CatalogManifest("made/x", SHA, SHA, NUM_CLIPS, 400, 2)
FAILURES: Final = [
    Failure("row 7", "metadata", "bad_row", "the span ends before it starts", False, 1),
    Failure("a/long/path/to/video-8.mp4", "cut", "container_unreadable", "no header", True, 2),
]
MEDIA: Final = GalleryMedia("media/still.png", "media/driving.mp4", "media/result.mp4")


def write_media(folder: Path) -> None:
    """What the pages refer to."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (25, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    for place in ("media", "samples", "previews", "failed"):
        (folder / place).mkdir(parents=True)
    for name in ("driving", "result", "v1", "v2", "v3", "v4"):
        encode(folder / f"media/{name}.mp4", iter(noise), fps=25)
    encode(folder / "strip.mp4", iter(noise), fps=25)
    strip = np.concatenate(list(noise[:8]), axis=1)
    for file in ("media/still.png", "failed/detector-step-000100-worker-0.png"):
        Image.fromarray(noise[0]).save(folder / file)
    for file in ("strip.png", "previews/clip.jpg", *sample_keys()):
        Image.fromarray(strip).save(folder / file)


def sample_keys() -> list[str]:
    return [f"samples/detector-step-{step:06d}.png" for step in range(0, 600, 100)]


def pages() -> dict[str, Callable[[], str]]:
    """How to make the page of every kind, by kind."""
    return {
        "dataset": _dataset,
        "run": _run,
        "gallery": _gallery,
        "evaluation": _evaluation,
        "comparison": _comparison,
        "demo": _demo,
        "study": lambda: study_page(_study()),
        "study-scores": _study_scores,
        "overview": _overview,
    }


def write_pages(folder: Path) -> dict[str, Path]:
    """Every page and what it refers to; the page's file by kind."""
    write_media(folder)
    files = {}
    for kind, make in pages().items():
        files[kind] = folder / f"{kind}.html"
        files[kind].write_text(make(), encoding="utf-8")
    return files


# --- records ---------------------------------------------------------------------------------


def _clip(index: int) -> ClipRecord:
    return ClipRecord(
        clip_id=f"{index:064x}",
        name=f"person-{index % 4}#video-{index}#000{index}",
        partition="test" if index % 4 == 3 else "train",
        identity=f"person-{index % 4}",
        video_id=f"video-{index}",
        shard="train/shard-00000.arrow",
        row=index,
        num_frames=20 + 7 * index,
        fps=25.0,
        width_px=SIDE_PX,
        height_px=SIDE_PX,
        start_s=0.0,
        end_s=1.0,
        crop_px=(0, 0, 100 + index, 90),
        clamped=False,
        num_frames_lost=0,
        sha256=SHA,
    )


def _animation(index: int) -> AnimationRecord:
    return AnimationRecord(
        item_id=f"{index:064x}",
        name=f"face-{index % 4}-as-dance-{index}",
        source=f"images/face-{index % 4}.png",
        driving=f"videos/dance-{index}.mp4",
        source_sha256=f"{index % 4:064x}",
        driving_sha256=f"{index:064x}",
        motion="relative" if index % 3 else "absolute",
        key="media/result.mp4",
        num_frames=25,
        num_frames_lost=0,
        fps=25.0,
        width_px=SIDE_PX,
        height_px=SIDE_PX,
        size_bytes=1000 + index,
        sha256=SHA,
    )


def _steps(phase: str = "detector") -> list[StepMetrics]:
    return [
        StepMetrics(
            phase=phase,
            step=10 * (index + 1),
            epoch=index / 10,
            learning_rate=2e-4,
            loss=30 * math.exp(-index / 10) + 1,
            term_names=("perceptual", "equivariance"),
            term_values=(30 * math.exp(-index / 10), 1.0),
            samples_per_s=20.0 + index % 3,
        )
        for index in range(30)
    ]


def _scores() -> tuple[ScoreTable, list[VideoScore]]:
    names = ("l1", "ssim")
    infos = tuple(MetricInfo(n, "1", None, "Apache-2.0", n == "ssim") for n in names)
    scores = [
        VideoScore(
            clip_id=f"{number:064x}",
            name=f"clip-{number}",
            metric=info.name,
            method=method,
            value=(0.04 if info.name == "l1" else 0.8) + 0.003 * number + 0.02 * (method == "copy"),
            num_frames=24,
        )
        for number in range(NUM_CLIPS)
        for info in infos
        for method in METHODS
    ]
    summaries = []
    for info in infos:
        for method in METHODS:
            found = [s.value for s in scores if (s.metric, s.method) == (info.name, method)]
            mean, std = float(np.mean(found)), float(np.std(found))
            summaries.append(ScoreSummary(info.name, method, mean, std, mean, NUM_CLIPS, 288))
    table = ScoreTable("e/x", SHA, SHA, SHA, "vgg19", NUM_CLIPS, 2, infos, tuple(summaries))
    return table, scores


def _study() -> Study:
    videos = (("v1", "v2"), ("v3", "v4"))
    items = [
        StudyItem(f"i{at}", f"item {at}", "key", "media/driving.mp4", "media/still.png", ids,
                  ("ours", "theirs"), SIDE_PX, SIDE_PX)
        for at, ids in enumerate(videos)
    ]  # fmt: skip
    return make_study("Which video is better?", ["ours", "theirs"], items)


def _answers(study: Study) -> Iterator[Answer]:
    for participant in ("p1", "p2", "p3"):
        for screen, item in enumerate(study.items, 1):
            for at, question in enumerate(QUESTIONS):
                method = "theirs" if (participant, at) == ("p2", 0) else "ours"
                yield Answer(
                    participant, item.item_id, item.name, question, method, screen, False, 1, 9.0
                )


# --- pages -----------------------------------------------------------------------------------


def _dataset() -> str:
    summary = DatasetSummary()
    clips = [_clip(index) for index in range(NUM_CLIPS)]
    for clip in clips:
        summary.add(clip)
    for failure in FAILURES:
        summary.add_failure(failure)
    return dataset_page(
        title="A dataset",
        manifest=DATASET,
        summary=summary,
        changes=DatasetChanges(7, "d", 1, 2, 3, 4, 5, 6, 7, 8, 9),
        previews={clip.clip_id: "previews/clip.jpg" for clip in clips},
        home=HOME,
    )


def _run() -> str:
    return run_page(
        title="Training run 1c76a9304347",
        manifest=None,
        settings_toml="[train]\nseed = 0\n",
        metrics=[*_steps(), *_steps("keypoint-mask")],
        validation=[
            ValidationScore("detector", step, f"{copy}{name}", 0.1, 3)
            for step in (100, 200, 300)
            for copy in ("", "copy_")
            for name in ("l1", "l1_moving", "ssim")
        ],
        samples=sample_keys(),
        weights=[KeptWeights("phases/detector.safetensors", "after phase detector", 10_000)],
        stops=["failed/detector-step-000100-worker-0.png"],
        home=HOME,
    )


def _gallery() -> str:
    return gallery_page(
        title="Animations",
        manifest=CATALOG,
        records=[_animation(index) for index in range(NUM_CLIPS)],
        failures=FAILURES,
        media=lambda _: MEDIA,
        home=HOME,
    )


def _evaluation() -> str:
    table, scores = _scores()
    rng = np.random.default_rng(0)
    return evaluation_page(
        title="Evaluation",
        table=table,
        scores=scores,
        failures=FAILURES,
        media={score.clip_id: MEDIA for score in scores},
        frames=[
            FrameScores(s.clip_id, s.name, s.metric, s.method, tuple(rng.uniform(0, 1, 25)))
            for s in scores
        ],
        home=HOME,
    )


def _comparison() -> str:
    table, _ = _scores()

    def value(mean: float, *, margin: float | None = None) -> tuple[ComparedValue, ...]:
        ends = (None, None, None) if margin is None else (margin - 5, margin + 5, 0.03)
        return tuple(
            ComparedValue(info.name, mean, 0.01, 3, None, margin, *ends) for info in table.metrics
        )

    def row(protocol: Protocol, system: str, variant: str, mean: float) -> ComparedRow:
        margin = 25.0 if system == "refined" else None
        method: ComparedMethod = "model" if system else COPY
        return ComparedRow(protocol, system, variant, method, value(mean, margin=margin))

    comparison = Comparison(
        uri="compared/x",
        settings_digest=SHA,
        dataset_id=SHA,
        budget="500 steps a system",
        batch_size=8,
        perceptual="efficientnet-lite0",
        device="CPU, 2 threads",
        precision="bfloat16",
        baseline="fomm",
        num_train_clips=9,
        test_clips=("one", "two", "three"),
        held_out=True,
        num_runs_left=1,
        metrics=table.metrics,
        runs=tuple(ComparedRun(s, 0, "r", 500, 150.0, 10**6, SHA) for s in ("fomm", "refined")),
        rows=(
            row("reconstruction", "", "", 0.05),
            row("reconstruction", "fomm", "", 0.04),
            row("reconstruction", "refined", "", 0.03),
            row("cross-absolute", "fomm", "", 0.04),
            row("cross-absolute", "refined", "", 0.03),
            row("reconstruction", "refined", "none", 0.03),
            row("reconstruction", "refined", "no_id", 0.035),
        ),
    )
    curves = [Curve(name, _steps(), [(100, 0.1), (300, 0.05)]) for name in ("fomm", "refined")]
    return comparison_page(
        title="Comparison",
        comparison=comparison,
        curves=curves,
        strips=[Strip("Reconstruction", "strip.png", "strip.mp4")],
        home=HOME,
    )


def _demo() -> str:
    table, _ = _scores()
    records = [_animation(index) for index in range(6)]
    return demo_page(
        title="kpmask demonstration",
        dataset=DATASET,
        run=RUN,
        catalog=CATALOG,
        records=records,
        media={record.item_id: MEDIA for record in records},
        table=table,
        own_table=table,
        failures=FAILURES,
        metrics=[*_steps(), *_steps("keypoint-mask")],
        samples=sample_keys(),
        links=[Link(kind, f"{kind}.html") for kind in ("dataset", "gallery", "run")],
        commands=[Command("Animate a picture of your own", "kpmask animate --source PICTURE.jpg")],
        seconds={"from start to page": 61.0},
    )


def _study_scores() -> str:
    study = _study()
    scores = score_answers(study, list(_answers(study)), uri="scored/x", num_failures=2)
    return scores_page(scores, FAILURES, home=HOME)


def _overview() -> str:
    jobs = [
        FoundJob("dataset", "dataset", "dataset.html", ("9 training clips",), "previews/clip.jpg"),
        FoundJob("run", "runs/x", "run.html", ("600 steps",), sample_keys()[0], going_on=True),
        FoundJob("animations", "made", "gallery.html", ("12 animations",), "media/still.png", 2),
        FoundJob("evaluation", "scores", "evaluation.html", ("12 videos",)),
        FoundJob("comparison", "compared", "comparison.html", ("2 systems",), "strip.png"),
        FoundJob("study", "study", "study.html", ("2 items",)),
        FoundJob("study scores", "answers", "study-scores.html", ("3 participants",)),
    ]
    return overview_page(title="outputs", jobs=jobs)

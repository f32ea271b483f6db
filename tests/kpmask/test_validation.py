"""Validation while training: the evaluation's scores on some of the clips, always the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from kpmask.animate import Animator
from kpmask.config import TrainJob, resolve_job
from kpmask.evaluate import reconstruct, score_video, summarise, video_scores
from kpmask.metrics import build_metrics
from kpmask.models import build_system
from kpmask.records import ClipRecord
from kpmask.validation import MAX_CLIPS, MAX_FRAMES, METRICS, Validation

SIDE_PX = 32


def clip(number: int, num_frames: int) -> ClipRecord:
    return ClipRecord(
        clip_id=f"c{number:02d}",
        name=f"c{number}",
        partition="test",
        identity=f"c{number}",
        video_id=f"c{number}",
        shard="x.arrow",
        row=number,
        num_frames=num_frames,
        fps=25.0,
        width_px=SIDE_PX,
        height_px=SIDE_PX,
        start_s=0.0,
        end_s=1.0,
        crop_px=(0, 0, SIDE_PX, SIDE_PX),
        clamped=False,
        num_frames_lost=0,
        sha256="0" * 64,
    )


def read(of: ClipRecord, indices: Sequence[int]) -> np.ndarray:
    still = np.random.default_rng(of.row).integers(0, 200, (SIDE_PX, SIDE_PX, 3), np.uint8)
    frames = []
    for index in indices:
        frame = still.copy()
        frame[8:20, index : index + 6] = 255
        frames.append(frame)
    return np.stack(frames)


@pytest.fixture
def system():
    job = resolve_job(
        TrainJob, preset="debug", systems=["fomm"], flags={"data": "unused", "out": "unused"}
    )
    torch.manual_seed(0)
    return build_system(job.phases[0].model)


def test_the_scores_are_the_evaluations(system) -> None:
    clips = [clip(number, 6) for number in range(3)]
    found = Validation(read, clips, device="cpu").scores(system, phase="p", step=7)
    animator = Animator(system, device="cpu")
    scored = [
        score_video(
            reconstruct(animator, [read(c, range(6))]),
            build_metrics(METRICS),
            clip_id=c.clip_id,
            name=c.name,
        )
        for c in clips
    ]
    wanted = {
        ("copy_" if row.method == "copy" else "") + row.metric: row.mean
        for row in summarise(video_scores(scored))
    }
    assert {row.metric: row.value for row in found} == pytest.approx(wanted, abs=1e-6)
    assert len(found) == 2 * len(METRICS)
    assert {(row.phase, row.step, row.num_clips) for row in found} == {("p", 7, 3)}


def test_few_frames_of_few_clips(system) -> None:
    asked: list[int] = []

    def counting(of: ClipRecord, indices: Sequence[int]) -> np.ndarray:
        asked.append(len(indices))
        assert indices[0] == 0
        return read(of, [i % 20 for i in indices])

    clips = [clip(number, 1000) for number in range(30)]
    one = Validation(counting, clips, device="cpu").scores(system, phase="p", step=0)
    assert asked == [MAX_FRAMES] * MAX_CLIPS
    other = Validation(counting, clips[::-1], device="cpu").scores(system, phase="p", step=0)
    assert one == other


def test_the_system_goes_on_training(system) -> None:
    system.train()
    Validation(read, [clip(0, 4)], device="cpu").scores(system, phase="p", step=0)
    assert system.training
    assert all(parameter.requires_grad for parameter in system.parameters())


def test_clips_of_one_frame_have_no_scores(system) -> None:
    assert Validation(read, [clip(0, 1)], device="cpu").scores(system, phase="p", step=0) == []

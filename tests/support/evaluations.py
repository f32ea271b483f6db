"""Small clips, a small model that was not trained, and the jobs that score them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from kpmask.config import Cluster, EvaluateJob, MediaLimits
from kpmask.data.shards import ShardWriter
from kpmask.media import images
from kpmask.records import ClipRecord, Failure, ScoreTable, VideoScore, from_table, to_table
from tasks.evaluate import evaluate
from tests.support.models import HEATMAP, SIDE_PX, save_weights

LIMITS = MediaLimits(min_side_px=16)
MODEL = HEATMAP
LENGTHS = {"test": (11, 5, 1), "train": (4,)}


def some_frames(count: int, *, seed: int = 0, side_px: int = SIDE_PX) -> np.ndarray:
    """A bright square that wanders over stripes."""
    frames = np.zeros((count, side_px, side_px, 3), np.uint8)
    frames[:, :, ::4] = 40 + 10 * seed % 200
    for t in range(count):
        left, top = (3 * t + 5 * seed) % (side_px - 12), (5 * t + seed) % (side_px - 12)
        frames[t, top : top + 12, left : left + 12] = (250, 120 + 10 * (t % 8), 30 + 20 * seed)
    return frames


def make_dataset(
    root: Path,
    *,
    side_px: int = SIDE_PX,
    lengths: Mapping[str, Sequence[int]] = LENGTHS,
    identities: Mapping[str, str] = {},
) -> Path:
    """Clips of these numbers of frames, a shard a split; by default each is another's."""
    records = []
    for partition, counts in lengths.items():
        (root / partition).mkdir(parents=True)
        with ShardWriter(root / partition / "shard-00000.arrow") as writer:
            for row, length in enumerate(counts):
                frames = some_frames(length, seed=row, side_px=side_px)
                clip_id = f"{partition}{row}"
                writer.add(clip_id, 25.0, [images.encode_png(frame) for frame in frames])
                record = clip_record(clip_id, partition, row, length, side_px)
                identity = identities.get(clip_id, clip_id)
                records.append(dataclasses.replace(record, identity=identity))
    write_manifest(root, records)
    return root


def write_manifest(root: Path, records: Sequence[ClipRecord]) -> None:
    pq.write_table(to_table(records, ClipRecord), root / "manifest.parquet")
    (root / "stats.json").write_text(json.dumps({"dataset_id": "d" * 64}))


def clip_record(clip_id: str, partition: Any, row: int, length: int, side_px: int) -> ClipRecord:
    return ClipRecord(
        clip_id=clip_id,
        name=f"name of {clip_id}",
        partition=partition,
        identity=clip_id,
        video_id=clip_id,
        shard=f"{partition}/shard-00000.arrow",
        row=row,
        num_frames=length,
        fps=25.0,
        width_px=side_px,
        height_px=side_px,
        start_s=0.0,
        end_s=length / 25,
        crop_px=(0, 0, side_px, side_px),
        clamped=False,
        num_frames_lost=0,
        sha256="0" * 64,
    )


def write_weights(path: Path, model: Any = MODEL, *, seed: int = 7) -> None:
    """Weights that move something: drawn at random."""
    save_weights(path, model, seed=seed, info={"perceptual": "none"})


def job_of(out: Path, **values: Any) -> EvaluateJob:
    given: dict[str, Any] = {
        "out": str(out),
        "device": "cpu",
        "batch_size": 4,
        "limits": LIMITS,
        "cluster": Cluster(num_workers=1),
    }
    return EvaluateJob(**(given | values))


def model_job(inputs: Path, out: Path, **values: Any) -> EvaluateJob:
    given = {"checkpoint": str(inputs / "w.safetensors"), "data": str(inputs / "data")}
    return job_of(out, **(given | values))


def scored(job: EvaluateJob) -> tuple[ScoreTable, dict[tuple[str, str, str], VideoScore]]:
    """What an evaluation gives, and its rows by name, metric and method."""
    table = evaluate(job)
    rows = from_table(pq.read_table(Path(job.out) / "scores.parquet"), VideoScore)
    return table, {(row.name, row.metric, row.method): row for row in rows}


def failures_of(out: Path) -> dict[str, tuple[str, str]]:
    """The code and cause of each item's failure."""
    rows = from_table(pq.read_table(out / "failures.parquet"), Failure)
    return {row.item: (row.code, row.cause) for row in rows}

"""Batches that come in order whatever the threads do, and frames that are decoded once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from kpmask.config import Augmentation
from kpmask.data.augment import augment, draw
from kpmask.data.frame_cache import FrameCache
from kpmask.data.loader import BatchLoader, to_float
from kpmask.data.pairs import PairSampler
from kpmask.errors import DatasetError
from kpmask.models.base import Batch
from kpmask.records import ClipRecord

SIDE_PX = 8


def clip(number: int, num_frames: int = 5) -> ClipRecord:
    return ClipRecord(
        clip_id=f"c{number}",
        name=f"c{number}",
        partition="train",
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


CLIPS = [clip(number) for number in range(6)]


def picture(of: ClipRecord, index: int) -> np.ndarray:
    random = np.random.default_rng([of.row, index])
    return random.integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8)


class Reader:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, int]] = Counter()
        self.lock = threading.Lock()

    def __call__(self, of: ClipRecord, indices: Sequence[int]) -> np.ndarray:
        with self.lock:
            self.asked.update((of.clip_id, i) for i in indices)
        return np.stack([picture(of, i) for i in indices])


def sampler() -> PairSampler:
    return PairSampler(CLIPS, num_repeats=10, batch_size=4, seed=3)


def test_batches_are_the_pairs_of_their_steps() -> None:
    config = Augmentation()
    loader = BatchLoader(Reader(), sampler(), config)
    for step, batch in enumerate(loader.batches(2, 9), start=2):
        pairs = sampler().batch(step)
        frames = torch.from_numpy(
            np.stack(
                [[picture(p.clip, p.source_index), picture(p.clip, p.driving_index)] for p in pairs]
            )
        )
        plain = to_float(frames)
        wanted = augment(
            Batch(plain[:, 0], plain[:, 1]), [draw(config, p.augment_seed) for p in pairs]
        )
        assert torch.equal(batch.source_BCHW, wanted.source_BCHW)
        assert torch.equal(batch.driving_BCHW, wanted.driving_BCHW)
    assert step == 8


@pytest.mark.parametrize("num_readers", [1, 4])
def test_reading_is_ahead_by_a_bounded_number_of_steps(
    num_readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, threads = Reader(), set(threading.enumerate())
    loader = BatchLoader(reader, sampler(), Augmentation())
    monkeypatch.setattr(loader, "_num_readers", num_readers)
    batches = loader.batches(0, 100)
    for done in range(1, 6):
        next(batches)
        assert reader.asked.total() <= (done + num_readers + 1) * 4 * 2
    batches.close()
    assert set(threading.enumerate()) <= threads


def test_a_frame_that_cannot_be_read_ends_the_batches() -> None:
    def broken(of: ClipRecord, indices: Sequence[int]) -> np.ndarray:
        raise DatasetError("a stored frame cannot be read", subject=of.name)

    with pytest.raises(DatasetError, match="cannot be read"):
        next(BatchLoader(broken, sampler(), Augmentation()).batches(0, 3))


def test_frames_are_decoded_once() -> None:
    reader = Reader()
    cache = FrameCache(reader)
    for _ in range(2):
        for of in CLIPS:
            for indices in ([0, 3], [3, 3], [4, 0, 1]):
                frames = cache(of, indices)
                assert np.array_equal(frames, np.stack([picture(of, i) for i in indices]))
    assert set(reader.asked.values()) == {1}
    assert cache.num_bytes == len(reader.asked) * SIDE_PX * SIDE_PX * 3


def test_the_cache_is_bounded() -> None:
    reader = Reader()
    cache = FrameCache(reader, max_bytes=4 * SIDE_PX * SIDE_PX * 3 + 5)
    for _ in range(2):
        for of in CLIPS:
            assert np.array_equal(cache(of, [0, 1]), np.stack([picture(of, i) for i in (0, 1)]))
    assert cache.num_bytes == 4 * SIDE_PX * SIDE_PX * 3
    assert Counter(reader.asked.values()) == {1: 4, 2: 8}


def test_changing_a_batch_does_not_change_the_cache() -> None:
    cache = FrameCache(Reader())
    cache(CLIPS[0], [0, 1])[:] = 0
    assert cache(CLIPS[0], [0])[0].any()

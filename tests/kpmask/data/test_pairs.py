"""Frame pairs: what is drawn, how often, and that only seed and step decide it."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from kpmask.data.pairs import PairSampler
from kpmask.errors import DatasetError
from kpmask.records import ClipRecord


def clip(identity: str, number: int, num_frames: int = 20) -> ClipRecord:
    name = f"{identity}#{number}"
    return ClipRecord(
        clip_id=name,
        name=name,
        partition="train",
        identity=identity,
        video_id=name,
        shard="train/shard-00000.arrow",
        row=number,
        num_frames=num_frames,
        fps=25.0,
        width_px=64,
        height_px=64,
        start_s=0.0,
        end_s=1.0,
        crop_px=(0, 0, 64, 64),
        clamped=False,
        num_frames_lost=0,
        sha256="0" * 64,
    )


CLIPS = [clip(*c) for c in [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("b", 3), ("c", 0), ("c", 1)]]


def sampler(clips=CLIPS, num_repeats=4, batch_size=6, seed=3, **kwargs) -> PairSampler:
    return PairSampler(clips, num_repeats=num_repeats, batch_size=batch_size, seed=seed, **kwargs)


def test_every_epoch_holds_every_identity_num_repeats_times() -> None:
    pairs = [pair for step in range(6) for pair in sampler().batch(step)]
    assert len(pairs) == 36
    for epoch in range(3):
        identities = Counter(p.clip.identity for p in pairs[12 * epoch : 12 * (epoch + 1)])
        assert identities == {"a": 4, "b": 4, "c": 4}
    orders = ["".join(p.clip.identity for p in pairs[12 * e : 12 * (e + 1)]) for e in range(3)]
    assert len(set(orders)) == 3


def test_a_batch_larger_than_what_is_left_of_an_epoch_goes_on_into_the_next() -> None:
    wide = sampler(batch_size=5)
    pairs = [pair for step in range(12) for pair in wide.batch(step)]
    narrow = sampler(batch_size=1)
    assert pairs == [narrow.batch(step)[0] for step in range(60)]
    assert wide.epoch(12) == 5.0


def test_all_clips_and_frames_of_an_identity_are_drawn_evenly() -> None:
    many = sampler(num_repeats=2000, batch_size=6000)
    pairs = [p for p in many.batch(0) if p.clip.identity == "b"]
    clips = Counter(p.clip.clip_id for p in pairs)
    assert len(clips) == 4
    assert all(400 < count < 600 for count in clips.values())
    frames = Counter(i for p in pairs for i in (p.source_index, p.driving_index))
    assert set(frames) == set(range(20))
    assert all(140 < count < 260 for count in frames.values())
    # With replacement: 1 pair in 20 is a frame with itself.
    same = sum(p.source_index == p.driving_index for p in pairs)
    assert 60 < same < 145
    assert all(p.source_index <= p.driving_index for p in pairs)
    assert len({p.augment_seed for p in pairs}) == len(pairs)


def test_the_workers_of_a_step_share_what_one_worker_would_draw() -> None:
    alone = sampler().batch(7)
    shared = [p for rank in range(3) for p in sampler(rank=rank, world_size=3).batch(7)]
    assert shared == alone


def test_only_seed_and_step_decide() -> None:
    used = sampler()
    for step in (9, 2, 5):
        used.batch(step)
    assert used.batch(4) == sampler(list(reversed(CLIPS))).batch(4)
    assert used.batch(4) != sampler(seed=4).batch(4)


@pytest.mark.parametrize("clips", [[], [clip("a", 0, num_frames=0)]])
def test_no_training_clips(clips: list[ClipRecord]) -> None:
    with pytest.raises(DatasetError, match="no training clips") as error:
        sampler(clips)
    assert error.value.code == "dataset_too_small"


def test_an_epoch_that_fills_no_batch() -> None:
    with pytest.raises(DatasetError, match=r"3 training identities .* 12 pairs .* batch of 13"):
        sampler(batch_size=13)


def test_threads_may_share_a_sampler() -> None:
    """Readers of coming steps ask for the pairs of two epochs at once."""
    alone = {step: sampler().batch(step) for step in range(40)}
    shared = sampler()
    steps = [step for _ in range(20) for step in alone]
    with ThreadPoolExecutor(8) as pool:
        for step, pairs in zip(steps, pool.map(shared.batch, steps), strict=True):
            assert pairs == alone[step]

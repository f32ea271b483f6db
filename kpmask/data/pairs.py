"""Which two frames of which clip are trained on when: frame pairs by identity.

- An epoch holds every identity `num_repeats` times, in an order of its own. For each, one of the
  identity's clips is drawn, and two of its frames with replacement; the earlier is the source.
- Epochs follow each other without a seam: pair n of the whole training is item n mod N of epoch
  n div N, so a batch may hold the end of one epoch and the start of the next and nothing is
  dropped.
- Pair n is a pure function of (seed, n). Resuming therefore needs the step alone, and the pairs
  of a step are the same however many workers share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kpmask.errors import DatasetError
from kpmask.records import ClipRecord


@dataclass(frozen=True, slots=True)
class FramePair:
    """Two frames of a clip in time order; `augment_seed` decides how both are changed."""

    clip: ClipRecord
    source_index: int
    driving_index: int
    augment_seed: int


class PairSampler:
    """The frame pairs of every step for one worker.

    Args:
        clips: training clips. Their order does not matter.
        num_repeats: pairs drawn of each identity in an epoch.
        batch_size: pairs in a step over all workers; divides by `world_size`.
        seed: two samplers with the same seed and clips give the same pairs.
        rank: which worker this is, of `world_size`.

    Raises:
        DatasetError: no clips, or an epoch that does not fill one batch.
    """

    def __init__(
        self,
        clips: Sequence[ClipRecord],
        *,
        num_repeats: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert batch_size % world_size == 0
        assert 0 <= rank < world_size
        self._by_identity = _by_identity(clips)
        self._seed = seed
        self._batch_size = batch_size
        self._local_size = batch_size // world_size
        self._rank = rank
        self.pairs_per_epoch = len(self._by_identity) * num_repeats
        self._order: tuple[int, np.ndarray] | None = None  # of the last epoch asked for
        if self.pairs_per_epoch < batch_size:
            raise DatasetError(
                f"{len(self._by_identity)} training identities with num_repeats = {num_repeats} "
                f"give {self.pairs_per_epoch} pairs an epoch, fewer than a batch of {batch_size}",
                code="dataset_too_small",
                hint="raise num_repeats, lower batch_size or add clips",
            )

    @property
    def num_identities(self) -> int:
        return len(self._by_identity)

    def epoch(self, step: int) -> float:
        """How many epochs lie before `step`."""
        return step * self._batch_size / self.pairs_per_epoch

    def batch(self, step: int) -> list[FramePair]:
        """This worker's pairs of step `step` (from 0)."""
        first = step * self._batch_size + self._rank * self._local_size
        return [self._pair(n) for n in range(first, first + self._local_size)]

    def _pair(self, number: int) -> FramePair:
        epoch, place = divmod(number, self.pairs_per_epoch)
        identity = self._epoch_order(epoch)[place] % len(self._by_identity)
        clips = self._by_identity[identity]
        random = np.random.default_rng([self._seed, 1, number])
        clip = clips[int(random.integers(len(clips)))]
        source, driving = sorted(random.integers(clip.num_frames, size=2).tolist())
        return FramePair(clip, source, driving, int(random.integers(2**63)))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        order = self._order  # which another thread may replace
        if order is None or order[0] != epoch:
            random = np.random.default_rng([self._seed, 0, epoch])
            self._order = order = epoch, random.permutation(self.pairs_per_epoch)
        return order[1]


def _by_identity(clips: Sequence[ClipRecord]) -> list[list[ClipRecord]]:
    """Clips grouped by identity, both in an order that the input's does not change."""
    usable = [clip for clip in clips if clip.num_frames > 0]
    if not usable:
        raise DatasetError("there are no training clips", code="dataset_too_small")
    groups: dict[str, list[ClipRecord]] = {}
    for clip in sorted(usable, key=lambda clip: (clip.identity, clip.clip_id)):
        groups.setdefault(clip.identity, []).append(clip)
    return list(groups.values())

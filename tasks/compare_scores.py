"""One trained system on the held-out clips: its scores, and the frames that are shown of it.

Beside each reconstruction stand the copy of the source and the true frames after the codec; beside
each cross-identity animation the source's own video and the driving video. They say what its scores
are worth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, get_args

import numpy as np
from numpy.typing import NDArray

from kpmask import checkpoint
from kpmask.animate import Animator, to_frames, to_tensor
from kpmask.data.dataset import Dataset
from kpmask.evaluate import FramePair, animated, reconstruct, scored_video, video_scores
from kpmask.media.roundtrip import through_codec
from kpmask.metrics import build_metrics
from kpmask.metrics.foreground import transfer_scores
from kpmask.model_config import Ablation
from kpmask.models.refined_mask import RefinedMaskSystem
from kpmask.records import ClipRecord, ClipScores, ComparedMethod, ComparedScore, Motion, Protocol
from kpmask.score_settings import suits

Frames = NDArray[np.uint8]  # THWC RGB
Frame = NDArray[np.uint8]  # HWC RGB
Pair = tuple[ClipRecord, ClipRecord]  # source and driving

BATCH_FRAMES: Final = 16
NUM_SHOWN: Final = 4  # clips and pairs
SHOWN_FRAMES: Final = 48
CROSS: Final[Mapping[Motion, Protocol]] = {
    "absolute": "cross-absolute",
    "relative": "cross-relative",
}


@dataclass(frozen=True)
class Scoring:
    """What every system is scored on."""

    dataset: Dataset
    clips: Sequence[ClipRecord]
    pairs: Sequence[Pair]
    metrics: Sequence[str]
    cross_frames: int
    device: str

    def shown_clips(self) -> list[ClipRecord]:
        """The clips that strips show, spread over all."""
        places = np.linspace(0, len(self.clips), NUM_SHOWN, endpoint=False).astype(int)
        return [self.clips[place] for place in dict.fromkeys(places.tolist())]

    def shown_pairs(self) -> Sequence[Pair]:
        return self.pairs[:NUM_SHOWN]

    def driving_frames(self, clip: ClipRecord) -> Frames:
        return self.dataset.read(clip, slice(0, self.cross_frames))


@dataclass(frozen=True)
class SystemScores:
    """What scoring a system found; `pictures` are frames by clip id or `picture_id`."""

    scores: list[ComparedScore]
    pictures: dict[str, Frames]
    num_parameters: int
    weights_sha256: str


def pair_id(pair: Pair) -> str:
    """A pair's name in tables and files."""
    source, driving = pair
    return f"{source.clip_id}-by-{driving.clip_id}"


def picture_id(pair: Pair, variant: str = "") -> str:
    """What an animation is called among the pictures."""
    return f"{variant}:{pair_id(pair)}" if variant else pair_id(pair)


def score_system(
    weights: Path,
    scoring: Scoring,
    *,
    system: str,
    seed: int,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> SystemScores:
    """Score the system in a weights file.

    Args:
        system, seed: what its rows are called.
        on_done: called with how many videos are done, and of all.

    Raises:
        CheckpointError: the file cannot be read, or draws another size than the clips'.
        DatasetError: what is stored is not what the manifest says.
        ItemError: the system draws pixels that are no numbers.
    """
    loaded = checkpoint.load(weights)
    animator = Animator(loaded.system, device=scoring.device, weights_sha256=loaded.sha256)
    parameters = loaded.system.named_parameters()
    work = _Work(scoring, _variants(animator), system, seed, on_done)
    work.reconstruct()
    work.cross()
    return SystemScores(
        scores=[score for score in work.scores if math.isfinite(score.value)],
        pictures=work.pictures,
        # A discriminator judges in training and draws nothing.
        num_parameters=sum(p.numel() for n, p in parameters if not n.startswith("discriminator.")),
        weights_sha256=loaded.sha256,
    )


def _variants(animator: Animator) -> dict[str, Animator]:
    """The system as it is, then under each of its ablations."""
    system = animator.system
    variants = {"": animator}
    if isinstance(system, RefinedMaskSystem):
        ablations: tuple[Ablation, ...] = get_args(Ablation)
        for name in ablations:
            variants[name] = Animator(system.with_ablation(name), device=str(animator.device))
    return variants


@dataclass
class _Work:
    """A system's way through clips and pairs."""

    scoring: Scoring
    variants: Mapping[str, Animator]
    system: str
    seed: int
    on_done: Callable[[int, int], None]
    scores: list[ComparedScore] = field(default_factory=list)
    pictures: dict[str, Frames] = field(default_factory=dict)
    num_done: int = 0

    def __post_init__(self) -> None:
        self.metrics = build_metrics(self.scoring.metrics)
        motions = self.variants[""].system.motions
        self.motions = [motion for motion in CROSS if motion in motions]
        each = len(self.scoring.clips) + len(self.scoring.pairs) * len(self.motions)
        self.total = each * len(self.variants)

    def _step(self) -> None:
        self.num_done += 1
        self.on_done(self.num_done, self.total)

    # --- reconstruction ---

    def reconstruct(self) -> None:
        shown = {clip.clip_id for clip in self.scoring.shown_clips()}
        for (variant, animator), clip in itertools.product(
            self.variants.items(), self.scoring.clips
        ):
            kept: list[Frames] = []
            pairs = _watched(self._drawn(animator, variant, clip), kept)
            with self._codec(clip) if not variant else nullcontext() as codec:
                found = scored_video(
                    pairs, self.metrics, clip_id=clip.clip_id, name=clip.name, codec=codec
                )
            self._add_scores("reconstruction", variant, clip, found.scores, own=bool(variant))
            if not variant and clip.clip_id in shown:
                self.pictures[clip.clip_id] = np.concatenate(kept)[:SHOWN_FRAMES]
            self._step()

    def _drawn(self, animator: Animator, variant: str, clip: ClipRecord) -> Iterator[FramePair]:
        if not variant:
            return reconstruct(animator, self._chunks(clip))
        # Some systems are published with scores of a simpler way than they animate.
        (source_HWC,) = self.scoring.dataset.read(clip, [0])
        return animated(animator, source_HWC, self._chunks(clip), motion="absolute")

    def _chunks(self, clip: ClipRecord) -> Iterator[Frames]:
        for start in range(0, clip.num_frames, BATCH_FRAMES):
            stop = min(start + BATCH_FRAMES, clip.num_frames)
            yield self.scoring.dataset.read(clip, slice(start, stop))

    def _codec(self, clip: ClipRecord) -> AbstractContextManager[Iterator[Frame]]:
        true = itertools.chain.from_iterable(self._chunks(clip))
        return through_codec(true, fps=clip.fps)

    # --- another identity's motion ---

    def cross(self) -> None:
        shown = {pair_id(pair) for pair in self.scoring.shown_pairs()}
        for (variant, animator), motion, pair in itertools.product(
            self.variants.items(), self.motions, self.scoring.pairs
        ):
            source, driving = pair
            videos = self.scoring.driving_frames(source), self.scoring.driving_frames(driving)
            generated = animator.animate(videos[0][0], videos[1], motion=motion)
            self._add_cross(CROSS[motion], variant, pair, "model", (generated, *videos))
            first = not variant and motion == "absolute"
            self._add_estimated(CROSS[motion], variant, pair, (generated, *videos), own=not first)
            if first:
                self._add_references(pair, *videos)
            if motion == "absolute" and pair_id(pair) in shown:
                self.pictures[picture_id(pair, variant)] = generated[:SHOWN_FRAMES]
            self._step()

    def _add_references(self, pair: Pair, source_THWC: Frames, driving_THWC: Frames) -> None:
        count = min(len(source_THWC), len(driving_THWC))
        both = (source_THWC[:count], driving_THWC[:count])
        references: tuple[tuple[ComparedMethod, Frames], ...] = (
            ("source", both[0]),
            ("driving", both[1]),
        )
        for method, frames_THWC in references:
            self._add_cross("cross-absolute", "", pair, method, (frames_THWC, *both))

    def _add_cross(
        self,
        protocol: Protocol,
        variant: str,
        pair: Pair,
        method: ComparedMethod,
        videos: tuple[Frames, ...],
    ) -> None:
        found = transfer_scores(*(to_tensor(video) for video in videos))
        for metric, value in found.items():
            self._add(protocol, variant, pair, method, (metric, value, len(videos[0])))

    def _add_estimated(
        self,
        protocol: Protocol,
        variant: str,
        pair: Pair,
        videos: tuple[Frames, Frames, Frames],
        *,
        own: bool,
    ) -> None:
        """What estimators find in an animation, beside its source and its driving video."""
        metrics = [metric for metric in self.metrics if suits(metric.name, "cross")]
        if not metrics:
            return
        generated_THWC, source_THWC, driving_THWC = videos
        clip_id, name = _names(pair)
        found = scored_video(
            [(to_tensor(generated_THWC), to_tensor(driving_THWC))],
            metrics,
            clip_id=clip_id,
            name=name,
            source_HWC=source_THWC[0],
            also_driving=True,
        )
        self._add_scores(protocol, variant, pair, found.scores, own=own)

    # --- rows ---

    def _add_scores(
        self,
        protocol: Protocol,
        variant: str,
        of: ClipRecord | Pair,
        scores: ClipScores,
        *,
        own: bool,
    ) -> None:
        """All scores of a video; `own` leaves out those of other methods than the system."""
        for score in video_scores([scores]):
            if score.method == "model" or not own:
                values = (score.metric, score.value, score.num_frames)
                self._add(protocol, variant, of, score.method, values)

    def _add(
        self,
        protocol: Protocol,
        variant: str,
        of: ClipRecord | Pair,
        method: ComparedMethod,
        scored: tuple[str, float, int],
    ) -> None:
        by_model = method == "model"
        clip_id, name = _names(of)
        score = ComparedScore(
            protocol=protocol,
            system=self.system if by_model else "",
            seed=self.seed if by_model else 0,
            variant=variant if by_model else "",
            clip_id=clip_id,
            name=name,
            metric=scored[0],
            method=method,
            value=scored[1],
            num_frames=scored[2],
        )
        self.scores.append(score)


def _names(of: ClipRecord | Pair) -> tuple[str, str]:
    if isinstance(of, ClipRecord):
        return of.clip_id, of.name
    return pair_id(of), f"{of[0].name} by {of[1].name}"


def _watched(pairs: Iterable[FramePair], kept: list[Frames]) -> Iterator[FramePair]:
    """The pairs; what was generated is put into `kept` on its way."""
    for generated, reference in pairs:
        kept.append(to_frames(generated))
        yield generated, reference

"""Whether somebody is still the same person, by the vector that an estimator has of a frame.

All of it is arithmetic on vectors, NaN where no face was found: of length 1, but for `reid` and
`reidpaper`. A value of a frame is NaN where the truth (or the source) has no face to compare with.

**A frame in which the truth has a face and the generated frame has none** counts as the opposite
vector: nothing that is drawn could score worse. So no model gains by faces that no detector
recognises. The papers' code leaves such frames out; metrics whose names end in `_found` do the
same, and mean little without their coverage. Estimators that take the whole frame (`openface`,
`reid`, `reidpaper`) never miss: there the rule is only for a frame that is no picture, and of
vectors that are not of length 1 a drawn one may lie even further away than the opposite one.

| name | of a frame | range, best |
|---|---|---|
| `aed_sq` | sum of squared differences, which is what the papers' code computes | 0 to 4, 0 |
| `aed_l2` | its root, the Euclidean distance that the papers' text says | 0 to 2, 0 |
| `csim_truth` | cosine with the true frame | -1 to 1, 1 |
| `csim_source` | cosine with the image that was animated: for other people's motion | -1 to 1, 1 |
| `coverage` | 1 where the true and the generated frame have a face, else 0 | 0 to 1, 1 |
| `coverage_source` | 1 where the source and the generated frame have one, else 0 | 0 to 1, 1 |

Of vectors of length 1, `aed_sq` is 2 - 2 `csim_truth`: both are here since both are read. There is
no plain "AED", which is also the name of a distance of expressions. The ranges are those of such
vectors; `aed_sq_reid` may be hundreds. The papers measured with `openface` and `reidpaper`, and
with some ArcFace: numbers of `sface` do not belong beside theirs. Compression moves them more than
motion does, so read them beside those of the true frames after the codec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kpmask.estimators import EmbeddingEstimator, embedding_estimator
from kpmask.estimators.frames import embeddings_of
from kpmask.metric_names import EmbeddingName, IdentityKind
from kpmask.metrics.base import EstimatorMetric

Vectors = NDArray[np.float64]  # TD, of length 1; NaN where nothing was found
PerFrame = NDArray[np.float64]  # T


# --- on tables of vectors --------------------------------------------------------------------


def aed_sq(true_TD: Vectors, generated_TD: Vectors) -> PerFrame:
    """Sum of squared differences of each pair of vectors, NaN where one is missing."""
    squared_TD: Vectors = np.square(generated_TD - true_TD)
    return np.asarray(squared_TD.sum(1))


def aed_l2(true_TD: Vectors, generated_TD: Vectors) -> PerFrame:
    """Euclidean distance of each pair of vectors, NaN where one is missing."""
    return np.sqrt(aed_sq(true_TD, generated_TD))


def csim(true_TD: Vectors, generated_TD: Vectors) -> PerFrame:
    """Cosine similarity of each pair of vectors of any length, NaN where one is missing."""
    lengths_T = np.linalg.norm(true_TD, axis=1) * np.linalg.norm(generated_TD, axis=1)
    products_TD: Vectors = true_TD * generated_TD
    return np.asarray(products_TD.sum(1) / lengths_T)


def coverage(true_TD: Vectors, generated_TD: Vectors) -> PerFrame:
    """1 for frames with a vector in both, else 0; never NaN."""
    return (found(true_TD) & found(generated_TD)).astype(np.float64)


def found(vectors_TD: Vectors) -> NDArray[np.bool_]:
    """Which vectors there are (T)."""
    there_TD: NDArray[np.bool_] = np.isfinite(vectors_TD)
    return np.asarray(there_TD.all(1))


def missed_as_opposite(true_TD: Vectors, generated_TD: Vectors) -> Vectors:
    """The generated vectors, missing ones replaced by the opposites of the true ones."""
    return np.where(found(generated_TD)[:, None], generated_TD, -true_TD)


# --- on frames -------------------------------------------------------------------------------

_FORMULAS: Final[dict[IdentityKind, Callable[[Vectors, Vectors], PerFrame]]] = {
    "aed_sq": aed_sq,
    "aed_l2": aed_l2,
    "csim_truth": csim,
    "csim_source": csim,
    "coverage": coverage,
    "coverage_source": coverage,
}


@dataclass(frozen=True)
class IdentityMetric(EstimatorMetric):
    """One of the formulas above, of the vectors that an estimator has.

    Attributes:
        only_found: leave frames out in which the generated face was not found.
    """

    kind: IdentityKind
    estimator: EmbeddingEstimator
    only_found: bool = False
    counts_first: ClassVar[bool] = False
    frames_before: ClassVar[int] = 0

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.estimator.name}" + ("_found" if self.only_found else "")

    @property
    def higher_is_better(self) -> bool:
        return not self.kind.startswith("aed")

    def per_frame(
        self, generated_TCHW: Tensor, reference_TCHW: Tensor, source_CHW: Tensor
    ) -> PerFrame:
        of_source = self.kind.endswith("_source")
        # Of the source there is one picture, whatever the number of frames.
        image_TCHW = source_CHW[None] if of_source else reference_TCHW
        generated_TD = embeddings_of(self.estimator, generated_TCHW)
        true_TD = np.broadcast_to(embeddings_of(self.estimator, image_TCHW), generated_TD.shape)
        if not self.only_found and not self.kind.startswith("coverage"):
            generated_TD = missed_as_opposite(true_TD, generated_TD)
        return _FORMULAS[self.kind](true_TD, generated_TD)


def identity_metric(name: str) -> IdentityMetric:
    """The metric of this name.

    Raises:
        ConfigError: the estimator's weights are not here; the hint is the command that gets them.
        CheckpointError: they are other weights.
    """
    only_found = name.endswith("_found")
    kind, estimator = _PARTS[name.removesuffix("_found")]
    return IdentityMetric(kind, embedding_estimator(estimator), only_found=only_found)


_PARTS: Final[dict[str, tuple[IdentityKind, EmbeddingName]]] = {
    f"{kind}_{estimator}": (kind, estimator)
    for estimator in get_args(EmbeddingName)
    for kind in get_args(IdentityKind)
}

"""What metrics of one kind say of themselves alike: see `kpmask.metrics.Metric`."""

from __future__ import annotations

from typing import ClassVar

from kpmask.estimators import Estimator


class PixelMetric:
    """A distance of pixels, of each frame by itself; a subclass says where it is otherwise."""

    counts_first: ClassVar[bool] = False
    frames_before: ClassVar[int] = 0
    version: ClassVar[str] = "1"
    weights_sha256: ClassVar[str | None] = None
    licence: ClassVar[str] = "Apache-2.0"
    higher_is_better: ClassVar[bool] = False


class EstimatorMetric:
    """A metric of what an estimator finds, whose version, weights and licence are part of it.

    Attributes:
        formula: changes whenever the same answers of the estimator would get another value.
    """

    estimator: Estimator
    formula: ClassVar[str] = "1"

    @property
    def version(self) -> str:
        return f"{self.formula}+{self.estimator.version}"

    @property
    def weights_sha256(self) -> str:
        return self.estimator.weights_sha256

    @property
    def licence(self) -> str:
        return self.estimator.licence

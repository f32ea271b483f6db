"""Identity metrics on vectors made by hand, and on frames whose colour is who they show."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kpmask.estimators import Subject
from kpmask.estimators.frames import EachFrame
from kpmask.metric_names import IDENTITY_METRICS, IdentityKind
from kpmask.metrics import identity
from kpmask.metrics.identity import IdentityMetric, identity_metric

NAN = math.nan
TRUE = np.array([[0.6, 0.8], [1.0, 0.0], [NAN, NAN], [0.0, 1.0]])
MADE = np.array([[0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [NAN, NAN]])


def test_the_formulas_on_a_table_made_by_hand() -> None:
    np.testing.assert_allclose(identity.aed_sq(TRUE, MADE), [0, 0.16 + 0.64, NAN, NAN])
    np.testing.assert_allclose(identity.aed_l2(TRUE, MADE), [0, math.sqrt(0.8), NAN, NAN])
    np.testing.assert_allclose(identity.csim(TRUE, MADE), [1, 0.6, NAN, NAN])
    np.testing.assert_array_equal(identity.coverage(TRUE, MADE), [1, 1, 0, 0])
    # Of vectors of any length: the original scripts' sums, and the cosine.
    a, b = np.random.default_rng(1).normal(size=(2, 5, 128))
    by_loop = [
        sum((float(x) - float(y)) ** 2 for x, y in zip(p, q, strict=True))
        for p, q in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(identity.aed_sq(a, b), by_loop, rtol=1e-12)
    cosines = torch.nn.functional.cosine_similarity(torch.tensor(a), torch.tensor(b))
    np.testing.assert_allclose(identity.csim(a, b), cosines.numpy(), rtol=1e-12)


def test_nothing_scores_worse_than_not_being_found() -> None:
    opposite = identity.missed_as_opposite(TRUE, MADE)
    np.testing.assert_allclose(identity.aed_sq(TRUE, opposite), [0, 0.8, NAN, 4])
    np.testing.assert_allclose(identity.aed_l2(TRUE, opposite), [0, math.sqrt(0.8), NAN, 2])
    np.testing.assert_allclose(identity.csim(TRUE, opposite), [1, 0.6, NAN, -1])
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 200, 4))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    assert identity.aed_sq(a, b).max() <= 4
    assert identity.csim(a, b).min() >= -1
    np.testing.assert_allclose(identity.aed_sq(a, b), 2 - 2 * identity.csim(a, b), atol=1e-12)


class Colour:
    """Takes the mean colour of a frame for who is in it; nobody is in dark frames."""

    name = "colour"
    version = "2"
    weights_sha256 = "cd" * 32
    licence = "MIT"
    subject: Subject = "face"
    size = 3

    def __init__(self) -> None:
        self._each = EachFrame(self._look, shape=(3,), name=self.name)

    def _look(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        mean_C = frame_HWC.reshape(-1, 3).mean(0)
        return mean_C / np.linalg.norm(mean_C) if mean_C.max() > 10 else None

    def estimate(self, frames_THWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        return self._each(frames_THWC)


def plain(*colours: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, 8, 8)


RED, GREEN, DARK = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)
NO_PICTURE = (NAN, 0.0, 0.0)


def values(kind: IdentityKind, only_found: bool = False) -> list[float]:
    true = plain(RED, RED, RED, RED, DARK)
    made = plain(RED, GREEN, DARK, NO_PICTURE, RED)
    metric = IdentityMetric(kind, Colour(), only_found=only_found)
    return list(metric.per_frame(made, true, plain(GREEN)[0]))


def test_frames_with_and_without_faces() -> None:
    np.testing.assert_allclose(values("aed_sq"), [0, 2, 4, 4, NAN])
    np.testing.assert_allclose(values("aed_l2"), [0, math.sqrt(2), 2, 2, NAN])
    np.testing.assert_allclose(values("csim_truth"), [1, 0, -1, -1, NAN])
    np.testing.assert_allclose(values("csim_truth", only_found=True), [1, 0, NAN, NAN, NAN])
    np.testing.assert_allclose(values("coverage"), [1, 1, 0, 0, 0])


def test_likeness_to_the_source_needs_no_face_in_the_truth() -> None:
    np.testing.assert_allclose(values("csim_source"), [0, 1, -1, -1, 0])
    np.testing.assert_allclose(values("coverage_source"), [1, 1, 0, 0, 1])
    faceless = IdentityMetric("csim_source", Colour())
    made = plain(RED, GREEN)
    assert np.isnan(faceless.per_frame(made, made, plain(DARK)[0])).all()


@pytest.mark.parametrize("name", IDENTITY_METRICS)
def test_every_name_is_known_and_none_is_a_bare_aed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(estimator: str) -> Any:
        made = Colour()
        made.name = estimator
        return made

    monkeypatch.setattr(identity, "embedding_estimator", found)
    metric = identity_metric(name)
    assert metric.name == name
    assert metric.higher_is_better == (not name.startswith("aed"))
    assert name.startswith(("aed_sq", "aed_l2", "csim", "coverage"))

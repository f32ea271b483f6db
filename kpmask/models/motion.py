"""Relative motion: move the source as the driving object moved since its first frame (FOMM)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor

from kpmask.models.layers import inverse, product


def relative_points(
    source_BK2: Tensor, driving_BK2: Tensor, initial_BK2: Tensor, *, adapt_scale: bool
) -> Tensor:
    """source + scale * (driving - initial), [B, K, 2].

    Args:
        source_BK2: the source's points. driving_BK2: the driving frame's points.
        initial_BK2: points of the frame that shows the driving object in the source's pose; one
            entry, or B.
        adapt_scale: scale by sqrt(hull area of the source / hull area of `initial_BK2`); by 1
            where one of the two has no area.
    """
    motion_BK2 = driving_BK2 - initial_BK2
    if adapt_scale:
        motion_BK2 = motion_BK2 * size_ratio(source_BK2, initial_BK2)[:, None, None]
    return source_BK2 + motion_BK2


def relative_jacobian(source_BK22: Tensor, driving_BK22: Tensor, initial_BK22: Tensor) -> Tensor:
    """(J_driving J_initial^-1) J_source, [B, K, 2, 2]."""
    return product(product(driving_BK22, inverse(initial_BK22)), source_BK22)


def size_ratio(points_BK2: Tensor, reference_BK2: Tensor) -> Tensor:
    """sqrt of the ratio of the convex hulls' areas, [B]; either may have one entry."""
    area_B, reference_B = np.broadcast_arrays(_areas(points_BK2), _areas(reference_BK2))
    valid_B = (area_B > 0) & (reference_B > 0)
    ratio_B = np.sqrt(np.divide(area_B, reference_B, out=np.ones(len(area_B)), where=valid_B))
    return torch.from_numpy(ratio_B).to(points_BK2)


def _areas(points_BK2: Tensor) -> np.ndarray:
    return np.array([_hull_area(points) for points in points_BK2.double().cpu().numpy()])


def _hull_area(points_K2: np.ndarray) -> float:
    if len(points_K2) < 3:
        return 0.0
    try:
        return float(ConvexHull(points_K2).volume)  # in two dimensions the volume is the area
    except QhullError:  # points on a line, or all the same
        return 0.0

"""Loss terms: perceptual distance over a pyramid, and equivariance under random warps (FOMM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kpmask.config import Losses
from kpmask.errors import ConfigError
from kpmask.models.layers import AntiAlias, coordinate_grid, inverse, product, transform, widened
from kpmask.perceptual import PerceptualFeatures


class PerceptualLoss(nn.Module):
    """Mean absolute difference of feature maps, summed over maps and over image scales.

    Args:
        features: frozen features.
        scales: sizes of the image, as fractions of it, at which features are compared.
    """

    def __init__(self, features: PerceptualFeatures, scales: Sequence[float]) -> None:
        super().__init__()
        self.extractor = features
        self.scales = tuple(scales)
        self.pyramid = nn.ModuleList(AntiAlias(3, scale) for scale in scales)

    def check_size(self, image_size_px: int) -> None:
        """Refuse images whose smallest scale leaves nothing to compare (ConfigError)."""
        smallest_px = int(image_size_px * min(self.scales))
        if smallest_px < self.extractor.min_side_px:
            raise ConfigError(
                f"{min(self.scales):g} of {image_size_px} px is {smallest_px} px; these features "
                f"need {self.extractor.min_side_px} px",
                subject="losses.scales",
            )

    def features(self, image_BCHW: Tensor) -> list[Tensor]:
        """All feature maps of an image at all scales."""
        return [m for shrink in self.pyramid for m in self.extractor(shrink(image_BCHW))]

    def distances(self, generated_BCHW: Sequence[Tensor], target: Sequence[Tensor]) -> list[Tensor]:
        """The loss of each batch of images against the features of the real one.

        They go through the features as one batch, which is faster and comes to the same.
        """
        maps = self.features(torch.cat(list(generated_BCHW)))
        per_map = [
            [
                (widened(part) - widened(real.detach())).abs().mean()
                for part in map_BCHW.chunk(len(generated_BCHW))
            ]
            for map_BCHW, real in zip(maps, target, strict=True)
        ]
        return [torch.stack(terms).sum() for terms in zip(*per_map, strict=True)]

    def forward(self, generated_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
        return self.distances([generated_BCHW], self.features(real_BCHW))[0]


@dataclass(frozen=True)
class RandomWarp:
    """A random warp of the plane a sample: affine plus thin-plate spline (FOMM, section 3.1).

    The spline adds one scalar to both coordinates, sum_c w_c r_c^2 log(r_c + 1e-6), where r_c is
    the L1 distance to control point c: so does the code that the published weights come from.

    Attributes:
        affine_B23: [A | t].
        weight_BC: the splines' weights.
        control_C2: the control points, a square grid over [-1, 1].
    """

    affine_B23: Tensor
    weight_BC: Tensor
    control_C2: Tensor

    @classmethod
    def draw(cls, losses: Losses, *, like: Tensor) -> RandomWarp:
        """One warp for each entry of a batch, from torch's global CPU random state."""
        batch, side = len(like), losses.transform_points_tps
        # Drawn on the CPU, so that a seed means the same on every device.
        noise_B23 = torch.randn(batch, 2, 3) * losses.transform_sigma_affine
        affine_B23 = torch.eye(2, 3) + noise_B23
        weight_BC = torch.randn(batch, side * side) * losses.transform_sigma_tps
        control_C2 = coordinate_grid(side, side, like=like).reshape(-1, 2)
        return cls(affine_B23.to(like), weight_BC.to(like), control_C2)

    def points(self, points_BN2: Tensor) -> Tensor:
        """The points' places after the warp, [B, N, 2]."""
        matrix_B122 = self.affine_B23[:, None, :, :2]
        moved_BN2 = transform(matrix_B122, points_BN2) + self.affine_B23[:, None, :, 2]
        x_BNC = points_BN2[:, :, None, 0] - self.control_C2[:, 0]
        y_BNC = points_BN2[:, :, None, 1] - self.control_C2[:, 1]
        distance_BNC = x_BNC.abs() + y_BNC.abs()
        bend_BNC = distance_BNC.square() * torch.log(distance_BNC + 1e-6)
        return moved_BN2 + (bend_BNC * self.weight_BC[:, None]).sum(-1)[..., None]

    def jacobian(self, points_BN2: Tensor) -> Tensor:
        """The warp's derivative at the points, in closed form: [B, N, 2, 2]."""
        offset_BNC2 = points_BN2[:, :, None] - self.control_C2
        distance_BNC = offset_BNC2.abs().sum(-1)
        slope_BNC = distance_BNC * (
            2 * torch.log(distance_BNC + 1e-6) + distance_BNC / (distance_BNC + 1e-6)
        )
        weighted_BNC1 = (slope_BNC * self.weight_BC[:, None])[..., None]
        gradient_BN2 = (weighted_BNC1 * offset_BNC2.sign()).sum(-2)
        # The same scalar is added to x and to y, so both rows get its gradient.
        return self.affine_B23[:, None, :, :2] + gradient_BN2[..., None, :]

    def image(self, image_BCHW: Tensor, *, align_corners: bool) -> Tensor:
        """The image whose pixel z shows what is at warp(z); borders are reflected."""
        batch, _, height_px, width_px = image_BCHW.shape
        grid_N2 = coordinate_grid(height_px, width_px, like=image_BCHW).reshape(-1, 2)
        places_BN2 = self.points(grid_N2.expand(batch, -1, -1))
        return functional.grid_sample(
            image_BCHW,
            places_BN2.reshape(batch, height_px, width_px, 2),
            mode="bilinear",
            padding_mode="reflection",
            align_corners=align_corners,
        )


def equivariance_value(points_BK2: Tensor, warped_points_BK2: Tensor, warp: RandomWarp) -> Tensor:
    """mean |p - T(p')|, where p' are the points found in the warped image."""
    return (points_BK2 - warp.points(warped_points_BK2)).abs().mean()


def equivariance_jacobian(
    jacobian_BK22: Tensor,
    warped_points_BK2: Tensor,
    warped_jacobian_BK22: Tensor,
    warp: RandomWarp,
) -> Tensor:
    """mean |1 - J^-1 dT(p') J'|, where p', J' were found in the warped image."""
    expected_BK22 = product(warp.jacobian(warped_points_BK2), warped_jacobian_BK22)
    ratio_BK22 = product(inverse(jacobian_BK22), expected_BK22)
    eye_22 = torch.eye(2, device=ratio_BK22.device, dtype=ratio_BK22.dtype)
    return (eye_22 - ratio_BK22).abs().mean()

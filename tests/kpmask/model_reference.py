"""The systems again, slowly and plainly, from their formulas: what the tests compare with.

Networks are functions of a dictionary of tensors under the original files' names. Formulas on
coordinates and maps are loops over single numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def sub(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) + 1 :]: v for k, v in weights.items() if k.startswith(prefix + ".")}


# --- blocks ----------------------------------------------------------------------------------


def conv(w: Weights, x: Tensor, pad: int | None = None) -> Tensor:
    return F.conv2d(
        x, w["weight"], w["bias"], padding=w["weight"].shape[-1] // 2 if pad is None else pad
    )


def norm(w: Weights, x: Tensor) -> Tensor:
    scale = w["weight"] / (w["running_var"] + 1e-5).sqrt()
    return x * scale[:, None, None] + (w["bias"] - w["running_mean"] * scale)[:, None, None]


def same(w: Weights, x: Tensor) -> Tensor:
    return norm(sub(w, "norm"), conv(sub(w, "conv"), x)).clamp(min=0)


def down(w: Weights, x: Tensor) -> Tensor:
    y = same(w, x)
    return (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4


def up(w: Weights, x: Tensor) -> Tensor:
    return same(w, x.repeat_interleave(2, -1).repeat_interleave(2, -2))


def res(w: Weights, x: Tensor) -> Tensor:
    y = conv(sub(w, "conv1"), norm(sub(w, "norm1"), x).clamp(min=0))
    return x + conv(sub(w, "conv2"), norm(sub(w, "norm2"), y).clamp(min=0))


def hourglass(w: Weights, x: Tensor) -> Tensor:
    count = len([k for k in w if k.startswith("encoder.") and k.endswith("conv.weight")])
    skips = [x]
    for i in range(count):
        skips.append(down(sub(w, f"encoder.down_blocks.{i}"), skips[-1]))
    y = skips.pop()
    for i in range(count):
        y = torch.cat([up(sub(w, f"decoder.up_blocks.{i}"), y), skips.pop()], 1)
    return y


def antialias(image: Tensor, scale: float) -> Tensor:
    """By the definition: a window of Gaussian weights around every (1/scale)-th pixel."""
    if scale == 1:
        return image
    step, sigma = round(1 / scale), (1 / scale - 1) / 2
    reach = round(sigma * 4)
    taps = np.array([math.exp(-(i**2) / (2 * sigma**2)) for i in range(-reach, reach + 1)])
    kernel = np.outer(taps, taps) / np.outer(taps, taps).sum()
    padded = np.pad(image.double().numpy(), ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    size = image.shape[-1] // step
    out = np.zeros((*image.shape[:2], size, size))
    for i in range(size):
        for j in range(size):
            window = padded[..., i * step : i * step + len(taps), j * step : j * step + len(taps)]
            out[..., i, j] = (window * kernel).sum((-2, -1))
    return torch.from_numpy(out).float()


# --- coordinates, one number at a time -------------------------------------------------------


def place(index: int, size: int) -> float:
    return 2 * index / (size - 1) - 1


def soft_argmax(heatmap_HW: np.ndarray) -> tuple[float, float]:
    height, width = heatmap_HW.shape
    x = sum(heatmap_HW[i, j] * place(j, width) for i in range(height) for j in range(width))
    y = sum(heatmap_HW[i, j] * place(i, height) for i in range(height) for j in range(width))
    return x, y


def gaussian(point: np.ndarray, size: int, variance: float) -> np.ndarray:
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            square = (place(j, size) - point[0]) ** 2 + (place(i, size) - point[1]) ** 2
            out[i, j] = math.exp(-square / (2 * variance))
    return out


def bilinear(image_CHW: np.ndarray, x: float, y: float, *, align_corners: bool) -> np.ndarray:
    """One sample at (x, y) in [-1, 1]; zeros outside."""
    channels, height, width = image_CHW.shape
    if align_corners:
        column, row = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
    else:
        column, row = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2
    out = np.zeros(channels)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                out += image_CHW[:, i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return out


def grid_sample(image: Tensor, grid: np.ndarray, *, align_corners: bool) -> Tensor:
    """image [B, C, H, W] at grid [B, H', W', 2]."""
    out = np.zeros((image.shape[0], image.shape[1], *grid.shape[1:3]))
    pixels = image.double().numpy()
    for b, i, j in np.ndindex(*grid.shape[:3]):
        x, y = grid[b, i, j]
        out[b, :, i, j] = bilinear(pixels[b], x, y, align_corners=align_corners)
    return torch.from_numpy(out).float()


# --- the keypoint detector -------------------------------------------------------------------


def detector(
    w: Weights, image: Tensor, *, scale: float, temperature: float = 0.1, pad: int = 0
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray | None]:
    """Logits, heatmaps, points [B, K, 2], jacobians [B, K, 2, 2]."""
    features = hourglass(sub(w, "predictor"), antialias(image, scale))
    logits = conv(sub(w, "kp"), features, pad)
    batch, count = logits.shape[:2]
    heat = (logits.double() / temperature).exp()
    heat = heat / heat.sum((2, 3), keepdim=True)
    points = np.array(
        [[soft_argmax(heat[b, k].numpy()) for k in range(count)] for b in range(batch)]
    )
    if "jacobian.weight" not in w:
        return logits, heat, points, None
    maps = conv(sub(w, "jacobian"), features, pad).double()
    jacobians = np.zeros((batch, count, 2, 2))
    for b, k, r, c in np.ndindex(batch, count, 2, 2):
        first = 0 if maps.shape[1] == 4 else 4 * k
        jacobians[b, k, r, c] = float((heat[b, k] * maps[b, first + 2 * r + c]).sum())
    return logits, heat, points, jacobians


# --- FOMM ------------------------------------------------------------------------------------


def dense_motion(
    w: Weights,
    small: Tensor,
    source: tuple[np.ndarray, np.ndarray | None],
    driving: tuple[np.ndarray, np.ndarray | None],
    *,
    variance: float,
    align_corners: bool,
) -> tuple[np.ndarray, Tensor]:
    """The flow [B, H, W, 2] and the occlusion [B, 1, H, W]."""
    batch, _, size, _ = small.shape
    count = source[0].shape[1]
    motion = np.zeros((batch, count + 1, size, size, 2))
    heat = np.zeros((batch, count + 1, size, size))
    for b, k, i, j in np.ndindex(batch, count + 1, size, size):
        z = np.array([place(j, size), place(i, size)])
        if k > 0:
            affine = np.eye(2)
            if source[1] is not None and driving[1] is not None:
                affine = source[1][b, k - 1] @ np.linalg.inv(driving[1][b, k - 1])
            z = source[0][b, k - 1] + affine @ (z - driving[0][b, k - 1])
        motion[b, k, i, j] = z
    for b, k in np.ndindex(batch, count):
        heat[b, k + 1] = gaussian(driving[0][b, k], size, variance)
        heat[b, k + 1] -= gaussian(source[0][b, k], size, variance)
    inputs = []
    for k in range(count + 1):
        inputs.append(torch.from_numpy(heat[:, k : k + 1]).float())
        inputs.append(grid_sample(small, motion[:, k], align_corners=align_corners))
    features = hourglass(sub(w, "hourglass"), torch.cat(inputs, 1))
    mask = conv(sub(w, "mask"), features).softmax(1).double().numpy()
    flow = (mask[..., None] * motion).sum(1)
    return flow, conv(sub(w, "occlusion"), features).sigmoid()


def fomm_generator(
    w: Weights,
    image: Tensor,
    source: tuple[np.ndarray, np.ndarray | None],
    driving: tuple[np.ndarray, np.ndarray | None],
    *,
    scale: float,
    variance: float,
    align_corners: bool,
) -> Tensor:
    flow, occlusion = dense_motion(
        sub(w, "dense_motion_network"),
        antialias(image, scale),
        source,
        driving,
        variance=variance,
        align_corners=align_corners,
    )
    x = same(sub(w, "first"), image)
    count = len([k for k in w if k.startswith("down_blocks.") and k.endswith("conv.weight")])
    for i in range(count):
        x = down(sub(w, f"down_blocks.{i}"), x)
    if x.shape[-1] != flow.shape[1]:
        moved = torch.from_numpy(flow).float().permute(0, 3, 1, 2)
        moved = F.interpolate(moved, x.shape[-2:], mode="bilinear", align_corners=False)
        flow = moved.permute(0, 2, 3, 1).double().numpy()
        occlusion = F.interpolate(occlusion, x.shape[-2:], mode="bilinear", align_corners=False)
    x = grid_sample(x, flow, align_corners=align_corners) * occlusion
    return decode(w, x)


def decode(w: Weights, x: Tensor) -> Tensor:
    """Residual blocks, up blocks, last convolution, sigmoid."""
    for i in range(len([k for k in w if k.startswith("bottleneck.") and "conv1.weight" in k])):
        x = res(sub(w, f"bottleneck.r{i}"), x)
    for i in range(len([k for k in w if k.startswith("up_blocks.") and "conv.weight" in k])):
        x = up(sub(w, f"up_blocks.{i}"), x)
    return conv(sub(w, "final"), x).sigmoid()


# --- the discriminator -----------------------------------------------------------------------


def inner_conv(w: Weights, x: np.ndarray) -> np.ndarray:
    """Unpadded, one output pixel at a time; the weight over u W v where the file has u and v."""
    if "weight_orig" in w:
        kernel = w["weight_orig"].double().numpy()
        rows = kernel.reshape(len(kernel), -1)
        kernel = kernel / (w["weight_u"].double().numpy() @ rows @ w["weight_v"].double().numpy())
    else:
        kernel = w["weight"].double().numpy()
    size = kernel.shape[-1]
    height, width = x.shape[-2] - size + 1, x.shape[-1] - size + 1
    out = np.zeros((len(x), len(kernel), height, width))
    for b, c, i, j in np.ndindex(*out.shape):
        out[b, c, i, j] = (x[b, :, i : i + size, j : j + size] * kernel[c]).sum()
    return out + w["bias"].double().numpy()[:, None, None]


def instance_norm(w: Weights, x: np.ndarray) -> np.ndarray:
    out = np.zeros_like(x)
    for b, c in np.ndindex(*x.shape[:2]):
        pixels = x[b, c]
        variance = ((pixels - pixels.mean()) ** 2).mean()
        out[b, c] = (pixels - pixels.mean()) / math.sqrt(variance + 1e-5)
        out[b, c] = out[b, c] * float(w["weight"][c]) + float(w["bias"][c])
    return out


def discriminator(
    w: Weights, image: Tensor, points: np.ndarray | None = None, *, variance: float = 0.01
) -> tuple[list[np.ndarray], np.ndarray]:
    """Every block's output, and the map; `points` [B, K, 2] where it sees keypoints."""
    x = image.double().numpy()
    if points is not None:
        maps = [[gaussian(p, x.shape[-1], variance) for p in sample] for sample in points]
        x = np.concatenate([x, np.array(maps)], 1)
    count = len([k for k in w if k.startswith("down_blocks.") and k.endswith("conv.bias")])
    features = []
    for i in range(count):
        x = inner_conv(sub(w, f"down_blocks.{i}.conv"), x)
        if i > 0:
            x = instance_norm(sub(w, f"down_blocks.{i}.norm"), x)
        x = np.where(x > 0, x, 0.2 * x)
        if i < count - 1:
            x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
            x = sum(x[..., r::2, c::2] for r, c in np.ndindex(2, 2)) / 4
        features.append(x)
    return features, inner_conv(sub(w, "conv"), x)


# --- keypoint mask ---------------------------------------------------------------------------


def stretched(map_HW: np.ndarray) -> np.ndarray:
    low, high = map_HW.min(), map_HW.max()
    return (map_HW - low) / (high - low) if high > low else np.zeros_like(map_HW)


def mask(maps_BKHW: np.ndarray, *, ring: int) -> Tensor:
    """Sum over K, stretch each sample to [0, 1], surround with zeros."""
    summed = [stretched(maps.sum(0)) for maps in maps_BKHW]
    padded = np.stack([np.pad(m, ring) for m in summed])[:, None]
    return torch.from_numpy(padded).float()


def keypoint_mask_generator(
    w: Weights, image: Tensor, source_mask: Tensor, driving_mask: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The first and the second stage's frame."""
    small = torch.cat([antialias(image, scale), source_mask, driving_mask], 1)
    low = decode(w, same(sub(w, "first"), small))
    large = [
        F.interpolate(m, image.shape[-2:], mode="bilinear", align_corners=False)
        for m in (source_mask, driving_mask)
    ]
    x = hourglass(sub(w, "hourglass"), torch.cat([image, *large, low], 1))
    return low, conv(sub(w, "final_hourglass"), x).sigmoid()


# --- motion ----------------------------------------------------------------------------------


def hull_area(points: np.ndarray) -> float:
    """By brute force: a pair is an edge of the hull when no point lies to its right."""
    twice = 0.0
    for i, p in enumerate(points):
        for j, q in enumerate(points):
            side = [(q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0]) for r in points]
            if i != j and all(s >= 0 for s in side):
                twice += p[0] * q[1] - p[1] * q[0]
    return twice / 2

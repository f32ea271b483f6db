"""Sample strips: what one looks at while a model trains."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kpmask.data.frame_cache import ReadFrames
from kpmask.data.loader import to_float
from kpmask.models.base import AnimationSystem, Batch
from kpmask.records import ClipRecord

MIN_TILE_PX = 128
NUM_SAME, NUM_CROSS = 3, 2  # rows of a strip: driven by the same video, and by another


def sample_batch(read: ReadFrames, clips: Sequence[ClipRecord]) -> Batch:
    """The pairs that are shown throughout a training, spread over the clips.

    First some clips that are drawn from their own first frame, as in training; then some sources
    with another clip's motion, which is what the model is for.
    """
    ordered = sorted(clips, key=lambda clip: clip.clip_id)
    places = np.linspace(0, len(ordered), NUM_SAME + NUM_CROSS, endpoint=False).astype(int)
    sources = [ordered[place] for place in places]
    drivings = sources[:NUM_SAME] + [ordered[(p + 1) % len(ordered)] for p in places[NUM_SAME:]]
    first = np.stack([read(clip, [0])[0] for clip in sources])
    later = np.stack([read(clip, [clip.num_frames * 2 // 3])[0] for clip in drivings])
    return Batch(
        source_BCHW=to_float(torch.from_numpy(first)),
        driving_BCHW=to_float(torch.from_numpy(later)),
    )


def sample_strip(system: AnimationSystem[Any, Any], batch: Batch) -> np.ndarray:
    """A row a pair: source | driving | their masks, where there are | prediction; uint8 HWC.

    The system is left in the mode that it was in.
    """
    was_training = system.training
    system.eval()
    try:
        with torch.inference_mode():
            source = system.encode_source(batch.source_BCHW)
            shown = system.render(source, system.encode_driving(batch.driving_BCHW))
    finally:
        system.train(was_training)
    columns = [batch.source_BCHW, batch.driving_BCHW]
    size_px = batch.source_BCHW.shape[-1]
    for mask_B1HW in (shown.source_mask_B1HW, shown.driving_mask_B1HW):
        if mask_B1HW is not None:
            large_B1HW = torch.nn.functional.interpolate(mask_B1HW, size=(size_px, size_px))
            columns.append(large_B1HW.expand(-1, 3, -1, -1))
    return _tiled([*columns, shown.image_BCHW])


def batch_strip(batch: Batch) -> np.ndarray:
    """A row a pair: source | driving; what is not a number is black. uint8 HWC."""
    return _tiled([batch.source_BCHW.nan_to_num(0), batch.driving_BCHW.nan_to_num(0)])


def _tiled(columns: Sequence[Tensor]) -> np.ndarray:
    """Batches side by side, entries below each other, small tiles enlarged by whole numbers."""
    rows_BCHW = torch.cat([column.cpu() for column in columns], dim=3)
    tall_CHW = torch.cat(list(rows_BCHW), dim=1)
    factor = max(1, -(-MIN_TILE_PX // columns[0].shape[-1]))
    bytes_HWC = (tall_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return bytes_HWC.repeat(factor, axis=0).repeat(factor, axis=1)


def png_bytes(image_HWC: np.ndarray) -> bytes:
    """A uint8 RGB image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG")
    return buffer.getvalue()

"""A trained system made faster from outside, and proof that it still draws the same.

- `optimized` gives a system with the same states and the same seam. Its blocks are replaced by
  faster ones; the plain system stays as it is, and what is not replaced is shared with it.
- In float32 it draws what the plain one draws but for the order of sums. In bfloat16 only
  convolutions of the generator are: those which run once per frame and give colours. Detectors,
  softmaxes, masks, flows and grids stay float32, and so does what runs once per source.
- On a GPU a system of a few batch sizes is recorded as CUDA graphs, if they draw the same; frames
  come and go beside the computation (`kpmask.optimize.transfer`).
- `render_by` draws frames in batches of one size, which makes them the same to the last bit
  whatever they are drawn with.
- `check_precision` measures what bfloat16 does to a given system's frames; `choose` takes it where
  that is little enough.
"""

from __future__ import annotations

from kpmask.optimize.choice import Chosen, Computed, Wanted, choose
from kpmask.optimize.fixed import render_by
from kpmask.optimize.precision import MIN_PSNR_DB, PrecisionCheck, check_precision
from kpmask.optimize.system import optimized

__all__ = [
    "MIN_PSNR_DB",
    "Chosen",
    "Computed",
    "PrecisionCheck",
    "Wanted",
    "check_precision",
    "choose",
    "optimized",
    "render_by",
]

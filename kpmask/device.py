"""What there is to compute on."""

from __future__ import annotations

import torch


def gpu_names() -> list[str]:
    """The name of every CUDA device; empty without one."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]

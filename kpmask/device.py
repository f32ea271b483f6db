"""What there is to compute on."""

from __future__ import annotations

import ctypes
import platform
from typing import Final, Literal

import torch

from kpmask.config import TrainSettings

Precision = Literal["float32", "bfloat16"]


def gpu_names() -> list[str]:
    """The name of every CUDA device; empty without one."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def training_precision(settings: TrainSettings, device: torch.device | str) -> Precision:
    """What convolutions are computed in while training on `device`.

    `auto` is bfloat16 where the device has instructions for it. Elsewhere it would be emulated,
    which is slower than float32.
    """
    if settings.precision != "auto":
        return settings.precision
    return "bfloat16" if has_bfloat16(torch.device(device).type) else "float32"


def has_bfloat16(device_type: str) -> bool:
    """Whether devices of that type here have instructions for bfloat16."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type == "cpu":
        there = torch.cpu.get_capabilities()
        return bool(there.get("avx512_bf16") or there.get("amx_bf16"))
    return False


# Parameters of glibc's mallopt.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3


def keep_freed_memory() -> None:
    """Have the C library keep large freed blocks for the next allocation, where it is glibc.

    It gives them back to the system by default, which must then find and clear new pages for every
    layer of every step: a training step on a CPU is about 6% shorter without.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, 2**30)
    library.mallopt(_TRIM_THRESHOLD, 2**30)

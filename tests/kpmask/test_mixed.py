"""Batches of frames of several animations, against each animation by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kpmask import mixed
from kpmask.animate import Animator, Transfer
from kpmask.config import TrainJob, resolve_job
from kpmask.mixed import Strip
from tests.support.models import lively_system

SYSTEMS = (
    *("heatmap", "circles", "refined", "fomm"),
    *("monkey-net", "x2face", "kpmask-plus"),
)
RELATIVE = Transfer("relative", adapt_scale=True)


def animator(name: str, precision: Any) -> Animator:
    flags = {"data": "data", "out": "out"}
    job = resolve_job(TrainJob, preset="debug", flags=flags, systems=[name])
    system = lively_system(job.phases[-1].model, seed=0)
    return Animator(system, device="cpu", precision=precision)


@pytest.mark.parametrize("precision", ["plain", "float32", "bfloat16"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_company_does_not_show(name: str, precision: str) -> None:
    ours = animator(name, precision)
    frames_THWC = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    strips = []
    for number, (start, stop) in enumerate([(0, 1), (1, 4), (4, 6)]):
        transfer = RELATIVE if number and "relative" in ours.system.motions else Transfer()
        driving = ours.encode_driving(frames_THWC[start:stop])
        source = ours.encode_source(frames_THWC[6 + number])
        strips.append(Strip(source, driving, driving[:1], transfer))
    together_BCHW = mixed.draw(ours, strips, size=8)
    assert len(together_BCHW) == 6
    backwards_BCHW = mixed.draw(ours, strips[::-1], size=8)
    alone_BCHW = torch.cat([mixed.draw(ours, [strip], size=8) for strip in strips])
    assert torch.equal(together_BCHW, alone_BCHW)
    assert torch.equal(together_BCHW[:1], backwards_BCHW[5:])
    assert torch.equal(together_BCHW, mixed.draw(ours, strips * 3, size=8)[6:12])
    for strip, start in zip(strips, (0, 1, 4), strict=True):
        image_BCHW = ours.render(
            strip.source, strip.driving, initial=strip.initial, transfer=strip.transfer
        )
        expected_BCHW = together_BCHW[start : start + len(image_BCHW)]
        torch.testing.assert_close(
            image_BCHW, expected_BCHW, rtol=0, atol=1e-5 if precision != "bfloat16" else 0.05
        )

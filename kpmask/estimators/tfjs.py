"""TensorFlow.js graph models in torch: the few operations that MoveNet has.

A model is a JSON file of nodes and a binary file of constants. Images are NHWC, as the graph has
them; a convolution sees them through a transposed view.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kpmask.errors import CheckpointError

_DTYPES: Final = {"float32": np.float32, "float16": np.float16, "int32": np.int32}
_CASTS: Final = {"DT_FLOAT": torch.float32, "DT_INT32": torch.int32}


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    inputs: tuple[tuple[str, int], ...]  # a node, and which of its outputs
    compute: Callable[..., Sequence[Tensor]]


class GraphModel:
    """A graph of one input and one output."""

    def __init__(self, topology: Path, constants: Path) -> None:
        """Raises CheckpointError: an operation that is not known here."""
        model = json.loads(topology.read_bytes())
        (group,) = model["weightsManifest"]
        self._constants = _tensors(group["weights"], constants.read_bytes())
        nodes = [n for n in model["modelTopology"]["node"] if n["op"] != "Const"]
        (self._input,) = (n["name"] for n in nodes if n["op"] == "Placeholder")
        (self._output,) = (n["name"] for n in nodes if n["op"] == "Identity")
        self._nodes = [_node(n) for n in _in_order(nodes, self._constants)]
        self._lay_out_kernels(nodes)

    def _lay_out_kernels(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        """Turn the kernels once, from TensorFlow's order of axes to torch's."""
        for node in nodes:
            if node["op"] not in _CONVOLUTIONS:
                continue
            name = node["input"][1]
            kernel = self._constants[name]
            if "Depthwise" in node["op"]:  # HWCM, one kernel a channel
                height, width, channels, times = kernel.shape
                kernel = kernel.reshape(height, width, 1, channels * times)
            self._constants[name] = kernel.permute(3, 2, 0, 1).contiguous()

    @torch.inference_mode()
    def __call__(self, value: Tensor) -> Tensor:
        """The output for an input of the graph's shape."""
        values: dict[str, Sequence[Tensor]] = {n: (v,) for n, v in self._constants.items()}
        values[self._input] = (value,)
        for node in self._nodes:
            given = (values[name][index] for name, index in node.inputs)
            values[node.name] = node.compute(*given)
        return values[self._output][0]


def _tensors(specs: Sequence[Mapping[str, Any]], data: bytes) -> dict[str, Tensor]:
    """The constants by name; floats that are stored by half are widened."""
    tensors: dict[str, Tensor] = {}
    start = 0
    for spec in specs:
        dtype = np.dtype(_DTYPES[spec.get("quantization", spec)["dtype"]]).newbyteorder("<")
        count = int(np.prod(spec["shape"], dtype=np.int64))
        stored = np.frombuffer(data, dtype, count, start)
        start += stored.nbytes
        wide = stored.astype(_DTYPES[spec["dtype"]]).reshape(spec["shape"])
        tensors[spec["name"]] = torch.from_numpy(wide)
    return tensors


def _in_order(
    nodes: Sequence[Mapping[str, Any]], constants: Mapping[str, Tensor]
) -> list[Mapping[str, Any]]:
    """The nodes, each after those that it needs; without the input."""
    waiting = {n["name"]: n for n in nodes if n["op"] != "Placeholder"}
    known = set(constants) | {n["name"] for n in nodes if n["op"] == "Placeholder"}
    ordered: list[Mapping[str, Any]] = []
    while waiting:
        ready = [n for n in waiting.values() if all(i.split(":")[0] in known for i in n["input"])]
        if not ready:
            raise CheckpointError("a graph that goes round", subject=next(iter(waiting)))
        for node in ready:
            known.add(node["name"])
            ordered.append(waiting.pop(node["name"]))
    return ordered


def _node(node: Mapping[str, Any]) -> _Node:
    make = _OPERATIONS.get(node["op"])
    if make is None:
        raise CheckpointError(f"the operation {node['op']} is not known", subject=node["name"])
    inputs = [name.partition(":") for name in node["input"]]
    return _Node(
        name=node["name"],
        inputs=tuple((name, int(index or 0)) for name, _, index in inputs),
        compute=make(node.get("attr", {})),
    )


# --- operations ------------------------------------------------------------------------------

Attributes = Mapping[str, Any]


def _single(function: Callable[..., Tensor]) -> Callable[[Attributes], Callable[..., list[Tensor]]]:
    """An operation without attributes and with one output."""
    return lambda _: lambda *given: [function(*given)]


def _convolution(attributes: Attributes) -> Callable[..., list[Tensor]]:
    _, *strides, _ = (int(i) for i in attributes["strides"]["list"]["i"])
    same = _text(attributes["padding"]["s"]) == "SAME"
    fused = [_text(s) for s in attributes.get("fused_ops", {}).get("list", {}).get("s", [])]
    known = fused[:1] in ([], ["BiasAdd"]) and all(name in _ACTIVATIONS for name in fused[1:])
    if not known:
        raise CheckpointError(f"a convolution with {fused} is not known")

    def compute(x_NHWC: Tensor, kernel_OIHW: Tensor, bias_C: Tensor | None = None) -> list[Tensor]:
        x_NCHW = x_NHWC.permute(0, 3, 1, 2)
        groups = 1 if kernel_OIHW.shape[1] == x_NCHW.shape[1] else x_NCHW.shape[1]
        if same:
            x_NCHW = F.pad(x_NCHW, _same_pads(x_NCHW, kernel_OIHW, strides))
        y_NCHW = F.conv2d(x_NCHW, kernel_OIHW, bias_C, stride=tuple(strides), groups=groups)
        for name in fused[1:]:
            y_NCHW = _ACTIVATIONS[name](y_NCHW)
        return [y_NCHW.permute(0, 2, 3, 1)]

    return compute


def _same_pads(x_NCHW: Tensor, kernel_OIHW: Tensor, strides: Sequence[int]) -> list[int]:
    """TensorFlow's SAME: the odd pixel goes to the right and the bottom."""
    pads: list[int] = []
    for axis in (3, 2):
        size_px, kernel_px, stride = x_NCHW.shape[axis], kernel_OIHW.shape[axis], strides[axis - 2]
        total_px = max((-(-size_px // stride) - 1) * stride + kernel_px - size_px, 0)
        pads += [total_px // 2, total_px - total_px // 2]
    return pads


def _resize(attributes: Attributes) -> Callable[..., list[Tensor]]:
    if attributes["align_corners"]["b"] or not attributes["half_pixel_centers"]["b"]:
        raise CheckpointError("this kind of resizing is not known")

    def compute(x_NHWC: Tensor, size_2: Tensor) -> list[Tensor]:
        size_px = [int(side) for side in size_2]
        y_NCHW = F.interpolate(x_NHWC.permute(0, 3, 1, 2), size_px, mode="bilinear")
        return [y_NCHW.permute(0, 2, 3, 1)]

    return compute


def _cast(attributes: Attributes) -> Callable[..., list[Tensor]]:
    dtype = _CASTS[attributes["DstT"]["type"]]
    return lambda x: [x.to(dtype)]


def _unpack(attributes: Attributes) -> Callable[..., Sequence[Tensor]]:
    axis = int(attributes["axis"]["i"])
    return lambda x: x.unbind(axis)


def _pack(attributes: Attributes) -> Callable[..., list[Tensor]]:
    axis = int(attributes["axis"]["i"])
    return lambda *given: [torch.stack(given, axis)]


def _squeeze(attributes: Attributes) -> Callable[..., list[Tensor]]:
    axes = tuple(int(i) for i in attributes["squeeze_dims"]["list"]["i"])
    return lambda x: [x.squeeze(axes)]


def _concat(_: Attributes) -> Callable[..., list[Tensor]]:
    return lambda *given: [torch.cat(given[:-1], int(given[-1]))]


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode()


_ACTIVATIONS: Final = {"Relu": F.relu, "Relu6": F.relu6}
_CONVOLUTIONS: Final = {
    "Conv2D",
    "_FusedConv2D",
    "DepthwiseConv2dNative",
    "FusedDepthwiseConv2dNative",
}
_OPERATIONS: Final[dict[str, Callable[[Attributes], Callable[..., Sequence[Tensor]]]]] = {
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    "AddV2": _single(torch.add),
    "ArgMax": _single(lambda x, axis: x.argmax(int(axis)).to(torch.int32)),
    "Cast": _cast,
    "ConcatV2": _concat,
    "ExpandDims": _single(lambda x, axis: x.unsqueeze(int(axis))),
    "FloorDiv": _single(lambda a, b: torch.div(a, b, rounding_mode="floor")),
    "GatherNd": _single(lambda x, at: x[tuple(at.long().unbind(-1))]),
    "Identity": _single(lambda x: x),
    "Mul": _single(torch.mul),
    "Pack": _pack,
    "RealDiv": _single(torch.div),
    "Reshape": _single(lambda x, shape: x.reshape(shape.tolist())),
    "ResizeBilinear": _resize,
    "Sigmoid": _single(torch.sigmoid),
    "Sqrt": _single(torch.sqrt),
    "SquaredDifference": _single(lambda a, b: (a - b).square()),
    "Squeeze": _squeeze,
    "Sub": _single(torch.sub),
    "Unpack": _unpack,
}

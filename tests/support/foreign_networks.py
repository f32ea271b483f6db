"""Small networks in other programs' formats, byte by byte: Lua torch's .t7 and ONNX."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


# --- Lua torch ---------------------------------------------------------------------------------


class T7:
    """What `torch.save` of Lua writes in its binary mode: numbered objects, little-endian."""

    def __init__(self) -> None:
        self._out = b""
        self._num_objects = 0

    def bytes(self) -> bytes:
        return self._out

    def number(self, value: float) -> T7:
        self._out += struct.pack("<id", 1, value)
        return self

    def text(self, value: str) -> T7:
        self._out += struct.pack("<i", 2) + _counted(value)
        return self

    def flag(self, value: bool) -> T7:
        self._out += struct.pack("<ii", 5, value)
        return self

    def table(self, items: Mapping[str | int, object]) -> T7:
        self._out += struct.pack("<iii", 3, self._next(), len(items))
        for key, value in items.items():
            _ = self.number(key) if isinstance(key, int) else self.text(key)
            self.value(value)
        return self

    def value(self, value: object) -> T7:
        if isinstance(value, bool):
            return self.flag(value)
        if isinstance(value, int | float):
            return self.number(value)
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, np.ndarray):
            return self.tensor(value)
        if isinstance(value, tuple):
            return self.module(*value)
        if isinstance(value, list):
            return self.longs(value)
        assert isinstance(value, dict)
        return self.table(value)

    def module(self, kind: str, fields: Mapping[str | int, object]) -> T7:
        self._begin(kind)
        return self.table(fields)

    def tensor(self, array: NDArray[np.floating]) -> T7:
        """Of doubles: a size, strides, an offset that counts from 1, and a storage."""
        self._begin("torch.DoubleTensor")
        strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
        self._out += struct.pack("<i", array.ndim)
        self._out += struct.pack(f"<{2 * array.ndim + 1}q", *array.shape, *strides, 1)
        self._begin("torch.DoubleStorage")
        self._out += struct.pack("<q", array.size) + array.astype("<f8").tobytes()
        return self

    def longs(self, values: Sequence[int]) -> T7:
        self._begin("torch.LongStorage")
        self._out += struct.pack(f"<{len(values) + 1}q", len(values), *values)
        return self

    def _begin(self, kind: str) -> None:
        self._out += struct.pack("<ii", 4, self._next()) + _counted("V 1") + _counted(kind)

    def _next(self) -> int:
        self._num_objects += 1
        return self._num_objects


def _counted(text: str) -> bytes:
    return struct.pack("<i", len(text)) + text.encode()


def t7_network(filters: Array, matrix: Array, bias: Array) -> bytes:
    """Convolution (stride 4), ReLU, all numbers in a row, a matrix, and length 1."""
    out_channels, in_channels, height, width = filters.shape
    layers = (
        (
            "nn.SpatialConvolutionMM",
            {
                "nInputPlane": in_channels,
                "nOutputPlane": out_channels,
                "kW": width,
                "kH": height,
                "dW": 4,
                "dH": 4,
                "padW": 0,
                "padH": 0,
                "weight": filters.reshape(out_channels, -1),
                "bias": np.zeros(out_channels),
            },
        ),
        ("nn.ReLU", {"inplace": False}),
        ("nn.View", {"numElements": matrix.shape[1], "size": [matrix.shape[1]]}),
        ("nn.Linear", {"weight": matrix, "bias": bias}),
        ("nn.Normalize", {"p": 2}),
    )
    modules = dict(enumerate(layers, 1))
    return T7().module("nn.Sequential", {"modules": modules, "train": False}).bytes()


# --- ONNX --------------------------------------------------------------------------------------


def onnx_network(filters: Array, matrix: Array, *, side_px: int, stride: int) -> bytes:
    """Convolution, ReLU, all numbers in a row, and a matrix."""
    nodes = (
        _node("Conv", ["image", "filters"], "a", _ints("strides", [stride, stride])),
        _node("Relu", ["a"], "b"),
        _node("Flatten", ["b"], "c"),
        _node("Gemm", ["c", "matrix"], "vector", _int("transB", 1)),
    )
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, b"made")
    graph += _field(5, _tensor("filters", filters)) + _field(5, _tensor("matrix", matrix))
    graph += _field(11, _typed("image", [1, filters.shape[1], side_px, side_px]))
    graph += _field(12, _typed("vector", [1, matrix.shape[0]]))
    return _number(1, 7) + _field(7, graph) + _field(8, _field(1, b"") + _number(2, 11))


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _node(kind: str, inputs: Sequence[str], output: str, *attributes: bytes) -> bytes:
    node = b"".join(_field(1, name.encode()) for name in inputs) + _field(2, output.encode())
    node += _field(3, output.encode()) + _field(4, kind.encode())
    return node + b"".join(_field(5, attribute) for attribute in attributes)


def _int(name: str, value: int) -> bytes:
    return _field(1, name.encode()) + _number(3, value) + _number(20, 2)


def _ints(name: str, values: Sequence[int]) -> bytes:
    return _field(1, name.encode()) + b"".join(_number(8, v) for v in values) + _number(20, 7)


def _tensor(name: str, array: Array) -> bytes:
    dims = b"".join(_number(1, side) for side in array.shape)
    raw = _field(9, array.astype("<f4").tobytes())
    return dims + _number(2, 1) + _field(8, name.encode()) + raw


def _typed(name: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(_field(1, _number(1, side)) for side in shape)
    tensor = _number(1, 1) + _field(2, dims)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))

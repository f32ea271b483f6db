"""Convolutions with what follows them: batch norm in the weights, ReLU and a sum in the kernel.

On a CPU the weights are brought into the order that oneDNN wants once, not at every call. For the
wide inner layers of a U-Net on one frame that order is most of the work: 1,024 to 1,024 channels
at 8x8 px take a quarter of the time.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

Size = tuple[int, int]
FUSED: Final = (
    "_convolution_pointwise",
    "_reorder_convolution_weight",
    "_is_mkldnn_bf16_supported",
)


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weight [O, I, h, w] and bias [O], float32, of a convolution and the norm behind it.

    In float64 until the end, so that it costs no accuracy.
    """
    weight_OIHW = conv.weight.detach().double()
    bias_O = torch.zeros(len(weight_OIHW)) if conv.bias is None else conv.bias.detach()
    bias_O = bias_O.to(weight_OIHW)
    if norm is not None:
        scale_O, shift_O = affine(norm)
        weight_OIHW = weight_OIHW * scale_O[:, None, None, None]
        bias_O = bias_O * scale_O + shift_O
    return weight_OIHW.float(), bias_O.float()


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm in eval mode multiplies by and adds, float64 [C] each."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale_C = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale_C = scale_C * norm.weight.detach().double()
    shift_C = -norm.running_mean.double() * scale_C
    if norm.bias is not None:
        shift_C = shift_C + norm.bias.detach().double()
    return scale_C, shift_C


class FusedConv(nn.Module):
    """A convolution with fixed weights, channels-last, in float32 or bfloat16.

    Args:
        weight_OIHW, bias_O: float32, on the device where it is to run; it cannot be moved.
        padding: rows and columns of zeros on either side.
        relu: what is below 0 becomes 0.
        dtype: of weights, inputs and outputs; an input of another type is converted.
        stride, groups: as of `nn.Conv2d`.
    """

    bias: Tensor

    def __init__(
        self,
        weight_OIHW: Tensor,
        bias_O: Tensor,
        *,
        padding: Size,
        relu: bool,
        dtype: torch.dtype,
        stride: Size = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.padding, self.stride, self.groups = padding, stride, groups
        self.relu, self.dtype = relu, dtype
        self.packed = packs(weight_OIHW.device, dtype)
        weight_OIHW = weight_OIHW.to(dtype)
        # No buffer: the order that oneDNN gives has no place in a state dict.
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight_OIHW, *self._place)
        else:
            self.weight = weight_OIHW.contiguous(memory_format=torch.channels_last)
        self.register_buffer("bias", bias_O.to(dtype), persistent=False)

    @property
    def _place(self) -> list[Any]:
        return [list(self.padding), list(self.stride), [1, 1], self.groups]

    def forward(self, x_BCHW: Tensor, add_BCHW: Tensor | None = None) -> Tensor:
        """The convolution of x, plus `add_BCHW`, which has the output's size and type."""
        x_BCHW = x_BCHW.to(dtype=self.dtype, memory_format=torch.channels_last)
        if self.packed:
            return self._fused(x_BCHW, add_BCHW)
        y_BCHW = functional.conv2d(
            x_BCHW, self.weight, self.bias, self.stride, self.padding, groups=self.groups
        )
        if add_BCHW is not None:
            y_BCHW = y_BCHW + add_BCHW
        return y_BCHW.relu_() if self.relu else y_BCHW

    def _fused(self, x_BCHW: Tensor, add_BCHW: Tensor | None) -> Tensor:
        operator, after = torch.ops.mkldnn._convolution_pointwise, "relu" if self.relu else None
        y_BCHW: Tensor
        if add_BCHW is None:
            y_BCHW = operator(x_BCHW, self.weight, self.bias, *self._place, after or "none", [], "")
        else:
            summed: tuple[Any, ...] = "add", 1.0, after, [], ""
            y_BCHW = operator.binary(
                x_BCHW, add_BCHW, self.weight, self.bias, *self._place, *summed
            )
        return y_BCHW


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's fused convolutions, which are none of its public functions.

    For bfloat16 these want AVX-512, or AVX2 with its newest part.
    """
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    operators = torch.ops.mkldnn
    if not all(hasattr(operators, name) for name in FUSED):
        return False
    return dtype == torch.float32 or bool(operators._is_mkldnn_bf16_supported())


def conv_of(
    conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, *, relu: bool, dtype: torch.dtype
) -> FusedConv:
    """A plain convolution padded with zeros, with the norm behind it."""
    assert conv.dilation == (1, 1)
    assert conv.padding_mode == "zeros"
    weight_OIHW, bias_O = folded(conv, norm)
    padding, stride = conv.padding, conv.stride
    assert not isinstance(padding, str)
    return FusedConv(
        weight_OIHW,
        bias_O,
        padding=(padding[0], padding[1]),
        relu=relu,
        dtype=dtype,
        stride=(stride[0], stride[1]),
        groups=conv.groups,
    )

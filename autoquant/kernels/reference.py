"""The definition of what a quantized layer computes, and the oracle of every backend.

Weight and activation are quantized and dequantized in so many words, and the product is float32.

With the rest of the model in bfloat16 (``nn.rest``) a quantized layer is the same between a cast at
either end: its input, which is bfloat16, is taken for float32 as it is; integers, product, scales
and the sum with the bias are float32; the output is rounded to bfloat16 once. The weight is
quantized from the float32 one; a bias is rounded to bfloat16 first, once it is corrected, and so
are weights that stay in float. A layer all of whose weights stay in float computes in bfloat16 as
torch does. Recurrent layers are float32 from their input to their output, gates and states too,
whatever of them is quantized; of multi-head attention each projection is a layer of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from autoquant.kernels.operation import Operation
from autoquant.quant.activation import ActivationQuantizer
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme

CONVOLUTIONS = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Let convolutions on a GPU be float32 within the context, as they are on a CPU.

    Unless told otherwise, torch has cuDNN round what they multiply to TF32, which keeps 10 bits.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def reference(
    operation: Operation,
    x: Tensor,
    weight: QuantizedWeight,
    activation: ActivationScheme | None,
    bias: Tensor | None,
) -> Tensor:
    """Return the layer's output on the activation ``x``, [..., in] or [batch, in, *spatial]."""
    if activation is not None:
        x = ActivationQuantizer(activation, operation.kind)(x)
    return multiply(operation, x, weight.dequantize(x.dtype), bias)


def multiply(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the layer's output in float, on an activation and a weight as they are."""
    if operation.kind == "linear":
        return F.linear(x, weight, bias)
    convolve = CONVOLUTIONS[operation.kind]
    return convolve(
        x,
        weight,
        bias,
        operation.stride,
        operation.padding,
        operation.dilation,
        operation.groups,
    )

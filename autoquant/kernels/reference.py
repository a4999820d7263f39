"""The definition of what a quantized layer computes, and the oracle of every backend.

Weight and activation are quantized and dequantized in so many words, and the product is float32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from autoquant.kernels.operation import Operation
from autoquant.quant.activation import ActivationQuantizer
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme

CONVOLUTIONS = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


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

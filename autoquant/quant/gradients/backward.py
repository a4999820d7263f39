"""An identity whose gradient is quantized on its way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autoquant.quant.gradients.format import GradientFormat


def with_quantized_gradient(
    y: Tensor, fmt: GradientFormat, generator: torch.Generator | None = None
) -> Tensor:
    """Return ``y``, a layer's output: the gradient by it is quantized before it goes any further.

    So both of the layer's backward products, by its weight and by its input, and the gradient by
    its bias have the same quantized gradient. ``generator`` is drawn from when the backward pass
    comes by: layers that share one draw in the order of that pass, which is the same every time.
    The gradient of the gradient is not defined (RuntimeError).
    """
    if fmt.is_random and generator is None:  # rather now than deep in a backward pass
        raise ValueError(f"{fmt} draws numbers and needs a generator")
    quantized: Tensor = _QuantizedGradient.apply(y, fmt, generator)
    return quantized


class _QuantizedGradient(torch.autograd.Function):
    """Identity forward, ``GradientFormat.quantize`` backward."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, fmt: GradientFormat, generator: torch.Generator | None
    ) -> Tensor:
        ctx.fmt, ctx.generator = fmt, generator
        return y.clone()  # of a view an activation could not be taken in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.fmt.quantize(gradient, ctx.generator), None, None

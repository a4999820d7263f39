"""What a converted module asks of the site that holds one of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from autoquant.kernels.operation import Operation, Reader
from autoquant.nn.layer_output import After
from autoquant.nn.sums import Plan

Multiply = Callable[[Tensor, Tensor | None], Tensor]
"""Activation [..., in], as it is before quantization, and bias [out] or None → [..., out]."""


Rows = tuple[int, int] | None
"""Output channels of a weight: from, to; None for all."""


class Layer(Protocol):
    """What a site has to know of the layer that asks it."""

    @property
    def operation(self) -> Operation | None:
        """What the layer does with weight and bias, so that a kernel can stand in for it.

        None where it is nothing that a kernel knows.
        """
        ...

    @property
    def after(self) -> After:
        """The ReLU or GELU that is expected to follow."""
        ...

    @property
    def plan(self) -> Plan | None:
        """What is expected to be added to the output, and to follow that; None for nothing."""
        ...

    @property
    def reader(self) -> Layer | None:
        """The layer that alone is expected to read the output after that."""
        ...

    def reads(self) -> Reader | None:
        """Return the scheme whose integers the layer takes; None where it wants real numbers."""
        ...


class SiteRuntime(Protocol):
    """Gives a converted module its weight, and computes what that weight is multiplied with."""

    @property
    def parameter(self) -> Tensor | None:
        """The parameter whose place the site takes; None in a saved model."""
        ...

    @property
    def weight(self) -> Tensor:
        """The weight to compute with, in the parameter's own shape."""
        ...

    def bias(self, own: Tensor | None) -> Tensor | None:
        """Return the bias to compute with, where the layer's ``own`` one may be None."""
        ...

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return the activation ``x`` that meets the weight, as the quantized model sees it."""
        ...

    def layer(
        self,
        layer: Layer,
        x: Tensor,
        bias: Tensor | None,
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return a layer's output on ``x``; ``compute`` gives it from the quantized activation."""
        ...

    def is_float(self, reason: str) -> bool:
        """Return whether nothing is quantized, and note why nothing can be."""
        ...

    def reads(self, operation: Operation | None) -> Reader | None:
        """Return the scheme whose integers a layer's kernel would take; None where it takes none.

        From here on what is computed depends on that layer's recipe.
        """
        ...

    def linear(self, *parts: Rows) -> tuple[Multiply, ...]:
        """Return the products with the weight, a matrix [out, in]: with each of some of its rows.

        The weight is read once.
        """
        ...

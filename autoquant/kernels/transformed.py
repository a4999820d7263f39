"""A product whose activation is transformed first, where its backend has no kernel for both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from autoquant.kernels.operation import Clamp, Product
from autoquant.quant.transforms import InputTransform


@dataclass(frozen=True, slots=True)
class Transformed:
    """A ``product`` of what a ``transform`` makes of the activation."""

    product: Product
    transform: InputTransform

    @property
    def backend(self) -> str:
        """Name of the backend that computes it."""
        return self.product.backend

    def __call__(self, x: Tensor, bias: Tensor | None, clamp: Clamp | None = None) -> Tensor | None:
        """Return the layer's output on the activation as it is before the transform."""
        return self.product(self.transform.of_input(x), bias, clamp)


def transformed(product: Product | None, transform: InputTransform | None) -> Product | None:
    """Return ``product`` with a ``transform`` before it, where there are both."""
    return product if product is None or transform is None else Transformed(product, transform)

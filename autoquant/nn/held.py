"""A quantized weight as it is held between candidates, with all that was made of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoquant.kernels.engine import Engine
from autoquant.kernels.operation import LINEAR, Operation, Product
from autoquant.nn.fixed import Forms
from autoquant.nn.runtime import Rows
from autoquant.quant.transforms import InputTransform
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme


class HeldWeight:
    """One quantized weight: its products, and its real numbers where something asks for them.

    ``forms`` are those of what is recorded with it (``fixed``).

    ``shift`` [channels], float32, is what the layer's bias moves by, None where it stays. With a
    ``transform`` the quantized weight is the one that meets what it makes.
    """

    def __init__(
        self,
        quantized: QuantizedWeight,
        engine: Engine,
        shift: Tensor | None = None,
        transform: InputTransform | None = None,
    ) -> None:
        self.quantized = quantized
        self.engine = engine
        self.shift = shift
        self.transform = transform
        self.forms: Forms = {}
        self._reals: dict[torch.dtype, Tensor] = {}
        self._bias: tuple[Tensor, int, Tensor] | None = None
        self._parts: dict[Rows, QuantizedWeight] = {None: quantized}
        self._products: dict[tuple[Operation, ActivationScheme | None, Rows], Product | None] = {}

    def real(self, parameter: nn.Parameter, dtype: torch.dtype | None = None) -> Tensor:
        """Return the real numbers in the shape and memory format of ``parameter``.

        In its dtype, unless another is asked for.
        """
        dtype = dtype or parameter.dtype
        if dtype not in self._reals:
            real = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            if self.transform is None:
                found = self.quantized.dequantize(dtype)
            else:
                found = self.transform.weight_back(self.quantized.dequantize(torch.float32))
            self._reals[dtype] = real.copy_(found)
        return self._reals[dtype]

    def bias(self, own: Tensor | None) -> Tensor | None:
        """Return the bias to compute with, where the layer's ``own`` one may be None."""
        if self.shift is None:
            return own
        if own is None:
            return self.shift
        version = -1 if own.is_inference() else own._version
        known = self._bias
        if known is None or known[0] is not own or known[1] != version or version < 0:
            moved = (own.to(torch.float32) + self.shift).to(own.dtype)
            self._bias = known = (own, version, moved)
        return known[2]

    def product(
        self,
        operation: Operation,
        activation: ActivationScheme | None,
        rows: Rows,
        device: torch.device,
    ) -> Product | None:
        """Return the product with an activation, packed once; None where float computes it.

        It takes the activation as it is before the transform.
        """
        key = (operation, activation, rows)
        if key not in self._products:
            if rows not in self._parts:
                assert rows is not None
                self._parts[rows] = self.quantized.rows(*rows)
            part = self._parts[rows]
            if operation == LINEAR:  # whose weight may lie [in, out]
                part = part.as_matrix()
            self._products[key] = self.engine.prepare(
                operation, part, activation, device, self.transform
            )
        return self._products[key]

    @property
    def bytes(self) -> int:
        """Bytes held: the integers, a packed copy where there are products, the real numbers."""
        total = self.quantized.q.numel()
        if any(product is not None for product in self._products.values()):
            total += 2 * self.quantized.q.numel()
        return total + sum(real.nbytes for real in self._reals.values())

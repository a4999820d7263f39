"""The backend for CPUs."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from autoquant.kernels.cpu import instructions, int16, native, onednn
from autoquant.kernels.operation import Operation, Product
from autoquant.quant.transforms import InputTransform
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme


class CpuBackend:
    """Products of integers on activations quantized in one pass.

    Through oneDNN where it is exact for 8-bit ones, which is fastest; else in 16 bits.
    """

    name = "int8"

    def missing(self, device: torch.device) -> str | None:
        """Return why nothing can be computed on ``device``, in one line; None where it can."""
        return onednn.missing(device)

    def collecting(self, flag: Tensor) -> AbstractContextManager[None]:
        """Leave ``flag`` as it is: on a CPU numbers are looked at before integers are handed on."""
        return contextlib.nullcontext()

    def prepare(
        self,
        operation: Operation,
        weight: QuantizedWeight,
        activation: ActivationScheme | None,
        device: torch.device,
        transform: InputTransform | None = None,
    ) -> Product | None:
        """Pack a weight; None where integers can't give the reference's numbers."""
        if device.type != "cpu":
            return None
        product = onednn.prepare(operation, weight, activation, transform)
        if product is None:
            product = int16.prepare(operation, weight, activation, transform)
        return product

    def notes(self) -> tuple[str, ...]:
        """Return what makes it slower than it could be, a line each."""
        found = []
        lacks = int16.missing()
        if not instructions.has_vnni():
            how = "in 16 bits" if lacks is None else f"in float ({lacks})"
            found.append(
                "oneDNN uses no VNNI here: products of integers are slower, and those of two "
                f"8-bit operands are computed {how}"
            )
        if native.library() is None:
            found.append(
                "the compiled quantizer is missing (no C compiler when autoquant was installed): "
                "activations are quantized by eager operators, which is slower"
            )
        return tuple(found)

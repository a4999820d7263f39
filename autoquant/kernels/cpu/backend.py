"""The backend for CPUs."""

from __future__ import annotations

import torch

from autoquant.kernels.cpu import instructions, native, onednn
from autoquant.kernels.operation import Operation, Product
from autoquant.quant.transforms import InputTransform
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme


class CpuBackend:
    """Products of 8-bit integers through oneDNN, on activations quantized in one pass."""

    name = "int8"

    def missing(self, device: torch.device) -> str | None:
        """Return why nothing can be computed on ``device``, in one line; None where it can."""
        return onednn.missing(device)

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
        return onednn.prepare(operation, weight, activation, transform)

    def notes(self) -> tuple[str, ...]:
        """Return what makes this backend slower than it could be, a line each."""
        found = []
        if not instructions.has_vnni():
            found.append(
                "oneDNN uses no VNNI here: products of integers are slower, and those of two "
                "8-bit operands are computed in float"
            )
        if native.library() is None:
            found.append(
                "the compiled quantizer is missing (no C compiler when autoquant was installed): "
                "activations are quantized by eager operators, which is slower"
            )
        return tuple(found)

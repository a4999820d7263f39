"""The Triton backend: which products it computes, and why it would compute none."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.kernels.gpu.doubt import collecting
from autoquant.kernels.operation import Operation, Product
from autoquant.kernels.transformed import transformed
from autoquant.quant.transforms import InputTransform
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme

CAPABILITY = (8, 0)
"""Least compute capability: the tensor cores of Ampere are the first that these kernels fit."""


@dataclass(frozen=True, slots=True)
class TritonBackend:
    """Computes linear layers and convolutions of integers, and linear layers of packed weights.

    ``interpret`` runs the kernels on the CPU, by Triton's interpreter, for tests: it needs
    TRITON_INTERPRET=1 before triton is first imported.
    """

    interpret: bool = False
    name: str = "triton"

    def missing(self, device: torch.device) -> str | None:
        """Return why nothing can be computed on ``device``, in one line; None where it can."""
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        interpreting = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
        if self.interpret:
            return None if interpreting else "Triton's interpreter needs TRITON_INTERPRET=1"
        if device.type != "cuda" or torch.version.cuda is None:
            return f"Triton kernels need a CUDA GPU, and the device is {device}"
        if interpreting:
            return "TRITON_INTERPRET is set, which runs Triton kernels on the CPU"
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            has, needs = (".".join(str(n) for n in c) for c in (capability, CAPABILITY))
            return f"the GPU has compute capability {has}, and the kernels need {needs}"
        return None

    def collecting(self, flag: Tensor) -> AbstractContextManager[None]:
        """Let products hand integers on inside, and raise ``flag`` where they can't (``doubt``)."""
        return collecting(flag)

    def prepare(
        self,
        operation: Operation,
        weight: QuantizedWeight,
        activation: ActivationScheme | None,
        device: torch.device,
        transform: InputTransform | None = None,
    ) -> Product | None:
        """Pack a weight [out, in] or [out, in / groups, *kernel]; None where it is not for it."""
        if self.missing(device) is not None or weight.channel_axis != 0 or weight.q.numel() == 0:
            return None
        product: Product | None = None
        if operation.kind == "linear" and activation is None:
            from autoquant.kernels.gpu.weight_only import weight_only_product

            product = weight_only_product(weight, device)
        elif operation.kind == "linear" and activation is not None:
            from autoquant.kernels.gpu.linear import linear_product

            product = linear_product(weight, activation, device)
        elif operation.kind in ("conv1d", "conv2d") and activation is not None:
            from autoquant.kernels.gpu.conv import conv_product

            product = conv_product(operation, weight, activation, device)
        return transformed(product, transform)


BACKEND = TritonBackend()
"""The backend of CUDA devices."""

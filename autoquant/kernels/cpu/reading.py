"""What every product of integers on a CPU does with the activation that it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from autoquant.kernels.cpu.native import quantize, quantize_rows, rotate
from autoquant.kernels.operation import Reader, SchemeReader
from autoquant.quant.rotation import Rotation
from autoquant.quant.transforms import InputTransform
from autoquant.spec.recipe import ActivationScheme

LARGEST_SCALE = 2.0**64
"""Largest scale of a token: beyond it (one that holds ∞), the order of products matters."""


class Reading(ABC):
    """A product that makes bytes of its activation, or is handed them."""

    activation: ActivationScheme
    transform: InputTransform | None
    reads: Reader | None
    """What makes the bytes that it takes."""

    def read(self, activation: ActivationScheme, transform: InputTransform | None) -> None:
        """Read an activation of this scheme, after a transform."""
        self.activation, self.transform = activation, transform
        self.reads = None
        if not activation.dynamic and not isinstance(transform, Rotation):
            self.reads = SchemeReader(activation, transform)

    def by_rows(self, x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the integers, scales and zero points of an activation, each token by its own."""
        if isinstance(self.transform, Rotation):
            x = rotate(x, self.transform)
        elif self.transform is not None:
            x = self.transform.of_input(x)
        rows = quantize_rows(x, self.activation, kind)
        return None if rows is None or bool((rows[1] > LARGEST_SCALE).any()) else rows

    @abstractmethod
    def takes(self, q: Tensor) -> bool:
        """Return whether it can compute with bytes of this shape."""

    def stored(self, x: Tensor) -> Tensor | None:
        """Return the bytes of a real activation; None as in a call."""
        if self.activation.dynamic or not is_taken(x) or not self.takes(x):
            return None
        return quantize(x, self.activation, self.transform)


def is_taken(x: Tensor) -> bool:
    """Return whether an activation is one that a product makes bytes of."""
    return x.dtype == torch.float32 and x.numel() > 0 and x.device.type == "cpu"


def is_bias(bias: Tensor | None, scale: Tensor) -> bool:
    """Return whether kernels, which do not ask, take a bias: float32 [channels], as ``scale``."""
    if bias is None:
        return True
    return bias.dtype == torch.float32 and bias.is_cpu and bias.shape == scale.shape

"""Products of integers on a CPU: they make bytes of an activation, and hand bytes on."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from autoquant.kernels.cpu.handing import HandedForm, handed_form, within_grid
from autoquant.kernels.cpu.native import OFFSET, quantize, quantize_rows, rotate
from autoquant.kernels.cpu.packed_weight import PackedWeight
from autoquant.kernels.layout import is_channels_last
from autoquant.kernels.operation import Chainable, Clamp, Reader, SchemeReader
from autoquant.quant.rotation import Rotation
from autoquant.quant.transforms import InputTransform
from autoquant.spec.recipe import ActivationScheme

LARGEST_SCALE = 2.0**64
"""Largest scale of a token: beyond it (one that holds ∞), the order of products matters."""

Rows = tuple[Tensor, Tensor, Tensor]
"""Integers, scales and zero points of an activation, each token by its own."""


class IntegerProduct(Chainable, ABC):
    """A product that makes bytes of its activation, or is handed them, and may hand its output on.

    ``axes`` are those of space: a linear layer has none.
    """

    reads: Reader | None = None
    hands_gelu = True

    def __init__(
        self,
        weight: PackedWeight,
        activation: ActivationScheme,
        axes: int,
        transform: InputTransform | None,
    ) -> None:
        self.weight, self.activation, self.axes = weight, activation, axes
        self.kind = "conv" if axes else "linear"
        self.transform = transform
        self.zero_point = OFFSET if activation.dynamic else (activation.zero_point or 0) + OFFSET
        if not activation.dynamic and not isinstance(transform, Rotation):
            self.reads = SchemeReader(activation, transform)

    def __call__(self, x: Tensor, bias: Tensor | None, clamp: Clamp | None = None) -> Tensor | None:
        """Return the layer's output; None for NaN, no numbers, or other dtypes or shapes."""
        if not is_taken(x) or not self.takes(x) or not is_bias(bias, self.weight.scale):
            return None
        if not self.activation.dynamic:
            q = quantize(x, self.activation, self.transform)
            return None if q is None else self.real(q, bias, clamp, is_channels_last(x))
        rows = self._by_rows(x)
        return None if rows is None else self._of_rows(x, rows, bias, clamp)

    @abstractmethod
    def _bytes(self, q: Tensor, form: HandedForm, gelu: str | None) -> Tensor | None:
        """Return the output on bytes as the bytes of ``form``; None where it can't."""

    @abstractmethod
    def _of_rows(self, x: Tensor, rows: Rows, bias: Tensor | None, clamp: Clamp | None) -> Tensor:
        """Return the output on ``x``, whose bytes are ``rows``."""

    def _by_rows(self, x: Tensor) -> Rows | None:
        if isinstance(self.transform, Rotation):
            x = rotate(x, self.transform)
        elif self.transform is not None:
            x = self.transform.of_input(x)
        rows = quantize_rows(x, self.activation, self.kind)
        return None if rows is None or bool((rows[1] > LARGEST_SCALE).any()) else rows

    def stored(self, x: Tensor) -> Tensor | None:
        """Return the bytes of a real activation; None as in a call."""
        if self.activation.dynamic or not is_taken(x) or not self.takes(x):
            return None
        return quantize(x, self.activation, self.transform)

    def handed(
        self,
        q: Tensor,
        bias: Tensor | None,
        clamp: Clamp | None,
        reader: Reader,
        gelu: str | None = None,
    ) -> Tensor | None:
        """Return it as the bytes that ``reader`` makes of it, in the same pass."""
        if not is_bias(bias, self.weight.scale) or not isinstance(reader, SchemeReader):
            return None
        # Nothing computes a GELU of what is clamped, or smoothed already.
        plain = clamp is None and reader.smoothing is None
        if gelu is not None and not (plain and self.hands_gelu):
            return None
        form = handed_form(self.weight, self.activation, bias, clamp, reader, self.kind)
        y = None if form is None else self._bytes(q, form, gelu)
        if form is None or y is None:
            return None
        return within_grid(y, form, reader, gelu, 1 if self.axes else -1)


def is_taken(x: Tensor) -> bool:
    """Return whether an activation is one that a product makes bytes of."""
    return x.dtype == torch.float32 and x.numel() > 0 and x.device.type == "cpu"


def is_bias(bias: Tensor | None, scale: Tensor) -> bool:
    """Return whether kernels, which do not ask, take a bias: float32 [channels], as ``scale``."""
    if bias is None:
        return True
    return bias.dtype == torch.float32 and bias.is_cpu and bias.shape == scale.shape

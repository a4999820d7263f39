"""Packed sites: what a quantized model carries when it is saved.

Integers are packed to their bit width and turned back by plain tensor operators, so that an
exported program needs nothing but torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.kernels.operation import Operation, Reader
from autoquant.nn.runtime import Layer, Multiply, Rows
from autoquant.quant.activation import ActivationQuantizer
from autoquant.quant.affine import QParams, dequantize
from autoquant.quant.blocks import from_blocks, from_matrix, to_blocks
from autoquant.quant.input_layout import Layout
from autoquant.quant.packing import pack, unpack
from autoquant.quant.rotation import Rotation
from autoquant.quant.smoothing import Smoothing
from autoquant.quant.transforms import InputTransform
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme


class PackedSite(nn.Module):
    """The runtime of one site in a saved model.

    Buffers: ``packed`` uint8 [channels, bytes], ``scale`` float32 [blocks, 1] and, for asymmetric
    schemes, ``zero_point`` int8 [blocks, 1]; or ``unquantized``, where only the activation is
    quantized. ``like`` is an empty parameter: its dtype and device are those of the weight, for
    code that asks the model's parameters what they are. ``smoothing`` float32 [input channels] are
    the factors of a smoothed input, whose weight is packed; ``hadamard`` [block, block] is what the
    blocks of a rotated one are multiplied by. With a ``rest`` the model around is of that format,
    and the layer computes in float32 between its input and its output, as a slot does.
    """

    parameter = None

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    unquantized: Tensor
    like: Tensor
    smoothing: Tensor
    hadamard: Tensor
    layout: Layout | None = None
    """Where the input channels lie that are transformed; None in models that were kept before."""
    rest: torch.dtype | None = None
    wide = False
    """Whether weight and bias are read in float32 just now, where the rest is of a lower format."""

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype,
        weight: QuantizedWeight | Tensor,
        activation: ActivationScheme | None,
        transform: InputTransform | None = None,
        rest: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rest = rest
        device = weight.device if isinstance(weight, Tensor) else weight.q.device
        like = torch.empty(0, dtype=dtype, device=device)
        self.like = nn.Parameter(like, requires_grad=False)
        self.activation = None if activation is None else ActivationQuantizer(activation, kind)
        self.quantized = isinstance(weight, QuantizedWeight)
        if isinstance(weight, QuantizedWeight):
            self.scheme = weight.scheme
            self.shape = weight.shape
            self.channel_axis = weight.channel_axis
            self.columns = weight.q.shape[1]
            self.register_buffer("packed", pack(weight.q, weight.scheme.bits))
            self.register_buffer("scale", weight.qparams.scale.clone())
            if not weight.scheme.symmetric:
                self.register_buffer("zero_point", weight.qparams.zero_point.to(torch.int8))
        else:
            self.register_buffer("unquantized", weight.detach().clone())
        self.layout = None if transform is None else transform.layout
        if isinstance(transform, Smoothing):
            self.register_buffer("smoothing", transform.factors.clone())
        elif transform is not None:
            self.register_buffer("hadamard", transform.matrix.clone(), persistent=False)

    @property
    def transform(self) -> InputTransform | None:
        """What is done to the input."""
        if self.layout is None:
            return None
        if "hadamard" in self._buffers:
            return Rotation(self.hadamard, self.layout)
        return Smoothing(self.smoothing, self.layout)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in its own shape."""
        if not self.quantized:
            return self.unquantized.to(torch.float32) if self.wide else self.unquantized
        matrix = self._dequantize(unpack(self.packed, self.scheme.bits, self.columns), None)
        found = from_matrix(matrix, self.shape, self.channel_axis)
        if (transform := self.transform) is not None:
            found = transform.weight_back(found)
        return found.to(torch.float32 if self.wide else self.like.dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of the dequantized weight, dequantizing only those: an embedding."""
        if not self.quantized:
            return nn.functional.embedding(indices, self.unquantized)
        flat = indices.reshape(-1)
        q = unpack(self.packed.index_select(0, flat), self.scheme.bits, self.columns)
        rows = self._dequantize(q, flat).to(self.like.dtype)
        return rows.reshape(*indices.shape, self.columns)

    def _dequantize(self, q: Tensor, rows: Tensor | None) -> Tensor:
        """Return the real numbers of integers ``q`` [n, columns]: all rows, or those named."""
        symmetric = self.scheme.symmetric
        scale = self._of_rows(self.scale, rows)
        zero_point = scale if symmetric else self._of_rows(self.zero_point, rows).float()
        if scale.shape[0] > 1:
            q = to_blocks(q, self.scheme.granularity)
        real = dequantize(q, QParams(scale, zero_point, self.scheme.bits, symmetric))
        return from_blocks(real, (-1, self.columns))

    def _of_rows(self, numbers: Tensor, rows: Tensor | None) -> Tensor:
        """Return the block parameters [blocks, 1] of ``rows``; all of them for None."""
        if rows is None or numbers.shape[0] == 1:
            return numbers
        per_row = numbers.shape[0] // self.packed.shape[0]
        return numbers.reshape(-1, per_row).index_select(0, rows).reshape(-1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedSite:
        """Move the site; scales stay float32, whatever the dtype of the weight that they give."""
        scale = self._buffers.get("scale")
        super()._apply(fn, recurse)
        if scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def is_float(self, reason: str) -> bool:
        """Return False: what a saved model carries is quantized."""
        return False

    def bias(self, own: Tensor | None) -> Tensor | None:
        """Return the layer's bias: a saved model's is corrected already."""
        return own.to(torch.float32) if self.wide and own is not None else own

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return the activation as the quantized model sees it."""
        if self.activation is None:
            return x
        transform = self.transform
        if transform is None:
            return self.activation(x)
        return transform.input_back(self.activation(transform.of_input(x)))

    def layer(
        self,
        layer: Layer,
        x: Tensor,
        bias: Tensor | None,
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return a layer's output on ``x``; a saved model has its ReLUs as modules."""
        if self.rest is None:
            return compute(self.quantize_input(x))
        with self._widened(x):
            y = compute(self.quantize_input(x.to(self.rest).to(torch.float32)))
        return y.to(self.rest)

    @contextlib.contextmanager
    def _widened(self, x: Tensor) -> Iterator[None]:
        """Compute in float32 inside: whoever reads weight or bias gets that."""
        self.wide = True
        try:
            if torch.is_autocast_enabled(x.device.type):
                with torch.autocast(x.device.type, enabled=False):
                    yield
            else:
                yield
        finally:
            self.wide = False

    def reads(self, operation: Operation | None) -> Reader | None:
        """Return None: a saved model computes with real numbers."""
        return None

    def linear(self, *parts: Rows) -> tuple[Multiply, ...]:
        """Return the products with the weight, a matrix: with each of some of its rows."""
        if self.rest is not None:
            return self._wide_linear(self.rest, *parts)
        weight = self.weight

        def product(rows: Rows) -> Multiply:
            part = weight if rows is None else weight[slice(*rows)]
            return lambda x, bias: F.linear(self.quantize_input(x), part, bias)

        return tuple(map(product, parts))

    def _wide_linear(self, rest: torch.dtype, *parts: Rows) -> tuple[Multiply, ...]:
        """Return the same in float32, rounded once where the activation was of the lower format."""
        with self._widened(self.like):
            weight = self.weight

        def product(rows: Rows) -> Multiply:
            part = weight if rows is None else weight[slice(*rows)]

            def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
                with self._widened(x):
                    wide = self.quantize_input(x.to(torch.float32))
                    y = F.linear(wide, part, None if bias is None else bias.to(torch.float32))
                return y.to(rest) if x.dtype == rest else y

            return multiply

        return tuple(map(product, parts))

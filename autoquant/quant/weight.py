"""A quantized weight: integers, the scales of its blocks, and its place in the layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.quant.affine import QParams, dequantize
from autoquant.quant.blocks import from_blocks, from_matrix, to_blocks
from autoquant.spec.recipe import WeightScheme


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight as integers and the scales of its blocks.

    ``q`` is int8 [output channels, everything else]; ``qparams`` hold [blocks, 1].
    """

    q: Tensor
    qparams: QParams
    scheme: WeightScheme
    shape: tuple[int, ...]
    channel_axis: int

    def matrix(self) -> Tensor:
        """Return the real numbers, float32 [output channels, everything else]."""
        blocks = dequantize(to_blocks(self.q, self.scheme.granularity), self.qparams)
        return from_blocks(blocks, (self.q.shape[0], self.q.shape[1]))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the real numbers in the weight's own shape."""
        return from_matrix(self.matrix(), self.shape, self.channel_axis).to(dtype)

    def as_matrix(self) -> QuantizedWeight:
        """Return the same weight laid out [output channels, everything else]."""
        shape = (self.q.shape[0], self.q.shape[1])
        return QuantizedWeight(self.q, self.qparams, self.scheme, shape, 0)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Return the output channels ``start`` … ``stop`` as a weight of their own."""
        p = self.qparams
        if p.scale.shape[0] > 1:
            per_row = p.scale.shape[0] // self.q.shape[0]
            span = slice(start * per_row, stop * per_row)
            p = QParams(p.scale[span], p.zero_point[span], p.bits, p.symmetric)
        shape = list(self.shape)
        shape[self.channel_axis] = stop - start
        return QuantizedWeight(self.q[start:stop], p, self.scheme, tuple(shape), self.channel_axis)

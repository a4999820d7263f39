"""Quantizing one weight by a scheme, and the value that comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.nn.sites import Site
from autoquant.observers.weights import weight_range
from autoquant.quant.affine import QParams, choose_qparams, dequantize, quantize
from autoquant.quant.blocks import from_blocks, from_matrix, to_blocks, to_matrix
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


def weight_qparams(matrix: Tensor, scheme: WeightScheme) -> QParams:
    """Return the calibrated parameters, [blocks, 1], of a weight matrix [channels, rest]."""
    blocks = to_blocks(matrix, scheme.granularity)
    lo, hi = weight_range(blocks, scheme.calibration, scheme.bits, scheme.symmetric)
    return choose_qparams(lo[:, None], hi[:, None], scheme.bits, symmetric=scheme.symmetric)


def quantize_weight(weight: Tensor, site: Site, scheme: WeightScheme) -> QuantizedWeight:
    """Round ``weight`` of ``site`` to the nearest point of the grid that ``scheme`` calibrates.

    Raises SpecError where a group does not divide the inputs, TrialError on NaN.
    """
    matrix = to_matrix(weight.detach().to(torch.float32), site.channel_axis)
    qparams = weight_qparams(matrix, scheme)
    q = quantize(to_blocks(matrix, scheme.granularity), qparams)
    shape = (matrix.shape[0], matrix.shape[1])
    return QuantizedWeight(from_blocks(q, shape), qparams, scheme, site.shape, site.channel_axis)

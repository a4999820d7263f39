"""Quantizing one weight by a scheme."""

from __future__ import annotations

import torch
from torch import Tensor

from autoquant.errors import TrialError
from autoquant.nn.sites import Site
from autoquant.observers.output_error import OutputError, output_qparams
from autoquant.observers.weights import weight_range
from autoquant.quant.affine import QParams, choose_qparams, quantize
from autoquant.quant.blocks import from_blocks, to_blocks, to_matrix
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import WeightScheme


def weight_qparams(
    matrix: Tensor, scheme: WeightScheme, error: OutputError | None = None
) -> QParams:
    """Return the calibrated parameters, [blocks, 1], of a weight matrix [channels, rest].

    ``error`` is what ``output_mse`` makes small; where there is none, plain squared error is.
    """
    if scheme.calibration == "output_mse" and error is not None and matrix.numel():
        if not bool(torch.isfinite(matrix).all()):
            raise TrialError("the weight holds NaN or Inf")
        return output_qparams(
            matrix, error, scheme.granularity, scheme.bits, symmetric=scheme.symmetric
        )
    blocks = to_blocks(matrix, scheme.granularity)
    lo, hi = weight_range(blocks, scheme.calibration, scheme.bits, scheme.symmetric)
    return choose_qparams(lo[:, None], hi[:, None], scheme.bits, symmetric=scheme.symmetric)


def quantize_weight(
    weight: Tensor, site: Site, scheme: WeightScheme, error: OutputError | None = None
) -> QuantizedWeight:
    """Round ``weight`` of ``site`` to the nearest point of the grid that ``scheme`` calibrates.

    ``error`` is needed by ``output_mse`` where an activation meets the weight.
    Raises SpecError where a group does not divide the inputs, TrialError on NaN.
    """
    matrix = to_matrix(weight.detach().to(torch.float32), site.channel_axis)
    qparams = weight_qparams(matrix, scheme, error)
    q = quantize(to_blocks(matrix, scheme.granularity), qparams)
    shape = (matrix.shape[0], matrix.shape[1])
    return QuantizedWeight(from_blocks(q, shape), qparams, scheme, site.shape, site.channel_axis)

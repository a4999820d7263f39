"""Quantizing one weight by a scheme."""

from __future__ import annotations

import torch
from torch import Tensor

from autoquant.errors import SpecError, TrialError
from autoquant.nn.sites import Site
from autoquant.observers.output_error import OutputError, output_qparams
from autoquant.observers.weights import weight_range
from autoquant.quant.affine import QParams, choose_qparams, quantize
from autoquant.quant.blocks import from_blocks, to_blocks, to_matrix
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.needs import WEIGHT_NEEDS
from autoquant.spec.recipe import WeightScheme


def weight_qparams(
    matrix: Tensor, scheme: WeightScheme, error: OutputError | None = None
) -> QParams:
    """Return the calibrated parameters, [blocks, 1], of a weight matrix [channels, rest].

    ``error`` is what ``output_mse`` makes small; None where rows are read one by one, as an
    embedding's are: then it is the plain squared error.
    """
    if scheme.calibration in WEIGHT_NEEDS and error is not None and matrix.numel():
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

    ``error`` is needed by ``output_mse`` where an activation meets the weight. Raises SpecError
    without it, or where a group does not divide the inputs, and TrialError on NaN.
    """
    if scheme.calibration in WEIGHT_NEEDS and site.activation and error is None:
        raise SpecError(
            f"{site.name}: calibration {scheme.calibration}: nothing is known of the layer's "
            "input, which it needs"
        )
    matrix = to_matrix(weight.detach().to(torch.float32), site.channel_axis)
    qparams = weight_qparams(matrix, scheme, error)
    q = quantize(to_blocks(matrix, scheme.granularity), qparams)
    shape = (matrix.shape[0], matrix.shape[1])
    return QuantizedWeight(from_blocks(q, shape), qparams, scheme, site.shape, site.channel_axis)

"""When a layer's output can be handed on as the bytes that its reader would make of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from autoquant.kernels.cpu.native import OFFSET, bounds, limit_bytes
from autoquant.kernels.cpu.packed_weight import PackedWeight
from autoquant.kernels.operation import Clamp, SchemeReader
from autoquant.quant.smoothing import LEAST
from autoquant.spec.formats import FORMATS
from autoquant.spec.recipe import ActivationScheme

LARGEST_HANDED = 2.0**60
"""Bound of the outputs that are handed on as bytes: far from ∞, which has no byte."""
SMALLEST_STEP = 2.0**-60
"""Smallest scale of bytes that are handed on: it is multiplied by its reciprocal."""


@dataclass(frozen=True, slots=True)
class HandedForm:
    """How a layer's output is made the bytes that its reader takes, by oneDNN.

    - ``scale``, ``zero_point``: those of the bytes: round(y · (1 / scale) + zero_point), halves to
      even.
    - ``weight_scale`` [channels], ``bias``: what to compute y with; None is the layer's own scale.
    - ``clamp``: of y.
    - ``limit`` [channels]: the largest byte of each channel, None where all have the same.
    """

    scale: float
    zero_point: int
    weight_scale: Tensor | None
    bias: Tensor | None
    clamp: Clamp | None
    limit: Tensor | None = None


def handed_form(
    weight: PackedWeight,
    activation: ActivationScheme,
    bias: Tensor | None,
    clamp: Clamp | None,
    reader: SchemeReader,
    kind: str,
) -> HandedForm | None:
    """Return how a layer of ``kind``, conv or linear, hands bytes to ``reader``.

    None where an output may be NaN, or so large that its byte would be in doubt, and where the
    reader smooths other channels than those of the output. Factors of smoothing are powers of two,
    so dividing scales and bias by them divides the output, bit for bit.
    """
    scheme, smoothing = reader.scheme, reader.smoothing
    if scheme.scale is None or scheme.scale < SMALLEST_STEP:
        return None
    largest = weight.largest_scale * (activation.scale or 1.0) * 2**31
    if smoothing is not None:
        largest *= 2.0**-LEAST
    if not largest < LARGEST_HANDED:
        return None
    if bias is not None and not _largest(bias) < LARGEST_HANDED * 2.0**LEAST:
        return None
    zero_point = (scheme.zero_point or 0) + OFFSET
    if smoothing is None:
        own = within(clamp, scheme)
        return HandedForm(scheme.scale, zero_point, None, bias, own)
    factors = smoothing.factors
    same = smoothing.layout.kind.startswith("conv") == (kind == "conv")
    if not same or len(factors) != len(weight.scale) or (clamp is not None and clamp[0] != 0.0):
        return None
    inner, limit = None if clamp is None else (0.0, math.inf), None
    if clamp is not None and clamp[1] < math.inf:
        # As the reader rounds it: many numbers end there, and the end may lie between two bytes.
        ends = (clamp[1] / factors / scheme.scale).round() + zero_point
        limit = ends.clamp_(0, 255).to(torch.uint8)
    return HandedForm(
        scheme.scale,
        zero_point,
        weight.scale / factors,
        None if bias is None else bias / factors,
        within(inner, scheme),
        limit,
    )


def within_grid(
    y: Tensor, form: HandedForm, reader: SchemeReader, gelu: str | None, axis: int
) -> Tensor:
    """Return bytes ``y`` as the reader's grid, and its limits, have them; channels are on ``axis``.

    A clamp keeps them within the grid beforehand, but for what a GELU makes of numbers.
    """
    if gelu is not None and reader.scheme.bits < 8:
        grid = FORMATS[reader.scheme.bits]
        y.clamp_(grid.qmin + OFFSET, grid.qmax + OFFSET)
    if form.limit is not None:
        limit_bytes(y, form.limit, axis)
    return y


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Version and largest magnitude of biases, as long as they live."""


def _largest(bias: Tensor) -> float:
    """Return the largest magnitude of a bias, NaN where it holds one."""
    version = -1 if bias.is_inference() else bias._version
    known = _known.get(bias)
    if known is None or known[0] != version or version < 0:
        known = version, float(torch.linalg.vector_norm(bias.detach(), math.inf))
        _known[bias] = known
    return float(known[1])


def within(clamp: Clamp | None, reader: ActivationScheme) -> Clamp | None:
    """Return the clamp after which ``reader``'s integers stay within its grid."""
    if reader.bits >= 8 or reader.scale is None:  # it ends where bytes do
        return clamp
    least, most = (end * reader.scale for end in bounds(reader))
    own = (-math.inf, math.inf) if clamp is None else clamp
    low = min(max(least, own[0]), most)
    return low, max(min(most, own[1]), low)

"""When a layer's output can be handed on as the bytes that its reader would make of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from autoquant.kernels.cpu.native import OFFSET, bounds
from autoquant.kernels.cpu.packed_weight import PackedWeight
from autoquant.kernels.operation import Clamp
from autoquant.spec.recipe import ActivationScheme

LARGEST_HANDED = 2.0**60
"""Bound of the outputs that are handed on as bytes: far from ∞, which has no byte."""
SMALLEST_STEP = 2.0**-60
"""Smallest scale of bytes that are handed on: it is multiplied by its reciprocal."""


def handed_form(
    weight: PackedWeight,
    activation: ActivationScheme,
    bias: Tensor | None,
    reader: ActivationScheme,
) -> tuple[float, int] | None:
    """Return the scale and zero point of the bytes that ``reader`` is handed.

    None where an output may be NaN, or so large that its byte would be in doubt. oneDNN computes
    round(y · (1 / scale) + zero_point), halves to even.
    """
    scale = reader.scale
    if scale is None or scale < SMALLEST_STEP:
        return None
    if not weight.largest_scale * (activation.scale or 1.0) * 2**31 < LARGEST_HANDED:
        return None
    if bias is not None and not _largest(bias) < LARGEST_HANDED:
        return None
    return scale, (reader.zero_point or 0) + OFFSET


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

"""Quantized weights as oneDNN's operators take them, packed once for all that use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from autoquant.quant.weight import QuantizedWeight

MOST_SUMMED = (2**31 - 1) // (255 * 128)
"""Most products of two bytes whose sum always fits into 32 bits."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Integers with their zero points taken off, int8 in the weight's shape, and how they scale.

    ``scale`` and ``sums`` (of a channel's integers, scaled) are float32 [channels]; ``largest`` is
    the largest magnitude, ``largest_scale`` the largest scale. ``packs`` keeps what oneDNN made of
    the integers, by what asked for it.
    """

    q: Tensor
    scale: Tensor
    sums: Tensor
    largest: int
    largest_scale: float
    packs: dict[object, Tensor]

    @property
    def bytes(self) -> int:
        """Bytes that the packed weights take beside ``q``."""
        return self.q.numel() * (len(self.packs) + 1)


_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Packed weights by the tensor of integers that they were made from, as long as that lives."""


def packed_weight(weight: QuantizedWeight) -> PackedWeight | None:
    """Return a weight as oneDNN takes it, packed once; None where it can't be."""
    known = _cache.get(weight.q)
    if known is None:
        known = _cache[weight.q] = _pack(weight)
    return known if isinstance(known, PackedWeight) else None


def _pack(weight: QuantizedWeight) -> PackedWeight | str:
    """Return a weight as oneDNN takes it, or why it can't be."""
    channels, columns = weight.q.shape
    if weight.channel_axis != 0:
        return "output channels come first"
    if weight.qparams.scale.shape[0] not in (1, channels):
        return "one scale for each channel"
    if columns > MOST_SUMMED:
        return "a sum may leave 32 bits"
    centered = weight.q.to(torch.int16)
    if not weight.qparams.symmetric:
        centered = centered - weight.qparams.zero_point.to(torch.int16)
    lo, hi = (int(v) for v in centered.aminmax()) if centered.numel() else (0, 0)
    if lo < -128 or hi > 127:
        return "integers less their zero point do not fit into a byte"
    scale = weight.qparams.scale.flatten().expand(channels).contiguous()
    sums = centered.sum(1, dtype=torch.int64).to(torch.float64) * scale
    q = centered.to(torch.int8).reshape(weight.shape).contiguous()
    largest_scale = float(scale.max()) if channels else 0.0
    return PackedWeight(q, scale, sums.to(torch.float32), max(-lo, hi), largest_scale, {})

"""Quantized weights as products of integers take them, packed once for all that use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from autoquant.quant.weight import QuantizedWeight

LARGEST_SUM = 2**31 - 1
"""Largest sum of products: it has to fit into 32 bits."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Integers with their zero points taken off, in the weight's shape, and how they scale.

    ``q`` is int8, or int16 where they need more than 8 bits. ``scale`` and ``sums`` (of a channel's
    integers, scaled) are float32 [channels]; ``largest`` is the largest magnitude,
    ``largest_scale`` the largest scale. ``packs`` keeps what kernels made of the integers, by what
    asked for it.
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
        return self.q.nbytes + sum(_bytes(pack) for pack in self.packs.values())


def _bytes(pack: Tensor) -> int:
    """Bytes of what a kernel made of integers: oneDNN, which doesn't tell, keeps bytes."""
    return pack.nbytes if pack.layout == torch.strided else pack.numel()


_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Packed weights by the tensor of integers that they were made from, as long as that lives."""


def packed_weight(weight: QuantizedWeight) -> PackedWeight | None:
    """Return a weight as integers that can be multiplied, packed once; None where it can't be."""
    known = _cache.get(weight.q)
    if known is None:
        known = _cache[weight.q] = _pack(weight)
    return known if isinstance(known, PackedWeight) else None


def _pack(weight: QuantizedWeight) -> PackedWeight | str:
    """Return a weight as integers that can be multiplied, or why it can't be."""
    channels, columns = weight.q.shape
    if weight.channel_axis != 0:
        return "output channels come first"
    if weight.qparams.scale.shape[0] not in (1, channels):
        return "one scale for each channel"
    centered = weight.q.to(torch.int16)
    if not weight.qparams.symmetric:
        centered = centered - weight.qparams.zero_point.to(torch.int16)
    lo, hi = (int(v) for v in centered.aminmax()) if centered.numel() else (0, 0)
    largest = max(-lo, hi)
    if columns * 255 * largest > LARGEST_SUM:
        return "a sum may leave 32 bits"
    scale = weight.qparams.scale.flatten().expand(channels).contiguous()
    sums = centered.sum(1, dtype=torch.int64).to(torch.float64) * scale
    q = centered if lo < -128 or hi > 127 else centered.to(torch.int8)
    q = q.reshape(weight.shape).contiguous()
    largest_scale = float(scale.max()) if channels else 0.0
    return PackedWeight(q, scale, sums.to(torch.float32), largest, largest_scale, {})

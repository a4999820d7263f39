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
    ``largest_scale`` the largest scale. Where groups of columns have scales of their own, those are
    ``of_groups`` [channels, groups], and ``scale`` is 1. ``packs`` keeps what kernels made of the
    integers, by what asked for it.
    """

    q: Tensor
    scale: Tensor
    sums: Tensor
    largest: int
    largest_scale: float
    packs: dict[object, Tensor]
    of_groups: Tensor | None = None

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
    scale = weight.qparams.scale.to(torch.float32)
    blocks, groups = len(scale), 1
    if blocks not in (1, channels):
        if channels == 0 or blocks % channels:
            return "each channel has scales of its own"
        groups = blocks // channels
    centered = weight.q.to(torch.int16)
    if not weight.qparams.symmetric:
        zero_point = weight.qparams.zero_point.to(torch.int16)
        centered = (centered.view(blocks, -1) - zero_point.view(blocks, 1)).view_as(centered)
    lo, hi = (int(v) for v in centered.aminmax()) if centered.numel() else (0, 0)
    largest = max(-lo, hi)
    if columns * 255 * largest > LARGEST_SUM:
        return "a sum may leave 32 bits"
    of_groups = scale.reshape(channels, groups).contiguous() if groups > 1 else None
    own = scale.flatten().expand(channels).contiguous() if groups == 1 else scale.new_ones(channels)
    sums = centered.view(channels, groups, -1).sum(2, dtype=torch.int64).to(torch.float64)
    sums = (sums * (own.view(-1, 1) if of_groups is None else of_groups)).sum(1)
    q = centered if lo < -128 or hi > 127 else centered.to(torch.int8)
    q = q.reshape(weight.shape).contiguous()
    largest_scale = float(scale.max()) if channels else 0.0
    return PackedWeight(q, own, sums.to(torch.float32), largest, largest_scale, {}, of_groups)

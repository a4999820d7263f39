"""The largest magnitude of each block of a gradient: what its scale comes of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autoquant.errors import SpecError
from autoquant.spec.granularity import PER_CHANNEL, PER_TENSOR, group_size


def check_granularity(granularity: str) -> None:
    """Raise SpecError where gradients have no such granularity."""
    if granularity not in (PER_TENSOR, PER_CHANNEL) and group_size(granularity) is None:
        allowed = f"{PER_TENSOR}, {PER_CHANNEL}, per_group_N"
        raise SpecError(f"granularity of a gradient: found {granularity!r}, allowed: {allowed}")


def largest_magnitudes(magnitudes: Tensor, granularity: str, axis: int) -> Tensor:
    """Return the largest of ``magnitudes`` in the block of each, of a shape that broadcasts to it.

    A block is the whole tensor (per_tensor), all numbers that share an index along ``axis``
    (per_channel), or N neighbours along the last axis, of which the last block may have fewer
    (per_group_N). Magnitudes are ≥ 0 and finite, and there is one at least. Raises IndexError where
    the tensor has no such axis.
    """
    if granularity == PER_TENSOR or magnitudes.dim() == 0:
        return magnitudes.amax()
    if granularity == PER_CHANNEL:
        own = range(magnitudes.dim())[axis]
        rest = [d for d in range(magnitudes.dim()) if d != own]
        return magnitudes.amax(rest, keepdim=True) if rest else magnitudes
    size = group_size(granularity)
    assert size is not None  # check_granularity saw to it
    n = magnitudes.shape[-1]
    size = min(size, n)
    blocks = F.pad(magnitudes, (0, -n % size)).unflatten(-1, (-1, size))
    return torch.repeat_interleave(blocks.amax(-1), size, dim=-1)[..., :n]

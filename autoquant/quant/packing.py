"""Integers of 2 to 8 bits, packed densely into bytes, and unpacked by plain tensor operators.

A width is cut into fields of 4, 2 and 1 bits (6 = 4 + 2, 3 = 2 + 1), because a field whose width
divides 8 unpacks with one shift and one mask. Each field is packed on its own; a row of n integers
of b bits takes n·b/8 bytes, rounded up for each field.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIELDS: dict[int, tuple[int, ...]] = {
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def packed_columns(columns: int, bits: int) -> int:
    """Return how many bytes a row of ``columns`` integers of ``bits`` bits takes."""
    return sum(-(-columns * width // 8) for width in _FIELDS[bits])


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack ``q`` (int8 [..., n], within the grid of ``bits``) into uint8 [..., packed_columns]."""
    offset = 1 << (bits - 1)
    rest = (q.to(torch.int16) + offset).to(torch.uint8)
    parts = []
    for width in _FIELDS[bits]:
        field = rest & ((1 << width) - 1)
        rest = rest >> width if width < 8 else rest
        parts.append(_pack_field(field, width))
    return torch.cat(parts, dim=-1)


def _pack_field(field: Tensor, width: int) -> Tensor:
    per_byte = 8 // width
    short = -field.shape[-1] % per_byte
    padded = torch.nn.functional.pad(field, (0, short))
    lanes = padded.unflatten(-1, (-1, per_byte))
    packed = torch.zeros_like(lanes[..., 0])
    for lane in range(per_byte):
        packed |= lanes[..., lane] << (lane * width)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the int8 [..., columns] that ``pack`` packed."""
    q = None
    start = shift = 0
    for width in _FIELDS[bits]:
        size = -(-columns * width // 8)
        field = _unpack_field(packed[..., start : start + size], width)[..., :columns]
        q = field if q is None else q | (field << shift)
        start += size
        shift += width
    assert q is not None
    # Unsigned arithmetic wraps around, so the bits are those of the signed difference, which the
    # conversion keeps. torch.jit can't trace a view of another type.
    return (q - (1 << (bits - 1))).to(torch.int8)


def _unpack_field(packed: Tensor, width: int) -> Tensor:
    if width == 8:
        return packed
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << width) - 1)).flatten(-2)

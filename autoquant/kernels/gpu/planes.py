"""Packing a weight so that a GPU unpacks it in registers, with no exchange between threads.

The inputs of a channel are cut into chunks of 8 · SPAN. The first span of a chunk is in the lowest
bits of its bytes, the next one above it, and so on: unpacking SPAN bytes by one shift gives SPAN
neighbouring integers. As in ``quant.packing``, a width is cut into fields of 8, 4, 2 and 1 bits;
each field of a chunk takes (its width) · SPAN bytes, and a chunk (bits) · SPAN.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIELDS: dict[int, tuple[int, ...]] = {
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}
SPANS = 8
"""Spans of a chunk: as many as the narrowest field has in one byte."""


def pack(q: Tensor, bits: int, span: int) -> Tensor:
    """Pack ``q``, int8 [N, K] within the grid, into uint8 [N, chunks, bits · span].

    K is filled up with the integer qmin to whole chunks.
    """
    chunk = SPANS * span
    offset = (q.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    offset = torch.nn.functional.pad(offset, (0, -q.shape[1] % chunk))
    spans = offset.view(q.shape[0], -1, SPANS, span)
    fields, shift = [], 0
    for width in FIELDS[bits]:
        lanes = 8 // width
        field = (spans >> shift) & ((1 << width) - 1)
        field = field.view(*spans.shape[:2], width, lanes, span)
        packed = torch.zeros_like(field[:, :, :, 0])
        for lane in range(lanes):
            packed |= field[:, :, :, lane] << (lane * width)
        fields.append(packed.flatten(2))
        shift += width
    return torch.cat(fields, dim=2).contiguous()

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.kernels.gpu.planes import FIELDS, SPANS, pack


def unpack(packed, bits, span, columns):
    """Return the int8 [N, columns] that ``pack`` packed, as kernels do it."""
    spans = []
    for n in range(SPANS):
        q = torch.zeros_like(packed[:, :, :span])
        start = shift = 0
        for width in FIELDS[bits]:
            lanes = 8 // width
            at = start + n // lanes * span
            field = packed[:, :, at : at + span] >> (n % lanes * width)
            q |= (field & ((1 << width) - 1)) << shift
            start += width * span
            shift += width
        spans.append(q)
    rows = torch.stack(spans, dim=2).flatten(1)[:, :columns]
    return (rows.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.integers(1, 300), st.sampled_from([16, 32]), st.integers(0, 2**31))
def test_packing_loses_nothing_and_takes_the_bits_it_says(bits, columns, span, seed):
    grid = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-grid, grid, (3, columns), dtype=torch.int8, generator=generator)
    packed = pack(q, bits, span)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, -(-columns // (8 * span)), bits * span)
    assert torch.equal(unpack(packed, bits, span, columns), q)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_integer_survives_in_every_span(bits):
    grid = 1 << (bits - 1)
    q = torch.arange(-grid, grid).to(torch.int8).repeat(2048 // (2 * grid))
    turned = torch.stack([q.roll(16 * n + n) for n in range(8)])
    assert torch.equal(unpack(pack(turned, bits, 16), bits, 16, q.numel()), turned)

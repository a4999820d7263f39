import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoquant.quant.packing import pack, packed_columns, unpack


def integers(bits, shape, seed=0):
    grid = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-grid, grid, shape, dtype=torch.int8, generator=generator)


@settings(deadline=None, max_examples=80)
@given(st.integers(2, 8), st.integers(1, 70), st.integers(0, 4), st.integers(0, 2**31))
def test_packing_loses_nothing_and_takes_the_bits_it_says(bits, columns, rows, seed):
    q = integers(bits, (rows, columns), seed)
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), q)
    assert packed_columns(8 * columns, bits) == bits * columns
    # Each of at most three fields is rounded up to whole bytes.
    assert bits * columns / 8 <= packed_columns(columns, bits) < bits * columns / 8 + 3


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_integer_of_the_grid_survives_at_every_place(bits):
    grid = 1 << (bits - 1)
    q = torch.arange(-grid, grid).to(torch.int8)
    turned = torch.stack([q.roll(n) for n in range(9)])
    assert torch.equal(unpack(pack(turned, bits), bits, q.numel()), turned)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_are_packed_on_their_own(bits):
    q = integers(bits, (3, 2, 13))
    packed = pack(q, bits)
    assert torch.equal(packed[1, 1], pack(q[1, 1], bits))
    assert torch.equal(unpack(packed[2], bits, 13), q[2])


class Unpacker(nn.Module):
    def __init__(self, q, bits):
        super().__init__()
        self.bits, self.columns = bits, q.shape[-1]
        self.register_buffer("packed", pack(q, bits))

    def forward(self, rows):
        return unpack(self.packed.index_select(0, rows), self.bits, self.columns)


@pytest.mark.parametrize("bits", range(2, 9))
def test_unpacking_can_be_exported(bits):
    q = integers(bits, (5, 11))
    rows = torch.tensor([4, 0, 2])
    program = torch.export.export(
        Unpacker(q, bits), (rows,), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    more = torch.tensor([1, 3, 3, 0, 2])
    assert torch.equal(program.module()(more), q[more])

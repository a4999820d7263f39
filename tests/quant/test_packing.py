import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoquant.quant.packing import pack, packed_columns, unpack


@given(st.integers(2, 8), st.integers(1, 70), st.integers(1, 4), st.integers(0, 2**31))
def test_packing_loses_nothing_and_takes_the_bits_it_says(bits, columns, rows, seed):
    grid = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-grid, grid, (rows, columns), dtype=torch.int8, generator=generator)
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), q)
    assert packed_columns(8 * columns, bits) == bits * columns


@pytest.mark.parametrize("bits", range(2, 9))
def test_both_ends_of_the_grid_survive(bits):
    q = torch.tensor([[-(1 << (bits - 1)), (1 << (bits - 1)) - 1, 0, -1]], dtype=torch.int8)
    assert torch.equal(unpack(pack(q, bits), bits, 4), q)

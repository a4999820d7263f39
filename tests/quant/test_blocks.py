import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.errors import SpecError
from autoquant.quant.blocks import from_blocks, from_matrix, matrix_shape, to_blocks, to_matrix


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.data())
def test_a_weight_survives_the_way_to_a_matrix_and_back(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    weight = torch.randn(shape)
    matrix = to_matrix(weight, axis)
    assert tuple(matrix.shape) == matrix_shape(tuple(shape), axis)
    for channel in range(shape[axis]):
        assert torch.equal(matrix[channel], weight.select(axis, channel).flatten())
    assert torch.equal(from_matrix(matrix, tuple(shape), axis), weight)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3, 32]))
def test_blocks_are_cut_along_the_rows(rows, groups, size):
    matrix = torch.randn(rows, groups * size)
    for granularity, blocks in (
        ("per_tensor", 1),
        ("per_channel", rows),
        ("per_token", rows),
        (f"per_group_{size}", rows * groups),
    ):
        cut = to_blocks(matrix, granularity)
        assert cut.shape == (blocks, matrix.numel() // blocks)
        assert torch.equal(cut.flatten(), matrix.flatten())
        assert torch.equal(from_blocks(cut, (rows, groups * size)), matrix)


def test_a_group_is_a_run_of_inputs_of_one_channel():
    matrix = torch.arange(4 * 64.0).reshape(4, 64)
    assert torch.equal(to_blocks(matrix, "per_group_32")[3], matrix[1, 32:])


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(SpecError, match="per_group_32 does not divide the 48 inputs"):
        to_blocks(torch.zeros(2, 48), "per_group_32")
    with pytest.raises(SpecError, match="unknown granularity 'per_row'"):
        to_blocks(torch.zeros(2, 48), "per_row")

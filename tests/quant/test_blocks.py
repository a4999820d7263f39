import torch
from hypothesis import given
from hypothesis import strategies as st

from autoquant.quant.blocks import from_blocks, from_matrix, to_blocks, to_matrix


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.data())
def test_a_weight_survives_the_way_to_a_matrix_and_back(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    weight = torch.randn(shape)
    matrix = to_matrix(weight, axis)
    assert matrix.shape[0] == shape[axis]
    assert torch.equal(matrix[0].flatten().sort()[0], weight.select(axis, 0).flatten().sort()[0])
    assert torch.equal(from_matrix(matrix, tuple(shape), axis), weight)


def test_blocks_of_every_granularity():
    matrix = torch.arange(4 * 64.0).reshape(4, 64)
    for granularity, blocks in (("per_tensor", 1), ("per_channel", 4), ("per_group_32", 8)):
        cut = to_blocks(matrix, granularity)
        assert cut.shape[0] == blocks
        assert torch.equal(from_blocks(cut, (4, 64)), matrix)

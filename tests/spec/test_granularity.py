"""Which numbers share a scale, as blocks of a matrix."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.errors import SpecError
from autoquant.spec.granularity import (
    ACTIVATION_GRANULARITIES,
    GROUP_SIZES,
    WEIGHT_GRANULARITIES,
    block_size,
    divides,
    group_size,
)

shapes = st.tuples(st.integers(1, 64), st.integers(1, 512))


@given(st.sampled_from([*WEIGHT_GRANULARITIES, *ACTIVATION_GRANULARITIES]), shapes)
def test_blocks_tile_the_matrix_or_are_refused(granularity, shape):
    rows, columns = shape
    if not divides(granularity, shape):
        with pytest.raises(SpecError, match=f"{granularity} does not divide the {columns} inputs"):
            block_size(granularity, shape)
        return
    height, width = block_size(granularity, shape)
    assert rows % height == 0
    assert columns % width == 0
    blocks = (rows // height) * (columns // width)
    expected = {"per_tensor": 1, "per_channel": rows, "per_token": rows}
    group = group_size(granularity)
    assert blocks == (expected[granularity] if group is None else rows * columns // group)


def test_groups_by_name():
    assert GROUP_SIZES == (32, 64, 128)
    assert [group_size(g) for g in WEIGHT_GRANULARITIES] == [None, None, 32, 64, 128]
    for name in ("per_group_0", "per_group_", "per_group_-32", "per_group_032", "per_group_32x"):
        assert group_size(name) is None
    with pytest.raises(SpecError, match="unknown granularity 'per_row'"):
        block_size("per_row", (2, 2))


def test_only_groups_can_fail_to_divide():
    assert divides("per_group_32", (3, 64))
    assert not divides("per_group_32", (64, 3))
    assert divides("per_channel", (3, 7))

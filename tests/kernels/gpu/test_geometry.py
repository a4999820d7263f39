import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.kernels.gpu.geometry import geometry_of
from autoquant.kernels.operation import Operation

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_the_size_of_the_output(taps, stride, dilation, padding):
    g = geometry_of(Operation("conv2d", stride, padding, dilation), (1, 1, *taps))
    x = torch.zeros(1, 1, 9, 11)
    expected = F.conv2d(x, torch.zeros(1, 1, *taps), None, stride, padding, dilation)
    assert g.out_size(9, 11) == tuple(expected.shape[2:])


def test_columns_are_channels_last_and_filled_up():
    g = geometry_of(Operation("conv1d", (1,), (0,), (1,)), (4, 3, 2))
    assert (g.taps, g.channels, g.group_depth) == ((1, 2), 4, 4)
    assert g.columns().tolist() == [0, 2, 4, -1, 1, 3, 5, -1]


def test_groups_are_not_filled_up():
    g = geometry_of(Operation("conv2d", (1, 1), (0, 0), (1, 1), 2), (4, 3, 1, 1))
    assert (g.channels, g.group_depth, g.depthwise) == (6, 3, False)
    g = geometry_of(Operation("conv2d", (1, 1), (0, 0), (1, 1), 5), (10, 1, 3, 3))
    assert (g.channels, g.group_depth, g.depthwise) == (5, 1, True)

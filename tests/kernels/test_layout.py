"""How numbers lie in memory is told as torch tells it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoquant.kernels.layout import contiguous_stride, is_channels_last, lies_channels_last


@given(st.lists(st.integers(0, 4), max_size=5))
def test_contiguous_strides_are_those_of_torch(shape):
    assert contiguous_stride(tuple(shape)) == torch.empty(shape).stride()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 1, 5, 7), (2, 3, 1, 1), (1, 1, 1, 1)])
def test_a_convolutions_output_lies_as_it_is_told(form, shape):
    x = torch.randn(shape).contiguous(memory_format=form)
    y = torch.nn.functional.conv2d(x, torch.randn(8, shape[1], 1, 1))
    told = is_channels_last(x)
    assert told == lies_channels_last(x.shape, x.stride())
    lies = torch.channels_last if told else torch.contiguous_format
    assert y.is_contiguous(memory_format=lies)
    assert not is_channels_last(x.flatten(2))


@given(st.data())
def test_it_is_the_order_of_the_strides_that_tells(data):
    """Also of views with gaps, of transposed ones, and of what was repeated without a copy."""
    sizes = [data.draw(st.integers(1, 4)) for _ in range(4)]
    x = torch.randn([n + 2 for n in sizes])
    if data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    x = x.permute(data.draw(st.permutations(range(4)))) if data.draw(st.booleans()) else x
    for axis in range(4):
        start, step = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2))
        x = x.movedim(axis, 0)[start::step].movedim(0, axis)
    axis = data.draw(st.integers(0, 3))
    x = x.narrow(axis, 0, 1).expand([3 if i == axis else -1 for i in range(4)])
    y = torch.nn.functional.conv2d(x, torch.randn(5, x.shape[1], 1, 1))
    lies = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    assert y.is_contiguous(memory_format=lies)

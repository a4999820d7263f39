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

"""How the numbers of an activation lie in memory.

A kernel's output must lie as the float layer's would, because a model's code may take a view of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Return whether a float convolution of ``x`` gives its output channels last.

    Where it gives it contiguous, the model's code may take a view that is not to be had otherwise.
    One channel lies the same both ways; its strides say which is meant.
    """
    return lies_channels_last(x.shape, x.stride())


def lies_channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return the same of a tensor's form."""
    return len(shape) == 4 and stride[1] == 1 and stride[3] >= shape[1]


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))

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
    """Return the same of a tensor's form.

    It is the order of the strides that tells, gaps or not: torch's own rule, that of
    ``is_channels_last_strides_2d_s4`` in c10/core/MemoryFormat.h.
    """
    if len(shape) != 4 or stride[1] == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        if shape[axis] == 0 or stride[axis] < least:
            return False
        if axis == 0 and least == stride[1]:  # one pixel of one channel: either
            return False
        least = stride[axis] * shape[axis]
    return True


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))

"""How the numbers of an activation lie in memory.

A kernel's output must lie as the float layer's would, because a model's code may take a view of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Return whether a float convolution of ``x`` gives its output channels last.

    Where it gives it contiguous, the model's code may take a view that is not to be had otherwise.
    One channel lies the same both ways; its strides say which is meant.
    """
    return x.dim() == 4 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape."""
    return torch.empty(shape, device="meta").stride()

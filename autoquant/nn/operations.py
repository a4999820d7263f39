"""What a layer does with its weight, as kernels know it."""

from __future__ import annotations

from torch import nn

from autoquant.kernels.operation import LINEAR, Operation
from autoquant.nn.layouts import transposed_linear

_CONVOLUTIONS = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}


def operation_of(module: nn.Module) -> Operation | None:
    """Return what ``module`` computes, None where no kernel knows it."""
    if isinstance(module, nn.Linear) or transposed_linear(module) is not None:
        return LINEAR
    for base, kind in _CONVOLUTIONS.items():
        if isinstance(module, base):
            padding = _padding(module)
            if padding is None:
                return None
            return Operation(kind, module.stride, padding, module.dilation, module.groups)
    return None


def _padding(module: nn.modules.conv._ConvNd) -> tuple[int, ...] | None:
    """Return the zeros on either side of each axis; None where it is no such padding."""
    if module.padding_mode != "zeros":
        return None
    if module.padding == "valid":
        return tuple(0 for _ in module.kernel_size)
    if module.padding == "same":
        whole = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(n % 2 for n in whole) else tuple(n // 2 for n in whole)
    return tuple(int(n) for n in module.padding)

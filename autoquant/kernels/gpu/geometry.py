"""The shape of a convolution, as the integer kernels see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.kernels.gpu.launch import round_up
from autoquant.kernels.operation import Operation


@dataclass(frozen=True, slots=True)
class Geometry:
    """A convolution on two axes, (y, x): what is known before the image.

    ``depth`` is the input channels of a group and ``outputs`` all output channels; ``channels``
    is what a pixel of the quantized image holds, filled up so that loads are aligned.
    """

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    taps: tuple[int, int]
    groups: int
    depth: int
    outputs: int

    @property
    def depthwise(self) -> bool:
        """Whether every output channel sees one input channel."""
        return self.depth == 1

    @property
    def channels(self) -> int:
        """Channels of a pixel in memory."""
        if self.groups > 1 or self.depthwise:
            return self.groups * self.depth
        return round_up(self.depth, 4 if self.depth < 32 else 16)

    @property
    def group_depth(self) -> int:
        """Channels of a group in memory."""
        return self.depth if self.groups > 1 or self.depthwise else self.channels

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the output."""
        sizes = zip(
            (height, width), self.padding, self.dilation, self.taps, self.stride, strict=True
        )
        rows, columns = ((n + 2 * p - d * (t - 1) - 1) // s + 1 for n, p, d, t, s in sizes)
        return rows, columns

    def columns(self) -> Tensor:
        """Return the order of a weight's columns as the kernels read them: (y, x, channel).

        −1 stands for a channel that is not there.
        """
        taps = self.taps[0] * self.taps[1]
        order = torch.arange(self.depth * taps).view(self.depth, taps).T
        missing = self.group_depth - self.depth
        return torch.nn.functional.pad(order, (0, missing), value=-1).flatten()


def geometry_of(operation: Operation, shape: tuple[int, ...]) -> Geometry:
    """Return the geometry of a weight of ``shape`` [out, in / groups, *kernel], one or two axes."""
    outputs, depth, *kernel = shape
    return Geometry(
        _pair(operation.stride, 1),
        _pair(operation.padding, 0),
        _pair(operation.dilation, 1),
        _pair(tuple(kernel), 1),
        operation.groups,
        depth,
        outputs,
    )


def _pair(values: tuple[int, ...], first: int) -> tuple[int, int]:
    """Return one number for each of two axes; a convolution on one axis has one row."""
    return (values[0], values[1]) if len(values) == 2 else (first, values[0])

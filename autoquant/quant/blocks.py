"""Tensor ↔ blocks: the one place that knows how a granularity cuts a tensor.

A weight becomes a matrix [output channels, everything else] by moving its channel axis to the
front; the matrix becomes blocks [number of blocks, numbers in a block].
"""

from __future__ import annotations

import math

from torch import Tensor

from autoquant.spec.granularity import block_size


def matrix_shape(shape: tuple[int, ...], channel_axis: int) -> tuple[int, int]:
    """Return [channels, rest] of a weight of ``shape``."""
    channels = shape[channel_axis]
    return channels, math.prod(shape) // max(channels, 1)


def to_matrix(weight: Tensor, channel_axis: int) -> Tensor:
    """Return ``weight`` as a matrix [channels, rest], contiguous however the weight lies."""
    return weight.movedim(channel_axis, 0).reshape(weight.shape[channel_axis], -1).contiguous()


def from_matrix(matrix: Tensor, shape: tuple[int, ...], channel_axis: int) -> Tensor:
    """Return the weight of ``shape`` that ``matrix`` [channels, rest] came from."""
    rest = [n for axis, n in enumerate(shape) if axis != channel_axis]
    return matrix.reshape(shape[channel_axis], *rest).movedim(0, channel_axis)


def to_blocks(matrix: Tensor, granularity: str) -> Tensor:
    """Return ``matrix`` [rows, columns] as blocks [blocks, numbers in a block]."""
    rows, columns = block_size(granularity, (matrix.shape[0], matrix.shape[1]))
    return matrix.reshape(-1, rows * columns)


def from_blocks(blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the matrix of ``shape`` that ``blocks`` came from."""
    return blocks.reshape(shape)

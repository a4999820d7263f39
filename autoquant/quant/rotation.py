"""Rotation: what a few input channels have too much of is spread over all in their block.

An activation with one scale, and a block of weights with one, give small numbers few steps where a
few are large. H, the Hadamard matrix over √n, is orthogonal and symmetric, with entries of one
size: W·x = (W·H)·(H·x), and no number of H·x is large unless all are. It is applied in blocks of n
neighbouring channels, at the layer itself, so no model needs to be of a certain architecture; the
float model stays as it is. Sources: Ashkboos et al. 2024 (QuaRot, arXiv 2404.00456) for rotations
that are applied as a layer runs, Tseng et al. 2024 (QuIP#, arXiv 2402.04396) for what they do to
weights, Sylvester 1867 for the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.errors import SpecError
from autoquant.quant.input_layout import Layout
from autoquant.spec.transforms import BLOCKS, rotated_block, rotation_text


@dataclass(frozen=True, eq=False)
class Rotation:
    """Hadamard's rotation of neighbouring input channels of one layer.

    ``matrix`` [block, block] is ``hadamard`` of the block: made beforehand, as what runs may be
    traced.
    """

    matrix: Tensor
    layout: Layout

    def of_input(self, x: Tensor) -> Tensor:
        """Return the activation H·x [..., channels]."""
        return rotate(x, self._matrix(x))

    def input_back(self, x: Tensor) -> Tensor:
        """Return the activation x of H·x: H is its own inverse."""
        return rotate(x, self._matrix(x))

    def of_weight(self, weight: Tensor) -> Tensor:
        """Return the weight, of the site's shape, that meets H·x."""
        axis = self.layout.axis
        return rotate(weight.movedim(axis, -1), self._matrix(weight)).movedim(-1, axis)

    def weight_back(self, weight: Tensor) -> Tensor:
        """Return the weight that meets x, of one that meets H·x."""
        return self.of_weight(weight)

    @property
    def block(self) -> int:
        """How many channels are rotated together."""
        return len(self.matrix)

    @property
    def norm(self) -> float:
        """The size of each entry of the matrix, as float32 has it."""
        return float(torch.tensor(self.block**-0.5, dtype=torch.float32))

    @property
    def kind(self) -> str:
        """What it does to inputs, in words."""
        return f"rotated by blocks of {self.block}"

    @property
    def text(self) -> str:
        """The transform as a recipe has it."""
        return rotation_text(self.block)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in a saved model: none, as anybody can make the matrix."""
        return 0

    def _matrix(self, x: Tensor) -> Tensor:
        return self.matrix.to(x.dtype)


def hadamard(block: int, like: Tensor) -> Tensor:
    """Return Hadamard's matrix over √block [block, block], in the dtype and where ``like`` is.

    Its entries are ± one number.
    """
    found = torch.ones(1, 1, dtype=torch.float64, device=like.device)
    while len(found) < block:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return (found / block**0.5).to(like.dtype)


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x`` [..., channels] with each block times ``matrix``, in its own dtype."""
    if torch.is_autocast_enabled(x.device.type):  # which would round sums to half precision
        with torch.autocast(x.device.type, enabled=False):
            return rotate(x, matrix)
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def block_of(channels: int, most: int) -> int | None:
    """Return the largest block of up to ``most`` channels that divides all; None without any."""
    return max((b for b in BLOCKS if b <= most and channels % b == 0), default=None)


def block_from_text(text: str, channels: int, where: str) -> int:
    """Return the block of ``Rotation.text``; SpecError where it is none, or doesn't fit."""
    block = rotated_block(text)
    if block is None or channels % block:
        fitting = [rotation_text(b) for b in BLOCKS if channels % b == 0]
        raise SpecError(
            f"{where}: transforms: found {text!r}, allowed with {channels} input channels: "
            + (", ".join(fitting) or "no rotation")
        )
    return block

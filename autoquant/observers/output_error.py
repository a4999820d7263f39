"""What an error of a weight does to the output of its layer, and the ranges that do least.

With C the second moments of the layer's input (about its mean, where the bias is corrected), an
error δ of one output channel adds δ·C·δᵀ to that channel's mean squared output. Source: Nagel et
al. 2020, arXiv 2004.10568, section 3; Frantar et al. 2022, arXiv 2210.17323, for the same form.
Plain squared error, which ignores C, doubles the loss of MobileNetV2 at 4 to 6 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.quant.affine import QParams, choose_qparams
from autoquant.quant.blocks import to_blocks

EXACT = 128
"""Widest input of which every eigenvector is kept."""
RANK = 64
"""Eigenvectors kept of a wider one; the diagonal stands for the rest."""
ROUNDS = 3
"""Rounds of subspace iteration: enough for eigenvalues that matter."""
FACTORS = 24
NARROW_FACTORS = 96
SMALLEST_FACTOR = 0.2
"""Parts of the largest range that are tried first, evenly spaced: more of them for channels of few
weights, whose error is a jagged function of the range and cheap to know."""
NARROW = 64
"""Weights of an output channel up to which they are few."""
REFINEMENTS = (3.0, 9.0)
"""By how much finer the steps around the best are, round by round."""
STEPS = 2
"""Steps to each side of the best in a round."""


@dataclass(frozen=True, eq=False)
class OutputError:
    """δ·C·δᵀ as Σ ``diagonal`` · δ² + ‖δ · ``basis``‖².

    ``diagonal`` is [groups, n] and ``basis`` [groups, n, rank], float32; groups are those of a
    convolution, whose output channels see different inputs.
    """

    diagonal: Tensor
    basis: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> OutputError:
        """Return the error under ``moments`` [groups, n, n], or their diagonal [groups, n]."""
        if moments.dim() == 2:
            return cls(moments, moments.new_zeros(*moments.shape, 0))
        whole = torch.diagonal(moments, dim1=1, dim2=2)
        basis = _basis(moments)
        return cls((whole - basis.square().sum(2)).clamp(min=0.0), basis)

    def of_blocks(self, delta: Tensor, blocks: int) -> Tensor:
        """Return the error [channels, ``blocks``] of ``delta`` [channels, n], cut into blocks.

        Blocks of columns are taken one by one: what their errors do together is left out.
        """
        groups, n = self.diagonal.shape
        d = delta.reshape(groups, -1, blocks, n // blocks)
        own = (d.square() * self.diagonal.reshape(groups, 1, blocks, -1)).sum(3)
        basis = self.basis.reshape(groups, blocks, n // blocks, -1)
        projected = d.transpose(1, 2) @ basis  # [groups, blocks, channels, rank]
        return (own + projected.square().sum(3).transpose(1, 2)).reshape(-1, blocks)


def _basis(moments: Tensor) -> Tensor:
    """Return [groups, n, rank] whose product with its transpose is nearest to ``moments``."""
    n = moments.shape[-1]
    if n <= EXACT:
        values, vectors = torch.linalg.eigh(moments.double())
    else:
        draw = torch.Generator().manual_seed(0)  # a fixed start: the answer must repeat
        start = torch.randn(n, RANK, generator=draw, dtype=torch.float64).to(moments.device)
        wide = moments.double()
        vectors = torch.linalg.qr(wide @ start).Q
        for _ in range(ROUNDS):
            vectors = torch.linalg.qr(wide @ vectors).Q
        values, rotation = torch.linalg.eigh(vectors.mT @ wide @ vectors)
        vectors = vectors @ rotation
    return (vectors * values.clamp(min=0.0).sqrt()[:, None]).float()


@torch.no_grad()
def output_qparams(
    matrix: Tensor, error: OutputError, granularity: str, bits: int, *, symmetric: bool
) -> QParams:
    """Return the parameters [blocks, 1] with the least output error that is found.

    ``matrix`` is [channels, n]. Parts of the widest range are tried: one for both ends, then, where
    asymmetric, for each end by itself. Never worse than the widest range, which is tried.
    """
    blocks = to_blocks(matrix, granularity)
    lo = blocks.amin(1).clamp(max=0.0)
    hi = blocks.amax(1).clamp(min=0.0)
    if symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    per_channel = max(len(blocks) // len(matrix), 1)

    def errors(factors: Tensor) -> Tensor:
        p = choose_qparams(
            (lo * factors[:, 0])[:, None], (hi * factors[:, 1])[:, None], bits, symmetric=symmetric
        )
        # The same numbers as fake_quantize gives; products with the inverse are faster.
        real = p.clamp_(blocks * p.scale.reciprocal()).round_().mul_(p.scale)
        delta = real.sub_(blocks).reshape(matrix.shape)
        found = error.of_blocks(delta, per_channel)
        return found.sum()[None] if len(blocks) == 1 else found.flatten()

    best = blocks.new_ones(len(blocks), 2)
    least = errors(best)

    def attempt(factors: Tensor) -> None:
        nonlocal best, least
        found = errors(factors)
        better = found < least
        least = torch.where(better, found, least)
        best = torch.where(better[:, None], factors, best)

    count = NARROW_FACTORS if matrix.shape[1] <= NARROW else FACTORS
    step = (1.0 - SMALLEST_FACTOR) / (count - 1)
    for i in range(1, count):
        attempt(torch.full_like(best, 1.0 - i * step))
    both = best.new_ones(2)
    ends = [] if symmetric else [both.new_tensor([0.0, 1.0]), both.new_tensor([1.0, 0.0])]
    for finer in REFINEMENTS:
        for direction in (both, *ends):
            start = best
            for i in (*range(-STEPS, 0), *range(1, STEPS + 1)):
                attempt((start + i * step / finer * direction).clamp(0.0, 1.0))
    return choose_qparams(
        (lo * best[:, 0])[:, None], (hi * best[:, 1])[:, None], bits, symmetric=symmetric
    )

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

from autoquant.kernels.cpu.native import round_weights
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
HOPELESS = 4.0
"""Errors so many times the least of each channel end the first round: they come from clipping."""
TOGETHER = 1 << 18
"""Numbers quantized at a time: enough that operators' overhead is small, and that a cache holds."""


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
        """Return the error [..., channels, ``blocks``] of ``delta`` [..., channels, n], in blocks.

        Blocks of columns are taken one by one: what their errors do together is left out.
        """
        diagonal = self.diagonal.repeat_interleave(delta.shape[-2] // len(self.diagonal), 0)
        own = (delta.square() * diagonal).unflatten(-1, (blocks, -1)).sum(-1)
        return own + self._together(delta, blocks)

    def _together(self, delta: Tensor, blocks: int) -> Tensor:
        """Return what is beside the diagonal, of the same shape as ``of_blocks``."""
        groups, n = self.diagonal.shape
        channels = delta.shape[-2]
        d = delta.reshape(-1, groups, channels // groups, blocks, n // blocks)
        basis = self.basis.reshape(groups, blocks, n // blocks, -1)
        projected = d.transpose(2, 3) @ basis  # [..., groups, blocks, channels, rank]
        found = torch.linalg.vecdot(projected, projected).transpose(2, 3)
        return found.reshape(*delta.shape[:-2], channels, blocks)

    def of_rounding(self, matrix: Tensor, p: QParams, blocks: int) -> Tensor:
        """Return the errors [tried, channels, ``blocks``] of rounding ``matrix`` [channels, n].

        ``p`` holds [tried, channels · blocks], or [tried, 1] for the whole matrix.
        """
        groups, n = self.diagonal.shape
        x = matrix.reshape(len(matrix), blocks, n // blocks)
        found = round_weights(x, self.diagonal.reshape(groups, blocks, -1), p)
        if found is not None:
            delta, own = found
            return own + self._together(delta.flatten(2), blocks)
        whole = p.scale.shape[1] != len(matrix) * blocks
        shape = (-1, 1, 1, 1) if whole else (-1, len(matrix), blocks, 1)
        each = QParams(p.scale.reshape(shape), p.zero_point.reshape(shape), p.bits, p.symmetric)
        # The same numbers as fake_quantize gives; products with the inverse are faster.
        real = each.clamp_(x * each.scale.reciprocal()).round_().mul_(each.scale)
        return self.of_blocks(real.sub_(x).flatten(2), blocks)


def exact_output_error(delta: Tensor, moments: Tensor | None) -> Tensor:
    """Return tr(Δ·C·Δᵀ): the mean squared output error, summed over channels, of a weight error.

    ``delta`` is [channels, n]; ``moments`` C [groups, n, n], its diagonal [groups, n], or None
    where rows are read one by one.
    """
    if moments is None:
        return delta.square().sum()
    grouped = delta.reshape(len(moments), -1, delta.shape[1])
    if moments.dim() == 2:
        return (grouped.square() * moments[:, None]).sum()
    return ((grouped @ moments) * grouped).sum()


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
    trial = _Trial(matrix, blocks, lo, hi, error, bits, symmetric)
    count = NARROW_FACTORS if matrix.shape[1] <= NARROW else FACTORS
    step = (1.0 - SMALLEST_FACTOR) / (count - 1)
    both = blocks.new_ones(2)
    factors = [both * (1.0 - i * step) for i in range(count)]
    together = max(TOGETHER // matrix.numel(), 1)
    for i in range(0, count, together):
        trial.attempt(torch.stack(factors[i : i + together])[:, None].expand(-1, len(blocks), 2))
        if trial.hopeless:
            break
    ends = [] if symmetric else [both.new_tensor([0.0, 1.0]), both.new_tensor([1.0, 0.0])]
    for finer in REFINEMENTS:
        for direction in (both, *ends):
            steps = (*range(-STEPS, 0), *range(1, STEPS + 1))
            moves = torch.stack([i * step / finer * direction for i in steps])
            tried = (trial.best + moves[:, None]).clamp(0.0, 1.0)
            for part in tried.split(together):
                trial.attempt(part)
    best = trial.best
    return choose_qparams(
        (lo * best[:, 0])[:, None], (hi * best[:, 1])[:, None], bits, symmetric=symmetric
    )


class _Trial:
    """Ranges tried on the blocks of a matrix: ``best`` [blocks, 2], the parts of both ends."""

    def __init__(
        self,
        matrix: Tensor,
        blocks: Tensor,
        lo: Tensor,
        hi: Tensor,
        error: OutputError,
        bits: int,
        symmetric: bool,
    ) -> None:
        self.matrix, self.lo, self.hi = matrix, lo, hi
        self.error = error
        self.bits, self.symmetric = bits, symmetric
        self.per_channel = max(len(blocks) // len(matrix), 1)
        self.best = blocks.new_ones(len(blocks), 2)
        self.least = blocks.new_full((len(blocks),), torch.inf)
        self.hopeless = False

    def attempt(self, factors: Tensor) -> None:
        """Try ``factors`` [tried, blocks, 2] in turn; of equal ones the first stays."""
        found = self._errors(factors)
        least, first = found.min(0)
        # Where even the best of several clips so much, narrower ranges only clip more.
        self.hopeless = bool((found[-1] > HOPELESS * self.least.minimum(least)).all())
        better = least < self.least
        self.least = torch.where(better, least, self.least)
        chosen = factors.gather(0, first[None, :, None].expand(1, -1, 2))[0]
        self.best = torch.where(better[:, None], chosen, self.best)

    def _errors(self, factors: Tensor) -> Tensor:
        """Return the errors [tried, blocks]; those of a single block for a whole matrix summed."""
        p = choose_qparams(
            self.lo * factors[..., 0],
            self.hi * factors[..., 1],
            self.bits,
            symmetric=self.symmetric,
        )
        found = self.error.of_rounding(self.matrix, p, self.per_channel)
        return found.sum((1, 2))[:, None] if len(self.lo) == 1 else found.flatten(1)

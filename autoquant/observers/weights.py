"""Weight calibration: from the numbers themselves to one range [lo, hi] a block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoquant.errors import SpecError, TrialError
from autoquant.kernels.cpu.native import squared_errors
from autoquant.quant.affine import QParams, choose_qparams
from autoquant.registry import unknown
from autoquant.spec.calibration import WEIGHT_CALIBRATIONS, percentile_of

_CHUNK = 1 << 18
"""Numbers quantized at a time: bounds the memory, and keeps the work inside a CPU's cache."""

_FACTORS = 96
_SMALLEST_FACTOR = 0.05
"""``mse`` tries these parts of the largest range, evenly spaced; fewer bits want smaller ones."""

_ROUNDS = 2
_STEPS = 4
"""Then, around the best, this many on each side, in this many ever finer rounds."""


@torch.no_grad()
def weight_range(blocks: Tensor, method: str, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the ranges lo [n] and hi [n], float32, of ``blocks`` [n, k], in their unit.

    ``max`` covers every number. ``percentile_P`` covers up to the P-th percentile of |x|, or of x
    and from the (100 − P)-th where asymmetric, interpolated linearly. ``mse`` is the range with
    the least squared error, and never has a larger one than ``max``; so is ``output_mse``, which
    knows no better without the layer's input (see ``output_error``). Symmetric ranges are [−T, T].
    Raises SpecError for an unknown method, TrialError for NaN or Inf.
    """
    p = percentile_of(method)
    if p is None and method not in WEIGHT_CALIBRATIONS:
        raise SpecError(unknown("weight calibration", method, WEIGHT_CALIBRATIONS))
    blocks = blocks.detach().to(torch.float32)
    if blocks.shape[1] == 0:
        return blocks.new_zeros(len(blocks)), blocks.new_zeros(len(blocks))
    lo, hi = blocks.amin(1), blocks.amax(1)
    if not (torch.isfinite(lo).all() and torch.isfinite(hi).all()):
        raise TrialError("the weight holds NaN or Inf")
    if symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    if p is not None:
        return _percentile(blocks, p, lo, hi, symmetric)
    if method in ("mse", "output_mse"):
        return _mse(blocks, lo, hi, bits, symmetric)
    return lo, hi


def _percentile(
    blocks: Tensor, p: float, lo: Tensor, hi: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return the percentile ranges; ``lo`` and ``hi`` [n] where so many zeros leave nothing."""
    if symmetric:
        top = _upper_percentile(blocks.abs(), p)
        bottom = -top
    else:
        top, bottom = _upper_percentile(blocks, p), -_upper_percentile(-blocks, p)
    nothing = (top <= 0) & (bottom >= 0)
    return torch.where(nothing, lo, bottom), torch.where(nothing, hi, top)


def _upper_percentile(x: Tensor, p: float) -> Tensor:
    """Return the ``p``-th percentile [n] of each row of ``x`` [n, k], for p > 50.

    Only the numbers above it are sorted; torch.quantile sorts all and refuses over 2^24 of them.
    """
    k = x.shape[1]
    rank = p / 100 * (k - 1)
    below = math.floor(rank)
    top = torch.topk(x, k - below, dim=1).values
    left, right = top[:, -1], top[:, max(k - below - 2, 0)]
    return torch.lerp(left.double(), right.double(), rank - below).float()


def _mse(
    blocks: Tensor, lo: Tensor, hi: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Search the part of [lo, hi] with the least squared error, block by block.

    First one factor for both ends, then, where asymmetric, each end by itself as well. The ends
    are those of a range that includes 0.
    """
    lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
    both = torch.ones(len(blocks), 2, dtype=torch.float32, device=blocks.device)
    ends = [[1.0, 1.0]] if symmetric else [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]
    directions = [torch.tensor(e, dtype=torch.float32) for e in ends]

    def errors(factors: Tensor) -> Tensor:
        p = choose_qparams(lo * factors[..., 0], hi * factors[..., 1], bits, symmetric=symmetric)
        return _squared_errors(blocks, p)

    step = (1.0 - _SMALLEST_FACTOR) / (_FACTORS - 1)
    grid = torch.stack([both * (1.0 - i * step) for i in range(_FACTORS)])
    best = _best(grid, errors(grid))
    for _ in range(_ROUNDS):
        for direction in directions:
            # The best so far comes first: what is no better does not replace it.
            offsets = [0, *(i for i in range(-_STEPS, _STEPS + 1) if i)]
            around = torch.stack([i * step / (_STEPS + 1) * direction.to(both) for i in offsets])
            tried = (best + around[:, None]).clamp(0.0, 1.0)
            best = _best(tried, errors(tried))
        step /= _STEPS + 1
    return lo * best[:, 0], hi * best[:, 1]


def _best(factors: Tensor, errors: Tensor) -> Tensor:
    """Return the first of the ``factors`` [tried, n, 2] with the least of ``errors`` [tried, n]."""
    first = torch.from_numpy(errors.cpu().numpy().argmin(0)).to(factors.device)
    return factors[first, torch.arange(factors.shape[1], device=factors.device)]


def _squared_errors(blocks: Tensor, p: QParams) -> Tensor:
    """Return Σ (x − Q(x))², float64 [tried, n], of each block by parameters [tried, n]."""
    found = squared_errors(blocks, p)
    if found is not None:
        return found
    n, k = blocks.shape
    rows, columns = max(_CHUNK // k, 1), min(k, _CHUNK)
    errors = torch.zeros(p.scale.shape, dtype=torch.float64, device=blocks.device)
    for t, (scale, zero_point) in enumerate(zip(p.scale, p.zero_point, strict=True)):
        for i in range(0, n, rows):
            span = slice(i, i + rows)
            part = QParams(scale[span, None], zero_point[span, None], p.bits, p.symmetric)
            for j in range(0, k, columns):
                x = blocks[span, j : j + columns]
                # Products with the inverse, as the library has them: the same sums either way.
                y = part.clamp_(x * part.scale.reciprocal()).round_().mul_(part.scale)
                errors[t, span] += y.sub_(x).double().square_().sum(1)
    return errors

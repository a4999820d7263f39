"""Weight calibration: from the numbers themselves to one range [lo, hi] a block."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from autoquant.errors import SpecError, TrialError
from autoquant.quant.affine import QParams, choose_qparams, fake_quantize
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
    the least squared error, and never has a larger one than ``max``. Symmetric ranges are
    [−T, T]. Raises SpecError for an unknown method, TrialError for NaN or Inf.
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
    if method == "mse":
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
    both = torch.ones(len(blocks), 2, device=blocks.device)
    if symmetric:
        directions = [torch.tensor([1.0, 1.0])]
    else:
        directions = [torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])]

    def error(factors: Tensor) -> Tensor:
        return _squared_error(blocks, lo * factors[:, 0], hi * factors[:, 1], bits, symmetric)

    best, least = both, error(both)
    step = (1.0 - _SMALLEST_FACTOR) / (_FACTORS - 1)
    grid = [both * (1.0 - i * step) for i in range(1, _FACTORS)]
    best, least = _keep_best(best, least, grid, error)
    for _ in range(_ROUNDS):
        for direction in directions:
            offsets = [
                i * step / (_STEPS + 1) * direction.to(both)
                for i in range(-_STEPS, _STEPS + 1)
                if i
            ]
            tried = [(best + offset).clamp(0.0, 1.0) for offset in offsets]
            best, least = _keep_best(best, least, tried, error)
        step /= _STEPS + 1
    return lo * best[:, 0], hi * best[:, 1]


def _keep_best(
    best: Tensor, least: Tensor, tried: list[Tensor], error: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the factors [n, 2] with the least error [n] of ``best`` and all that are ``tried``."""
    for factors in tried:
        errors = error(factors)
        better = errors < least
        least = torch.where(better, errors, least)
        best = torch.where(better[:, None], factors, best)
    return best, least


def _squared_error(blocks: Tensor, lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return Σ (x − Q(x))² [n] of each block, some numbers at a time."""
    p = choose_qparams(lo, hi, bits, symmetric=symmetric)
    n, k = blocks.shape
    rows, columns = max(_CHUNK // k, 1), min(k, _CHUNK)
    errors = torch.zeros(n, dtype=torch.float64, device=blocks.device)
    for i in range(0, n, rows):
        part = QParams(
            p.scale[i : i + rows, None], p.zero_point[i : i + rows, None], bits, p.symmetric
        )
        for j in range(0, k, columns):
            x = blocks[i : i + rows, j : j + columns]
            errors[i : i + rows] += fake_quantize(x, part).sub_(x).square_().sum(1)
    return errors

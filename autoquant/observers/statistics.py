"""One pass over a layer's input: all that every calibration method needs, in a few kilobytes.

The histogram covers [−R, R) with R a power of two, ``BINS_PER_SIDE`` equal bins a side. A larger
number doubles R, whereupon neighbouring bins merge exactly. R depends on the largest magnitude
only and scaling by a power of two does not round, so the counts are the same in whatever order
and batches the numbers come. Exact zeros, of which a ReLU makes very many and which every affine
grid represents exactly, are counted apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoquant.kernels.cpu.native import histogram

BINS_PER_SIDE = 4096
BINS = 2 * BINS_PER_SIDE

_SMALLEST_EXPONENT = -100
"""R is never below 2^−100: further down the scale to bins would overflow float32."""

_CPU_CHUNK = 1 << 17
"""Numbers handled at a time on a CPU, so that the intermediate results stay in its cache."""

_DEVICE_CHUNK = 1 << 24
"""The same on an accelerator; up to here float32 counts are exact."""

_LANES = 4
_LANES_FROM = 1 << 14
_LANE_OFFSETS = (torch.arange(_CPU_CHUNK) % _LANES * BINS + BINS_PER_SIDE).to(torch.int16)
"""Neighbours go to different copies of the histogram: a run of numbers in one bin would otherwise
make each increment wait for the one before. The largest index is the largest int16."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorStatistics:
    """What was seen of one tensor, in the units of the tensor; numbers are taken as float32.

    NaN and ±Inf are left out of everything and make ``finite`` false. ``minima`` and ``maxima``
    [calls] are those of each call, in order. ``counts`` [BINS] leaves the ``zeros`` out; bin
    i covers [(i − BINS_PER_SIDE), (i − BINS_PER_SIDE + 1)) · ``bin_width``.

    ``token_absmax_square`` and ``token_range_square`` are means over the ``tokens`` of the squares
    of max|x| and of max(x, 0) − min(x, 0); without tokens, all three are 0.
    """

    count: int
    zeros: int
    minimum: float
    maximum: float
    mean: float
    mean_square: float
    minima: NDArray[np.float64]
    maxima: NDArray[np.float64]
    limit: float
    counts: NDArray[np.int64]
    tokens: int
    token_absmax_square: float
    token_range_square: float
    finite: bool

    @property
    def bin_width(self) -> float:
        """Width of every bin."""
        return self.limit / BINS_PER_SIDE

    @property
    def absmax(self) -> float:
        """Largest magnitude."""
        return max(-self.minimum, self.maximum)


class StatisticsCollector:
    """Gathers TensorStatistics call by call; the numbers themselves are not kept.

    ``token_dim`` is the dimension along which one vector shares one scale in dynamic per-token
    quantization (−1 for linear and recurrent layers), or None where there are no tokens.
    """

    def __init__(self, token_dim: int | None = None) -> None:
        self._token_dim = token_dim
        self._exponent = _SMALLEST_EXPONENT
        self._counts = torch.zeros(BINS, dtype=torch.int64)
        self._minima: list[float] = []
        self._maxima: list[float] = []
        self._count = self._zeros = self._tokens = 0
        self._sum = self._square = self._absmax_square = self._range_square = 0.0
        self._finite = True

    @property
    def empty(self) -> bool:
        """Whether no finite number has been seen yet."""
        return self._count == 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add the numbers of one call; any shape, floating dtype, layout and device."""
        if x.numel() == 0:
            return
        if self._token_dim is not None and x.dim():
            vectors = x.movedim(self._token_dim, -1).to(torch.float32)
            rows = vectors.reshape(-1, vectors.shape[-1])
            # Two reductions: along a dimension, aminmax is ten times slower than amin and amax.
            lows, highs = rows.amin(1), rows.amax(1)
            lo, hi = lows.amin().item(), highs.amax().item()
            self._add_tokens(torch.stack([lows, highs]))
            flat = rows.reshape(-1)
        else:
            flat = _flatten(x).to(torch.float32)
            low, high = torch.aminmax(flat)
            lo, hi = low.item(), high.item()
        if not (math.isfinite(lo) and math.isfinite(hi)):
            self._finite = False
            flat = flat[torch.isfinite(flat)]
            if flat.numel() == 0:
                return
            lo, hi = flat.amin().item(), flat.amax().item()
        self._minima.append(lo)
        self._maxima.append(hi)
        self._grow(max(-lo, hi))
        self._add_numbers(flat)

    def finish(self) -> TensorStatistics:
        """Return the statistics so far; where nothing was seen, ``count`` is 0."""
        n, tokens = max(self._count, 1), max(self._tokens, 1)
        return TensorStatistics(
            count=self._count,
            zeros=self._zeros,
            minimum=min(self._minima, default=0.0),
            maximum=max(self._maxima, default=0.0),
            mean=self._sum / n,
            mean_square=self._square / n,
            minima=np.array(self._minima),
            maxima=np.array(self._maxima),
            limit=2.0**self._exponent,
            counts=self._counts.numpy().copy(),
            tokens=self._tokens,
            token_absmax_square=self._absmax_square / tokens,
            token_range_square=self._range_square / tokens,
            finite=self._finite,
        )

    def _add_tokens(self, extremes: Tensor) -> None:
        """Add tokens by their ``extremes`` [2, tokens], minima and maxima."""
        extremes = extremes.cpu().double()
        finite = extremes.isfinite().all(0)
        if not finite.all():
            extremes = extremes[:, finite]
        lows, highs = extremes
        self._tokens += lows.numel()
        self._absmax_square += torch.maximum(-lows, highs).square_().sum().item()
        self._range_square += highs.clamp(min=0.0).sub_(lows.clamp(max=0.0)).square_().sum().item()

    def _grow(self, magnitude: float) -> None:
        """Double R until it exceeds ``magnitude``, merging bins."""
        if magnitude == 0.0:
            return
        exponent = max(math.frexp(magnitude)[1], _SMALLEST_EXPONENT)
        doublings = exponent - self._exponent
        if doublings <= 0:
            return
        self._exponent = exponent
        if not self._count:
            return
        merged = 1 << min(doublings, BINS_PER_SIDE.bit_length() - 1)
        groups = self._counts.reshape(-1, merged).sum(1)
        middle = BINS_PER_SIDE // merged
        self._counts.zero_()
        self._counts[BINS_PER_SIDE - middle : BINS_PER_SIDE + middle] = groups

    def _add_numbers(self, flat: Tensor) -> None:
        """Add finite numbers, float32 [n], all within (−R, R)."""
        bin_width = 2.0**self._exponent / BINS_PER_SIDE
        counted = histogram(flat, 1.0 / bin_width, self._counts)
        if counted is None:
            counted = self._count_eagerly(flat, bin_width)
        total, square, zeros = counted
        self._counts[BINS_PER_SIDE] -= zeros
        self._count += flat.numel()
        self._zeros += zeros
        self._sum += total * bin_width
        self._square += square * bin_width**2

    def _count_eagerly(self, flat: Tensor, bin_width: float) -> tuple[float, float, int]:
        """Count numbers by operators; return Σ y and Σ y² in units of a bin, and the zeros."""
        on_cpu = flat.device.type == "cpu"
        size = min(flat.numel(), _CPU_CHUNK if on_cpu else _DEVICE_CHUNK)
        scaled, scratch = flat.new_empty(size), flat.new_empty(size)
        indices = flat.new_empty(size, dtype=torch.int16)
        total = square = 0.0
        zeros = 0
        for chunk in flat.split(size):
            n = chunk.numel()
            # Moments of the scaled numbers, at most 4096 in magnitude, cannot overflow.
            y, z, i = scaled[:n], scratch[:n], indices[:n]
            torch.mul(chunk, 1.0 / bin_width, out=y)
            total += y.sum().item()
            square += torch.mul(y, y, out=z).sum().item()
            zeros += int(torch.eq(chunk, 0.0, out=z).sum().item())
            if bin_width > 1.0:  # a tiny negative number may have become −0, which floors to 0
                y.masked_fill_((y == 0.0) & (chunk < 0.0), -1.0)
            i.copy_(y.floor_())
            if on_cpu and n >= _LANES_FROM:
                counts = torch.bincount(i.add_(_LANE_OFFSETS[:n]), minlength=_LANES * BINS)
                self._counts += counts.view(_LANES, BINS).sum(0)
            else:
                self._counts += torch.bincount(i.add_(BINS_PER_SIDE), minlength=BINS).cpu()
        return total, square, zeros


def _flatten(x: Tensor) -> Tensor:
    """Return the numbers [n] in the order of memory: a view also of channels-last and transposed.

    The order of dimensions does not matter here, and a copy would cost as much as the histogram.
    """
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)

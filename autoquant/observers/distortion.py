"""Expected squared error of a quantizer, from statistics alone.

With levels q_0 < … < q_L, a step s apart, and the cell edges e_j half-way between them, partial
summation turns the error into the integrated distribution Φ(e) = E[max(e − x, 0)]:

    E[(x − Q(x))²] = E[(x − q_L)²] − 2 s Σ_j Φ(e_j)

Φ is piecewise quadratic for a histogram that is even within each bin, so the error of a range costs
one look-up a level, whatever the number of bins, and is exact also for steps finer than a bin.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from autoquant.errors import TrialError
from autoquant.observers.histogram import signed_histogram
from autoquant.observers.statistics import TensorStatistics
from autoquant.quant.affine import choose_qparams
from autoquant.spec.formats import FORMATS

Array = NDArray[np.float64]


class Distortion:
    """The mean squared error of static quantization, as a function of the range.

    ``Distortion(stats)(lo, hi, bits, symmetric)`` takes ranges [n] and returns errors [n], in the
    unit of the tensor squared, under the semantics of ``quant.affine``.
    """

    def __init__(self, stats: TensorStatistics) -> None:
        histogram = signed_histogram(stats)
        counts = histogram.counts / max(stats.count, 1)
        width = histogram.upper - histogram.lower
        middle = (histogram.upper + histogram.lower) / 2
        mass = np.cumsum(counts)
        self._empty = counts.size == 0
        self._total = float(mass[-1]) if counts.size else 0.0
        self._mean = float(counts @ middle)
        self._square = float(counts @ (middle**2 + width**2 / 12))
        self._bin_width = stats.bin_width
        self._first = histogram.first
        self._lower, self._upper = histogram.lower, histogram.upper
        self._below = mass - counts
        # Φ at the lower end of each bin: what lies under the distribution up to there.
        self._phi = np.cumsum(self._below * width + counts * width / 2)
        self._phi -= self._below * width + counts * width / 2
        self._density = np.divide(counts, 2 * width, out=np.zeros_like(width), where=width > 0)

    def __call__(self, lo: Array, hi: Array, bits: int, symmetric: bool) -> Array:
        """Return the errors [n] of the ranges [``lo``, ``hi``] [n]."""
        if self._empty:
            return np.zeros(np.shape(lo))
        p = choose_qparams(
            torch.as_tensor(lo, dtype=torch.float32),
            torch.as_tensor(hi, dtype=torch.float32),
            bits,
            symmetric=symmetric,
        )
        scale = p.scale.double().numpy()[:, None]
        zero_point = p.zero_point.double().numpy()[:, None]
        edges = (np.arange(p.qmin, p.qmax) + 0.5 - zero_point) * scale
        top = ((p.qmax - zero_point) * scale)[:, 0]
        from_top = self._square - 2 * top * self._mean + top**2 * self._total
        error = from_top - 2 * scale[:, 0] * self._integrated(edges).sum(1)
        return error.clip(min=0.0)

    def _integrated(self, e: Array) -> Array:
        """Return Φ(e), any shape."""
        index = np.floor(e / self._bin_width) - self._first
        i = index.clip(0, self._lower.size - 1).astype(np.intp)
        inside = np.minimum(e, self._upper[-1]) - self._lower[i]
        np.maximum(inside, 0.0, out=inside)
        phi = self._phi[i] + inside * (self._below[i] + inside * self._density[i])
        return phi + np.maximum(e - self._upper[-1], 0.0) * self._total


def quantization_error(
    stats: TensorStatistics, lo: float, hi: float, bits: int, symmetric: bool
) -> float:
    """Return the mean squared error of one static range [``lo``, ``hi``] for the whole tensor.

    Raises TrialError where ``stats`` holds no number or some that are not finite.
    """
    check_usable(stats)
    return float(Distortion(stats)(np.array([lo]), np.array([hi]), bits, symmetric)[0])


def token_error(stats: TensorStatistics, bits: int, symmetric: bool) -> float:
    """Return the predicted mean squared error of dynamic quantization with one range a token.

    A token's step is its range over the number of steps, and the error is even within a step:
    step²/12. Exact zeros cost nothing, and as 0 is a level no number errs by more than itself,
    which bounds the prediction by the mean square where the step is coarse.

    Raises TrialError where ``stats`` holds no token or numbers that are not finite.
    """
    check_usable(stats)
    if not stats.tokens:
        raise TrialError("no tokens were seen in calibration, so none can have a range of its own")
    grid = FORMATS[bits]
    if symmetric:
        step_square = stats.token_absmax_square / grid.qmax**2
    else:
        step_square = stats.token_range_square / (grid.qmax - grid.qmin) ** 2
    return min(step_square / 12 * (1 - stats.zeros / stats.count), stats.mean_square)


def check_usable(stats: TensorStatistics) -> None:
    """Raise TrialError where ``stats`` holds no number or some that are not finite."""
    if not stats.finite:
        raise TrialError("the layer's input held NaN or Inf during calibration")
    if not stats.count:
        raise TrialError("the layer saw no numbers during calibration")

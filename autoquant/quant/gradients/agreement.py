"""How well an estimated gradient agrees with the one that it stands for.

What trains a quantized network is an estimate twice over: rounding has no derivative, so a rule
such as straight-through takes its place (gradient mismatch: Lin & Talathi 2016, arXiv 1607.02241),
and the gradients that flow back may be rounded themselves. Direction and size are told apart, and
noise from bias: noise averages out over the steps of SGD, bias does not.
All sums are in float64. NaN in a gradient is NaN in what is said of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

STEEPNESS = 20.0
"""α of UI8 training: how fast the learning rate falls as the direction is off."""
LEAST_RATE = 0.1
"""β of UI8 training: the share of the learning rate that is left however far it is off."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an estimate ĝ agrees with a gradient g; all without unit.

    ``cosine`` is ⟨ĝ, g⟩/(‖ĝ‖·‖g‖), in [−1, 1]: 1 where both are 0, 0 where one of them is.
    ``signs`` is Σ|g|·[sign ĝ = sign g]/Σ|g|, in [0, 1]: the share of the gradient's magnitude that
    is moved the right way; what the estimate has as 0 counts as wrong. 1 where g is 0.
    ``norm_ratio`` is ‖ĝ‖/‖g‖: 1 where both are 0, inf where only g is.
    ``bias`` and ``noise`` are ``Bias`` of several draws, NaN where there are none.
    """

    cosine: float
    signs: float
    norm_ratio: float
    bias: float = math.nan
    noise: float = math.nan

    @property
    def rate(self) -> float:
        """The multiplier of the learning rate that the cosine asks for."""
        return rate_multiplier(self.cosine)


@dataclass(frozen=True, slots=True)
class Bias:
    """The error of the mean of k draws of an estimate, as a share of the norm of the gradient g.

    ``bias`` is ‖meanₖ ĝₖ − g‖/‖g‖. ``noise`` is √(Σᵢ sᵢ²/k)/‖g‖ with sᵢ² the variance of entry i
    over the draws: about what ``bias`` would be without any (NaN for one draw). Of both 0/0 is 0,
    and anything else over 0 is inf.
    """

    bias: float
    noise: float
    draws: int

    @property
    def beyond_noise(self) -> float:
        """What of the bias the noise does not explain: √max(bias² − noise², 0)."""
        if math.isnan(self.bias) or math.isnan(self.noise):
            return math.nan
        if math.isinf(self.bias):
            return self.bias
        return math.sqrt(max(self.bias**2 - self.noise**2, 0.0))


def agreement(estimated: Tensor, reference: Tensor, draws: Iterable[Tensor] = ()) -> Agreement:
    """Return how ``estimated`` agrees with ``reference``, of its shape.

    ``draws`` are independent draws of the estimate, where it is random: they are looked at one
    after another. Raises ValueError for gradients of different shapes.
    """
    e, r = _pair(estimated, reference)
    magnitude = r.abs()
    right = torch.where(e.isnan(), e, torch.where(e.sign() == r.sign(), magnitude, 0.0))
    size_e, size_r = float(e.norm()), float(r.norm())
    bias = bias_of_draws(draws, reference)
    return Agreement(
        _cosine(float(e @ r), size_e, size_r),
        _quotient(float(right.sum()), float(magnitude.sum()), 1.0),
        _quotient(size_e, size_r, 1.0),
        bias.bias,
        bias.noise,
    )


def agreements(
    estimated: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    draws: Iterable[Mapping[str, Tensor]] = (),
) -> dict[str, Agreement]:
    """Return the agreement of each layer's gradient, by the layer's name.

    Raises ValueError where one of the mappings lacks a layer of another.
    """
    known = list(draws)
    for other in (estimated, *known):
        if other.keys() != reference.keys():
            differing = ", ".join(sorted(other.keys() ^ reference.keys()))
            raise ValueError(f"gradients of different layers are compared: {differing}")
    return {
        name: agreement(estimated[name], g, (draw[name] for draw in known))
        for name, g in reference.items()
    }


def bias_of_draws(draws: Iterable[Tensor], reference: Tensor) -> Bias:
    """Return the bias of ``draws``, each of the shape of ``reference``; NaN without any.

    Mean and variance are kept up to date draw by draw (Welford 1962), so memory is that of three
    gradients in float64.
    """
    truth = reference.detach().double().flatten()
    mean, squares, count = torch.zeros_like(truth), torch.zeros_like(truth), 0
    for draw in draws:
        x, _ = _pair(draw, reference)
        count += 1
        off = x - mean
        mean += off / count
        squares += off * (x - mean)
    if not count:
        return Bias(math.nan, math.nan, 0)
    size = float(truth.norm())
    error = float((mean - truth).norm())
    noise = math.sqrt(float(squares.sum()) / (count - 1) / count) if count > 1 else math.nan
    return Bias(_quotient(error, size, 0.0), _quotient(noise, size, 0.0), count)


def rate_multiplier(
    cosine: float, steepness: float = STEEPNESS, least: float = LEAST_RATE
) -> float:
    """Return φ = max(exp(−steepness·(1 − cosine)), least), NaN for a cosine that is NaN.

    A layer whose gradient points elsewhere takes a smaller step along it.
    Source: Zhu et al. 2020 (UI8), arXiv 1912.12607, deviation counteractive learning rate scaling.
    """
    if math.isnan(cosine):
        return cosine
    return max(math.exp(-steepness * (1.0 - cosine)), least)


def _pair(estimated: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as float64 vectors."""
    if estimated.shape != reference.shape:
        shapes = f"{tuple(estimated.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"gradients of shapes {shapes} are compared")
    return estimated.detach().double().flatten(), reference.detach().double().flatten()


def _cosine(product: float, size_e: float, size_r: float) -> float:
    if math.isnan(product):
        return product
    if not (size_e and size_r):
        return 1.0 if size_e == size_r else 0.0
    found = product / size_e / size_r
    # Rounding may add a little to 1; min and max would lose NaN.
    return found if math.isnan(found) else min(max(found, -1.0), 1.0)


def _quotient(part: float, whole: float, of_zeros: float) -> float:
    """Return part/whole, both ≥ 0, ``of_zeros`` for 0/0, inf for anything else over 0."""
    if whole == 0.0 and not math.isnan(part):
        return of_zeros if part == 0.0 else math.inf
    return part / whole if whole else math.nan

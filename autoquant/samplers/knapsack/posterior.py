"""How much each layer's noise matters: a Bayesian regression of measured losses on the profile.

The loss of a trial is taken for a sum over sites of weight × damage, with a relative error; the
weights' logarithms are normal beforehand. Of many layers those that are alike (``clustering``)
share most of what is not known: what a trial says of one it says of all, until the trials tell them
apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoquant.libraries import unchanged
from autoquant.samplers.knapsack.clustering import groups
from autoquant.sensitivity.profile import Profile

with unchanged():
    import scipy.linalg
    from threadpoolctl import ThreadpoolController

NOISE = 0.3
"""Relative error that the additive model is taken to have on one trial."""
NEWTON_STEPS, HALVINGS = 20, 6
"""Most steps to the mode of the posterior, and how often one may be halved."""
FEW_LAYERS = 100
"""Layers up to which each is known by itself."""
SHARED = 0.8
"""Share of the variance between layers that those that are alike have in common."""


@dataclass(frozen=True, eq=False)
class Row:
    """One trial: its number, the damage of its choice at each site [sites], and its loss."""

    number: int
    damage: np.ndarray
    loss: float

    @functools.cached_property
    def total(self) -> float:
        """The damage of all sites."""
        return float(self.damage.sum())


@dataclass(frozen=True, eq=False)
class Posterior:
    """A log-normal belief in the weight of each site's noise, in units of the ``typical`` one.

    ``center`` [sites] is the mode of the weights' logarithms, ``lower`` the Cholesky factor of
    their precision [sites, sites]. Logarithms: weights are positive, and a few sites matter
    hundreds of times more than most.
    """

    typical: float
    center: np.ndarray
    lower: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The weights at the mode."""
        return np.asarray(np.exp(self.center))

    def draw(self, rng: np.random.Generator, spread: float = 1.0) -> np.ndarray:
        """Return one draw of the weights, ``spread`` times as far from the mode."""
        z = rng.standard_normal(len(self.center))
        noise = scipy.linalg.solve_triangular(self.lower, z, trans="T", lower=True)
        return np.asarray(np.exp(self.center + spread * noise))


class Sums:
    """Sums over trials, r·rᵀ and r with r = damage ÷ loss: each trial is added once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._forget()

    def _forget(self) -> None:
        self._added: list[int] = []
        self._gram = np.zeros((self.size, self.size))
        self._linear = np.zeros(self.size)

    def over(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Return both sums over ``rows``, in the order of the trials: they repeat bit for bit."""
        numbers = [row.number for row in rows]
        known = len(self._added)
        if numbers[:known] != self._added:
            self._forget()
            known = 0
        for row in rows[known:]:
            relative = row.damage / row.loss
            self._gram += np.outer(relative, relative)
            self._linear += relative
            self._added.append(row.number)
        return self._gram.copy(), self._linear.copy()


def prior(names: Sequence[str], profile: Profile) -> np.ndarray:
    """Return the precision [sites, sites] of the weights' logarithms before any trial.

    Beyond FEW_LAYERS sites a weight is a group's part and its own, normal with SHARED and the rest
    of the variance; the precision of a group of m is (I − a/(b + m·a)·11ᵀ)/b, with a and b the
    variances of the two parts (Sherman and Morrison 1950).
    """
    variance = profile.spread**2
    precision = np.eye(len(names)) / variance
    if len(names) <= FEW_LAYERS:
        return precision
    a, b = SHARED * variance, (1.0 - SHARED) * variance
    for group in groups(names, profile):
        block = np.ix_(group, group)
        precision[block] = (np.eye(len(group)) - a / (b + len(group) * a)) / b
    return precision


def believe(rows: Sequence[Row], sums: Sums, precision: np.ndarray) -> Posterior:
    """Return what trials say of how much each site's noise matters; ``precision`` is the prior's.

    Rows are divided by their loss, so the error is relative: a trial with a loss a hundred times
    larger does not drown the others. ``sums`` are kept from call to call.
    """
    usable = [r for r in rows if r.loss > 0 and r.total > 0 and math.isfinite(r.loss)]
    if not usable:
        lower = scipy.linalg.cholesky(precision, lower=True, check_finite=False)
        return Posterior(1.0, np.zeros(len(precision)), lower)
    typical = float(np.exp(np.median(np.log([r.loss / r.total for r in usable]))))
    gram, linear = sums.over(usable)
    with _threads().limit(limits=1):  # for such small matrices threads only wait for each other
        center, lower = infer(gram * typical**2, linear * typical, precision)
    return Posterior(typical, center, lower)


@functools.cache
def _threads() -> ThreadpoolController:
    """Return what sets the threads of linear algebra; to find its libraries takes milliseconds."""
    return ThreadpoolController()


def infer(
    gram: np.ndarray, linear: np.ndarray, precision: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return mode and Cholesky factor of the precision of the logarithms u of the weights.

    The model is 1 = Σ row · exp(u) ± NOISE for each trial, with ``gram`` and ``linear`` the sums of
    row·rowᵀ and row over trials, and u normal beforehand, with mean 0 and ``precision``. The mode
    is found by damped Gauss-Newton steps; the normal approximation around it is Laplace's.
    """
    u = np.zeros(len(linear))

    def cost(u: np.ndarray) -> float:
        w = np.exp(u)
        return float((w @ gram @ w / 2 - w @ linear) / NOISE**2 + u @ precision @ u / 2)

    def factor(u: np.ndarray) -> np.ndarray:
        w = np.exp(u)
        whole = gram * np.outer(w, w) / NOISE**2 + precision
        return scipy.linalg.cholesky(whole, lower=True, check_finite=False)

    current = cost(u)
    for _ in range(NEWTON_STEPS):
        w = np.exp(u)
        gradient = w * (gram @ w - linear) / NOISE**2 + precision @ u
        step = scipy.linalg.cho_solve((factor(u), True), -gradient, check_finite=False)
        step *= min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        for _ in range(HALVINGS):
            tried = cost(u + step)
            if tried <= current:
                break
            step = step / 2
        else:
            break
        u, last, current = u + step, current, tried
        if last - current < 1e-6 * (1.0 + abs(current)):
            break
    return u, factor(u)

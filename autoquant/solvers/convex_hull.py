"""The multiple-choice knapsack: one option for each site, least damage within a budget.

Solved on the lower convex hull of each site's options by steepest descent per unit of cost, then
filled up with what still fits: optimal but for the last step, in well under a millisecond per
hundred sites. Source: Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, chapter 11.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def solve(damage: Sequence[Array], cost: Sequence[Array], budget: float) -> list[int] | None:
    """Return the index of the option of each site, or None where even the cheapest do not fit.

    ``damage[s]`` and ``cost[s]`` hold the options of site s.
    """
    hulls = [_hull(d, c) for d, c in zip(damage, cost, strict=True)]
    left = budget - sum(float(c[hull[0]]) for c, hull in zip(cost, hulls, strict=True))
    if left < -1e-9 * max(abs(budget), 1.0):
        return None
    at = [0] * len(hulls)
    for _, site, k, price, _ in _steps(damage, cost, hulls):
        # Hull steps of one site come in order; one that does not fit ends that site's climb.
        if at[site] == k - 1 and price <= left + 1e-9:
            at[site] = k
            left -= price
    return [hull[k] for hull, k in zip(hulls, at, strict=True)]


def cheapest(damage: Sequence[Array], cost: Sequence[Array], limit: float) -> list[int]:
    """Return the options of least cost whose damage is at most ``limit`` in all.

    Where even the options of least damage exceed it, those are returned.
    """
    hulls = [_hull(d, c) for d, c in zip(damage, cost, strict=True)]
    total = sum(float(d[hull[0]]) for d, hull in zip(damage, hulls, strict=True))
    at = [0] * len(hulls)
    for _, site, k, _, gain in _steps(damage, cost, hulls):
        if total <= limit:
            break
        at[site] = k
        total -= gain
    return [hull[k] for hull, k in zip(hulls, at, strict=True)]


def _steps(
    damage: Sequence[Array], cost: Sequence[Array], hulls: Sequence[list[int]]
) -> list[tuple[float, int, int, float, float]]:
    """Return all hull steps (−gain/price, site, k, price, gain), the best bargains first."""
    steps = []
    for site, hull in enumerate(hulls):
        last = -np.inf
        for k in range(1, len(hull)):
            a, b = hull[k - 1], hull[k]
            gain = float(damage[site][a] - damage[site][b])
            price = float(cost[site][b] - cost[site][a])
            last = max(last, -gain / price)  # rounding must not put a step before the one below it
            steps.append((last, site, k, price, gain))
    steps.sort()
    return steps


def _hull(damage: Array, cost: Array) -> list[int]:
    """Return the options on the lower convex hull of (cost, damage), cheapest first."""
    order = np.lexsort((damage, cost))
    hull: list[int] = []
    for i in order.tolist():
        if hull and damage[i] >= damage[hull[-1]]:
            continue
        while len(hull) > 1 and _above(damage, cost, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _above(damage: Array, cost: Array, a: int, b: int, c: int) -> bool:
    """Return whether ``b`` lies above the line from ``a`` to ``c``; on it, it is a step to keep."""
    left = (damage[b] - damage[a]) * (cost[c] - cost[a])
    right = (damage[c] - damage[a]) * (cost[b] - cost[a])
    return bool(left > right + 1e-12 * abs(right))

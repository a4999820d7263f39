"""The multiple-choice knapsack with several budgets, as an integer program.

One budget is solved far faster by ``convex_hull``; with two there is no order of best bargains any
more, so branch and cut (HiGHS: Huangfu and Hall 2018) does it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from autoquant.libraries import unchanged

with unchanged():
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

Array = NDArray[np.float64]
Rows = Sequence[Array]
"""Rows[s] holds what each option of site s costs."""

NODES = 500
"""Most nodes of the search tree: a count and not a time, so that the answer is repeatable."""
GAP = 1e-4
"""Relative distance from the optimum at which an answer is good enough."""
TOLERANCE = 1e-9
"""By how much, relative to it, a budget may be exceeded: rounding, not more."""
MARGIN = 2e-6
"""What a budget is tightened by, relative to it, where HiGHS's own tolerance exceeded it."""


def solve_within(value: Rows, budgets: Sequence[tuple[Rows, float]]) -> list[int] | None:
    """Return the options of least ``value`` in all whose costs keep every budget.

    None where there is no such choice.
    """
    kept = [
        undominated(np.stack([value[s], *(cost[s] for cost, _ in budgets)]))
        for s in range(len(value))
    ]
    few = [(_take(cost, kept), limit) for cost, limit in budgets]
    for margin in (0.0, MARGIN):
        chosen = _solve(_take(value, kept), few, margin)
        if chosen is None:
            return None
        found = [int(rows[i]) for rows, i in zip(kept, chosen, strict=True)]
        if keeps(found, budgets):
            return found
    return None


def undominated(table: Array) -> NDArray[np.int64]:
    """Return the options (columns) that no other one beats or equals in every row."""
    less = (table[:, :, None] <= table[:, None, :]).all(0)  # [i, j]: i is as good as j everywhere
    order = np.arange(table.shape[1])
    equal = less & less.T
    beats = less & (~equal | (order[:, None] < order[None, :]))
    return np.flatnonzero(~beats.any(0))


def _take(rows: Rows, kept: Sequence[NDArray[np.int64]]) -> list[Array]:
    return [row[which] for row, which in zip(rows, kept, strict=True)]


def keeps(chosen: Sequence[int], budgets: Sequence[tuple[Rows, float]]) -> bool:
    """Return whether the options ``chosen`` keep every budget."""
    return all(
        sum(float(row[i]) for row, i in zip(cost, chosen, strict=True))
        <= limit + TOLERANCE * max(abs(limit), 1e-30)
        for cost, limit in budgets
    )


def _solve(value: Rows, budgets: Sequence[tuple[Rows, float]], margin: float) -> list[int] | None:
    sizes = [len(row) for row in value]
    total = sum(sizes)
    starts = np.cumsum([0, *sizes])
    sites = np.repeat(np.arange(len(sizes)), sizes)
    once = csr_array((np.ones(total), (sites, np.arange(total))), shape=(len(sizes), total))
    constraints = [LinearConstraint(once, 1.0, 1.0)]
    for cost, limit in budgets:
        if not np.isfinite(limit):
            continue
        flat = np.concatenate(list(cost))
        # HiGHS's tolerances are absolute, and a limit is anything from microseconds to gigabytes.
        unit = max(abs(limit), 1e-9 * float(np.abs(flat).max()), 1e-30)
        top = (limit - margin * abs(limit)) / unit
        constraints.append(LinearConstraint(flat[None] / unit, -np.inf, top))
    flat = np.concatenate(list(value))
    unit = max(float(np.abs(flat).max()), 1e-30)
    with silent_output():
        result = milp(
            flat / unit,
            integrality=np.ones(total),
            bounds=Bounds(0.0, 1.0),
            constraints=constraints,
            options={"node_limit": NODES, "mip_rel_gap": GAP},
        )
    if result.x is None:
        return None
    return [int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(starts)]


@contextlib.contextmanager
def silent_output() -> Iterator[None]:
    """Keep out of standard output what HiGHS prints: a forgotten remark, where --json must go.

    It comes from C, past ``sys.stdout``, so the file descriptor is what is turned away.
    """
    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing can be printed anyway
        yield
        return
    _flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _flush() -> None:
    """Write out what C has buffered."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).fflush(None)

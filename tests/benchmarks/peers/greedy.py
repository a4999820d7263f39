"""Allocations of bits from a table of what each layer costs alone; plain arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

WIDEST = 8
Table = Mapping[str, Mapping[int, float]]
"""Layer → width → damage of that layer at that width, all others at the widest."""


def average(widths: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Return the mean bits of all weights."""
    return sum(widths[n] * sizes[n] for n in sizes) / sum(sizes.values())


def greedy(table: Table, sizes: Mapping[str, int], bits: float) -> dict[str, int]:
    """Return a width a layer: all start at the widest, and flips are made in order of damage.

    As AIMET's automatic mixed precision does: the pairs (layer, narrower width) are sorted by what
    each costs alone, the cheapest first, and taken one by one until the budget holds.
    """
    widths = dict.fromkeys(sizes, WIDEST)
    flips = sorted((damage, n, w) for n, row in table.items() for w, damage in row.items())
    for _, name, width in flips:
        if average(widths, sizes) <= bits + 1e-9:
            break
        widths[name] = min(widths[name], width)
    return widths

"""What the comparison runs: each tool at each budget, how many evaluations and how long."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tests.benchmarks.peers.results import Row
from tests.benchmarks.peers.tools import TOOLS, Tool

BUDGETS = {
    "mobilenet_v2": (5.0, 6.0, 8.0),
    "resnext": (4.5,),
    "g2p": (5.0,),
    "minilm": (5.0,),
}
"""Average bits of weights; all rivals are given time at the first budget of each model."""
RIVALS = ("tpe", "nsga2", "gp", "random")
OURS, THEIRS = 40, 300
"""Evaluations of autoquant's search, and of each rival's."""
SLOW = ("gp", "random")
"""GP's proposals take longer than evaluations; random ones are rarely within the budget."""
ENDLESS = 3600.0
SLOW_SECONDS = 100.0
OTHER_SECONDS = 40.0
"""About what autoquant's own trials take at the budgets beyond the first."""


@dataclass(frozen=True)
class Wanted:
    """A run: its row as far as it is known before, and the seconds after which trials end."""

    row: Row
    limit: float = ENDLESS


def limit(tool: Tool, first: bool) -> float:
    """Return the seconds of trials that a search has."""
    if tool.name not in RIVALS:
        return ENDLESS
    if not first:
        return OTHER_SECONDS
    return SLOW_SECONDS if tool.name in SLOW else ENDLESS


def plan(models: Iterable[str], budgets: Collection[float], seeds: int) -> list[Wanted]:
    """Return what is to be run: first budgets first, then seed by seed.

    So little time gives a little of everything. ``budgets`` are the only ones asked for; none: all.
    """
    found = []
    pairs = [(i, m, b) for m in models for i, b in enumerate(BUDGETS[m])]
    for index, model, bits in sorted(pairs, key=lambda pair: min(pair[0], 1)):
        if budgets and bits not in budgets:
            continue
        for seed in range(seeds):
            for tool in TOOLS:
                if tool.takes(bits, model) and (tool.stochastic or seed == 0):
                    trials = THEIRS if tool.name in RIVALS else OURS if tool.stochastic else 0
                    row = Row(tool.name, model, bits, seed, trials)
                    found.append(Wanted(row, limit(tool, index == 0)))
    return found

"""Which runs there are: what comes next depends on what the runs before came to.

A peer's learning rate is looked for by the loss on the search split with the first seed: RATES, and
further while the best is at an end of those tried. The other seeds have the best rate, and so has
the row of the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.benchmarks.training_peers.cases import Case
from tests.benchmarks.training_peers.rows import STEPS, TIME, Row
from tests.benchmarks.training_peers.tools import MEASURE, Tool

RATES = (1e-3, 3e-3, 1e-2)
LEAST, MOST = 1e-4, 1e-1
"""No further than that."""

Look = Callable[[], Sequence[Row]]
"""Returns all rows of the case that are known by now."""


def next_rate(held: Mapping[float, float]) -> float | None:
    """Return the rate to try after those in ``held`` (rate → loss), None where none is left."""
    for rate in RATES:
        if rate not in held:
            return rate
    known = sorted(held)
    best = min(known, key=lambda rate: held[rate])
    if best == known[-1]:
        further = _step(best, up=True)
    elif best == known[0]:
        further = _step(best, up=False)
    else:
        return None
    return further if LEAST <= further <= MOST else None


def _step(rate: float, up: bool) -> float:
    """Return the next rate of 1, 3, 10, 30 …"""
    leading = f"{rate:.0e}"[0]
    factor = {"1": 3, "3": 10 / 3}[leading] if up else {"1": 0.3, "3": 1 / 3}[leading]
    return float(f"{rate * factor:.0e}")


def swept(rows: Sequence[Row], tool: str) -> dict[float, float]:
    """Return rate → loss on the search split of a tool, with the first seed and so many steps."""
    return {
        r.rate: float("inf") if r.held is None else r.held
        for r in rows
        if r.tool == tool and r.goal == STEPS and r.seed == 0
    }


def best_rate(rows: Sequence[Row], tool: str) -> float | None:
    """Return the rate that did best on the search split, None where none came to anything."""
    held = {rate: loss for rate, loss in swept(rows, tool).items() if loss < float("inf")}
    return min(held, key=lambda rate: held[rate]) if held else None


def first(rows: Sequence[Row], tool: str, rate: float = 0.0) -> Row | None:
    """Return the run of a tool with the first seed, None where there is none."""
    found = (r for r in rows if r.key[1:] == (tool, STEPS, rate, 0) and r.error is None)
    return next(found, None)


def steps_in(seconds: float, row: Row) -> int | None:
    """Return how many steps a tool takes in so many seconds, with what it prepares."""
    if row.step_seconds is None or row.prepared is None:
        return None
    return max(1, round((seconds - row.prepared) / row.step_seconds))


def plan(case: Case, tools: Sequence[Tool], look: Look, seeds: int) -> Iterator[Row]:
    """Yield the runs of a case, each known before the next is asked for; first seeds first.

    A tool that came to nothing with the first rate is tried no further.
    """
    for tool in tools:
        if not tool.swept:
            yield Row(case.name, tool.name, STEPS, 0.0, 0, case.steps)
            continue
        if best_rate(look(), tool.name) is None:
            yield Row(case.name, tool.name, STEPS, RATES[0], 0, case.steps)
        while best_rate(look(), tool.name) is not None:
            rate = next_rate(swept(look(), tool.name))
            if rate is None:
                break
            yield Row(case.name, tool.name, STEPS, rate, 0, case.steps)
    for seed in range(seeds):
        yield from _of_seed(case, tools, look, seed)


def _of_seed(case: Case, tools: Sequence[Tool], look: Look, seed: int) -> Iterator[Row]:
    for tool in tools:
        rate = best_rate(look(), tool.name)
        if rate is not None and tool.trains and seed:
            yield Row(case.name, tool.name, STEPS, rate, seed, case.steps)
        ours = first(look(), MEASURE)
        if rate is None or not tool.swept or ours is None or ours.seconds is None:
            continue
        row = first(look(), tool.name, rate)
        steps = None if row is None else steps_in(ours.seconds, row)
        if steps is not None:
            yield Row(case.name, tool.name, TIME, rate, seed, steps)


def known(rows: Sequence[Row], wanted: Row) -> bool:
    """Return whether a run is among ``rows``; one of the same time must have the same steps."""
    return any(
        r.key == wanted.key and r.error is None and (r.goal == STEPS or r.steps == wanted.steps)
        for r in rows
    )

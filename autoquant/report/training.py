"""How training goes, in words: one line a check, and what a live view shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from autoquant.report.tables import plain_number
from autoquant.training.rates import Rate
from autoquant.training.train import Moment
from autoquant.training.turn import BlockDone

BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
"""Heights of a sparkline, lowest first."""
LONGEST = 40
"""Checks that a sparkline shows, the last ones."""


def moment_line(moment: Moment) -> str:
    """Return how training goes at a check."""
    metric = "" if moment.value is None else f"; {moment.metric} {plain_number(moment.value)}"
    return (
        f"step {moment.step} of {moment.steps}: loss {plain_number(moment.loss)}, on the search "
        f"data {plain_number(moment.held)}, best {plain_number(moment.best)}{metric}; "
        f"{weights_line(moment)}"
    )


def block_line(done: BlockDone) -> str:
    """Return how one block came out."""
    what = f"block {done.number} of {done.count}, {done.path}"
    if not done.samples:
        return f"{what}: not trained"
    return (
        f"{what}: loss on held-back samples {plain_number(done.before)}, fitted anew "
        f"{plain_number(done.fitted)}, best {plain_number(done.after)}"
    )


def weights_line(moment: Moment) -> str:
    """Return what became of the weights."""
    return f"{moment.frozen:.2%} of the weights frozen, {moment.lost:.2%} rounded to 0"


def rates_line(rates: Sequence[Rate]) -> str:
    """Return the lowest and the highest rate of those that learn, and what the guard did to all."""
    on = [row.rate for row in rates if row.share > 0]
    found = f"rates {min(on):.2g} to {max(on):.2g}" if on else "no rates"
    lowered = sum(0 < row.share < 1 for row in rates)
    stopped = sum(row.share == 0 for row in rates)
    if lowered or stopped:
        found += f" ({lowered} of {len(rates)} lowered, {stopped} stopped)"
    return found


def live_lines(
    moments: Sequence[Moment], losses: Sequence[float], *, ascii_only: bool = False
) -> Iterator[str]:
    """Yield what a live view shows below its bar.

    ``moments`` are the checks so far; ``losses`` are those of the last steps, of which the mean is
    shown: of those that are finite, for what became of the others is a finding.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    loss = f"loss {plain_number(sum(finite) / len(finite))}" if finite else "loss"
    if not moments:
        yield f"{loss}; not yet measured on the search data"
        return
    bars = PLAIN_BARS if ascii_only else BARS
    last, shown = moments[-1], moments[-LONGEST:]
    yield f"{loss} {sparkline([m.loss for m in shown], bars)}"
    yield (
        f"on the search data {plain_number(last.held)} "
        f"{sparkline([m.held for m in shown], bars)} best {plain_number(last.best)}"
    )
    metric = "" if last.value is None else f"{last.metric} {plain_number(last.value)}; "
    yield metric + rates_line(last.rates)
    yield weights_line(last)


def sparkline(values: Sequence[float], bars: str = BARS) -> str:
    """Return the course of ``values`` as bars, by their logarithms; "x" where one is no number."""
    logs = [math.log(v) if 0 < v < math.inf else None for v in values]
    known = [v for v in logs if v is not None]
    if not known:
        return "x" * len(values)
    low, high = min(known), max(known)
    unit = (high - low) / (len(bars) - 1) or 1.0
    return "".join("x" if v is None else bars[round((v - low) / unit)] for v in logs)

"""When a search is done: what perfect knowledge of the layers would still gain is too little.

The sampler believes in some weight of each layer's noise, with an uncertainty. Were the true
weights known, the recipe would be the best one for them; how much better that is than the best
recipe so far, on average over what the weights may be, is the expected value of perfect
information (Raiffa and Schlaifer 1961): no number of further trials gains more. A search ends where
that is below a tolerance, or where trial after trial has gained less than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from autoquant.study.ledger import MEASURED
from autoquant.study.trials import measured

TOLERANCE = 0.01
"""Share of the objective that is not worth more trials."""
FEWEST = 8
"""Trials beyond the uniform ones before a search may end of itself."""
PATIENCE = 24
"""Trials in a row that gained less than the tolerance, after which a search ends."""
MOST = 1000
"""Trials after which a search ends that was never sure."""

Gain = Callable[[Sequence[FrozenTrial]], float | None]
"""Says how much more, as a share of the objective, could be gained; None where it can't."""


@dataclass(frozen=True)
class Enough:
    """Says whether a study has had enough trials; ``uniforms`` begin every study."""

    uniforms: int
    gain: Gain | None = None
    tolerance: float = TOLERANCE

    def __call__(self, trials: Sequence[FrozenTrial]) -> str | None:
        """Return why the study is done, in one line, or None."""
        own = len(trials) - self.uniforms
        if own < FEWEST:
            return None
        if len(trials) >= MOST:
            return f"done: {MOST} trials"
        gain = None if self.gain is None else self.gain(trials)
        if gain is not None and gain < self.tolerance:
            return (
                f"done after {len(trials)} trials: all that is still unknown could improve the "
                f"best recipe by {gain:.2%} on average, less than {self.tolerance:.0%}"
            )
        if own >= PATIENCE:
            before, now = _best(trials[:-PATIENCE]), _best(trials)
            if before is not None and now is not None and before - now < self.tolerance * abs(now):
                return (
                    f"done after {len(trials)} trials: the last {PATIENCE} improved the best "
                    f"recipe by less than {self.tolerance:.0%}"
                )
        return None


def _best(trials: Sequence[FrozenTrial]) -> float | None:
    """Return the least objective of a feasible trial."""
    found = [
        m["objective"]
        for t in trials
        if (m := measured(t)) is not None and m["feasible"] and MEASURED in t.user_attrs
    ]
    return min(found, default=None)

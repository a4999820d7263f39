"""Every recipe of a small space: where there are so few, no sampler does better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from optuna.trial import FrozenTrial

from autoquant.samplers.base import Proposal
from autoquant.spec.recipe import SiteRecipe, choices_key
from autoquant.study.parameters import ParameterMap


class Exhaustive:
    """Proposes every recipe of a small space, one after the other, whatever the sampler."""

    forecast = None

    def __init__(
        self,
        recipes: Sequence[Mapping[str, SiteRecipe]],
        mapping: ParameterMap,
        trials: Callable[[], Sequence[FrozenTrial]],
        worker: int = 0,
    ) -> None:
        self._worker = worker
        self._recipes = {choices_key(sites): sites for sites in recipes}
        self._mapping = mapping
        self._trials = trials

    def left(self, trials: Sequence[FrozenTrial]) -> list[str]:
        """Return the keys of the recipes that no trial was of."""
        tried = {choices_key(self._mapping.decode(t.params)) for t in trials}
        return [key for key in self._recipes if key not in tried]

    def done(self, trials: Sequence[FrozenTrial]) -> str | None:
        """Return in one line that there is nothing left to try, or None."""
        if self.left(trials):
            return None
        return f"done: all {len(self._recipes)} recipes of the space were tried"

    def propose(self, number: int) -> Proposal:
        """Return the proposal for trial ``number``."""
        left = self.left(self._trials()) or list(self._recipes)
        key = left[self._worker % len(left)]
        return Proposal(self._mapping.encode(self._recipes[key]))

    def told(self, trial: FrozenTrial) -> FrozenTrial:
        """Return ``trial`` as it is."""
        return trial

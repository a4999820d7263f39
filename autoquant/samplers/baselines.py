"""The uniform recipes, which every study begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial

from autoquant.samplers.base import Forecast, Proposal, Proposer
from autoquant.spec.recipe import SiteRecipe
from autoquant.study.parameters import ParameterMap


class Baselines:
    """Proposes the uniform recipes first, then what ``then`` does.

    The first worker on a study tries them; others (``worker`` above 0) begin with ``then``.
    """

    def __init__(
        self,
        recipes: Sequence[Mapping[str, SiteRecipe]],
        mapping: ParameterMap,
        then: Proposer,
        worker: int = 0,
    ) -> None:
        self._params = [] if worker else [mapping.encode(sites) for sites in recipes]
        self._then = then

    @property
    def forecast(self) -> Forecast | None:
        """What the other one foretells."""
        return self._then.forecast

    def propose(self, number: int) -> Proposal:
        """Return the proposal for trial ``number``."""
        if number < len(self._params):
            return Proposal(dict(self._params[number]))
        return self._then.propose(number)

    def told(self, trial: FrozenTrial) -> FrozenTrial:
        """Pass a finished trial on."""
        return self._then.told(trial)

"""The default sampler as a row of the registry: its profile, and what it foretells."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from autoquant.samplers.base import Context, Forecast, Proposal, Proposer
from autoquant.samplers.knapsack.sampler import KnapsackSampler
from autoquant.samplers.optuna_samplers import random, seeded_by_trial
from autoquant.sensitivity.fisher import SAMPLES, Sensitivity
from autoquant.sensitivity.profile import Profile, profile
from autoquant.sensitivity.sample_gradients import Candidates
from autoquant.spec.recipe import SiteRecipe
from autoquant.study.explanation import FIELD
from autoquant.study.explanation import plain as plain_profile
from autoquant.study.rank_correlation import Fidelity, fidelity


def knapsack(context: Context) -> Proposer:
    """Profile the layers, note that in the study, and return the default sampler.

    Where the schedule has no time for the profile, recipes are drawn at random.
    """
    context.say("profiling the layers")
    table = _profile(context)
    if table is None:
        return seeded_by_trial(random)(context)
    if table.reason:
        context.say(f"profiled by damage at the layers: {table.reason}")
    if table.layer:
        context.say(f"profiled on what {table.layer} gives: the outputs have no gradient")
    if FIELD not in context.ledger.header:
        context.ledger.note(**{FIELD: plain_profile(table)})
    session = context.session
    sampler = KnapsackSampler(
        context.mapping,
        table,
        context.goal,
        session.sizes.rest,
        context.options.seed,
        session.costs,
        context.worker,
        session.sizes.rest_weights,
    )
    return KnapsackProposer(sampler, context.ledger.trials)


class KnapsackProposer:
    """Proposes what the default sampler does, straight from the ledger's study.

    It is its own forecast: what proposes by predicted losses can also say what they are.
    """

    def __init__(
        self, sampler: KnapsackSampler, trials: Callable[[], Sequence[FrozenTrial]]
    ) -> None:
        self._sampler = sampler
        self._trials = trials

    @property
    def forecast(self) -> Forecast:
        """What the sampler foretells."""
        return self

    def propose(self, number: int) -> Proposal:
        """Return the proposal for trial ``number``."""
        sites = self._sampler.propose(self._trials(), number)
        return Proposal(self._sampler.mapping.encode(sites))

    def told(self, trial: FrozenTrial) -> FrozenTrial:
        """Return ``trial`` as it is: the sampler reads it from the ledger."""
        return trial

    def expected_gain(self, trials: Sequence[FrozenTrial]) -> float | None:
        """Return what knowing the layers' true weights would gain; None as long as not known."""
        return self._sampler.expected_gain(trials)

    def cheaper(
        self, trials: Sequence[FrozenTrial], losses: Sequence[float]
    ) -> list[dict[str, SiteRecipe]]:
        """Return the cheapest recipes that lose so many times what the goal allows."""
        return self._sampler.cheaper(trials, losses)

    def front(self, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
        """Return the best recipes from the cheapest to the best, as foretold."""
        return [dataclasses.asdict(point) for point in self._sampler.sweep(trials)]

    def fidelity(self, trials: Sequence[FrozenTrial]) -> Fidelity | None:
        """Return how well the profile foretold the losses of ``trials``."""
        return fidelity(self._sampler.profile, self._sampler.mapping, trials)


class _Late(Exception):
    """The profile has had its time."""


def _profile(context: Context) -> Profile | None:
    """Return the profile of the layers, None where the schedule has no time for it.

    With too little time for all samples gradients are taken on fewer. Either is noted.
    """
    session, schedule = context.session, context.schedule
    until = math.inf if schedule is None else time.monotonic() + schedule.for_profile

    def heed(_: str) -> None:
        if time.monotonic() >= until:
            raise _Late

    def measure(candidates: Mapping[str, Candidates]) -> Sensitivity | str:
        heed("")
        return session.sensitivity(candidates, until - time.monotonic())

    try:
        table = profile(
            session.prepared,
            session.statistics,
            context.mapping.spaces,
            heed,
            speeds=not session.costs.indifferent,
            measure=measure,
            quantize=session.quantized,
        )
    except _Late:
        assert schedule is not None
        schedule.skipped.append("the profile: recipes after the uniform ones are drawn at random")
        return None
    possible = min(SAMPLES, session.splits.samples["calibrate"])
    if schedule is not None and 0 < table.samples < possible:
        schedule.skipped.append(
            f"gradients on {possible - table.samples} of {possible} samples for the profile"
        )
    return table

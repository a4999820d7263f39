"""Optuna's samplers, and any of the user's own: each works on a copy of the study in memory.

They write one parameter at a time, which a study's storage would take seconds for; the finished
trial is written once.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from autoquant.errors import UserError
from autoquant.models.usercode import guarded
from autoquant.samplers.base import Context, Make, Proposal, Proposer
from autoquant.samplers.seeding import derive, of_worker
from autoquant.study.ledger import MEASURED, finished, quiet_optuna
from autoquant.study.parameters import ParameterMap
from autoquant.study.tuned import searched

SAMPLER_STATE = "sampler_state"
"""System attribute of a trial: what the sampler keeps with the study, as it was after the trial."""

Factory = Callable[[int], BaseSampler]
"""Makes a sampler from a seed."""


def tpe(seed: int) -> BaseSampler:
    """Tree-structured Parzen estimator."""
    return optuna.samplers.TPESampler(seed=seed)


def nsga2(seed: int) -> BaseSampler:
    """Genetic algorithm NSGA-II."""
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)


def gp(seed: int) -> BaseSampler:
    """Gaussian process."""
    return optuna.samplers.GPSampler(seed=seed)


def cmaes(seed: int) -> BaseSampler:
    """Covariance matrix adaptation."""
    return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)


def qmc(seed: int) -> BaseSampler:
    """Quasi-random sequence."""
    return optuna.samplers.QMCSampler(
        seed=seed, scramble=True, warn_independent_sampling=False, warn_asynchronous_seeding=False
    )


def random(seed: int) -> BaseSampler:
    """Random draws."""
    return optuna.samplers.RandomSampler(seed=seed)


def seeded_by_trial(factory: Factory) -> Make:
    """Return what makes a proposer whose sampler is made anew, with a new seed, for each trial."""

    def make(context: Context) -> Proposer:
        seed = of_worker(context.options.seed, context.worker)
        return _proposer(context, lambda number: factory(derive(seed, number)))

    return make


def one_sequence(factory: Factory) -> Make:
    """Return the same for a sampler that is one sequence for the whole study: one seed for all."""

    def make(context: Context) -> Proposer:
        seed = of_worker(context.options.seed, context.worker)
        return _proposer(context, lambda _: factory(seed))

    return make


def one_object(own: BaseSampler) -> Make:
    """Return what makes a proposer of the user's own sampler: one object for the whole study."""
    return lambda context: _proposer(context, lambda _: own)


def _proposer(context: Context, make: Callable[[int], BaseSampler]) -> OptunaProposer:
    state = context.ledger.header.get(SAMPLER_STATE, {})
    trials, limits = searched(context.ledger.trials()), context.goal.limits
    return OptunaProposer(make, context.mapping, trials, state, limits)


class OptunaProposer:
    """Proposes what an Optuna sampler does, on a copy of the study in memory.

    ``make`` gives the sampler for one trial from its number. What the sampler keeps with the study
    (quasi-random sequences count there) is written with the trial, in the one write, so that it is
    never ahead of the trials; ``state`` is where it starts if no trial has it.

    Genetic and Gaussian-process samplers look at completed trials only. A candidate that arithmetic
    ruled out, or that was stopped early, is therefore told as a completed one that breaks its
    constraints: else they would never learn where the limits are. ``limits`` names the constraints
    of the goal; what is not known of one counts as just kept.
    """

    forecast = None

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        mapping: ParameterMap,
        trials: Sequence[FrozenTrial],
        state: Mapping[str, Any] | None = None,
        limits: Sequence[str] = (),
    ) -> None:
        self._make = make
        self._limits = limits
        self._mapping = mapping
        known = (t.system_attrs[SAMPLER_STATE] for t in reversed(trials) if _has_state(t))
        self._state = dict(next(known, state or {}))
        with _quiet():
            self._study = optuna.create_study(direction="minimize", sampler=make(0))
        for key, value in self._state.items():
            self._storage.set_study_system_attr(self._study._study_id, key, value)
        self._worst = -math.inf
        for trial in trials:
            self._study.add_trial(self._seen(trial))
        self._asked: optuna.Trial | None = None

    @property
    def _storage(self) -> optuna.storages.BaseStorage:
        return self._study._storage

    def propose(self, number: int) -> Proposal:
        """Return the proposal for trial ``number``."""
        with _quiet(), self._guarded():
            self._study.sampler = self._make(number)
            self._asked = self._study.ask(self._mapping.distributions)
        return Proposal(dict(self._asked.params))

    def told(self, trial: FrozenTrial) -> FrozenTrial:
        """Tell the sampler how its trial ended; return the trial with what the sampler keeps."""
        asked, self._asked = self._asked, None
        seen = self._seen(trial)
        if asked is None:
            self._study.add_trial(seen)
            return trial
        for key, value in seen.user_attrs.items():
            asked.set_user_attr(key, value)
        for key, value in seen.constraints.items():
            asked.set_constraint(key, value)
        with _quiet(), self._guarded():
            if seen.state == TrialState.COMPLETE:
                self._study.tell(asked, seen.value)
            else:
                self._study.tell(asked, state=seen.state)
        known = self._storage.get_trial(asked._trial_id)
        for key, value in known.system_attrs.items():
            if not key.startswith("constraints"):
                trial.system_attrs[key] = value
        state = self._storage.get_study_system_attrs(self._study._study_id)
        if state != self._state:
            self._state = dict(state)
            trial.system_attrs[SAMPLER_STATE] = dict(state)
        return trial

    def _guarded(self) -> guarded:
        """Return what names the sampler where it fails: it may be one of the user's own."""
        kind = type(self._study.sampler).__name__
        return guarded(lambda reason: UserError(f"sampler {kind} failed: {reason}"))

    def _seen(self, trial: FrozenTrial) -> FrozenTrial:
        """Return a trial as the sampler is told of it.

        The objective of a candidate that was not measured is the worst that there was so far; that
        of one which was stopped early, what it had come to.
        """
        if trial.state != TrialState.PRUNED:
            if trial.value is not None and math.isfinite(trial.value):
                self._worst = max(self._worst, trial.value)
            return trial
        measured = trial.user_attrs.get(MEASURED)
        value = self._worst if math.isfinite(self._worst) else 0.0
        if isinstance(measured, dict) and math.isfinite(measured["objective"]):
            value = measured["objective"]
        return finished(
            TrialState.COMPLETE,
            params=trial.params,
            distributions=trial.distributions,
            started=trial.datetime_start or datetime.datetime.now(),
            value=value,
            constraints=dict.fromkeys(self._limits, 0.0) | trial.constraints,
            user_attrs=trial.user_attrs,
            system_attrs={
                k: v for k, v in trial.system_attrs.items() if not k.startswith("constraints")
            },
        )


def _has_state(trial: FrozenTrial) -> bool:
    return isinstance(trial.system_attrs.get(SAMPLER_STATE), dict)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's remarks on its own samplers (experimental, blind to constraints) to itself."""
    with warnings.catch_warnings(), quiet_optuna():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Constraints have been set")
        yield

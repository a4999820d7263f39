"""Where the next recipe comes from: the uniform ones first, then a sampler.

Each trial's randomness is a function of the seed and the trial's number, so that a resumed study
gives the trials that an uninterrupted one gives. Optuna's own samplers work on a copy of the study
in memory, because they write one parameter at a time; the finished trial is written once.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from autoquant.errors import UserError
from autoquant.models.usercode import guarded
from autoquant.registry import Registry
from autoquant.samplers.knapsack.sampler import KnapsackSampler
from autoquant.spec.recipe import SiteRecipe, choices_key
from autoquant.study.ledger import MEASURED, finished, quiet_optuna
from autoquant.study.parameters import ParameterMap

STOCK: Registry[Callable[[int], BaseSampler]] = Registry("sampler")
DEFAULT = "knapsack"
SAMPLER_STATE = "sampler_state"
"""System attribute of a trial: what the sampler keeps with the study, as it was after the trial."""


@STOCK.register("tpe")
def _tpe(seed: int) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=seed)


@STOCK.register("nsga2")
def _nsga2(seed: int) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)


@STOCK.register("gp")
def _gp(seed: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed)


@STOCK.register("cmaes")
def _cmaes(seed: int) -> BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)


@STOCK.register("qmc")
def _qmc(seed: int) -> BaseSampler:
    return optuna.samplers.QMCSampler(
        seed=seed, scramble=True, warn_independent_sampling=False, warn_asynchronous_seeding=False
    )


@STOCK.register("random")
def _random(seed: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def names() -> tuple[str, ...]:
    """Return the names that ``--sampler`` takes, the default first."""
    return (DEFAULT, *STOCK.names())


def check(name: str) -> None:
    """Raise UserError where ``name`` is no sampler."""
    if name != DEFAULT:
        try:
            STOCK.get(name)
        except UserError as error:
            raise UserError(f"--sampler: {error}, {DEFAULT}") from None


@dataclass
class Proposal:
    """The parameters of the next trial. ``system_attrs`` is what the sampler keeps with it."""

    params: dict[str, Any]
    system_attrs: dict[str, Any] = field(default_factory=dict)


class Proposer(Protocol):
    """Proposes trials, and is told of each one that is finished."""

    def propose(self, number: int) -> Proposal:
        """Return the proposal for trial ``number``."""

    def told(self, trial: FrozenTrial) -> FrozenTrial:
        """Take note of a finished trial, and return it as it should be written.

        UserError where a sampler of the user's own fails at that: the trial stays what it is.
        """


class KnapsackProposer:
    """Proposes what the default sampler does, straight from the ledger's study."""

    def __init__(
        self, sampler: KnapsackSampler, trials: Callable[[], Sequence[FrozenTrial]]
    ) -> None:
        self._sampler = sampler
        self._trials = trials

    def propose(self, number: int) -> Proposal:
        """Return the proposal for trial ``number``."""
        sites = self._sampler.propose(self._trials(), number)
        return Proposal(self._sampler.mapping.encode(sites))

    def told(self, trial: FrozenTrial) -> FrozenTrial:
        """Return ``trial`` as it is: the sampler reads it from the ledger."""
        return trial


class StockProposer:
    """Proposes what an Optuna sampler does, on a copy of the study in memory.

    ``make`` gives the sampler for one trial from its number. What the sampler keeps with the study
    (quasi-random sequences count there) is written with the trial, in the one write, so that it is
    never ahead of the trials; ``state`` is where it starts if no trial has it.

    Genetic and Gaussian-process samplers look at completed trials only. A candidate that arithmetic
    ruled out, or that was stopped early, is therefore told as a completed one that breaks its
    constraints: else they would never learn where the limits are. ``limits`` names the constraints
    of the goal; what is not known of one counts as just kept.
    """

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        mapping: ParameterMap,
        trials: Sequence[FrozenTrial],
        state: Mapping[str, Any] | None = None,
        keep: Callable[[dict[str, Any]], None] | None = None,
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


def of_worker(seed: int, worker: int) -> int:
    """Return the seed of one of several workers on a study: the study's own for the first."""
    return seed if not worker else derive(seed, 10**6 + worker)


def derive(seed: int, number: int) -> int:
    """Return the seed of one trial."""
    return (seed * 1_000_003 + number * 7919 + 1) % (2**32 - 1)


def seeded(name: str, seed: int) -> Callable[[int], BaseSampler]:
    """Return what makes the stock sampler ``name`` for a trial's number.

    A quasi-random sequence is one sequence for the whole study, so its seed stays the same.
    """
    factory = STOCK.get(name)
    if name == "qmc":
        return lambda _: factory(seed)
    return lambda number: factory(derive(seed, number))


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

    def propose(self, number: int) -> Proposal:
        """Return the proposal for trial ``number``."""
        if number < len(self._params):
            return Proposal(dict(self._params[number]))
        return self._then.propose(number)

    def told(self, trial: FrozenTrial) -> FrozenTrial:
        """Pass a finished trial on."""
        return self._then.told(trial)


class Exhaustive:
    """Proposes every recipe of a small space, one after the other, whatever the sampler."""

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

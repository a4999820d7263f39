"""The trial loop: propose, measure, write; whatever happens to one candidate costs that one."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from optuna.trial import FrozenTrial, TrialState

from autoquant.errors import StudyError, TrialError, UserError
from autoquant.spec.costs import Costs
from autoquant.spec.goal import ROUNDING, Goal, Measurement
from autoquant.spec.recipe import SiteRecipe
from autoquant.study.ledger import MEASURED, REASON, Ledger, finished
from autoquant.study.parameters import ParameterMap
from autoquant.study.trials import SCALES, best_trial, better, scales
from autoquant.study.tuned import searched

if TYPE_CHECKING:
    from autoquant.measure.evaluator import Watch
    from autoquant.samplers.base import Proposer
    from autoquant.selection.schedule import Schedule

FAILURES = 10
"""Failed trials in a row that end a search."""


@dataclass(frozen=True)
class Outcome:
    """What measuring one candidate gave: ``sites`` calibrated, ``stopped`` if ended early."""

    measurement: Measurement
    sites: Mapping[str, SiteRecipe]
    stopped: bool


Measure = Callable[[Mapping[str, SiteRecipe], "Watch"], Outcome]
Price = Callable[[Mapping[str, SiteRecipe]], Costs]
"""Says what a candidate costs, in far less than a millisecond a layer."""


class Listener(Protocol):
    """Hears how a search goes on."""

    def trial(self, trial: FrozenTrial, best: FrozenTrial | None) -> None:
        """A trial was written."""

    def step(self, number: int, done: int, total: int) -> None:
        """A trial has seen ``done`` of ``total`` samples."""


@dataclass(frozen=True)
class Stop:
    """When the trials end: with so many in the study, or where the schedule has no room for one."""

    trials: int | None
    schedule: Schedule | None = None
    enough: Callable[[list[FrozenTrial]], str | None] | None = None
    """Says in one line that a study is done, None as long as it is not."""


def run_trials(
    ledger: Ledger,
    mapping: ParameterMap,
    proposer: Proposer,
    goal: Goal,
    measure: Measure,
    stop: Stop,
    listener: Listener,
    price: Price | None = None,
) -> str | None:
    """Run trials until ``stop``; every finished one is in the ledger, whatever ends the loop.

    Return why the study is done, where ``stop.enough`` said so.

    A candidate whose ``price`` is over a limit of the goal is written as pruned, and not measured.

    Raises StudyError where ten trials in a row failed, naming the reason, and whatever the
    ledger raises; KeyboardInterrupt passes through with the trial in flight dropped.
    """
    trials = searched(ledger.trials())
    failures = _failures(trials)
    best = best_trial(trials)
    most = math.inf if stop.trials is None else stop.trials
    # Counted anew each time: other workers may add trials to the same study.
    while (number := len(known := searched(ledger.trials()))) < most:
        if stop.schedule is not None and stop.schedule.late():
            return None
        if stop.enough is not None and (reason := stop.enough(known)) is not None:
            return reason
        began = time.monotonic()
        trial = _run_one(ledger, mapping, proposer, goal, measure, listener, number, price)
        if stop.schedule is not None:
            stop.schedule.trial(time.monotonic() - began)
        failures = failures + 1 if trial.state == TrialState.FAIL else 0
        if better(trial, best):
            best = trial
        listener.trial(trial, best)
        if failures >= FAILURES:
            raise StudyError(
                f"{FAILURES} trials in a row failed, the last one: {trial.user_attrs[REASON]}"
            )
    return None


def _run_one(
    ledger: Ledger,
    mapping: ParameterMap,
    proposer: Proposer,
    goal: Goal,
    measure: Measure,
    listener: Listener,
    number: int,
    price: Price | None,
) -> FrozenTrial:
    began = datetime.datetime.now()
    proposal = proposer.propose(number)
    sites = mapping.decode(proposal.params)
    common: dict[str, Any] = {
        "params": proposal.params,
        "distributions": mapping.distributions,
        "started": began,
        "system_attrs": proposal.system_attrs,
    }
    if price is not None and not goal.affords(costs := price(sites)):
        return _write(ledger, proposer, _refused(goal, costs, common), number)
    try:
        outcome = measure(sites, lambda done, total: listener.step(number, done, total))
    except TrialError as error:
        trial = finished(TrialState.FAIL, user_attrs={REASON: str(error)}, **common)
    else:
        m = outcome.measurement
        attrs = {
            MEASURED: m.plain() | {"objective": goal.objective(m), "feasible": goal.feasible(m)},
            SCALES: scales(outcome.sites),
        }
        trial = finished(
            TrialState.PRUNED if outcome.stopped else TrialState.COMPLETE,
            value=None if outcome.stopped else goal.objective(m),
            constraints=goal.constraints(m),
            user_attrs=attrs,
            **common,
        )
    return _write(ledger, proposer, trial, number)


def _write(ledger: Ledger, proposer: Proposer, trial: FrozenTrial, number: int) -> FrozenTrial:
    try:
        trial = proposer.told(trial)
    except UserError:
        ledger.add(trial)  # what was measured is kept, whatever the sampler makes of it
        raise
    ledger.add(trial)
    trial.number = max(number, len(ledger.trials()) - 1)  # more where there are tuned ones
    return trial


def _refused(goal: Goal, costs: Costs, common: dict[str, Any]) -> FrozenTrial:
    """Return the trial of a candidate that costs more than the goal allows."""
    excess = goal.excess(costs)
    over = ", ".join(name for name, v in excess.items() if v > ROUNDING)
    attrs = {REASON: f"over the limit by arithmetic ({over}), not measured"}
    return finished(TrialState.PRUNED, constraints=excess, user_attrs=attrs, **common)


def _failures(trials: list[FrozenTrial]) -> int:
    """Return how many of the last trials failed in a row."""
    count = 0
    for trial in reversed(trials):
        if trial.state != TrialState.FAIL:
            break
        count += 1
    return 0 if count >= FAILURES else count

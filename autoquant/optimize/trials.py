"""The second stage of a search: its trials, each a candidate measured on the search split."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from autoquant.errors import TrialError
from autoquant.measure.evaluator import Bar, Watch
from autoquant.optimize.loop import Outcome, run_trials
from autoquant.optimize.opened import OpenStudy
from autoquant.optimize.prepare import Plan
from autoquant.optimize.result import Speed
from autoquant.session.session import Measured
from autoquant.spec.options import AUTO
from autoquant.spec.recipe import SiteRecipe
from autoquant.study.rank_correlation import Fidelity
from autoquant.study.trials import FRONT, best_trial, measured
from autoquant.study.tuned import searched


@dataclass(frozen=True)
class Tried:
    """What the trials came to.

    - ``trials``: all that the study has, also from before and of other workers; no tuned ones.
    - ``done``: why they ended of themselves, None where they were counted or timed.
    - ``foretold``: how well the sampler foretold them, None where that can't be said.
    - ``speed``: how fast candidates were measured, by this process.
    - ``skipped``: in words, which trials there was no time for.
    """

    trials: Sequence[FrozenTrial]
    done: str | None
    foretold: Fidelity | None
    speed: Speed
    skipped: Sequence[str]


def try_all(study: OpenStudy, plan: Plan) -> Tried:
    """Run the trials of a plan; note in the study what the sampler foretells after them."""
    ledger, session = study.ledger, study.session
    before, started = len(searched(ledger.trials())), time.monotonic()
    session.prepared.engine.reset()
    if study.schedule is not None:
        study.schedule.begin_trials(tunes=study.options.tune != "none")
    done = run_trials(
        ledger,
        plan.mapping,
        plan.proposer,
        study.goal,
        Measurer(study, plan).measure,
        plan.stop,
        study.reporter,
        session.costs.of,
    )
    trials, foretold = searched(ledger.trials()), None
    if plan.forecast is not None:
        foretold = plan.forecast.fidelity(trials)
        ledger.note(**{FRONT: plan.forecast.front(trials)})
    speed = Speed(len(trials) - before, time.monotonic() - started, _of_layers(study))
    return Tried(trials, done, foretold, speed, _unfinished(study, plan, len(trials), done))


class Measurer:
    """Measures candidates, and stops early what surely can't win.

    It remembers whether any was measured to its end: however bad, one is, so that there is an
    answer.
    """

    def __init__(self, study: OpenStudy, plan: Plan) -> None:
        self._study = study
        self._plan = plan
        self._answered = any(measured(trial) is not None for trial in study.ledger.trials())

    def measure(self, sites: Mapping[str, SiteRecipe], watch: Watch) -> Outcome:
        """Measure one candidate; TrialError where it fails."""
        schedule = self._study.schedule
        if sites in self._plan.uniforms:
            measurement, reading, done = self._uniform(sites, watch)
        else:
            measurement, reading, done = self._study.session.measure(
                sites, "search", bar=self._bar(), watch=watch
            )
        self._answered = self._answered or not reading.stopped
        if schedule is not None and not schedule.knows_exact:
            schedule.exact(self._exact_seconds(done))
        return Outcome(measurement, done, reading.stopped)

    def _uniform(self, sites: Mapping[str, SiteRecipe], watch: Watch) -> Measured:
        """Measure a uniform recipe.

        They are few, unlike each other and all that follows, and what the sampler learns the scale
        of losses from: nothing of them is kept, and each is measured to its end.
        """
        session, schedule = self._study.session, self._study.schedule
        with session.without_reuse():
            found = session.measure(sites, "search", watch=watch)
        if schedule is not None:
            schedule.candidate(found[1].seconds)
        return found

    def _bar(self) -> Bar | None:
        """Return what the next candidate has to reach."""
        study = self._study
        if not study.options.prune or not self._answered:
            return None
        if not study.goal.budgeted:
            return Bar(study.goal.max_drop)
        best = best_trial(searched(study.ledger.trials()))
        if best is None:
            return None
        # Measured before, but for a search that was resumed.
        sites = self._plan.mapping.decode(best.params)
        rival = study.session.measure(sites, "search")[1].evidence
        return None if rival is None else Bar(0.0, rival, f"trial {best.number}")

    def _exact_seconds(self, sites: Mapping[str, SiteRecipe]) -> float | None:
        """Return what the reference takes on the search split, None where it can't be told."""
        try:
            return self._study.session.exact_seconds(sites)
        except TrialError:
            return None


def _of_layers(study: OpenStudy) -> dict[str, float]:
    """Return the seconds that quantized layers took, by backend.

    An accelerator computes behind the clock's back: there, calls are counted.
    """
    shares = study.session.prepared.engine.shares()
    if study.session.device.type == "cpu":
        return {name: share.seconds for name, share in shares.items()}
    return {name: float(share.calls) for name, share in shares.items()}


def _unfinished(study: OpenStudy, plan: Plan, trials: int, done: str | None) -> list[str]:
    """Return in words which trials a search was asked for that --timeout left no time for."""
    most = plan.stop.trials
    if study.schedule is None or done is not None:
        return []
    if study.options.trials == AUTO:
        return ["trials that might have gained something: --trials auto was not done"]
    return [] if most is None or trials >= most else [f"{most - trials} of {most} trials"]

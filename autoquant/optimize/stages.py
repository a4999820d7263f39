"""What a study runs through once it is open: its trials, the choice, the confirmation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from autoquant.errors import StudyError, TaskError, TrialError, UserError
from autoquant.measure.evaluator import Bar, Watch
from autoquant.optimize.callbacks import Reporter
from autoquant.optimize.loop import Outcome, Stop, run_trials
from autoquant.optimize.result import SearchResult, Speed
from autoquant.optimize.termination import Enough
from autoquant.samplers.base import Context, Proposer
from autoquant.samplers.baselines import Baselines
from autoquant.samplers.exhaustive import Exhaustive
from autoquant.samplers.registry import make_proposer
from autoquant.selection.confirmation import confirm
from autoquant.selection.finalists import finalists, incumbent
from autoquant.selection.schedule import Schedule
from autoquant.session.costs import (
    LatencyCheck,
    check_one,
)
from autoquant.session.session import Session
from autoquant.spec.goal import Goal
from autoquant.spec.options import AUTO, Options
from autoquant.spec.outputs import check_target, is_signed
from autoquant.spec.recipe import Recipe, SiteRecipe
from autoquant.spec.recipe_file import dumps, save
from autoquant.spec.space import SiteSpace
from autoquant.spec.uniform import baselines
from autoquant.study.ledger import MEASURED, Ledger, count
from autoquant.study.opening import (
    RECIPE_FILE,
)
from autoquant.study.parameters import ParameterMap
from autoquant.study.trials import FRONT, RECIPE, best_trial, measured

WORTH_REUSING = 0.3
"""Seconds that the float model takes on the search split, from which results are kept."""

MOST_OF_ALL = 200
"""Recipes of a space up to which a search without a number of trials tries them all."""


def run_study(
    ledger: Ledger,
    session: Session,
    spaces: Mapping[str, SiteSpace],
    goal: Goal,
    options: Options,
    out: Path,
    own: BaseSampler | None,
    reporter: Reporter,
    began: float,
    schedule: Schedule | None,
    worker: int = 0,
) -> SearchResult:
    """Run the trials of a study that is checked and created, choose, confirm, and write.

    Trials go on from those that the study has; ``worker`` is the number of this process on it.
    Raises StudyError where no recipe comes of it.
    """
    mapping = ParameterMap(spaces)
    # What arithmetic rules out is never tried, but something uniform is, where it can be.
    plain = [sites for sites in baselines(spaces) if goal.affords(session.costs.of(sites))]
    most = 1 if not mapping.distributions else options.most_trials
    try:
        # Keeping books costs more than it saves where a candidate takes no time, unless asked for.
        if options.memory is not None or session.baseline("search").seconds >= WORTH_REUSING:
            session.reuse(options.memory_bytes, reporter.say)
    except TrialError as error:
        raise TaskError(f"{session.task.source}: on the float model: {error}") from error
    stop = Stop(most, schedule)
    # From here on whoever interrupts the search is told which study to resume.
    reporter.begin(ledger.name, goal, ledger.trials(), stop)
    context = Context(ledger, session, mapping, goal, options, worker, schedule, reporter.say)
    then: Proposer = make_proposer(context, own)
    forecast = then.forecast
    session.keep({name: space.needs for name, space in mapping.spaces.items()})
    if options.trials == AUTO and most is None:
        gain = None if forecast is None else forecast.expected_gain
        stop = replace(stop, enough=Enough(len(plain), gain))
    # Of few recipes all are tried: no sampler does better.
    every = mapping.recipes(MOST_OF_ALL if most is None else most)
    if every is not None and own is None and mapping.distributions:
        then = exhaustive = Exhaustive(every, mapping, ledger.trials, worker)
        stop = replace(stop, enough=exhaustive.done)
    proposer = Baselines(plain, mapping, then, worker)
    answered = any(measured(trial) is not None for trial in ledger.trials())

    def bar() -> Bar | None:
        # However bad, one candidate is measured to its end: there must be an answer.
        if not options.prune or not answered:
            return None
        if not goal.budgeted:
            return Bar(goal.max_drop)
        best = best_trial(ledger.trials())
        if best is None:
            return None
        # Measured before, but for a search that was resumed.
        rival = session.measure(mapping.decode(best.params), "search")[1].evidence
        return None if rival is None else Bar(0.0, rival, f"trial {best.number}")

    def measure(sites: Mapping[str, SiteRecipe], watch: Watch) -> Outcome:
        nonlocal answered
        if sites in plain:
            # Few, unlike each other and all that follows, and what the sampler learns the scale
            # of losses from: nothing of them is kept, and each is measured to its end.
            with session.without_reuse():
                m, reading, done = session.measure(sites, "search", watch=watch)
            if schedule is not None:
                schedule.candidate(reading.seconds)
        else:
            m, reading, done = session.measure(sites, "search", bar=bar(), watch=watch)
        answered = answered or not reading.stopped
        if schedule is not None and not schedule.knows_exact:
            schedule.exact(_exact_seconds(session, done))
        return Outcome(m, done, reading.stopped)

    before, started = len(ledger.trials()), time.monotonic()
    session.prepared.engine.reset()
    if schedule is not None:
        schedule.begin_trials()
    done = run_trials(ledger, mapping, proposer, goal, measure, stop, reporter, session.costs.of)
    trials = ledger.trials()
    foretold = None if forecast is None else forecast.fidelity(trials)
    if forecast is not None:
        ledger.note(**{FRONT: forecast.front(trials)})
    speed = Speed(
        len(trials) - before,
        time.monotonic() - started,
        {
            # An accelerator computes behind the clock's back: there, calls are counted.
            name: share.seconds if session.device.type == "cpu" else float(share.calls)
            for name, share in session.prepared.engine.shares().items()
        },
    )
    skipped = [] if schedule is None else _unfinished(options, most, len(trials), done)
    reporter.say("confirming")
    candidates = finalists(trials, mapping, goal, len(plain))
    refused = sum(t.state == TrialState.PRUNED and MEASURED not in t.user_attrs for t in trials)
    if not candidates and not refused:
        raise StudyError(
            f"study {ledger.name}: no trial was completed, so there is no recipe; give more "
            "--trials or --timeout"
        )
    if not candidates or (goal.budgeted and best_trial(trials) is None):
        raise StudyError(
            f"study {ledger.name}: none of its {len(trials)} trials is within the budget; go on "
            f"with `autoquant resume {ledger.name}` and more --trials"
        )
    try:
        rival = incumbent(trials, goal, len(plain))
        with session.without_reuse():
            chosen, confirmed = confirm(
                session, mapping, goal, candidates, options.seed, rival, schedule
            )
    except TrialError as error:
        raise StudyError(f"study {ledger.name}: {error}") from error
    recipe, checks = _time_result(session, chosen.recipe, ledger.header)
    evidence, asked = recipe.evidence, options.max_drop is not None or not goal.budgeted
    path = _free(out, ledger.name)
    # The study first: `autoquant export` then has the recipe even where ``path`` can't be written.
    ledger.note(**{RECIPE: {"text": dumps(recipe), "trial": chosen.trial}})
    save(recipe, path)
    return SearchResult(
        ledger.name,
        recipe,
        path,
        chosen.holds,
        goal.max_drop,
        count(trials),
        tuple(confirmed),
        round(time.monotonic() - began, 3),
        session.device.type,
        speed,
        goal.latency,
        checks,
        done,
        foretold,
        None if evidence is None or not asked else evidence.verdict,
        () if schedule is None else (*schedule.skipped, *skipped),
    )


def _free(out: Path, study: str) -> Path:
    """Return where the recipe goes: beside one that was edited while the search ran."""
    beside = (out / f"recipe-{study}-{i}.yaml" for i in itertools.count(1))
    for path in itertools.chain([out / RECIPE_FILE], beside):
        try:
            check_target(path, is_signed)
        except UserError:
            continue
        return path
    raise AssertionError("unreachable")


def _exact_seconds(session: Session, sites: Mapping[str, SiteRecipe]) -> float | None:
    """Return what the reference takes on the search split, None where it can't be told."""
    try:
        return session.exact_seconds(sites)
    except TrialError:
        return None


def _unfinished(options: Options, most: int | None, trials: int, done: str | None) -> list[str]:
    """Return in words which trials a search was asked for that --timeout left no time for."""
    if done is not None:
        return []
    if options.trials == AUTO:
        return ["trials that might have gained something: --trials auto was not done"]
    return [] if most is None or trials >= most else [f"{most - trials} of {most} trials"]


def _time_result(
    session: Session, recipe: Recipe, header: Mapping[str, Any]
) -> tuple[Recipe, tuple[LatencyCheck, ...]]:
    """Return the result with its measured latency, where that was asked for, and all checks."""
    table, evidence = session.costs.latency, recipe.evidence
    if table is None or evidence is None:
        return recipe, ()
    done = tuple(LatencyCheck.read(row) for row in header.get("latency_checks", ()))
    found = check_one(session, "result", recipe.sites)
    latency = table.evidence(found.predicted, found.measured)
    return replace(recipe, evidence=replace(evidence, latency=latency)), (*done, found)

"""The first stage of a search: what proposes its trials, and when they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoquant.errors import TaskError, TrialError
from autoquant.optimize.loop import Stop
from autoquant.optimize.opened import OpenStudy
from autoquant.optimize.termination import Enough
from autoquant.samplers.base import Context, Forecast, Proposer
from autoquant.samplers.baselines import Baselines
from autoquant.samplers.exhaustive import Exhaustive
from autoquant.samplers.registry import make_proposer
from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.uniform import baselines
from autoquant.study.parameters import ParameterMap

MOST_OF_ALL = 200
"""Recipes of a space up to which a search without a number of trials tries them all."""


@dataclass(frozen=True)
class Plan:
    """What the trials of a study are to be.

    - ``mapping``: the space, as parameters.
    - ``uniforms``: the uniform recipes within the limits; every study begins with them.
    - ``proposer``: what proposes the trials, these included.
    - ``forecast``: what the sampler foretells, even where all recipes are tried; None for nothing.
    - ``stop``: when they end.
    """

    mapping: ParameterMap
    uniforms: Sequence[dict[str, SiteRecipe]]
    proposer: Proposer
    forecast: Forecast | None
    stop: Stop


def prepare(study: OpenStudy) -> Plan:
    """Decide what is tried; the default sampler profiles the layers for it.

    From here on whoever interrupts the search is told which study to resume.
    """
    mapping, costs = ParameterMap(study.spaces), study.session.costs
    # What arithmetic rules out is never tried, but something uniform is, where it can be.
    uniforms = [s for s in baselines(study.spaces) if study.goal.affords(costs.of(s))]
    _reuse(study)
    stop = Stop(study.options.most_trials if mapping.distributions else 1, study.schedule)
    study.reporter.begin(study.ledger.name, study.goal, study.ledger.trials(), stop)
    sampler = make_proposer(_context(study, mapping), study.own)
    study.session.keep({name: space.needs for name, space in mapping.spaces.items()})
    if study.options.ends_itself and mapping.distributions:
        gain = None if sampler.forecast is None else sampler.forecast.expected_gain
        stop = replace(stop, enough=Enough(len(uniforms), gain))
    proposer, every = sampler, _exhaustive(study, mapping, stop)
    if every is not None:
        proposer, stop = every, replace(stop, enough=every.done)
    begun = Baselines(uniforms, mapping, proposer, study.worker)
    return Plan(mapping, uniforms, begun, sampler.forecast, stop)


def _reuse(study: OpenStudy) -> None:
    """Record the model, or keep results of layers, where that saves time.

    TaskError where the user's code fails.
    """
    session, options = study.session, study.options
    if session.record(study.reporter.say):
        if options.memory is not None:
            study.reporter.say(
                "--memory is not used: on a GPU the whole model is recorded and replayed, which "
                "is faster than to keep results of layers (--backend eager keeps them)"
            )
        return
    try:
        if options.memory is not None or session.repays_reuse:
            session.reuse(options.memory_bytes, study.reporter.say)
    except TrialError as error:
        raise TaskError(f"{session.task.source}: on the float model: {error}") from error


def _context(study: OpenStudy, mapping: ParameterMap) -> Context:
    return Context(
        ledger=study.ledger,
        session=study.session,
        mapping=mapping,
        goal=study.goal,
        options=study.options,
        worker=study.worker,
        schedule=study.schedule,
        say=study.reporter.say,
    )


def _exhaustive(study: OpenStudy, mapping: ParameterMap, stop: Stop) -> Exhaustive | None:
    """Return what tries all recipes, where they are so few; one's own sampler is kept to."""
    recipes = mapping.recipes(MOST_OF_ALL if stop.trials is None else stop.trials)
    if recipes is None or study.own is not None or not mapping.distributions:
        return None
    return Exhaustive(recipes, mapping, study.ledger.trials, study.worker)

"""What proposes a study's trials: the default sampler with its profile, or one of Optuna's."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from optuna.samplers import BaseSampler

from autoquant.optimize.callbacks import Reporter
from autoquant.samplers import samplers
from autoquant.samplers.knapsack.sampler import KnapsackSampler
from autoquant.selection.schedule import Schedule
from autoquant.sensitivity.fisher import SAMPLES, Sensitivity
from autoquant.sensitivity.profile import Profile, profile
from autoquant.sensitivity.sample_gradients import Candidates
from autoquant.session.session import Session
from autoquant.spec.goal import Goal
from autoquant.spec.options import Options
from autoquant.study.explanation import FIELD
from autoquant.study.explanation import plain as plain_profile
from autoquant.study.ledger import Ledger
from autoquant.study.parameters import ParameterMap


def make_proposer(
    ledger: Ledger,
    session: Session,
    mapping: ParameterMap,
    goal: Goal,
    options: Options,
    own: BaseSampler | None,
    reporter: Reporter,
    worker: int,
    schedule: Schedule | None = None,
) -> tuple[samplers.Proposer, KnapsackSampler | None]:
    """Return what proposes the trials, and the default sampler, where it is that.

    The default one needs the profile of the layers, which is taken here and noted in the study.
    Where the ``schedule`` has no time for it, recipes are drawn at random after the uniform ones.
    """
    sampler: KnapsackSampler | None = None
    name, table = options.sampler, None
    if own is None and name == samplers.DEFAULT:
        reporter.say("profiling the layers")
        table = _profile(session, mapping, schedule)
        name = "random" if table is None else name
    if table is not None:
        if table.reason:
            reporter.say(f"profiled by damage at the layers: {table.reason}")
        if table.layer:
            reporter.say(f"profiled on what {table.layer} gives: the outputs have no gradient")
        if FIELD not in ledger.header:
            ledger.note(**{FIELD: plain_profile(table)})
        sampler = KnapsackSampler(
            mapping,
            table,
            goal,
            session.sizes.rest,
            options.seed,
            session.costs,
            worker,
            session.sizes.rest_weights,
        )
        then: samplers.Proposer = samplers.KnapsackProposer(sampler, ledger.trials)
    else:
        seed = samplers.of_worker(options.seed, worker)
        make = (lambda _: own) if own is not None else samplers.seeded(name, seed)
        state = ledger.header.get(samplers.SAMPLER_STATE, {})

        def keep(new: dict[str, Any]) -> None:
            ledger.note(**{samplers.SAMPLER_STATE: new})

        then = samplers.StockProposer(make, mapping, ledger.trials(), state, keep, goal.limits)
    session.keep({name: space.needs for name, space in mapping.spaces.items()})
    return then, sampler


class _Late(Exception):
    """The profile has had its time."""


def _profile(session: Session, mapping: ParameterMap, schedule: Schedule | None) -> Profile | None:
    """Return the profile of the layers, None where the ``schedule`` has no time for it.

    With too little time for all samples gradients are taken on fewer. Either is noted.
    """
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
            mapping.spaces,
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

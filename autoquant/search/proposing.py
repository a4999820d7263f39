"""What proposes a study's trials: the default sampler with its profile, or one of Optuna's."""

from __future__ import annotations

from typing import Any

from optuna.samplers import BaseSampler

from autoquant.search import samplers
from autoquant.search.goal import Goal
from autoquant.search.ledger import Ledger
from autoquant.search.options import Options
from autoquant.search.params import ParameterMap
from autoquant.search.profile import profile
from autoquant.search.reporter import Reporter
from autoquant.search.sampler import KnapsackSampler
from autoquant.search.session import Session
from autoquant.search.why import FIELD
from autoquant.search.why import plain as plain_profile


def make_proposer(
    ledger: Ledger,
    session: Session,
    mapping: ParameterMap,
    goal: Goal,
    options: Options,
    own: BaseSampler | None,
    reporter: Reporter,
    worker: int,
) -> tuple[samplers.Proposer, KnapsackSampler | None]:
    """Return what proposes the trials, and the default sampler, where it is that.

    The default one needs the profile of the layers, which is taken here and noted in the study.
    """
    sampler: KnapsackSampler | None = None
    if own is None and options.sampler == samplers.DEFAULT:
        reporter.say("profiling the layers")
        speeds = not session.costs.indifferent
        table = profile(
            session.prepared,
            session.statistics,
            mapping.spaces,
            speeds=speeds,
            measure=session.sensitivity,
            quantize=session.quantized,
        )
        if table.reason:
            reporter.say(f"profiled by damage at the layers: {table.reason}")
        if table.layer:
            reporter.say(f"profiled on what {table.layer} gives: the outputs have no gradient")
        if FIELD not in ledger.header:
            ledger.note(**{FIELD: plain_profile(table)})
        rest = session.sizes.rest
        sampler = KnapsackSampler(mapping, table, goal, rest, options.seed, session.costs, worker)
        then: samplers.Proposer = samplers.KnapsackProposer(sampler, ledger.trials)
    else:
        seed = samplers.of_worker(options.seed, worker)
        make = (lambda _: own) if own is not None else samplers.seeded(options.sampler, seed)
        state = ledger.header.get(samplers.SAMPLER_STATE, {})

        def keep(new: dict[str, Any]) -> None:
            ledger.note(**{samplers.SAMPLER_STATE: new})

        then = samplers.StockProposer(make, mapping, ledger.trials(), state, keep, goal.limits)
    session.keep({name: space.needs for name, space in mapping.spaces.items()})
    return then, sampler

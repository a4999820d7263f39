"""Which samplers there are, by the names that ``--sampler`` takes.

A row makes a proposer from a context; one more sampler is one more row.
"""

from __future__ import annotations

from optuna.samplers import BaseSampler

from autoquant.errors import UserError
from autoquant.registry import Registry
from autoquant.samplers import optuna_samplers
from autoquant.samplers.base import Context, Make, Proposer
from autoquant.samplers.knapsack.proposer import knapsack
from autoquant.samplers.optuna_samplers import one_object, one_sequence, seeded_by_trial

DEFAULT = "knapsack"

SAMPLERS: Registry[Make] = Registry("sampler")
SAMPLERS.register("tpe")(seeded_by_trial(optuna_samplers.tpe))
SAMPLERS.register("nsga2")(seeded_by_trial(optuna_samplers.nsga2))
SAMPLERS.register("gp")(seeded_by_trial(optuna_samplers.gp))
SAMPLERS.register("cmaes")(seeded_by_trial(optuna_samplers.cmaes))
SAMPLERS.register("qmc")(one_sequence(optuna_samplers.qmc))
SAMPLERS.register("random")(seeded_by_trial(optuna_samplers.random))
SAMPLERS.register(DEFAULT)(knapsack)


def names() -> tuple[str, ...]:
    """Return the names that ``--sampler`` takes, the default first."""
    return (DEFAULT, *(name for name in SAMPLERS.names() if name != DEFAULT))


def check(name: str) -> None:
    """Raise UserError where ``name`` is no sampler."""
    try:
        SAMPLERS.get(name)
    except UserError as error:
        raise UserError(f"--sampler: {error}") from None


def make_proposer(context: Context, own: BaseSampler | None = None) -> Proposer:
    """Return what proposes a study's trials: the sampler of its options, or one's ``own``."""
    make = SAMPLERS.get(context.options.sampler) if own is None else one_object(own)
    return make(context)

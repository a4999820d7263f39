"""A study of twelve made-up layers whose losses are known exactly: for tests of samplers."""

from __future__ import annotations

import numpy as np

from autoquant.optimize.loop import Outcome, Stop, run_trials
from autoquant.samplers.base import Context
from autoquant.samplers.baselines import Baselines
from autoquant.samplers.knapsack.proposer import KnapsackProposer
from autoquant.samplers.knapsack.sampler import KnapsackSampler
from autoquant.samplers.registry import SAMPLERS
from autoquant.sensitivity.profile import Option, Profile
from autoquant.spec.goal import Goal, Measurement
from autoquant.spec.options import Options
from autoquant.spec.recipe import SiteRecipe, WeightScheme
from autoquant.spec.space import DEFAULTS, SiteSpace
from autoquant.spec.uniform import baselines
from autoquant.study.ledger import Ledger
from autoquant.study.parameters import ParameterMap

LAYERS = 12
NAMES = [f"layer{i}" for i in range(LAYERS)]
BITS = (8, 6, 4)
SPACE = SiteSpace({**DEFAULTS, "weight_bits": BITS, "activation_bits": (16,)})
MAPPING = ParameterMap(dict.fromkeys(NAMES, SPACE))
IMPORTANCE = np.random.default_rng(3).lognormal(0, 1.5, LAYERS)
SIZE = 4000 * LAYERS
DROP = Goal(0.05, SIZE)
BUDGET = Goal(0.05, SIZE, bits=5.5)


class Quiet:
    def trial(self, trial, best):
        pass

    def step(self, number, done, total):
        pass


def made_up_profile():
    weights = {WeightScheme(b): 4.0**-b for b in BITS}
    options = tuple(Option(SiteRecipe(w), d, w.bits, 125 * w.bits) for w, d in weights.items())
    return Profile(
        dict.fromkeys(NAMES, options),
        dict.fromkeys(NAMES, weights),
        {name: {} for name in NAMES},
        dict.fromkeys(NAMES, 1000),
    )


PROFILE = made_up_profile()


def loss_of(sites):
    return sum(w * 4.0 ** -sites[n].weight.bits for w, n in zip(IMPORTANCE, NAMES, strict=True))


def measure(sites, _):
    loss = loss_of(sites)
    bits = sum(sites[n].weight.bits for n in NAMES) / LAYERS
    m = Measurement(0.9, 10 * loss, loss, bits, int(1000 * LAYERS * bits / 8), 0.0)
    return Outcome(m, sites, False)


def context(ledger, goal=DROP, seed=0, worker=0):
    """There is no model, so the row of the default sampler can't be made from it."""
    return Context(ledger, None, MAPPING, goal, Options(seed=seed), worker)


def sampler_of(name, ledger, goal=DROP, seed=0):
    """Return a sampler by name, the default one with the profile of the made-up layers."""
    if name == "knapsack":
        sampler = KnapsackSampler(MAPPING, PROFILE, goal, 0, seed)
        return KnapsackProposer(sampler, ledger.trials)
    return SAMPLERS.get(name)(context(ledger, goal, seed))


def proposer(name, ledger, goal, seed=0):
    """Return the same after the uniform recipes, as a search has it."""
    plain = list(baselines(MAPPING.spaces))
    return Baselines(plain, MAPPING, sampler_of(name, ledger, goal, seed))


def run(name, study, trials, goal, *, pieces=1, seed=0):
    ledger = Ledger.create(study, None, {"x": 1})
    for piece in range(1, pieces + 1):
        ledger = Ledger.open(study, None)
        stop = Stop(trials * piece // pieces, None)
        run_trials(
            ledger, MAPPING, proposer(name, ledger, goal, seed), goal, measure, stop, Quiet()
        )
    return ledger.trials()

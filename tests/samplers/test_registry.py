"""Samplers by name."""

from __future__ import annotations

import optuna
import pytest

from autoquant.errors import UserError
from autoquant.samplers import registry
from autoquant.study.ledger import Ledger
from tests.samplers.made_up import MAPPING, context


def test_an_unknown_sampler_lists_the_known_ones():
    with pytest.raises(UserError, match=r"--sampler: .*did you mean 'tpe'.*, knapsack$"):
        registry.check("tpee")
    for name in registry.names():
        registry.check(name)
    assert set(registry.names()) == {"knapsack", "tpe", "nsga2", "gp", "cmaes", "qmc", "random"}


def test_the_default_is_a_row_like_the_others_and_named_first():
    assert registry.names()[0] == registry.DEFAULT
    assert set(registry.names()) == set(registry.SAMPLERS)


def test_a_sampler_of_ones_own_takes_the_place_of_the_named_one():
    ledger = Ledger.create("s", None, {"x": 1})
    given = context(ledger)
    assert given.options.sampler == registry.DEFAULT
    made = registry.make_proposer(given, optuna.samplers.RandomSampler(seed=0))
    assert made.forecast is None
    assert set(made.propose(0).params) == set(MAPPING.distributions)

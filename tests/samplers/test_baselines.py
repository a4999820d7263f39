"""The uniform recipes before all others."""

from __future__ import annotations

from autoquant.samplers.baselines import Baselines
from autoquant.spec.uniform import baselines
from autoquant.study.ledger import Ledger
from tests.samplers.made_up import DROP, MAPPING, run, sampler_of


def test_the_uniform_recipes_come_first():
    trials = run("random", "s", 5, DROP)
    first = [MAPPING.decode(t.params) for t in trials[:3]]
    assert first == list(baselines(MAPPING.spaces))
    assert [s["layer0"].weight.bits for s in first] == [8, 6, 4]


def test_only_the_first_worker_tries_them():
    ledger = Ledger.create("s", None, {"x": 1})
    then = sampler_of("random", ledger)
    plain = list(baselines(MAPPING.spaces))
    first, second = (Baselines(plain, MAPPING, then, worker) for worker in (0, 1))
    assert MAPPING.decode(first.propose(1).params) == plain[1]
    assert MAPPING.decode(second.propose(1).params) not in plain


def test_what_is_foretold_is_what_the_sampler_foretells():
    ledger = Ledger.create("s", None, {"x": 1})
    for name in ("knapsack", "random"):
        then = sampler_of(name, ledger)
        assert Baselines([], MAPPING, then).forecast is then.forecast

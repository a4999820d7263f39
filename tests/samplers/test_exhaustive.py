"""Every recipe of a small space, once."""

from __future__ import annotations

from autoquant.optimize.loop import Stop, run_trials
from autoquant.samplers.exhaustive import Exhaustive
from autoquant.spec.recipe import choices_key
from autoquant.study.ledger import Ledger
from autoquant.study.parameters import ParameterMap
from tests.samplers.made_up import DROP, MAPPING, SPACE, Quiet, measure

SMALL = ParameterMap({"layer0": SPACE, "layer1": SPACE})


def tried(ledger):
    return [choices_key(SMALL.decode(t.params)) for t in ledger.trials()]


def outcome(sites, watch):
    return measure(dict.fromkeys(MAPPING.spaces, sites["layer0"]) | sites, watch)


def test_each_is_tried_once_however_often_interrupted():
    recipes = SMALL.recipes(100)
    assert len(recipes) == 9
    ledger = Ledger.create("s", None, {"x": 1})
    for trials in (4, 50):
        every = Exhaustive(recipes, SMALL, ledger.trials)
        stop = Stop(trials, None, every.done)
        said = run_trials(ledger, SMALL, every, DROP, outcome, stop, Quiet())
        assert said == (None if trials == 4 else "done: all 9 recipes of the space were tried")
    assert sorted(tried(ledger)) == sorted(choices_key(sites) for sites in recipes)
    assert every.forecast is None


def test_workers_try_different_ones():
    ledger = Ledger.create("s", None, {"x": 1})
    recipes = SMALL.recipes(100)
    proposals = [Exhaustive(recipes, SMALL, ledger.trials, w).propose(0).params for w in range(9)]
    assert len({choices_key(SMALL.decode(p)) for p in proposals}) == 9

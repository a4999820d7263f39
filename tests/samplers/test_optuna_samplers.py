"""Optuna's samplers, and ones of the user's own, on a copy of the study."""

from __future__ import annotations

import optuna
import pytest

from autoquant.optimize.loop import Stop, run_trials
from autoquant.samplers.optuna_samplers import one_object, one_sequence, seeded_by_trial
from autoquant.samplers.registry import DEFAULT, SAMPLERS, names
from autoquant.spec.costs import Costs
from autoquant.spec.goal import Goal
from autoquant.study.ledger import Ledger, journal_path
from tests.samplers.made_up import (
    DROP,
    LAYERS,
    MAPPING,
    NAMES,
    SIZE,
    Quiet,
    context,
    measure,
    proposer,
    sampler_of,
)


@pytest.mark.parametrize("name", ["qmc", "nsga2", "cmaes"])
def test_what_a_sampler_keeps_is_written_with_the_trial(name):
    ledger = Ledger.create("s", None, {"x": 1})
    lines = []

    class Count(Quiet):
        def trial(self, trial, best):
            lines.append(journal_path("s").read_bytes().count(b"\n"))

    run_trials(
        ledger, MAPPING, proposer(name, ledger, DROP), DROP, measure, Stop(30, None), Count()
    )
    assert lines == list(range(lines[0], lines[0] + 30))
    assert set(Ledger.open("s", None).header) == {"x"}


def test_one_and_the_same_sampler_object_goes_on_too():
    """One's own sampler is one object for the whole study."""
    own = optuna.samplers.TPESampler(seed=0, n_startup_trials=3)
    ledger = Ledger.create("s", None, {"x": 1})
    stock = one_object(own)(context(ledger))
    run_trials(ledger, MAPPING, stock, DROP, measure, Stop(8, None), Quiet())
    again = one_object(own)(context(ledger))
    run_trials(ledger, MAPPING, again, DROP, measure, Stop(12, None), Quiet())
    assert len(ledger.trials()) == 12


def price(sites):
    bits = sum(sites[n].weight.bits for n in NAMES) / LAYERS
    return Costs(bits, int(1000 * LAYERS * bits / 8))


@pytest.mark.parametrize("name", ["tpe", "nsga2", pytest.param("gp", marks=pytest.mark.slow)])
def test_samplers_learn_where_a_budget_ends_from_what_is_refused(name):
    """No random recipe of 12 layers keeps 4.6 bits but one in hundreds; those of a learner do."""
    goal = Goal(0.05, SIZE, bits=4.6)
    ledger = Ledger.create("s", None, {"x": 1})
    stock = sampler_of(name, ledger, goal)
    many = 60 if name == "gp" else 400
    run_trials(ledger, MAPPING, stock, goal, measure, Stop(many, None), Quiet(), price)
    trials = ledger.trials()
    refused = [t for t in trials if t.state == optuna.trial.TrialState.PRUNED]
    assert refused
    assert all(t.value is None and t.constraints["bits"] > 0 for t in refused)
    late = trials[-many // 4 :]
    assert sum(t.state == optuna.trial.TrialState.COMPLETE for t in late) > len(late) / 4


@pytest.mark.parametrize("name", ["tpe", "nsga2", pytest.param("gp", marks=pytest.mark.slow)])
def test_samplers_take_what_was_refused_beside_a_drop_that_was_measured(name):
    """Of what arithmetic rules out the drop is not known: samplers want each constraint of each."""
    goal = Goal(0.05, SIZE, bits=6.0, minimize="size")
    assert goal.limits == ("drop", "bits")
    study = []
    for pieces in (1, 3):
        ledger = Ledger.create(f"s{pieces}", None, {"x": 1})
        for piece in range(1, pieces + 1):
            stock = sampler_of(name, ledger, goal)
            stop = Stop(18 * piece // pieces, None)
            run_trials(ledger, MAPPING, stock, goal, measure, stop, Quiet(), price)
        study.append(ledger.trials())
    assert [t.params for t in study[0]] == [t.params for t in study[1]]
    refused = [t for t in study[0] if t.state == optuna.trial.TrialState.PRUNED]
    assert refused
    assert all("drop" not in t.constraints for t in refused)


@pytest.mark.parametrize("name", [name for name in names() if name != DEFAULT])
def test_every_seed_is_one_that_a_sampler_takes(name):
    for study, seed in (("first", 0), ("last", 2**32 - 1)):
        ledger = Ledger.create(study, None, {"x": 1})
        proposal = sampler_of(name, ledger, seed=seed).propose(10**6)
        assert set(proposal.params) == set(MAPPING.distributions)


def test_workers_draw_other_numbers():
    ledger = Ledger.create("s", None, {"x": 1})
    first, again, second = (
        SAMPLERS.get("random")(context(ledger, worker=worker)).propose(5).params
        for worker in (0, 0, 1)
    )
    assert first == again != second


def test_a_sequence_is_one_for_the_whole_study():
    """Its samplers are made anew for each trial, with one seed; those of others with a new one."""
    seeds = []

    def factory(seed):
        seeds.append(seed)
        return optuna.samplers.RandomSampler(seed=seed)

    ledger = Ledger.create("s", None, {"x": 1})
    for make, kinds in ((one_sequence, 1), (seeded_by_trial, 5)):
        proposer = make(factory)(context(ledger))
        seeds.clear()
        for number in range(5):
            proposer.propose(number)
        assert len(set(seeds)) == kinds


def test_ones_own_sampler_proposes():
    class Smallest(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study, trial):
            return {}

        def sample_relative(self, study, trial, search_space):
            return {}

        def sample_independent(self, study, trial, param_name, param_distribution):
            return param_distribution.low

    ledger = Ledger.create("s", None, {"x": 1})
    own = one_object(Smallest())(context(ledger))
    run_trials(ledger, MAPPING, own, DROP, measure, Stop(2, None), Quiet())
    assert set(ledger.trials()[1].params.values()) == {4}

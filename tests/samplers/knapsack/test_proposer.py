"""The default sampler in a study: budgets, against chance, and what it foretells."""

from __future__ import annotations

import optuna
import pytest

from autoquant.optimize.loop import best_trial
from autoquant.samplers.knapsack.sampler import KnapsackSampler
from autoquant.study.ledger import Ledger
from tests.samplers.made_up import BUDGET, DROP, LAYERS, MAPPING, PROFILE, run, sampler_of


def test_the_default_sampler_is_an_optuna_sampler_as_well():
    """Through Optuna's own optimize, with no ledger, it proposes what its space has."""
    study = optuna.create_study(sampler=KnapsackSampler(MAPPING, PROFILE, DROP, 0, 0))
    trial = study.ask(MAPPING.distributions)
    assert set(trial.params) == set(MAPPING.distributions)
    assert len(MAPPING.decode(trial.params)) == LAYERS


def test_every_proposal_of_the_default_sampler_keeps_a_budget():
    for trial in run("knapsack", "s", 25, BUDGET)[3:]:
        assert trial.user_attrs["measured"]["average_weight_bits"] <= 5.5 + 1e-9


@pytest.mark.parametrize("goal", [DROP, BUDGET])
def test_the_default_sampler_beats_random_with_far_fewer_trials(goal):
    ours = best_trial(run("knapsack", "ours", 25, goal))
    theirs = best_trial(run("random", "theirs", 150, goal))
    plain = best_trial(run("knapsack", "plain", 3, goal))
    assert ours.value < theirs.value
    assert ours.value < 0.9 * plain.value


def test_it_foretells_what_it_did_not_measure():
    trials = run("knapsack", "s", 20, DROP)
    forecast = sampler_of("knapsack", Ledger.open("s", None)).forecast
    front = forecast.front(trials)
    sizes, drops = ([row[key] for row in front] for key in ("size_bytes", "drop"))
    assert sizes == sorted(sizes)
    assert drops == sorted(drops, reverse=True)
    assert forecast.fidelity(trials).trials == 20
    assert forecast.fidelity(trials[:3]) is None
    assert forecast.expected_gain([]) is None
    assert forecast.expected_gain(trials) >= 0

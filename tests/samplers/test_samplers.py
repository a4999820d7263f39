"""Samplers: the same seed gives the same trials, however often a study is interrupted."""

from __future__ import annotations

import dataclasses

import numpy as np
import optuna
import pytest

from autoquant.errors import StudyError, TrialError, UserError
from autoquant.optimize.loop import Outcome, Stop, best_trial, run_trials
from autoquant.samplers import samplers
from autoquant.samplers.knapsack.sampler import KnapsackSampler
from autoquant.sensitivity.profile import Option, Profile
from autoquant.spec.costs import Costs
from autoquant.spec.goal import Goal, Measurement
from autoquant.spec.recipe import SiteRecipe, WeightScheme
from autoquant.spec.space import DEFAULTS, SiteSpace
from autoquant.spec.uniform import baselines
from autoquant.study.ledger import Ledger, journal_path
from autoquant.study.parameters import ParameterMap
from autoquant.study.trials import front, measured

LAYERS = 12
NAMES = [f"layer{i}" for i in range(LAYERS)]
BITS = (8, 6, 4)
SPACE = SiteSpace({**DEFAULTS, "weight_bits": BITS, "activation_bits": (16,)})
MAPPING = ParameterMap(dict.fromkeys(NAMES, SPACE))
IMPORTANCE = np.random.default_rng(3).lognormal(0, 1.5, LAYERS)
SIZE = 4000 * LAYERS


class Quiet:
    def trial(self, trial, best):
        pass

    def step(self, number, done, total):
        pass


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


def proposer(name, ledger, goal, seed=0):
    plain = list(baselines(MAPPING.spaces))
    if name == "knapsack":
        sampler = KnapsackSampler(MAPPING, PROFILE, goal, 0, seed)
        then = samplers.KnapsackProposer(sampler, ledger.trials)
    else:
        then = samplers.StockProposer(samplers.seeded(name, seed), MAPPING, ledger.trials())
    return samplers.Baselines(plain, MAPPING, then)


def run(name, study, trials, goal, *, pieces=1, seed=0):
    ledger = Ledger.create(study, None, {"x": 1})
    for piece in range(1, pieces + 1):
        ledger = Ledger.open(study, None)
        stop = Stop(trials * piece // pieces, None)
        run_trials(
            ledger, MAPPING, proposer(name, ledger, goal, seed), goal, measure, stop, Quiet()
        )
    return ledger.trials()


DROP = Goal(0.05, SIZE)
BUDGET = Goal(0.05, SIZE, bits=5.5)


SLOW = {"gp"}
NAMES_OF_SAMPLERS = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in samplers.names()
]


@pytest.mark.parametrize("name", NAMES_OF_SAMPLERS)
@pytest.mark.parametrize("goal", [DROP, BUDGET])
def test_an_interrupted_study_gives_the_trials_of_an_uninterrupted_one(name, goal):
    trials = 16
    whole = run(name, "whole", trials, goal)
    pieces = run(name, "pieces", trials, goal, pieces=trials)
    assert [t.params for t in pieces] == [t.params for t in whole]
    assert [t.value for t in pieces] == [t.value for t in whole]
    other = run(name, "other", trials, goal, seed=1)
    assert [t.params for t in other] != [t.params for t in whole]


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.mark.parametrize("name", NAMES_OF_SAMPLERS)
def test_killed_before_a_trial_is_written_a_study_gives_the_same_trials(name, monkeypatch):
    """At that moment the sampler knows of a trial that the storage does not."""
    whole = run(name, "whole", 11, DROP)
    Ledger.create("killed", None, {"x": 1})

    def kill(self, trial):
        raise Killed

    def one_more(trials):
        ledger = Ledger.open("killed", None)
        then = proposer(name, ledger, DROP)
        run_trials(ledger, MAPPING, then, DROP, measure, Stop(trials, None), Quiet())

    for number in range(11):
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "add", kill)
            with pytest.raises(Killed):
                one_more(number + 1)
        one_more(number + 1)
    assert [t.params for t in Ledger.open("killed", None).trials()] == [t.params for t in whole]


def sometimes(sites, _):
    """Fail some candidates and stop some others early, by what they are."""
    outcome = measure(sites, _)
    kind = round(1e6 * outcome.measurement.loss) % 4
    if kind == 0:
        raise TrialError("out of memory")
    return dataclasses.replace(outcome, stopped=kind == 1)


@pytest.mark.parametrize("name", ["knapsack", "tpe", "nsga2", "cmaes", "qmc"])
def test_failed_and_stopped_trials_are_resumed_over_as_well(name):
    def go(study, pieces):
        for piece in range(1, pieces + 1):
            ledger = Ledger.open(study, None)
            stop = Stop(24 * piece // pieces, None)
            run_trials(
                ledger, MAPPING, proposer(name, ledger, DROP), DROP, sometimes, stop, Quiet()
            )
        return [(t.params, t.state, t.value) for t in ledger.trials()]

    for study in ("whole", "pieces"):
        Ledger.create(study, None, {"x": 1})
    whole = go("whole", 1)
    assert go("pieces", 12) == whole
    assert len({state for _, state, _ in whole}) == 3


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
    stock = samplers.StockProposer(lambda _: own, MAPPING, [])
    run_trials(ledger, MAPPING, stock, DROP, measure, Stop(8, None), Quiet())
    again = samplers.StockProposer(lambda _: own, MAPPING, ledger.trials())
    run_trials(ledger, MAPPING, again, DROP, measure, Stop(12, None), Quiet())
    assert len(ledger.trials()) == 12


def test_the_default_sampler_is_an_optuna_sampler_as_well():
    """Through Optuna's own optimize, with no ledger, it proposes what its space has."""
    study = optuna.create_study(sampler=KnapsackSampler(MAPPING, PROFILE, DROP, 0, 0))
    trial = study.ask(MAPPING.distributions)
    assert set(trial.params) == set(MAPPING.distributions)
    assert len(MAPPING.decode(trial.params)) == LAYERS


@pytest.mark.parametrize("name", NAMES_OF_SAMPLERS)
def test_every_proposal_lies_within_the_space(name):
    for trial in run(name, "s", 14, DROP):
        assert trial.distributions == MAPPING.distributions
        assert set(trial.params) == set(MAPPING.distributions)
        for parameter, value in trial.params.items():
            assert MAPPING.distributions[parameter]._contains(value)
        assert MAPPING.encode(MAPPING.decode(trial.params)) == trial.params


def price(sites):
    bits = sum(sites[n].weight.bits for n in NAMES) / LAYERS
    return Costs(bits, int(1000 * LAYERS * bits / 8))


@pytest.mark.parametrize("name", ["tpe", "nsga2", pytest.param("gp", marks=pytest.mark.slow)])
def test_samplers_learn_where_a_budget_ends_from_what_is_refused(name):
    """No random recipe of 12 layers keeps 4.6 bits but one in hundreds; those of a learner do."""
    goal = Goal(0.05, SIZE, bits=4.6)
    ledger = Ledger.create("s", None, {"x": 1})
    stock = samplers.StockProposer(samplers.seeded(name, 0), MAPPING, [], limits=goal.limits)
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
            stock = samplers.StockProposer(
                samplers.seeded(name, 0), MAPPING, ledger.trials(), limits=goal.limits
            )
            stop = Stop(18 * piece // pieces, None)
            run_trials(ledger, MAPPING, stock, goal, measure, stop, Quiet(), price)
        study.append(ledger.trials())
    assert [t.params for t in study[0]] == [t.params for t in study[1]]
    refused = [t for t in study[0] if t.state == optuna.trial.TrialState.PRUNED]
    assert refused
    assert all("drop" not in t.constraints for t in refused)


def test_seeds_differ_from_trial_to_trial():
    seeds = {samplers.derive(seed, number) for seed in range(30) for number in range(300)}
    assert len(seeds) == 30 * 300
    assert all(0 <= s < 2**32 for s in seeds)
    assert 0 <= samplers.derive(2**32 - 1, 10**6) < 2**32


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", samplers.STOCK.names())
def test_every_seed_is_one_that_a_sampler_takes(name):
    for seed in (0, 2**32 - 1):
        assert isinstance(samplers.seeded(name, seed)(10**6), optuna.samplers.BaseSampler)


def test_the_uniform_recipes_come_first():
    trials = run("random", "s", 5, DROP)
    first = [MAPPING.decode(t.params) for t in trials[:3]]
    assert first == list(baselines(MAPPING.spaces))
    assert [s["layer0"].weight.bits for s in first] == [8, 6, 4]


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


def test_ones_own_sampler_proposes():
    class Smallest(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study, trial):
            return {}

        def sample_relative(self, study, trial, search_space):
            return {}

        def sample_independent(self, study, trial, param_name, param_distribution):
            return param_distribution.low

    ledger = Ledger.create("s", None, {"x": 1})
    own = samplers.StockProposer(lambda _: Smallest(), MAPPING, [])
    run_trials(ledger, MAPPING, own, DROP, measure, Stop(2, None), Quiet())
    assert set(ledger.trials()[1].params.values()) == {4}


def test_a_failed_candidate_is_recorded_and_ten_in_a_row_end_the_search():
    ledger = Ledger.create("s", None, {"x": 1})
    calls = []

    def sometimes(sites, watch):
        calls.append(1)
        if len(calls) in (2, 5) or len(calls) > 8:
            raise TrialError("out of memory")
        return measure(sites, watch)

    with pytest.raises(StudyError, match=r"10 trials in a row failed.*out of memory"):
        run_trials(
            ledger,
            MAPPING,
            proposer("knapsack", ledger, DROP),
            DROP,
            sometimes,
            Stop(50, None),
            Quiet(),
        )
    states = [t.state.name for t in ledger.trials()]
    assert states == [
        "COMPLETE",
        "FAIL",
        *["COMPLETE"] * 2,
        "FAIL",
        *["COMPLETE"] * 3,
        *["FAIL"] * 10,
    ]
    assert ledger.trials()[1].user_attrs["reason"] == "out of memory"


def test_an_interruption_keeps_what_is_finished():
    ledger = Ledger.create("s", None, {"x": 1})

    def third(sites, watch):
        if len(ledger.trials()) == 2:
            raise KeyboardInterrupt
        return measure(sites, watch)

    with pytest.raises(KeyboardInterrupt):
        run_trials(
            ledger, MAPPING, proposer("knapsack", ledger, DROP), DROP, third, Stop(9, None), Quiet()
        )
    assert len(Ledger.open("s", None).trials()) == 2


def test_the_front_is_what_no_other_trial_beats():
    trials = run("random", "s", 40, DROP)
    rows = {t.number: measured(t) for t in trials}
    kept = {t.number for t in front(trials)}
    for number, m in rows.items():
        beaten = any(
            o["size_bytes"] <= m["size_bytes"]
            and o["drop"] <= m["drop"]
            and (o["size_bytes"] < m["size_bytes"] or o["drop"] < m["drop"])
            for o in rows.values()
        )
        assert beaten == (number not in kept) or any(
            rows[k]["size_bytes"] == m["size_bytes"] and rows[k]["drop"] == m["drop"] for k in kept
        )


def test_an_unknown_sampler_lists_the_known_ones():
    with pytest.raises(UserError, match=r"--sampler: .*did you mean 'tpe'.*, knapsack$"):
        samplers.check("tpee")
    for name in samplers.names():
        samplers.check(name)
    assert set(samplers.names()) == {"knapsack", "tpe", "nsga2", "gp", "cmaes", "qmc", "random"}

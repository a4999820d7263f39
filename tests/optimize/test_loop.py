"""The trial loop: whatever happens to one candidate costs that one."""

import dataclasses
import os

import pytest
from optuna.trial import TrialState

from autoquant.errors import StudyError, TrialError
from autoquant.optimize.loop import FAILURES, Outcome, Stop, run_trials
from autoquant.samplers.base import Proposal
from autoquant.spec.costs import Costs
from autoquant.spec.goal import Goal, Measurement
from autoquant.spec.recipe import ActivationScheme, SiteRecipe
from autoquant.spec.space import DEFAULTS, SiteSpace
from autoquant.study.ledger import MEASURED, REASON, Ledger
from autoquant.study.parameters import ParameterMap
from autoquant.study.trials import SCALES, best_trial

MAPPING = ParameterMap({"a": SiteSpace({**DEFAULTS, "weight_bits": (8, 6, 4)})})
GOAL = Goal(0.05, 1000)
BITS = (8, 6, 4)


class Cycle:
    """Proposes 8, 6, 4, 8, … bits; keeps what it is told."""

    def __init__(self):
        self.told_of = []

    def propose(self, number):
        return Proposal({"a.weight_bits": BITS[number % 3]}, {"mine": number})

    def told(self, trial):
        self.told_of.append(trial.state.name)
        return trial


class Hears:
    def __init__(self):
        self.trials, self.steps = [], []

    def trial(self, trial, best):
        self.trials.append((trial.number, trial.state.name, None if best is None else best.number))

    def step(self, number, done, total):
        self.steps.append((number, done, total))


def measurement(bits, drop=None):
    drop = 0.3 / bits if drop is None else drop  # 8: 0.0375, 6: 0.05, 4: 0.075
    return Measurement(0.9 - drop, drop, drop, float(bits), 100 * bits, 0.01)


def measure(sites, watch):
    watch(5, 10)
    watch(10, 10)
    site = sites["a"]
    static = dataclasses.replace(site.activation, scale=0.5, zero_point=2)
    done = {"a": dataclasses.replace(site, activation=static)}
    return Outcome(measurement(site.weight.bits), done, site.weight.bits == 4)


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Ledger.create("s", None, {"x": 1})


def run(ledger, measure=measure, trials=3, schedule=None, proposer=None, hears=None):
    hears = hears or Hears()
    stop = Stop(trials, schedule)
    run_trials(ledger, MAPPING, proposer or Cycle(), GOAL, measure, stop, hears)
    return hears


def test_what_a_trial_keeps(ledger):
    proposer = Cycle()
    hears = run(ledger, proposer=proposer)
    first, second, third = Ledger.open("s", None).trials()
    assert first.params == {"a.weight_bits": 8}
    assert first.distributions == MAPPING.distributions
    m = measurement(8)
    assert first.value == GOAL.objective(m)
    assert first.constraints == {"drop": m.drop - 0.05}
    expected = m.plain() | {"objective": GOAL.objective(m), "feasible": True}
    assert first.user_attrs == {MEASURED: expected, SCALES: {"a": [0.5, 2]}}
    assert first.system_attrs["mine"] == 0
    assert first.datetime_start <= first.datetime_complete
    assert second.user_attrs[MEASURED]["feasible"]
    # Stopped early: measured on a part of the data, so it has no value.
    assert (third.state, third.value) == (TrialState.PRUNED, None)
    assert third.constraints["drop"] > 0
    assert hears.trials == [(0, "COMPLETE", 0), (1, "COMPLETE", 1), (2, "PRUNED", 1)]
    assert hears.steps == [(n, d, 10) for n in range(3) for d in (5, 10)]
    assert proposer.told_of == ["COMPLETE", "COMPLETE", "PRUNED"]


def failing(*numbers):
    calls = iter(range(1000))

    def one(sites, watch):
        if (n := next(calls)) in numbers:
            raise TrialError(f"no luck in {n}")
        return measure(sites, watch)

    return one


def test_a_candidate_that_fails_is_recorded_and_the_search_goes_on(ledger):
    proposer = Cycle()
    hears = run(ledger, failing(0, 2), 4, proposer=proposer)
    trials = Ledger.open("s", None).trials()
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert trials[2].user_attrs == {REASON: "no luck in 2"}
    assert trials[2].params == {"a.weight_bits": 4}
    assert hears.trials[2] == (2, "FAIL", 1)
    assert proposer.told_of == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]


def test_a_candidate_that_costs_too_much_is_written_and_not_measured(ledger):
    asked = []

    def one(sites, watch):
        asked.append(sites["a"].weight.bits)
        return measure(sites, watch)

    proposer, hears = Cycle(), Hears()
    goal = dataclasses.replace(GOAL, size_bytes=500, minimize="size")
    run_trials(ledger, MAPPING, proposer, goal, one, Stop(6, None), hears, costs)
    trials = Ledger.open("s", None).trials()
    assert asked == [4, 4]
    refused = [t for t in trials if t.params["a.weight_bits"] != 4]
    assert len(refused) == 4
    for trial in refused:
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs == {REASON: "over the limit by arithmetic (size), not measured"}
        assert trial.constraints == {"size": 100.0 * trial.params["a.weight_bits"] - 500}
    assert proposer.told_of == ["PRUNED"] * 6


def costs(sites):
    bits = sites["a"].weight.bits
    return Costs(float(bits), 100 * bits)


def test_ten_in_a_row_end_it_nine_do_not(ledger):
    run(ledger, failing(*range(9), *range(10, 19)), 20)
    assert [t.state.name for t in ledger.trials()].count("FAIL") == 18
    with pytest.raises(StudyError, match=r"^10 trials in a row failed, the last one: no luck in 9"):
        run(ledger, failing(*range(99)), 99)
    assert len(Ledger.open("s", None).trials()) == 30


def test_failures_are_counted_across_an_interruption(ledger):
    run(ledger, failing(*range(6)), 6)
    with pytest.raises(StudyError, match="no luck in 3"):
        run(ledger, failing(*range(99)), 99)
    assert len(ledger.trials()) == FAILURES
    # One who goes on after that has mended something, so the count begins again.
    hears = run(ledger, failing(0), 13)
    assert [state for _, state, _ in hears.trials] == ["FAIL", "PRUNED", "COMPLETE"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_passes_and_keeps_what_is_finished(ledger, error):
    def third(sites, watch):
        if len(ledger.trials()) == 2:
            watch(1, 10)
            raise error
        return measure(sites, watch)

    with pytest.raises(error):
        run(ledger, third, 9)
    assert [t.state.name for t in Ledger.open("s", None).trials()] == ["COMPLETE"] * 2
    hears = run(Ledger.open("s", None), trials=4)
    assert [t.params["a.weight_bits"] for t in ledger.trials()] == [8, 6, 4, 8]
    assert hears.trials == [(2, "PRUNED", 1), (3, "COMPLETE", 1)]


def test_a_full_disk_ends_it_and_keeps_what_is_finished(ledger, monkeypatch):
    working = os.fsync

    def full(_):
        raise OSError(28, "No space left on device")

    def third(sites, watch):
        if len(ledger.trials()) == 2:
            monkeypatch.setattr("os.fsync", full)
        return measure(sites, watch)

    with pytest.raises(
        StudyError, match=r"study s: the disk is full; every finished trial is kept"
    ):
        run(ledger, third, 9)
    monkeypatch.setattr("os.fsync", working)
    assert len(Ledger.open("s", None).trials()) >= 2
    run(Ledger.open("s", None), trials=5)
    assert len(Ledger.open("s", None).trials()) == 5


def test_user_code_that_changes_the_folder_does_not_move_the_study(ledger, tmp_path, monkeypatch):
    def wander(sites, watch):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        return measure(sites, watch)

    run(ledger, wander)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    monkeypatch.chdir(tmp_path)
    assert len(Ledger.open("s", None).trials()) == 3


def test_a_study_that_is_done_runs_nothing(ledger):
    run(ledger, trials=3)
    assert run(ledger, trials=3).trials == []
    assert run(ledger, trials=2).trials == []


class Rations:
    """A schedule with room for so many trials."""

    def __init__(self, room):
        self.room = room
        self.took = []

    def late(self):
        return len(self.took) >= self.room

    def trial(self, seconds):
        self.took.append(seconds)


def test_time_ends_it_between_trials(ledger):
    schedule = Rations(4)
    run(ledger, trials=None, schedule=schedule)
    assert len(ledger.trials()) == len(schedule.took) == 4
    assert all(seconds > 0 for seconds in schedule.took)
    assert run(ledger, trials=None, schedule=Rations(0)).trials == []


def test_the_best_is_known_from_before(ledger):
    run(ledger, trials=2)
    hears = run(Ledger.open("s", None), lambda s, w: Outcome(measurement(8, 0.9), {}, False), 3)
    assert hears.trials == [(2, "COMPLETE", 1)]
    assert best_trial(ledger.trials()).number == 1


def test_what_a_proposal_decodes_to_is_what_is_measured(ledger):
    seen = []

    def note(sites, watch):
        seen.append(sites)
        return measure(sites, watch)

    run(ledger, note)
    assert [s["a"].weight.bits for s in seen] == [8, 6, 4]
    assert all(isinstance(s["a"], SiteRecipe) for s in seen)
    assert all(s["a"].activation == ActivationScheme(8) for s in seen)

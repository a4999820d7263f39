"""What every sampler keeps to: the same seed gives the same trials, however often interrupted."""

from __future__ import annotations

import dataclasses

import pytest

from autoquant.errors import StudyError, TrialError
from autoquant.optimize.loop import Stop, run_trials
from autoquant.samplers import registry
from autoquant.study.ledger import Ledger
from tests.samplers.made_up import BUDGET, DROP, MAPPING, Quiet, measure, proposer, run

SLOW = {"gp"}
NAMES_OF_SAMPLERS = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in registry.names()
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


@pytest.mark.parametrize("name", NAMES_OF_SAMPLERS)
def test_every_proposal_lies_within_the_space(name):
    for trial in run(name, "s", 14, DROP):
        assert trial.distributions == MAPPING.distributions
        assert set(trial.params) == set(MAPPING.distributions)
        for parameter, value in trial.params.items():
            assert MAPPING.distributions[parameter]._contains(value)
        assert MAPPING.encode(MAPPING.decode(trial.params)) == trial.params


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

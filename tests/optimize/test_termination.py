"""A search ends of itself when nothing is left to gain, and not before."""

import datetime

import numpy as np
import pytest
from optuna.trial import TrialState

from autoquant.optimize.termination import FEWEST, MOST, PATIENCE, Enough
from autoquant.study.ledger import MEASURED, finished


def study(objectives, feasible=True):
    found = []
    for objective in objectives:
        m = {"objective": objective, "feasible": feasible, "loss": objective, "drop": 0.0}
        trial = finished(
            TrialState.COMPLETE,
            params={},
            distributions={},
            started=datetime.datetime.now(),
            value=objective,
            user_attrs={MEASURED: m},
        )
        found.append(trial)
    return found


def test_a_few_trials_are_never_enough():
    enough = Enough(3, lambda trials: 0.0)
    assert enough(study([1.0] * (3 + FEWEST - 1))) is None
    assert "0.00% on average" in enough(study([1.0] * (3 + FEWEST)))


def test_what_could_be_gained_decides():
    trials = study(np.linspace(2.0, 1.0, 20))
    assert Enough(0, lambda trials: 0.02)(trials) is None
    assert Enough(0, lambda trials: None)(trials) is None
    said = Enough(0, lambda trials: 0.004)(trials)
    assert said == (
        "done after 20 trials: all that is still unknown could improve the best recipe by "
        "0.40% on average, less than 1%"
    )


def test_a_long_time_without_improvement_is_enough():
    still = study([1.0, *[1.0] * PATIENCE])
    assert "the last 24 improved" in Enough(0)(still)
    better = study([1.0, *[1.0] * (PATIENCE - 1), 0.9])
    assert Enough(0)(better) is None
    assert Enough(0)(study([1.0] * 60, feasible=False)) is None


def test_no_study_goes_on_for_ever():
    assert Enough(0)(study([1.0], feasible=False) * MOST) == f"done: {MOST} trials"


@pytest.mark.parametrize("gain", [0.5, None])
def test_the_gain_is_asked_of_all_trials(gain):
    seen = []
    Enough(0, lambda trials: seen.append(len(trials)) or gain)(study(np.linspace(3, 1, 30)))
    assert seen == [30]

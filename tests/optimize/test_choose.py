"""Which trials go to the confirmation, and what is said where none can."""

from __future__ import annotations

import datetime
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from autoquant.errors import StudyError
from autoquant.optimize.callbacks import Silent
from autoquant.optimize.choose import choose
from autoquant.spec.goal import Goal, Measurement
from autoquant.spec.space import DEFAULTS, SiteSpace
from autoquant.study.ledger import MEASURED, REASON, finished
from autoquant.study.parameters import ParameterMap

MAPPING = ParameterMap({"a": SiteSpace({**DEFAULTS, "weight_bits": (8, 6, 4)})})
DROP = Goal(0.05, 1000)
BUDGET = Goal(0.05, 1000, bits=5.0)


def trial(number, bits, goal, state=TrialState.COMPLETE, drop=0.0):
    m = Measurement(0.9 - drop, drop, max(drop, 1e-6), float(bits), 100 * bits, 0.0)
    found = m.plain() | {"objective": goal.objective(m), "feasible": goal.feasible(m)}
    measured = state == TrialState.COMPLETE
    made = finished(
        state,
        params={"a.weight_bits": bits},
        distributions=MAPPING.distributions,
        started=datetime.datetime.now(),
        value=goal.objective(m) if measured else None,
        user_attrs={MEASURED: found} if measured else {REASON: "no luck"},
    )
    made.number = number
    return made


def choice(trials, goal, uniforms=0):
    study = SimpleNamespace(ledger=SimpleNamespace(name="s"), goal=goal, reporter=Silent())
    plan = SimpleNamespace(mapping=MAPPING, uniforms=[{}] * uniforms)
    return choose(study, plan, trials)


def test_the_uniform_one_is_among_the_candidates():
    trials = [trial(0, 8, DROP), trial(1, 6, DROP, drop=0.01), trial(2, 4, DROP, drop=0.02)]
    found = choice(trials, DROP, uniforms=2)
    assert found.rival is trials[1]
    assert any(found.rival is candidate for candidate in found.candidates)
    assert choice(trials, DROP).rival is None


@pytest.mark.parametrize("goal", [DROP, BUDGET])
@pytest.mark.parametrize("failed", [0, 3])
def test_no_trial_was_completed(goal, failed):
    trials = [trial(number, 8, goal, TrialState.FAIL) for number in range(failed)]
    with pytest.raises(StudyError, match=r"^study s: no trial was completed, so there is no reci"):
        choice(trials, goal)


def test_none_is_within_the_budget():
    refused = trial(0, 8, BUDGET, TrialState.PRUNED)
    over = trial(1, 6, BUDGET)
    for trials in ([refused], [refused, over]):
        with pytest.raises(
            StudyError, match=rf"^study s: none of its {len(trials)} trials is within the budget; "
        ):
            choice(trials, BUDGET)

"""Reading a study: the best trial, the front, and recipes, against brute force."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from autoquant.spec.recipe import (
    ActivationScheme,
    Evidence,
    ModelIdentity,
    SiteRecipe,
    SplitResult,
    WeightScheme,
)
from autoquant.study.header import Header
from autoquant.study.ledger import MEASURED, REASON, finished
from autoquant.study.trials import (
    SCALES,
    best_trial,
    better,
    front,
    measured,
    scales,
    trial_recipe,
    with_scales,
)
from tests.study.headers import plain_header


def make(number, state=TrialState.COMPLETE, **m):
    m = {"objective": 0.5, "feasible": True, "drop": 0.0, "size_bytes": 1, "loss": 0.1} | m
    fails = state == TrialState.FAIL
    trial = finished(
        state,
        params={},
        distributions={},
        started=datetime.datetime.now(),
        value=m["objective"] if state == TrialState.COMPLETE else None,
        user_attrs={REASON: "no"} if fails else {MEASURED: m},
    )
    trial.number = number
    return trial


@st.composite
def studies(draw):
    states = st.sampled_from([TrialState.COMPLETE] * 4 + [TrialState.PRUNED, TrialState.FAIL])
    small = st.integers(0, 4)
    count = draw(st.integers(0, 12))
    return [
        make(
            i,
            draw(states),
            objective=draw(small) / 10,
            feasible=draw(st.booleans()),
            drop=draw(small) / 100,
            size_bytes=draw(small),
            loss=draw(small) / 10,
        )
        for i in range(count)
    ]


@given(studies())
def test_the_best_trial(trials):
    rows = [(t, measured(t)) for t in trials if t.state == TrialState.COMPLETE]
    good = [(m["objective"], t.number) for t, m in rows if m["feasible"]]
    best = best_trial(trials)
    assert (None if best is None else best.number) == (min(good)[1] if good else None)


@given(studies())
def test_better_is_better_than_the_best_so_far(trials):
    for i, trial in enumerate(trials):
        best = best_trial(trials[:i])
        assert better(trial, best) == (best_trial(trials[: i + 1]) is not best)


@given(studies())
def test_the_front(trials):
    def point(t):
        return measured(t)["size_bytes"], measured(t)["drop"]

    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    points = {point(t) for t in complete}
    best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    found = front(trials)
    assert [point(t) for t in found] == sorted(best)
    for t in found:  # of trials at one point, the one of least loss
        same = [measured(o)["loss"] for o in complete if point(o) == point(t)]
        assert measured(t)["loss"] == min(same)


def test_only_a_complete_trial_is_measured():
    assert measured(make(0))["objective"] == 0.5
    assert measured(make(0, TrialState.PRUNED)) is None
    assert measured(make(0, TrialState.FAIL)) is None
    assert best_trial([]) is None
    assert front([]) == []


SITES = {
    "a": SiteRecipe(WeightScheme(4), ActivationScheme(8, scale=0.25, zero_point=-3)),
    "b": SiteRecipe(WeightScheme(4), ActivationScheme(8, "per_token")),
    "c": SiteRecipe(WeightScheme(4), ActivationScheme(4, scheme="symmetric", scale=2.0)),
    "d": SiteRecipe(WeightScheme(4)),
    "e": SiteRecipe(None, ActivationScheme(8, scale=1e-30, zero_point=0)),
}


def test_a_trial_keeps_the_calibrated_numbers():
    kept = scales(SITES)
    assert kept == {"a": [0.25, -3], "c": [2.0, 0], "e": [1e-30, 0]}
    bare = {name: site.uncalibrated() for name, site in SITES.items()}
    again = with_scales(bare, kept)
    assert again["a"] == SITES["a"]
    assert again["b"] == SITES["b"]
    assert again["c"].activation.zero_point == 0
    assert bare["a"].activation.scale is None  # the argument is left as it is
    assert with_scales(bare, {}) == bare


HEADER = Header.read(
    plain_header(
        float={
            "samples": 40,
            "value": 0.9,
            "metric": "accuracy",
            "higher_is_better": True,
            "size_bytes": 4000,
        },
        sites=[
            {"name": "a", "layer": "Linear", "matrix": [4, 6], "activation": True},
            {"name": "b", "layer": "Linear", "matrix": [4, 2], "activation": True},
        ],
        folded={"bn": "a"},
        options={"seed": 7},
    ),
    "s",
)


def test_a_trial_as_a_recipe():
    trial = make(3, value=0.88, drop=0.02, average_weight_bits=7.0, size_bytes=1000)
    trial.user_attrs[SCALES] = {"a": [0.5, 1]}
    site = SiteRecipe(WeightScheme(4), ActivationScheme(8))
    found = trial_recipe(trial, {"a": site}, HEADER)
    assert found.sites["a"].activation == ActivationScheme(8, scale=0.5, zero_point=1)
    assert found.model == ModelIdentity("net", "ab")
    assert (dict(found.folded), found.seed) == ({"bn": "a"}, 7)
    search = SplitResult(40, 0.9, 0.88, 0.02)
    assert found.evidence == Evidence("accuracy", True, search, None, 7.0, 1000, 4000)


def test_a_trials_recipe_tells_its_layers_width_from_that_of_all_weights():
    trial = make(3, value=0.88, drop=0.02, average_weight_bits=9.5, size_bytes=1000)
    site = SiteRecipe(WeightScheme(4))
    evidence = trial_recipe(trial, {"a": site, "b": site}, HEADER).evidence
    assert (evidence.average_weight_bits, evidence.layer_weight_bits) == (9.5, 4)
    assert evidence.of_layers == 4


def test_a_failed_trial_is_no_recipe():
    with pytest.raises(AssertionError):
        trial_recipe(make(0, TrialState.FAIL), {}, HEADER)

"""A recipe out of a study, with nothing but its storage."""

import datetime

import pytest
from optuna.trial import TrialState

from autoquant.errors import StudyError, UserError
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme
from autoquant.spec.recipe_file import dumps
from autoquant.study.extract import extract, mapping_of
from autoquant.study.header import StoredSite
from autoquant.study.ledger import MEASURED, REASON, Ledger, finished
from autoquant.study.trials import SCALES
from tests.study.headers import plain_header

HEADER = plain_header(
    sites=[
        {"name": "a", "layer": "Linear", "matrix": [4, 8], "activation": True},
        {"name": "b", "layer": "Embedding", "matrix": [10, 8], "activation": False},
    ]
)
A8 = ActivationScheme(8)


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """Return a study of five trials: (a, b) bits, drop, size; one failed, one stopped early."""
    monkeypatch.chdir(tmp_path)
    made = Ledger.create("s", None, HEADER)
    mapping = mapping_of(made)
    rows = [(8, 8, 0.00, 300), (4, 4, 0.05, 150), (8, 4, 0.02, 200), (4, 8, 0.01, 200)]
    for a, b, drop, size in rows:
        add(made, mapping, a, b, drop, size)
    add(made, mapping, 4, 8, 0.9, 100, TrialState.PRUNED)
    add(made, mapping, 4, 8, 0.9, 100, TrialState.FAIL)
    return Ledger.open("s", None)


def add(ledger, mapping, a, b, drop, size, state=TrialState.COMPLETE):
    complete = state == TrialState.COMPLETE
    m = {
        "value": 0.9 - drop,
        "drop": drop,
        "loss": drop,
        "average_weight_bits": (a * 32 + b * 80) / 112,
        "size_bytes": size,
        "objective": size / 1000,
        "feasible": drop <= 0.03,
    }
    ledger.add(
        finished(
            state,
            params={"a.weight_bits": a, "b.weight_bits": b},
            distributions=mapping.distributions,
            started=datetime.datetime.now(),
            value=size / 1000 if complete else None,
            user_attrs={REASON: "no"}
            if state == TrialState.FAIL
            else {MEASURED: m, SCALES: {"a": [0.5, 1]}},
        )
    )


def bits(recipe):
    return tuple(site.weight.bits for site in recipe.sites.values())


def test_the_parameters_come_back_from_the_header(ledger):
    mapping = mapping_of(ledger)
    assert set(mapping.distributions) == {"a.weight_bits", "b.weight_bits"}
    sites = mapping.decode(ledger.trials()[2].params)
    assert sites == {
        "a": SiteRecipe(WeightScheme(8), A8),
        "b": SiteRecipe(WeightScheme(4)),
    }
    assert StoredSite.read(HEADER["sites"][0]) == StoredSite("a", "Linear", (4, 8), True)


def test_the_best_feasible_trial_where_none_is_confirmed(ledger):
    recipe, number = extract(ledger)
    assert (number, bits(recipe)) == (2, (8, 4))
    assert recipe.evidence.confirm is None
    assert recipe.sites["a"].activation == ActivationScheme(8, scale=0.5, zero_point=1)


def test_the_confirmed_recipe_where_there_is_one(ledger):
    recipe = Recipe({"a": SiteRecipe(WeightScheme(3))})
    ledger.note(recipe={"text": dumps(recipe), "trial": 7})
    assert extract(Ledger.open("s", None)) == (recipe, 7)
    assert extract(ledger, trial=0)[1] == 0


def test_any_complete_trial(ledger):
    recipe, number = extract(ledger, trial=1)
    assert (number, bits(recipe)) == (1, (4, 4))
    assert recipe.evidence.search.drop == 0.05
    for trial, words in [
        (4, "trial 4 is pruned"),
        (5, "trial 5 is failed"),
        (6, "has no trial 6; it has 6"),
        (-1, "has no trial -1"),
    ]:
        with pytest.raises(StudyError, match=words):
            extract(ledger, trial=trial)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"bits": 8}, 0),
        ({"bits": 7}, 3),
        ({"bits": 6}, 2),
        ({"bits": 4}, 1),
        ({"size": "250b"}, 3),
        ({"size": "20%"}, 3),
        ({"size": "19.9%"}, 1),
        ({"size": "1MB"}, 0),
    ],
)
def test_the_front_is_cut_at_another_budget(ledger, budget, expected):
    assert extract(ledger, **budget)[1] == expected


def test_a_budget_below_every_trial_names_the_smallest(ledger):
    with pytest.raises(StudyError, match=r"no trial within 3\.5; the smallest has 4"):
        extract(ledger, bits=3.5)
    with pytest.raises(StudyError, match="no trial within 100; the smallest has 150"):
        extract(ledger, size="10%")
    with pytest.raises(UserError, match="--size 'little'"):
        extract(ledger, size="little")


def test_a_study_without_a_recipe(ledger):
    empty = Ledger.create("empty", None, HEADER)
    with pytest.raises(StudyError, match="no feasible trial yet; go on with `autoquant resume emp"):
        extract(empty)
    with pytest.raises(StudyError, match="study empty has no complete trial"):
        extract(empty, bits=8)
    with pytest.raises(StudyError, match="has no trial 0; it has 0"):
        extract(empty, trial=0)

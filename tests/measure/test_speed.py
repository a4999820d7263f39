"""Which choices share a time, and what a table says of those that it does not hold."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.measure.speed import (
    FLOAT,
    MOST_PAIRS,
    adapted,
    choices_of,
    pairs,
    seconds_of,
    speed_class,
)
from autoquant.spec.recipe import FLOAT_SITE, ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import DEFAULTS, SiteSpace

weights = st.none() | st.builds(
    WeightScheme,
    st.sampled_from([8, 4, 2]),
    st.sampled_from(["per_channel", "per_tensor"]),
    st.sampled_from(["symmetric", "asymmetric"]),
    st.sampled_from(["max", "mse"]),
)
activations = st.none() | st.builds(
    ActivationScheme,
    st.sampled_from([8, 4]),
    st.sampled_from(["per_tensor", "per_token"]),
    st.sampled_from(["symmetric", "asymmetric"]),
    st.sampled_from(["max", "entropy"]),
    st.none() | st.floats(0.1, 1),
)
recipes = st.builds(SiteRecipe, weights, activations, st.none() | st.floats(0.001, 0.1))


@given(recipes, recipes)
def test_classes_are_equal_where_the_same_code_runs(a, b):
    def code(r):
        w, x = r.weight, r.activation
        return (
            w and (w.bits, w.granularity, w.scheme),
            x and (x.bits, x.granularity, x.scheme),
        )

    assert (speed_class(a) == speed_class(b)) == (code(a) == code(b))


def test_float_is_a_class():
    assert speed_class(FLOAT_SITE) == FLOAT


def space(**choices):
    return SiteSpace({**DEFAULTS, **choices})


def test_choices_of_a_site():
    found = choices_of(
        space(weight_bits=(8, 4, 16), weight_calibration=("max", "mse"), activation_bits=(8, 16)),
        True,
        (4, 8),
    )
    assert len(found) == len({speed_class(r) for r in found}) == 6
    assert FLOAT_SITE in found
    no_input = choices_of(space(weight_bits=(8, 4)), False, (4, 8))
    assert [r.activation for r in no_input] == [None, None]
    groups = choices_of(space(weight_granularity=("per_channel", "per_group_32")), True, (4, 8))
    assert {r.weight.granularity for r in groups} == {"per_channel"}
    fixed = SiteRecipe(WeightScheme(4), ActivationScheme(8, scale=0.5, zero_point=1))
    assert choices_of(SiteSpace({}, fixed=fixed), True, (4, 8)) == [fixed.uncalibrated()]


def test_all_pairs_of_a_few_and_a_cross_of_many():
    few = pairs([WeightScheme(8), WeightScheme(4)], [ActivationScheme(8), None])
    assert len(few) == 5
    assert few[0] == FLOAT_SITE
    ws = [WeightScheme(b, g) for b in range(2, 9) for g in ("per_channel", "per_tensor")]
    acts = [ActivationScheme(b) for b in range(2, 9)]
    many = pairs(ws, [*acts, None])
    assert len(ws) * (len(acts) + 1) > MOST_PAIRS
    assert len(many) == 1 + 2 * len(ws) + len(acts) - 1
    assert len({speed_class(r) for r in many}) == len(many)


@given(
    st.dictionaries(st.integers(2, 8), st.floats(0, 1), min_size=7),
    st.dictionaries(st.integers(2, 8), st.floats(0, 1), min_size=7),
)
def test_what_a_cross_leaves_out_is_exact_where_times_add_up(of_weight, of_activation):
    ws = [WeightScheme(b, g) for b in range(2, 9) for g in ("per_channel", "per_tensor")]
    acts = [ActivationScheme(b) for b in range(2, 9)]

    def true(r):
        w = 0 if r.weight is None else 1 + of_weight[r.weight.bits]
        return w + (0 if r.activation is None else 1 + of_activation[r.activation.bits])

    times = {speed_class(r): true(r) for r in pairs(ws, [*acts, None])}
    for w, a in itertools.product(ws, acts):
        assert seconds_of(times, SiteRecipe(w, a)) == pytest.approx(true(SiteRecipe(w, a)))


def test_what_was_not_timed_is_as_slow_as_the_slowest():
    times = {FLOAT: 1.0, "w8 per_channel symmetric": 3.0}
    for recipe in (
        SiteRecipe(WeightScheme(4), None),
        SiteRecipe(None, ActivationScheme(8)),
        SiteRecipe(WeightScheme(8), ActivationScheme(8)),
    ):
        assert seconds_of(times, recipe) == 3.0


def test_a_group_that_does_not_divide():
    recipe = SiteRecipe(WeightScheme(4, "per_group_32"), ActivationScheme(8))
    assert adapted(recipe, (4, 64)) == recipe
    narrow = adapted(recipe, (4, 8))
    assert narrow == dataclasses.replace(recipe, weight=WeightScheme(4, "per_channel"))
    assert adapted(FLOAT_SITE, (4, 8)) == FLOAT_SITE

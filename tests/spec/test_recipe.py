"""Recipes are values: they compare, hash and have one spelling."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.spec.recipe import (
    FLOAT_SITE,
    ActivationScheme,
    Evidence,
    ModelIdentity,
    Recipe,
    SiteRecipe,
    SplitResult,
    WeightScheme,
    choices_key,
)
from autoquant.spec.techniques import NEAREST, UNCORRECTED

BIAS = BiasCorrection()
W4 = WeightScheme(4)
A8 = ActivationScheme(8, calibration="mse", scale=0.25, zero_point=3)

roundings = (
    st.just(NEAREST)
    | st.builds(LearnedRounding, st.floats(1e-4, 0.1))
    | st.builds(GPTQ, st.floats(1e-4, 0.1), st.booleans())
)
weights = st.builds(
    WeightScheme,
    st.integers(2, 8),
    calibration=st.sampled_from(["max", "mse"]),
    rounding=roundings,
)
activations = st.builds(
    ActivationScheme,
    st.integers(2, 8),
    st.sampled_from(["per_tensor", "per_token"]),
    calibration=st.sampled_from(["max", "mse"]),
    scale=st.none() | st.floats(1e-3, 1.0),
)
sites = st.builds(
    SiteRecipe, st.none() | weights, st.none() | activations, st.sampled_from([UNCORRECTED, BIAS])
)


@given(sites)
def test_the_one_spelling_is_a_fixed_point(site):
    canonical = site.canonical()
    assert canonical.canonical() == canonical
    assert canonical.weight == site.weight
    assert (canonical.activation is None) == (site.activation is None)
    assert choices_key({"a": canonical}) == choices_key({"a": site})


def test_what_has_no_effect_is_left_out():
    per_token = ActivationScheme(8, "per_token", calibration="mse", scale=0.5, zero_point=1)
    found = SiteRecipe(None, per_token, BIAS).canonical()
    assert found == SiteRecipe(None, ActivationScheme(8, "per_token", calibration="max"))
    assert SiteRecipe(W4, A8, BIAS).canonical() == SiteRecipe(W4, A8, BIAS)
    learned = WeightScheme(4, rounding=LearnedRounding(0.01))
    assert SiteRecipe(learned, A8).canonical() == SiteRecipe(learned, A8)


def test_uncalibrated_keeps_the_choices():
    assert SiteRecipe(W4, A8).uncalibrated().activation == ActivationScheme(8, calibration="mse")
    assert SiteRecipe(W4).uncalibrated() == SiteRecipe(W4)


def test_a_site_in_float_counts_sixteen_bits():
    assert FLOAT_SITE.weight_bits == 16
    assert SiteRecipe(W4).weight_bits == 4
    assert (W4.symmetric, A8.symmetric, A8.dynamic) == (True, False, False)


@given(st.dictionaries(st.text(max_size=5), sites, min_size=1, max_size=4))
def test_the_key_is_of_the_choices_alone(layers):
    backwards = dict(reversed(layers.items()))
    bare = {name: site.uncalibrated() for name, site in layers.items()}
    recipe = Recipe(layers, ModelIdentity("m", "0"), seed=3)
    assert recipe.key() == choices_key(backwards) == choices_key(bare)
    assert hash(recipe) == hash(Recipe(backwards))


@given(sites, sites)
def test_other_choices_another_key(a, b):
    same = a.canonical().uncalibrated() == b.canonical().uncalibrated()
    assert (choices_key({"x": a}) == choices_key({"x": b})) == same
    assert choices_key({"x": a}) != choices_key({"y": a})


def test_a_recipe_does_not_change():
    layers = {"a": SiteRecipe(W4)}
    recipe = Recipe(layers, folded={"bn": "a"})
    layers["b"] = SiteRecipe()
    assert list(recipe.sites) == ["a"]
    with pytest.raises(TypeError):
        recipe.sites["b"] = SiteRecipe()  # type: ignore[index]
    with pytest.raises(TypeError):
        recipe.folded["x"] = "y"  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]
    other = recipe.with_sites({"b": SiteRecipe()})
    assert (list(other.sites), dict(other.folded)) == (["b"], {"bn": "a"})
    assert recipe == Recipe({"a": SiteRecipe(W4)}, folded={"bn": "a"})
    assert recipe != other


def test_the_confirmed_result_is_the_one_to_report():
    search, confirm = SplitResult(10, 0.9, 0.8, 0.1), SplitResult(12, 0.9, 0.85, 0.05)
    assert Evidence("m", True, search, confirm, 4.0, 1, 4).reported is confirm
    assert Evidence("m", True, search, None, 4.0, 1, 4).reported is search

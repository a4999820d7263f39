"""What choices need to know of a layer's input."""

from __future__ import annotations

import itertools

import pytest

from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.spec.needs import EVERYTHING, Need, needs_of
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import SearchSpace, shipped

BIAS, LEARNED = BiasCorrection(), LearnedRounding(0.01)
STATIC, TOKENS = ActivationScheme(8), ActivationScheme(8, "per_token")
ROWS = [
    (SiteRecipe(), set()),
    (SiteRecipe(WeightScheme(4)), set()),
    (SiteRecipe(None, STATIC), {Need.RANGE}),
    (SiteRecipe(None, TOKENS), set()),
    (SiteRecipe(None, ActivationScheme(8, scale=0.5, zero_point=0)), set()),
    (SiteRecipe(WeightScheme(4, calibration="output_mse")), {Need.OUTPUT_ERROR}),
    (
        SiteRecipe(WeightScheme(4, calibration="output_mse"), None, BIAS),
        {Need.CENTERED_OUTPUT_ERROR, Need.MEANS},
    ),
    (SiteRecipe(WeightScheme(4), None, BIAS), {Need.MEANS}),
    (SiteRecipe(WeightScheme(4, rounding=LEARNED)), {Need.MOMENTS}),
    (SiteRecipe(WeightScheme(4, rounding=GPTQ())), {Need.MOMENTS}),
    (
        SiteRecipe(WeightScheme(4, rounding=LEARNED), STATIC, BIAS),
        {Need.MOMENTS, Need.MEANS, Need.RANGE},
    ),
]


@pytest.mark.parametrize(("recipe", "needs"), ROWS)
def test_what_a_recipe_needs(recipe, needs):
    assert needs_of(recipe) == needs


class Layer:
    name, layer, matrix = "layer", "Linear", (8, 128)
    activation = corrects = True


@pytest.mark.parametrize("space", shipped())
def test_a_space_needs_what_any_of_its_recipes_needs(space):
    found = SearchSpace.load(space).resolve([Layer()])["layer"]
    c = found.choices
    union: set[Need] = set()
    roundings, corrections = ([o.technique for o in c[d]] for d in ("rounding", "correction"))
    for bits, method, rounding, correction in itertools.product(
        c["weight_bits"], c["weight_calibration"], roundings, corrections
    ):
        weight = WeightScheme(bits, calibration=method, rounding=rounding)
        weight = None if bits == 16 else weight
        for wide, grain in itertools.product(c["activation_bits"], c["activation_granularity"]):
            activation = None if wide == 16 else ActivationScheme(wide, grain)
            union |= needs_of(SiteRecipe(weight, activation, correction).canonical())
    assert found.needs == union
    assert found.needs <= EVERYTHING


def test_a_locked_site_needs_what_its_recipe_does():
    text = "autoquant_space: 1\nrules:\n- lock: {weight: {bits: 4, calibration: output_mse}}\n"
    found = SearchSpace.parse(text, "mine").resolve([Layer()])["layer"]
    assert found.needs == {Need.OUTPUT_ERROR}

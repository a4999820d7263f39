"""Small changes of a site's recipe stay in the space and change one dimension."""

from dataclasses import replace

import numpy as np
import pytest

from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.samplers.knapsack.mutation import inherit, mutate, rounded_as
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import DEFAULTS, SiteSpace
from autoquant.spec.techniques import NEAREST, UNCORRECTED, Axis, Offer

CHOICES = {
    **DEFAULTS,
    "weight_bits": (8, 4),
    "weight_granularity": ("per_channel", "per_tensor"),
    "weight_scheme": ("symmetric", "asymmetric"),
    "weight_calibration": ("max", "mse"),
    "activation_bits": (8, 16),
    "activation_granularity": ("per_tensor",),
    "activation_calibration": ("max", "mse", "percentile_99.9"),
}
RECIPE = SiteRecipe(WeightScheme(8), ActivationScheme(8))
BIAS, LEARNED = BiasCorrection(), LearnedRounding(1e-3)


def offered(axis, technique=LEARNED):
    return Offer(technique.method, technique, (axis,))


def rounded(recipe, rounding):
    return replace(recipe, weight=replace(recipe.weight, rounding=rounding))


def moves(recipe, space, count=200):
    return [mutate(recipe, space, np.random.default_rng(i)) for i in range(count)]


def fields(recipe):
    """Return what may differ of a recipe, by name."""
    found = {"rounding": recipe.weight.rounding, "correction": recipe.correction}
    for part in ("weight", "activation"):
        scheme = getattr(recipe, part)
        for name in ("bits", "granularity", "scheme", "calibration"):
            found[part, name] = None if scheme is None else getattr(scheme, name)
    return found


def test_one_dimension_changes_and_every_value_is_reached():
    before = fields(RECIPE)
    seen = set()
    for recipe in moves(RECIPE, SiteSpace(CHOICES)):
        after = fields(recipe)
        changed = [name for name in before if after[name] != before[name]]
        assert len(changed) == 1
        part, name = changed[0]
        assert name != "bits"
        assert after[changed[0]] in CHOICES[f"{part}_{name}"]
        seen.add((changed[0], after[changed[0]]))
    offered = {
        ((part, name), value)
        for part in ("weight", "activation")
        for name in ("granularity", "scheme", "calibration")
        for value in CHOICES[f"{part}_{name}"]
    }
    assert seen == {(name, value) for name, value in offered if value != before[name]}


def test_a_learning_rate_is_drawn_within_its_range_or_left_out():
    narrow = {k: (v[0],) for k, v in CHOICES.items()}
    rates = offered(Axis("learning_rate", 1e-4, 1e-2, log=True))
    space = SiteSpace({**narrow, "rounding": (Offer("nearest", NEAREST), rates)})
    found = [r.weight.rounding for r in moves(rounded(RECIPE, LEARNED), space)]
    rates = [r.learning_rate for r in found if r != NEAREST]
    assert min(rates) >= 1e-4
    assert max(rates) <= 1e-2
    assert 0.2 < found.count(NEAREST) / len(found) < 0.5
    # Evenly on a logarithmic scale: half of them are below its middle.
    assert 0.35 < sum(r < 1e-3 for r in rates) / len(rates) < 0.65


def test_options_are_drawn_from_their_list_or_evenly_from_their_range():
    narrow = {k: (v[0],) for k, v in CHOICES.items()}
    damped = offered(Axis("damping", 0.1, 0.5), GPTQ())
    found = moves(rounded(RECIPE, GPTQ(2.0)), SiteSpace({**narrow, "rounding": (damped,)}))
    drawn = [r.weight.rounding.damping for r in found]
    assert 0.1 <= min(drawn) < 0.12
    assert 0.48 < max(drawn) <= 0.5
    assert 0.35 < sum(d < 0.3 for d in drawn) / len(drawn) < 0.65
    ordered = offered(Axis("act_order", choices=(True, False)), GPTQ())
    found = moves(rounded(RECIPE, GPTQ()), SiteSpace({**narrow, "rounding": (ordered,)}))
    # Where the draw is what it was, nothing moves.
    assert {r.weight.rounding for r in found} == {GPTQ(), GPTQ(act_order=False)}


def test_a_correction_comes_and_goes_with_the_weight_alone():
    narrow = {k: (v[0],) for k, v in CHOICES.items()}
    both = (Offer("bias", BIAS), Offer("none", UNCORRECTED))
    space = SiteSpace({**narrow, "correction": both})
    assert set(moves(RECIPE, space, 10)) == {replace(RECIPE, correction=BIAS)}
    assert set(moves(replace(RECIPE, correction=BIAS), space, 10)) == {RECIPE}
    floats = SiteRecipe(None, ActivationScheme(8))
    assert set(moves(floats, space, 10)) == {floats}


def test_the_rounding_of_another_recipe_is_taken_where_both_have_a_weight():
    learned = rounded(SiteRecipe(WeightScheme(4), None, BIAS), LEARNED)
    assert rounded_as(RECIPE, learned) == rounded(RECIPE, LEARNED)
    assert rounded_as(learned, RECIPE) == rounded(learned, NEAREST)
    for floats in (SiteRecipe(), SiteRecipe(None, ActivationScheme(8))):
        assert rounded_as(RECIPE, floats) == RECIPE
        assert rounded_as(floats, learned) == floats


def test_what_has_no_other_choice_stays():
    narrow = {k: (v[0],) for k, v in CHOICES.items()}
    assert set(moves(RECIPE, SiteSpace(narrow), 10)) == {RECIPE}


def test_a_per_token_scale_that_becomes_static_gets_a_calibration_of_the_space():
    """Per token there is no calibration but max; the space may not offer it."""
    choices = {
        **DEFAULTS,
        "activation_granularity": ("per_tensor", "per_token"),
        "activation_calibration": ("mse", "entropy"),
    }
    dynamic = SiteRecipe(WeightScheme(8), ActivationScheme(8, "per_token"))
    expected = SiteRecipe(WeightScheme(8), ActivationScheme(8, calibration="mse"))
    assert set(moves(dynamic, SiteSpace(choices), 20)) == {expected}


@pytest.mark.parametrize(
    ("new", "known", "expected"),
    [
        (SiteRecipe(None, None), RECIPE, SiteRecipe(None, None)),
        (RECIPE, SiteRecipe(None, ActivationScheme(4)), RECIPE),
        (
            RECIPE,
            SiteRecipe(WeightScheme(8, calibration="mse", rounding=LEARNED), ActivationScheme(4)),
            SiteRecipe(WeightScheme(8, calibration="mse", rounding=LEARNED), ActivationScheme(4)),
        ),
        (
            RECIPE,
            SiteRecipe(WeightScheme(4, calibration="mse", rounding=LEARNED), ActivationScheme(4)),
            SiteRecipe(WeightScheme(8), ActivationScheme(4)),
        ),
    ],
)
def test_what_was_learned_of_a_weight_goes_with_its_width(new, known, expected):
    assert inherit(new, known) == expected

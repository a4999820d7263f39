"""Every layer the same: the recipes that every study begins with."""

from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import DEFAULTS, DIMENSIONS, SiteSpace
from autoquant.spec.techniques import NEAREST, UNCORRECTED, Axis, Offer
from autoquant.spec.uniform import GLOBAL, baselines, choices, uniform, widths

BIAS = BiasCorrection()
NEAR = Offer("nearest", NEAREST)
LEARNED = Offer(
    "learned_rounding", LearnedRounding(0.03), (Axis("learning_rate", 0.01, 0.09, log=True),)
)
TECHNIQUES = {
    "rounding": (NEAR, LEARNED, Offer("gptq", GPTQ())),
    "correction": (Offer("none", UNCORRECTED), Offer("bias", BIAS)),
}


def space(**choices):
    return SiteSpace({**DEFAULTS, **choices})


@st.composite
def spaces(draw):
    choices = {
        name: tuple(draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=4, unique=True)))
        for name, allowed in (DIMENSIONS | TECHNIQUES).items()
    }
    fixed = draw(st.sampled_from([None, None, None, SiteRecipe(WeightScheme(5)), SiteRecipe()]))
    return SiteSpace(choices, fixed)


resolved = st.lists(spaces(), min_size=1, max_size=4).map(
    lambda found: {f"layer{i}": s for i, s in enumerate(found)}
)


@given(resolved, st.integers(2, 8))
@settings(deadline=None)
def test_the_width_asked_for_or_the_next_on_offer(found, bits):
    for name, site in uniform(found, bits).items():
        s = found[name]
        if s.fixed is not None:
            assert site == s.fixed
            continue
        offered = sorted(s.choices["weight_bits"])
        expected = next((b for b in offered if b >= bits), offered[-1])
        assert site.weight_bits == expected
        if site.weight is not None:
            assert site.weight.granularity == s.choices["weight_granularity"][0]
            assert site.weight.scheme == s.choices["weight_scheme"][0]
            assert site.weight.calibration == s.choices["weight_calibration"][0]
            assert site.weight.rounding == s.choices["rounding"][0].technique
            assert site.correction == s.choices["correction"][0].technique


@given(resolved)
@settings(deadline=None)
def test_the_baselines_hold_every_width_and_every_choice_for_all_activations(found):
    recipes = list(baselines(found))
    offered = widths(found)
    assert offered == sorted(set(offered), reverse=True)
    for bits in offered[1:]:
        assert uniform(found, bits) in recipes
    for choice in choices(found):
        assert uniform(found, max(offered, default=16), choice) in recipes
    assert len(recipes) <= max(len(offered), 1) + len(choices(found))


def test_the_order_of_the_first_trials():
    choices = {
        "weight_bits": (8, 4, 16),
        "activation_bits": (6, 8, 16),
        "activation_calibration": ("mse", "max"),
    }
    found = list(baselines({"a": space(**choices), "b": space(weight_bits=(8, 6))}))
    rows = [(s["a"].weight.bits, s["a"].activation.calibration, s["b"].weight.bits) for s in found]
    assert rows == [(8, "mse", 8), (8, "max", 8), (8, "mse", 6), (4, "mse", 6)]
    assert all(s["a"].activation.bits == 8 for s in found)


def test_the_whole_model_is_tried_with_each_choice_for_activations():
    offered = {
        "activation_calibration": ("mse", "max"),
        "activation_scheme": ("asymmetric", "symmetric"),
        "activation_granularity": ("per_tensor", "per_token"),
    }
    assert set(offered) == set(GLOBAL)
    found = {"a": space(weight_bits=(8, 4), **offered), "b": space(weight_bits=(8,))}
    rows = [s["a"] for s in baselines(found)]
    assert [s.weight.bits for s in rows] == [8, 8, 8, 8, 4]
    seen = [(s.activation.calibration, s.activation.scheme, s.activation.granularity) for s in rows]
    assert seen[:3] == [
        ("mse", "asymmetric", "per_tensor"),
        ("max", "asymmetric", "per_tensor"),
        ("mse", "symmetric", "per_tensor"),
    ]
    assert seen[3][2] == "per_token"  # which needs no calibration
    assert seen[4] == seen[0]
    assert {s["b"].activation.scheme for s in baselines(found)} == {"asymmetric"}


def test_a_layer_left_in_float_keeps_its_activation_in_float_where_it_may():
    both = space(weight_bits=(16,), activation_bits=(8, 16))
    assert uniform({"a": both}, 8)["a"] == SiteRecipe()
    forced = space(weight_bits=(16,), activation_bits=(8,))
    assert uniform({"a": forced}, 8)["a"] == SiteRecipe(None, ActivationScheme(8))


def test_learning_only_where_the_space_insists():
    optional, insists = (NEAR, LEARNED), (LEARNED,)
    assert uniform({"a": space(rounding=optional)}, 8)["a"].weight.rounding == NEAREST
    assert uniform({"a": space(rounding=insists)}, 8)["a"].weight.rounding == LearnedRounding(0.03)
    assert uniform({"a": space(rounding=insists, weight_bits=(16,))}, 8)["a"].weight is None


def test_nothing_to_choose_is_still_one_recipe():
    locked = {"a": SiteSpace({}, SiteRecipe(WeightScheme(8)))}
    assert list(baselines(locked)) == [{"a": SiteRecipe(WeightScheme(8))}]
    weights_only = {"a": space(activation_bits=(16,), weight_bits=(8, 4))}
    assert [s["a"].weight.bits for s in baselines(weights_only)] == [8, 4]

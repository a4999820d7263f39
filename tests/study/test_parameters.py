import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution

from autoquant.errors import StudyError
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.spec.recipe import (
    ActivationScheme,
    Recipe,
    SiteRecipe,
    WeightScheme,
    choices_key,
)
from autoquant.spec.recipe_file import dumps, loads
from autoquant.spec.space import DEFAULTS, DIMENSIONS, SearchSpace, SiteSpace, shipped
from autoquant.spec.techniques import NEAREST, UNCORRECTED, Axis, Offer, merged
from autoquant.spec.uniform import baselines, uniform
from autoquant.study.header import StoredSite
from autoquant.study.parameters import ParameterMap

BIAS = BiasCorrection()
NEAR = Offer("nearest", NEAREST)
ONE = Offer("learned_rounding", LearnedRounding(0.01))
LEARNED = Offer(
    "learned_rounding", LearnedRounding(0.01), (Axis("learning_rate", 1e-3, 0.1, log=True),)
)
ORDERED = Offer("gptq", GPTQ(), (Axis("act_order", choices=(True, False)),))
DAMPED = Offer("gptq", GPTQ(0.1), (Axis("damping", 0.01, 0.2),))
ROUNDINGS = [[NEAR], [ONE], [NEAR, LEARNED], [ORDERED, NEAR], [ORDERED, DAMPED, LEARNED]]
CORRECTIONS = [Offer("bias", BIAS), Offer("none", UNCORRECTED)]


@st.composite
def spaces(draw):
    choices = {
        name: tuple(draw(st.lists(st.sampled_from(allowed), min_size=1, unique=True)))
        for name, allowed in DIMENSIONS.items()
    }
    choices["rounding"] = merged(draw(st.sampled_from(ROUNDINGS)))
    corrections = st.lists(st.sampled_from(CORRECTIONS), min_size=1, unique=True)
    choices["correction"] = tuple(draw(corrections))
    return SiteSpace(choices)


@given(st.lists(spaces(), min_size=1, max_size=3), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_recipe_survives_the_way_through_parameters(found, seed):
    mapping = ParameterMap({f"l{i}": space for i, space in enumerate(found)})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    params = study.ask(mapping.distributions).params
    sites = mapping.decode(params)
    again = mapping.encode(sites)
    assert mapping.decode(again) == sites
    for name, value in again.items():
        distribution = mapping.distributions[name]
        assert distribution._contains(distribution.to_internal_repr(value))


@given(st.lists(spaces(), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_uniform_recipes_are_in_the_space_and_none_comes_twice(found):
    resolved = {f"l{i}": space for i, space in enumerate(found)}
    mapping = ParameterMap(resolved)
    recipes = list(baselines(resolved))
    assert recipes
    assert all(a != b for i, a in enumerate(recipes) for b in recipes[:i])
    for sites in recipes:
        assert mapping.decode(mapping.encode(sites)) == sites


def test_widths_are_ordered_integers_and_single_choices_no_parameters():
    choices = {**DEFAULTS, **{k: v[:1] for k, v in DIMENSIONS.items()}}
    even = SiteSpace({**choices, "weight_bits": (8, 4, 6)})
    uneven = SiteSpace({**choices, "weight_bits": (16, 8, 4)})
    mapping = ParameterMap({"a": even, "b": uneven})
    assert set(mapping.distributions) == {"a.weight_bits", "b.weight_bits_rank"}
    d = mapping.distributions["a.weight_bits"]
    assert (d.low, d.high, d.step) == (4, 8, 2)
    sites = mapping.decode({"a.weight_bits": 6, "b.weight_bits_rank": 2})
    assert sites["a"].weight.bits == 6
    assert sites["b"].weight is None


def test_what_the_space_does_not_offer_is_refused():
    choices = {**DEFAULTS, "weight_bits": (8, 4)}
    mapping = ParameterMap({"a": SiteSpace(choices)})
    with pytest.raises(StudyError, match="not in the search space"):
        mapping.encode({"a": SiteRecipe(WeightScheme(3))})
    with pytest.raises(StudyError, match="no parameter"):
        mapping.decode({})


def test_a_locked_site_is_what_it_is_locked_to():
    fixed = SiteRecipe(WeightScheme(6))
    mapping = ParameterMap({"a": SiteSpace({}, fixed)})
    assert mapping.distributions == {}
    assert mapping.decode({})["a"] == fixed
    assert uniform(mapping.spaces, 8)["a"] == fixed


CHOICES = {**DEFAULTS, "weight_bits": (8, 4)}
RATE, ORDER = "a.rounding.learned_rounding.learning_rate", "a.rounding.gptq.act_order"
DAMPING = "a.rounding.gptq 2.damping"


def of_rounding(*offers):
    return ParameterMap({"a": SiteSpace({**CHOICES, "rounding": merged(list(offers))})})


@pytest.mark.parametrize(
    ("offers", "names", "rounding", "params"),
    [
        ([NEAR, LEARNED], {"a.rounding", RATE}, NEAREST, {"a.rounding": "nearest"}),
        (
            [NEAR, LEARNED],
            {"a.rounding", RATE},
            LearnedRounding(0.05),
            {"a.rounding": "learned_rounding", RATE: 0.05},
        ),
        ([LEARNED], {RATE}, LearnedRounding(0.05), {RATE: 0.05}),
        ([ONE], set(), LearnedRounding(0.01), {}),
        ([NEAR], set(), NEAREST, {}),
        ([ORDERED], {ORDER}, GPTQ(0.01, False), {ORDER: False}),
        (
            [ORDERED, DAMPED, LEARNED],
            {"a.rounding", ORDER, DAMPING, RATE},
            GPTQ(0.15),
            # What is not taken has a value too, always the same.
            {"a.rounding": "gptq 2", DAMPING: 0.15, ORDER: True, RATE: pytest.approx(0.01)},
        ),
    ],
)
def test_roundings_and_their_options(offers, names, rounding, params):
    mapping = of_rounding(*offers)
    assert set(mapping.distributions) == {"a.weight_bits"} | names
    site = SiteRecipe(WeightScheme(4, rounding=rounding), ActivationScheme(8))
    found = mapping.encode({"a": site})
    assert {name: found[name] for name in params} == params
    assert set(found) == set(mapping.distributions)
    assert mapping.decode(found) == {"a": site}


def test_a_range_on_a_logarithmic_scale_is_one_of_the_sampler_too():
    mapping = of_rounding(LEARNED, DAMPED)
    assert mapping.distributions[RATE] == FloatDistribution(1e-3, 0.1, log=True)
    assert mapping.distributions["a.rounding.gptq.damping"] == FloatDistribution(0.01, 0.2)


def test_corrections_are_a_parameter_where_there_are_two():
    both = ParameterMap({"a": SiteSpace({**CHOICES, "correction": tuple(CORRECTIONS)})})
    assert set(both.distributions) == {"a.weight_bits", "a.correction"}
    for offer in CORRECTIONS:
        site = SiteRecipe(WeightScheme(4), ActivationScheme(8), offer.technique)
        assert both.encode({"a": site})["a.correction"] == offer.label
        assert both.decode(both.encode({"a": site})) == {"a": site}
    with pytest.raises(StudyError, match="a: correction: bias is not in the search space"):
        of_rounding(NEAR).encode({"a": SiteRecipe(WeightScheme(4), ActivationScheme(8), BIAS)})


@pytest.mark.parametrize(
    ("offers", "rounding", "told"),
    [
        ([NEAR], LearnedRounding(0.01), "learned_rounding"),
        ([NEAR, LEARNED], LearnedRounding(0.5), "learned_rounding learning_rate 0.5"),
        ([NEAR, LEARNED], LearnedRounding(1e-4), "learned_rounding learning_rate 0.0001"),
        ([NEAR, LEARNED], GPTQ(), "gptq"),
        ([ONE], LearnedRounding(0.02), "learned_rounding learning_rate 0.02"),
        ([ONE], NEAREST, "nearest"),
        ([ORDERED], GPTQ(0.02), "gptq damping 0.02"),
        ([DAMPED], GPTQ(0.1, act_order=False), "gptq damping 0.1 act_order False"),
    ],
)
def test_a_rounding_that_the_space_does_not_offer_is_refused(offers, rounding, told):
    mapping = of_rounding(*offers)
    with pytest.raises(StudyError, match=f"a: rounding: {told} is not in the search space"):
        weight = WeightScheme(4, rounding=rounding)
        mapping.encode({"a": SiteRecipe(weight, ActivationScheme(8))})


def test_calibrated_numbers_do_not_enter_parameters():
    mapping = ParameterMap({"a": SiteSpace(CHOICES)})
    static = ActivationScheme(8, scale=0.5, zero_point=1)
    found = mapping.encode({"a": SiteRecipe(WeightScheme(4), static)})
    assert mapping.decode(found)["a"].activation == ActivationScheme(8)


@pytest.mark.parametrize("name", shipped())
def test_shipped_spaces_through_parameters_and_yaml(name):
    """A random recipe of every shipped space: parameters, recipe, YAML, and back."""
    sites = [
        StoredSite("conv", "Conv2d", (16, 27), True),
        StoredSite("fc", "Linear", (64, 128), True),
        StoredSite("words", "Embedding", (100, 64), False),
        StoredSite("rnn.weight_ih_l0", "LSTM", (192, 64), True),
    ]
    mapping = ParameterMap(SearchSpace.load(name).resolve(sites))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask(mapping.distributions)
        recipes = mapping.decode(trial.params)
        again = dict(loads(dumps(Recipe(recipes))).sites)
        assert again == recipes
        assert mapping.decode(mapping.encode(again)) == recipes


@given(st.lists(spaces(), min_size=1, max_size=2), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_all_recipes_of_a_small_space_are_those_that_can_be_drawn(found, seed):
    mapping = ParameterMap({f"l{i}.x": space for i, space in enumerate(found)})
    every = mapping.recipes(3000)
    if every is None:
        return
    keys = {choices_key(sites) for sites in every}
    assert len(keys) == len(every) <= 3000
    assert mapping.recipes(len(every) - 1) is None
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(20):
        assert choices_key(mapping.decode(study.ask(mapping.distributions).params)) in keys


def test_a_learning_rate_has_no_last_recipe():
    assert of_rounding(NEAR, LEARNED).recipes(10**9) is None


def test_options_that_are_lists_are_counted_with_the_rest():
    found = of_rounding(NEAR, ORDERED).recipes(100)
    weights = {site["a"].weight for site in found}
    roundings = NEAREST, GPTQ(), GPTQ(act_order=False)
    assert weights == {WeightScheme(b, rounding=r) for b in (8, 4) for r in roundings}
    assert len(found) == len(weights)

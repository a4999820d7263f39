import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.errors import StudyError
from autoquant.spec.recipe import (
    ActivationScheme,
    Recipe,
    SiteRecipe,
    WeightScheme,
    choices_key,
)
from autoquant.spec.recipe_file import dumps, loads
from autoquant.spec.space import (
    DEFAULTS,
    DIMENSIONS,
    LearningRates,
    SearchSpace,
    SiteSpace,
    shipped,
)
from autoquant.spec.uniform import baselines, uniform
from autoquant.study.header import StoredSite
from autoquant.study.parameters import ParameterMap


@st.composite
def spaces(draw):
    choices = {
        name: tuple(draw(st.lists(st.sampled_from(allowed), min_size=1, unique=True)))
        for name, allowed in DIMENSIONS.items()
    }
    rate = draw(
        st.none()
        | st.sampled_from([LearningRates(1e-3, 0.1), LearningRates(0.01, 0.01, optional=False)])
    )
    return SiteSpace(choices, rate)


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
    choices = {k: v[:1] for k, v in DIMENSIONS.items()}
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
    choices = {k: v[:1] for k, v in DIMENSIONS.items()} | {"weight_bits": (8, 4)}
    mapping = ParameterMap({"a": SiteSpace(choices)})
    with pytest.raises(StudyError, match="not in the search space"):
        mapping.encode({"a": SiteRecipe(WeightScheme(3))})
    with pytest.raises(StudyError, match="no parameter"):
        mapping.decode({})


def test_a_locked_site_is_what_it_is_locked_to():
    fixed = SiteRecipe(WeightScheme(6))
    mapping = ParameterMap({"a": SiteSpace({}, None, fixed)})
    assert mapping.distributions == {}
    assert mapping.decode({})["a"] == fixed
    assert uniform(mapping.spaces, 8)["a"] == fixed


CHOICES = {**DEFAULTS, "weight_bits": (8, 4)}
OPTIONAL = LearningRates(1e-3, 0.1)
DEMANDED = LearningRates(1e-3, 0.1, optional=False)
ONE = LearningRates(0.01, 0.01, optional=False)


@pytest.mark.parametrize(
    ("rate", "names", "learned", "params"),
    [
        (OPTIONAL, {"a.learning", "a.learning_rate"}, None, {"a.learning": "none"}),
        (OPTIONAL, {"a.learning", "a.learning_rate"}, 0.05, {"a.learning": "learned"}),
        (DEMANDED, {"a.learning_rate"}, 0.05, {"a.learning_rate": 0.05}),
        (ONE, set(), 0.01, {}),
        (None, set(), None, {}),
    ],
)
def test_learning_rates(rate, names, learned, params):
    mapping = ParameterMap({"a": SiteSpace(CHOICES, rate)})
    assert set(mapping.distributions) == {"a.weight_bits"} | names
    site = SiteRecipe(WeightScheme(4), ActivationScheme(8), learned)
    found = mapping.encode({"a": site})
    assert params.items() <= found.items()
    assert mapping.decode(found) == {"a": site}


@pytest.mark.parametrize(
    ("rate", "learned"), [(None, 0.01), (OPTIONAL, 0.5), (OPTIONAL, 1e-4), (ONE, 0.02)]
)
def test_a_learning_rate_that_the_space_does_not_offer_is_refused(rate, learned):
    mapping = ParameterMap({"a": SiteSpace(CHOICES, rate)})
    with pytest.raises(StudyError, match=f"a: learning_rate: {learned} is not in the search space"):
        mapping.encode({"a": SiteRecipe(WeightScheme(4), ActivationScheme(8), learned)})


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
    space = SiteSpace(DEFAULTS, LearningRates(1e-3, 0.1))
    assert ParameterMap({"a": space}).recipes(10**9) is None

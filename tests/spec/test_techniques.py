"""Techniques as values: their options, what spaces offer of them, and how files name them."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.errors import SpecError
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.registry import Registry
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme
from autoquant.spec.recipe_file import dumps, load, loads
from autoquant.spec.space import SearchSpace
from autoquant.spec.techniques import (
    CORRECTIONS,
    ESTIMATORS,
    NEAREST,
    ROUNDINGS,
    UNCORRECTED,
    Axis,
    Bounds,
    Nearest,
    Offer,
    Rounding,
    merged,
    offer_of,
    option,
    technique_of,
)

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BIAS = BiasCorrection()


@dataclass(frozen=True)
class Toy(Rounding):
    """Has an option of every kind."""

    method: ClassVar[str] = "toy"
    share: float = option(0.5, 0.0, 1.0)
    rounds: int = option(3, 1, 9)
    careful: bool = False


TOYS: Registry[type[Rounding]] = Registry("rounding")
TOYS.register("toy")(Toy)
TOYS.register("nearest")(Nearest)


def one_line(call, data):
    with pytest.raises(SpecError) as caught:
        call(TOYS, data, "here")
    message = str(caught.value)
    assert message.startswith("here: rounding: ")
    assert len(message.splitlines()) == 1
    return message


MISTAKES = [
    ("tooy", ["unknown method 'tooy'", "did you mean 'toy'?", "allowed: toy, nearest"]),
    (3, ["expected fields, found 3"]),
    (None, ["expected fields, found None"]),
    (["toy"], ["expected fields, found ['toy']"]),
    ({}, ["method is missing"]),
    ({"share": 0.1}, ["method is missing"]),
    ({"method": 3}, ["method: found 3, allowed: text"]),
    ({"method": "toy", "shar": 1}, ["unknown field 'shar'", "did you mean 'share'?"]),
    ({"method": "nearest", "share": 1}, ["unknown field 'share'", "allowed: method"]),
    ({"method": "toy", "share": "much"}, ["share: found 'much', allowed: a number ≥ 0, at most 1"]),
    ({"method": "toy", "share": True}, ["share: found True"]),
    ({"method": "toy", "share": None}, ["share: found None"]),
    ({"method": "toy", "share": float("nan")}, ["share: found nan"]),
    ({"method": "toy", "share": -0.1}, ["share: found -0.1, allowed: a number ≥ 0"]),
    ({"method": "toy", "share": 1.5}, ["share: found 1.5", "at most 1"]),
    ({"method": "toy", "rounds": 2.5}, ["rounds: found 2.5, allowed: an integer ≥ 1, at most 9"]),
    ({"method": "toy", "rounds": 10}, ["rounds: found 10, allowed: an integer"]),
    ({"method": "toy", "rounds": True}, ["rounds: found True"]),
    ({"method": "toy", "careful": 1}, ["careful: found 1, allowed: true, false"]),
    ({"method": "toy", "careful": "yes"}, ["careful: found 'yes', allowed: true, false"]),
]


@pytest.mark.parametrize("call", [technique_of, offer_of])
@pytest.mark.parametrize(("data", "words"), MISTAKES, ids=[str(d) for d, _ in MISTAKES])
def test_a_wrong_technique_is_one_line_that_says_what_may_be(call, data, words):
    message = one_line(call, data)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("open_option", "words"),
    [
        ({"share": {"low": 0, "high": 1, "log": True}}, ["share: found 0 … 1", "a low above 0"]),
        ({"share": {"low": 0.5, "high": 0.2}}, ["share: found 0.5 … 0.2", "a high above the low"]),
        ({"share": {"low": 0.5}}, ["share: high is missing"]),
        ({"share": {"high": 0.5}}, ["share: low is missing"]),
        ({"share": {"low": 0, "high": 2}}, ["share: found 2", "at most 1"]),
        ({"share": {"low": 0, "high": 1, "logs": True}}, ["'logs'", "did you mean 'log'?"]),
        ({"share": {"low": 0.1, "high": 1, "log": 1}}, ["share: log: found 1"]),
        ({"rounds": {"low": 1, "high": 3}}, ["rounds: found a range", "a value, or a list"]),
        ({"careful": {"low": 0, "high": 1}}, ["careful: found a range"]),
        ({"share": []}, ["share: found an empty list, allowed: one value or more"]),
        ({"share": [0.1, "much"]}, ["share: found 'much'"]),
        ({"share": [[0.1]]}, ["share: found [0.1]"]),
        ({"rounds": [1, 2.5]}, ["rounds: found 2.5, allowed: an integer"]),
    ],
    ids=str,
)
def test_a_wrong_range_or_list_is_one_line(open_option, words):
    message = one_line(offer_of, {"method": "toy", **open_option})
    for word in words:
        assert word in message


def test_a_recipe_takes_values_alone():
    for value in ([0.1], {"low": 0.1, "high": 0.2}):
        assert "share: found" in one_line(technique_of, {"method": "toy", "share": value})


def test_bounds_leave_the_low_end_out_where_they_say_so():
    within, above = Bounds(0.0, 1.0), Bounds(0.0, 1.0, above=True)
    assert (within.allow(0.0), above.allow(0.0)) == (True, False)
    assert within.allow(1.0)
    assert above.allow(1.0)
    assert not above.allow(1.1)
    assert (str(within), str(above)) == ("a number ≥ 0, at most 1", "a number > 0, at most 1")


@pytest.mark.parametrize(
    "data", [{"method": "gptq", "damping": 0}, {"method": "gptq", "damping": 11}]
)
def test_damping_lies_within_bounds(data):
    with pytest.raises(
        SpecError, match=r"damping: found .*, allowed: a number ≥ 1e-06, at most 10$"
    ):
        technique_of(ROUNDINGS, data, "here")


def test_options_have_their_type_however_they_are_written():
    data = {"method": "toy", "share": "1e-3", "rounds": 4.0, "careful": True}
    found = technique_of(TOYS, data, "here")
    assert found == Toy(0.001, 4, True)
    assert [type(v) for v in dataclasses.astuple(found)] == [float, int, bool]
    assert type(technique_of(TOYS, {"method": "toy", "share": 1}, "here").share) is float
    assert (
        technique_of(TOYS, "toy", "here") == technique_of(TOYS, {"method": "toy"}, "here") == Toy()
    )


def values_of(field):
    """Return what an option may be."""
    if type(field.default) is bool:
        return st.booleans()
    bounds = field.metadata["bounds"]
    if type(field.default) is int:
        return st.integers(int(bounds.low) + bounds.above, int(bounds.high))
    return st.floats(bounds.low, bounds.high, exclude_min=bounds.above)


def techniques(kind):
    """Return every technique of a class, whatever its options."""
    return st.builds(kind, **{f.name: values_of(f) for f in dataclasses.fields(kind)})


def of(registry):
    return st.sampled_from(registry.names()).flatmap(lambda name: techniques(registry.get(name)))


@given(techniques(Toy) | st.just(NEAREST))
def test_what_is_plain_is_read_as_it_was(technique):
    plain = technique.plain()
    assert plain["method"] == technique.method
    assert technique_of(TOYS, plain, "here") == technique
    assert offer_of(TOYS, plain, "here") == Offer(technique.method, technique)


def test_a_technique_says_in_a_few_words_what_is_not_as_usual():
    assert [str(t) for t in (NEAREST, UNCORRECTED, BIAS, Toy(), GPTQ())] == [
        "nearest",
        "none",
        "bias",
        "toy",
        "gptq",
    ]
    assert str(Toy(0.25, 4, True)) == "toy share 0.25 rounds 4 careful True"
    assert str(LearnedRounding(0.0123)) == "learned_rounding learning_rate 0.0123"


OFFER = offer_of(
    TOYS,
    {"careful": True, "rounds": [4, 1, 4], "method": "toy", "share": {"low": 0.1, "high": 0.9}},
    "here",
)


def test_ranges_and_lists_are_axes_in_the_order_of_the_options():
    axes = Axis("share", 0.1, 0.9), Axis("rounds", choices=(4, 1))
    assert Offer("toy", Toy(0.5, 4, True), axes) == OFFER
    log = offer_of(TOYS, {"method": "toy", "share": {"low": 0.01, "high": 1, "log": True}}, "here")
    assert log.axes == (Axis("share", 0.01, 1.0, log=True),)
    assert log.technique == Toy(pytest.approx(0.1))
    settled = offer_of(TOYS, {"method": "toy", "share": 0.25}, "here")
    assert settled == Offer("toy", Toy(0.25))
    flags = offer_of(TOYS, {"method": "toy", "careful": [True, False]}, "here")
    assert flags.axes == (Axis("careful", choices=(True, False)),)


def test_an_offer_gives_a_technique_for_values_and_values_for_a_technique():
    assert OFFER.of({"share": 0.2, "rounds": 1}) == Toy(0.2, 1, True)
    assert OFFER.of({}) is OFFER.technique
    assert OFFER.values(Toy(0.2, 1, True)) == {"share": 0.2, "rounds": 1}
    assert OFFER.values(Toy(0.1, 4, True)) == {"share": 0.1, "rounds": 4}
    assert Offer("nearest", NEAREST).values(NEAREST) == {}


@pytest.mark.parametrize(
    "other",
    [Toy(0.95, 4, True), Toy(0.05, 4, True), Toy(0.2, 2, True), Toy(0.2, 4, False), NEAREST, BIAS],
    ids=str,
)
def test_what_is_not_on_offer_has_no_values(other):
    assert OFFER.values(other) is None


@given(
    st.tuples(st.floats(1e-9, 1.0), st.floats(1e-9, 1.0)).map(sorted),
    st.booleans(),
    st.lists(st.integers(1, 9), min_size=1),
)
def test_what_stands_for_an_offer_is_on_offer(ends, log, rounds):
    span = {"low": ends[0], "high": ends[1], "log": log}
    offer = offer_of(TOYS, {"method": "toy", "share": span, "rounds": rounds}, "here")
    values = offer.values(offer.technique)
    assert values is not None
    assert offer.of(values) == offer.technique


def test_offers_come_once_and_are_numbered():
    rows = ["toy", {"method": "toy", "share": 0.5}, "nearest", {"method": "toy", "share": 0.1}]
    rows.append({"method": "toy", "share": {"low": 0.1, "high": 0.9}})
    rows.append({"method": "toy", "share": [0.5]})
    found = merged([offer_of(TOYS, row, "here") for row in rows])
    # The second is the first with its usual value written out; the last is a choice, if of one.
    assert [o.label for o in found] == ["toy", "nearest", "toy 2", "toy 3", "toy 4"]
    assert [o.technique for o in found] == [Toy(), NEAREST, Toy(0.1), Toy(0.5), Toy(0.5)]
    assert merged([]) == ()


odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 12)
    | st.floats(min_value=1e-9)
    | st.sampled_from(["toy", "nearest", "1e-3", "method", 10**400, -0.0, float("nan")])
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["method", "share", "rounds", "careful", "low", "high", "log", "x"]),
            inner,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(odd | odd.map(lambda x: {"method": "toy", "share": x, "rounds": [x]}))
def test_whatever_is_written_is_an_offer_or_one_line(data):
    try:
        offer = offer_of(TOYS, data, "here")
    except SpecError:
        one_line(offer_of, data)
        return
    assert offer.values(offer.technique) is not None


def test_built_in_techniques_are_known_by_the_names_of_their_files():
    assert ROUNDINGS.names() == ("nearest", "coordinate_descent", "gptq", "learned_rounding")
    assert CORRECTIONS.names() == ("none", "bias")
    straight = ("clipped", "straight_through", "stochastic", "pact", "lsq", "magnitude_aware")
    assert set(ESTIMATORS.names()) == {*straight, "ewgs", "dsq", "reste"}
    for registry in (ROUNDINGS, CORRECTIONS, ESTIMATORS):
        for name in registry.names():
            assert registry.get(name).method == name


schemes = st.builds(
    WeightScheme,
    st.integers(2, 8),
    st.sampled_from(["per_tensor", "per_channel", "per_group_32"]),
    st.sampled_from(["symmetric", "asymmetric"]),
    st.sampled_from(["max", "mse", "output_mse"]),
    of(ROUNDINGS),
)


@given(schemes, st.sampled_from([None, ActivationScheme(8)]), of(CORRECTIONS))
def test_every_technique_survives_a_recipe_file(weight, activation, correction):
    first = Recipe({"fc": SiteRecipe(weight, activation, correction)})
    text = dumps(first)
    assert text.startswith("autoquant_recipe: 2\n")
    again = loads(text)
    assert dict(again.sites) == dict(first.sites)
    assert again.key() == first.key()
    assert dumps(again) == text


def test_what_does_nothing_is_not_written():
    text = dumps(Recipe({"fc": SiteRecipe(WeightScheme(4))}))
    assert "rounding" not in text
    assert "correction" not in text
    both = SiteRecipe(WeightScheme(4, rounding=GPTQ(act_order=False)), None, BIAS)
    lines = [line.strip() for line in dumps(Recipe({"fc": both})).splitlines()]
    assert "rounding: {method: gptq, damping: 0.01, act_order: false}" in lines
    assert "correction: {method: bias}" in lines


def test_recipes_that_round_otherwise_have_other_keys():
    roundings = [NEAREST, GPTQ(), GPTQ(0.02), GPTQ(act_order=False), LearnedRounding()]
    sites = [
        SiteRecipe(WeightScheme(4, rounding=r), None, c)
        for r in roundings
        for c in (BIAS, UNCORRECTED)
    ]
    keys = {Recipe({"fc": site}).key() for site in sites}
    assert len(keys) == len(sites)


def test_version_1_says_techniques_by_a_rate_and_a_flag():
    text = (ASSETS / "recipe_v1.yaml").read_text()
    assert load(ASSETS / "recipe_v1.yaml").sites["hidden"].weight.rounding == LearnedRounding(0.01)
    corrected = text.replace(
        "learning_rate: 0.01", "learning_rate: 0.01\n    bias_correction: true"
    )
    found = loads(corrected).sites
    assert {name: site.correction for name, site in found.items()} == {
        "features.0": UNCORRECTED,
        "hidden": BIAS,
        "classifier": UNCORRECTED,
    }
    assert found["features.0"].weight.rounding == NEAREST
    again = dumps(loads(corrected))
    assert again.startswith("autoquant_recipe: 2\n")
    assert dict(loads(again).sites) == dict(found)


@pytest.mark.parametrize(
    ("site", "word"),
    [
        ("learning_rate: 0.1, rounding: gptq", "learning_rate: found 0.1"),
        ("learning_rate: 0.1, rounding: nearest", "learning_rate: found 0.1"),
        ("bias_correction: true, correction: bias", "bias_correction: found True"),
        ("bias_correction: true, correction: none", "bias_correction: found True"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_both_spellings_in_one_recipe_are_refused(site, word, version):
    text = f"autoquant_recipe: {version}\nlayers: {{fc: {{weight: {{bits: 4}}, {site}}}}}"
    with pytest.raises(SpecError) as caught:
        loads(text, "r.yaml")
    assert str(caught.value).startswith(f"r.yaml: fc: {word}, allowed: none beside ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "rule",
    [
        "learning_rate: null, rounding: gptq",
        "learning_rate: {low: 0.1, high: 0.2}, rounding: [nearest]",
        "bias_correction: [true], correction: [bias]",
        "bias_correction: false, correction: none",
    ],
)
def test_both_spellings_in_one_rule_are_refused(rule):
    with pytest.raises(SpecError, match=r"^s: rule 1: (rounding|correction) is given twice"):
        SearchSpace.parse(f"autoquant_space: 1\nrules: [{{{rule}}}]", "s")


WITHOUT_TORCH = """
import sys
from autoquant.spec.recipe_file import dumps, loads
from autoquant.spec.space import SearchSpace
from autoquant.spec.techniques import CORRECTIONS, ROUNDINGS

roundings, corrections = (list(r.names()) for r in (ROUNDINGS, CORRECTIONS))
layers = {f"{r} {c}": (r, c) for r in roundings for c in corrections}
row = "  {}: {{weight: {{bits: 4}}, rounding: {}, correction: {}}}"
rows = [row.format(name, *techniques) for name, techniques in layers.items()]
recipe = loads("\\n".join(["autoquant_recipe: 2", "layers:", *rows]))
assert loads(dumps(recipe)) == recipe
rule = f"{{rounding: [{', '.join(roundings)}], correction: [{', '.join(corrections)}]}}"
SearchSpace.parse(f"autoquant_space: 1\\nrules: [{rule}]", "s")
print(len(recipe.sites), [m for m in ("torch", "optuna", "numpy") if m in sys.modules])
"""


def test_recipes_that_name_every_technique_are_read_without_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.stderr == ""
    count = len(ROUNDINGS.names()) * len(CORRECTIONS.names())
    assert child.stdout.strip() == f"{count} []"


@pytest.mark.parametrize("rate", ["1e-300", "1e7", "1.7e308"])
def test_any_rate_of_version_1_is_read(rate):
    text = f"autoquant_recipe: 1\nlayers: {{fc: {{weight: {{bits: 4}}, learning_rate: {rate}}}}}"
    assert loads(text).sites["fc"].weight.rounding.learning_rate == float(rate)


@pytest.mark.parametrize(("low", "high"), [(1e-200, 1e-190), (1e200, 1e300), (0.1, 0.1)])
def test_the_middle_of_a_range_is_in_it(low, high):
    for log in (True, False):
        axis = Axis("learning_rate", low, high, log)
        assert axis.offers(axis.middle)

import copy
from dataclasses import dataclass

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.errors import SpecError
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.spec.granularity import divides
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import DEFAULTS, DIMENSIONS, OLDER, TECHNIQUES, SearchSpace, shipped
from autoquant.spec.techniques import NEAREST, UNCORRECTED, Axis, Offer

BIAS = BiasCorrection()
EVERY = [*DIMENSIONS, *TECHNIQUES]


@dataclass(frozen=True)
class Layer:
    name: str
    layer: str = "Linear"
    matrix: tuple[int, int] = (64, 128)
    activation: bool = True
    corrects: bool = True


LAYERS = (
    Layer("stem", "Conv2d", (16, 27)),
    Layer("body.fc1"),
    Layer("body.fc2"),
    Layer("words", "Embedding", (100, 64), activation=False, corrects=False),
    Layer("rnn.weight_ih_l0", "GRU", (192, 64), corrects=False),
)


def space(rules):
    return SearchSpace.parse(f"autoquant_space: 1\nname: s\nrules:\n{rules}", "s.yaml")


@pytest.mark.parametrize("name", shipped())
def test_shipped_spaces_resolve_on_every_layer(name):
    resolved = SearchSpace.load(name).resolve(LAYERS)
    assert set(resolved) == {layer.name for layer in LAYERS}
    for layer in LAYERS:
        choices = resolved[layer.name].choices
        assert set(choices) == set(EVERY)
        assert all(choices.values())
        assert all(divides(g, layer.matrix) for g in choices["weight_granularity"])
        if not layer.activation:
            assert choices["activation_bits"] == (16,)
    assert min(resolved["body.fc1"].choices["weight_bits"]) <= 8


def test_every_dimension_is_on_offer_in_full():
    found = SearchSpace.load("full").resolve([Layer("fc")])["fc"].choices
    for dimension, allowed in DIMENSIONS.items():
        if dimension != "activation_bits":
            assert set(found[dimension]) == set(allowed)
    assert set(found["activation_bits"]) == {4, 5, 6, 7, 8, 16}
    for dimension, registry in TECHNIQUES.items():
        assert {offer.technique.method for offer in found[dimension]} == set(registry.names())


def test_seven_spaces_are_shipped_the_default_first():
    expected = {"default", "int8", "weight_only", "cnn", "transformer", "rnn", "full"}
    assert set(shipped()) == expected
    assert shipped()[0] == "default"


def test_later_rules_override_and_patterns_match_type_and_name():
    found = space(
        "  - {weight_bits: [8, 4], activation_bits: 8}\n"
        "  - {types: [Conv*], weight_bits: [8]}\n"
        "  - {names: ['body.*'], weight_calibration: [mse]}\n"
        "  - {names: [body.fc2], skip: true}\n"
        "  - {names: [stem], lock: {weight: {bits: 6}}}\n"
    ).resolve(LAYERS)
    assert found["body.fc1"].choices["weight_bits"] == (8, 4)
    assert found["body.fc1"].choices["weight_calibration"] == ("mse",)
    assert found["rnn.weight_ih_l0"].choices["weight_calibration"] == ("max",)
    assert found["body.fc2"].fixed == SiteRecipe()
    assert found["stem"].fixed == SiteRecipe(WeightScheme(6))


def test_groups_that_do_not_divide_and_activations_that_are_not_there_are_left_out():
    rule = "  - {weight_granularity: [per_group_64, per_channel], activation_bits: [8, 4]}\n"
    found = space(rule).resolve(LAYERS)
    assert found["stem"].choices["weight_granularity"] == ("per_channel",)
    assert found["body.fc1"].choices["weight_granularity"] == ("per_group_64", "per_channel")
    assert found["words"].choices["activation_bits"] == (16,)


def test_the_order_of_choices_is_kept_and_each_comes_once():
    found = space("  - {weight_bits: [4, 8, 4, 6], weight_scheme: asymmetric}").resolve(LAYERS)
    assert found["stem"].choices["weight_bits"] == (4, 8, 6)
    assert found["stem"].choices["weight_scheme"] == ("asymmetric",)
    untouched = {k: v for k, v in found["stem"].choices.items() if k in ("activation_bits",)}
    assert untouched == {"activation_bits": DEFAULTS["activation_bits"]}


def test_a_later_rule_ends_a_lock():
    found = space(
        "  - {skip: true}\n  - {types: [Linear], lock: {weight: {bits: 8}}}\n"
        "  - {names: [body.fc2], weight_bits: [4]}"
    ).resolve(LAYERS)
    assert found["stem"].fixed == SiteRecipe()
    assert found["body.fc1"].fixed == SiteRecipe(WeightScheme(8))
    assert found["body.fc2"].fixed is None
    assert found["body.fc2"].choices["weight_bits"] == (4,)


def test_a_lock_says_everything_a_recipe_says():
    found = space(
        "  - {lock: {weight: {bits: 4, granularity: per_channel, calibration: mse}, "
        "activation: {bits: 8, scheme: symmetric}, rounding: {method: gptq, damping: 0.1}, "
        "correction: bias}}"
    ).resolve(LAYERS)
    weight = WeightScheme(4, "per_channel", "symmetric", "mse", GPTQ(0.1))
    activation = ActivationScheme(8, scheme="symmetric")
    assert found["stem"].fixed == SiteRecipe(weight, activation, BIAS)
    assert found["words"].fixed == SiteRecipe(weight, None)


def test_type_and_name_must_both_match():
    found = space(
        "  - {weight_bits: 8}\n  - {types: [Linear, GRU], names: ['*1', '*_l?'], weight_bits: 4}"
    ).resolve(LAYERS)
    narrow = {name for name, s in found.items() if s.choices["weight_bits"] == (4,)}
    assert narrow == {"body.fc1", "rnn.weight_ih_l0"}
    nobody = space("  - {weight_bits: 8}\n  - {types: [LSTM], weight_bits: 4}").resolve(LAYERS)
    assert all(s.choices["weight_bits"] == (8,) for s in nobody.values())


NEAR = Offer("nearest", NEAREST)


def learned(low, high):
    middle = LearnedRounding(Axis("", low, high, log=True).middle)
    return Offer("learned_rounding", middle, (Axis("learning_rate", low, high, log=True),))


ONE_RATE = Offer("learned_rounding", LearnedRounding(0.001))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("learning_rate: {low: 1e-4, high: 0.1}", (NEAR, learned(1e-4, 0.1))),
        ("learning_rate: {low: 0.001, high: 0.001, optional: false}", (ONE_RATE,)),
        ("learning_rate: {low: 0.01, high: 0.1, optional: false}", (learned(0.01, 0.1),)),
        ("learning_rate: 1e-3", (ONE_RATE,)),
        ("learning_rate: null", (NEAR,)),
        (
            "rounding: [nearest, {method: learned_rounding, "
            "learning_rate: {low: 1e-4, high: 0.1, log: true}}]",
            (NEAR, learned(1e-4, 0.1)),
        ),
        ("rounding: {method: learned_rounding, learning_rate: 1e-3}", (ONE_RATE,)),
        ("rounding: nearest", (NEAR,)),
        ("rounding: [gptq, nearest, gptq]", (Offer("gptq", GPTQ()), NEAR)),
    ],
)
def test_roundings_in_both_spellings(written, read):
    before = "  - {learning_rate: {low: 0.2, high: 0.3}}\n"
    found = space(f"{before}  - {{{written}}}").resolve(LAYERS)
    assert found["stem"].choices["rounding"] == read
    kept = space(f"{before}  - {{weight_bits: 4}}").resolve(LAYERS)
    assert kept["stem"].choices["rounding"] == (NEAR, learned(0.2, 0.3))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("bias_correction: [true]", (Offer("bias", BIAS),)),
        ("bias_correction: [false, true]", (Offer("none", UNCORRECTED), Offer("bias", BIAS))),
        ("correction: [bias, none]", (Offer("bias", BIAS), Offer("none", UNCORRECTED))),
        ("correction: {method: bias}", (Offer("bias", BIAS),)),
    ],
)
def test_corrections_in_both_spellings(written, read):
    found = space(f"  - {{{written}}}").resolve(LAYERS)
    assert found["stem"].choices["correction"] == read
    assert found["words"].choices["correction"] == DEFAULTS["correction"]


def test_a_space_of_one_s_own_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    text = "autoquant_space: 1\ndescription: mine\nrules:\n  - weight_bits: [4]\n"
    path.write_text(text)
    for found in (SearchSpace.load(path), SearchSpace.load(str(path))):
        assert found.name == "mine"
        assert found.text == text
    assert SearchSpace.load("default").name == "default"


WHOLE = {
    "autoquant_space": 1,
    "name": "mine",
    "description": "",
    "rules": [
        {"weight_bits": [8, 4], "activation_calibration": ["mse", "percentile_99.5"]},
        {"types": ["Conv*"], "learning_rate": {"low": 0.01, "high": 0.1, "optional": False}},
        {
            "types": ["Linear"],
            "rounding": [
                "nearest",
                {"method": "gptq", "damping": [0.01, 0.1], "act_order": [True, False]},
                {
                    "method": "learned_rounding",
                    "learning_rate": {"low": 0.01, "high": 0.1, "log": True},
                },
            ],
            "correction": ["none", {"method": "bias"}],
        },
        {"names": ["body.fc?"], "lock": {"weight": {"bits": 8}, "activation": {"bits": 8}}},
        {"names": ["words"], "skip": True},
    ],
}
odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.sampled_from([10**400, "1e-3", "mse", "per_group_64", "symmetric", "*", "["])
    | st.floats()
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


def places(data, path=()):
    """Yield the path of everything in a document."""
    yield path
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from places(data[key], (*path, key))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(places(WHOLE))[1:]),
    st.sampled_from([None, "skip", "lock", "names", "types", *OLDER.values(), *EVERY]),
    odd,
)
def test_whatever_is_in_a_field_is_a_space_or_one_line(path, name, value):
    data = copy.deepcopy(WHOLE)
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    if name is not None:
        data["rules"] = [*WHOLE["rules"], {name: value}]
    text = yaml.safe_dump(data, allow_unicode=True)
    try:
        resolved = SearchSpace.parse(text, "s.yaml").resolve(LAYERS)
    except SpecError:
        with pytest.raises(SpecError) as caught:
            SearchSpace.parse(text, "s.yaml").resolve(LAYERS)
        assert len(str(caught.value).splitlines()) == 1
        return
    for found in resolved.values():
        assert set(found.choices) == set(EVERY)
        assert all(found.choices.values())


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("  - {weight_bits: [9]}", ["rule 1", "weight_bits", "found 9", "2, 3"]),
        ("  - {weight_calibration: [mxa]}", ["weight_calibration", "mxa", "percentile_99.9"]),
        ("  - {activation_calibration: [percentile_300]}", ["percentile_300"]),
        ("  - {weight_bits: []}", ["weight_bits", "one choice or more"]),
        ("  - {weight_bit: [8]}", ["weight_bit", "did you mean 'weight_bits'"]),
        ("  - {names: [nothing.*], weight_bits: 8}", ["rule 1", "nothing.*", "matches no layer"]),
        ("  - {learning_rate: {low: 0, high: 1}}", ["learning_rate", "low"]),
        ("  - {learning_rate: {low: 0.1, high: 0.01}}", ["high"]),
        ("  - {types: [Linear]}", ["says nothing"]),
        ("  - {skip: true}", ["leaves every layer in float"]),
        ("  - {weight_bits: [16], activation_bits: [16]}", ["leaves every layer in float"]),
        ("  oops", ["rules"]),
        ("  - oops", ["rule 1", "expected fields", "'oops'"]),
        ("  - {weight_bits: [true]}", ["weight_bits", "found True"]),
        ("  - {weight_bits: 0}", ["weight_bits", "found 0"]),
        ("  - {weight_granularity: per_group_48}", ["weight_granularity", "per_group_48"]),
        ("  - {weight_granularity: per_token}", ["weight_granularity", "per_token"]),
        ("  - {weight_calibration: entropy}", ["weight_calibration", "found 'entropy'"]),
        ("  - {learning_rate: fast}", ["learning_rate", "found 'fast'", "low, high"]),
        ("  - {learning_rate: 0}", ["learning_rate", "found 0", "a number > 0"]),
        ("  - {learning_rate: {low: 0.1}}", ["learning_rate: high is missing"]),
        ("  - {learning_rate: 0.1, rounding: gptq}", ["rule 1", "rounding is given twice"]),
        ("  - {bias_correction: true, correction: bias}", ["rule 1", "correction is given twice"]),
        ("  - {rounding: []}", ["rule 1: rounding", "found an empty list", "one or more"]),
        ("  - {rounding: [gtpq]}", ["rule 1: rounding", "'gtpq'", "did you mean 'gptq'"]),
        ("  - {rounding: 3}", ["rule 1: rounding", "expected fields, found 3"]),
        ("  - {rounding: {method: gptq, dampng: 1}}", ["'dampng'", "did you mean 'damping'"]),
        ("  - {rounding: {method: gptq, damping: 11}}", ["rounding: damping", "found 11", "10"]),
        ("  - {correction: [[bias]]}", ["rule 1: correction", "found ['bias']"]),
        ("  - {names: [], weight_bits: 4}", ["rule 1", "names", "found []"]),
        ("  - {names: [3], weight_bits: 4}", ["names", "[3]"]),
        ("  - {skip: yes please}", ["skip", "'yes please'"]),
        ("  - {skip: true, lock: {weight: {bits: 8}}}", ["lock or skip, not both"]),
        ("  - {lock: {weight: {bits: 9}}}", ["rule 1: lock: weight: bits", "found 9"]),
        (
            "  - {types: [Conv2d], lock: {weight: {bits: 8, granularity: per_group_64}}}",
            ["stem", "lock", "per_group_64 does not divide the 27 inputs"],
        ),
        ('  - {names: ["a\\nb"], weight_bits: 8}', [r"names 'a\nb' matches no layer"]),
        ("  - {weight_bits: 8}\nrule: 3", ["'rule'", "did you mean 'rules'"]),
    ],
)
def test_a_wrong_space_is_one_line_that_says_where(rules, words):
    with pytest.raises(SpecError) as caught:
        space(rules).resolve(LAYERS)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("version", ["2", "true", "1.0", "null", "[1]"])
def test_another_version_is_refused(version):
    text = f"autoquant_space: {version}\nrules: [{{weight_bits: 8}}]"
    with pytest.raises(SpecError, match=r"^s\.yaml: autoquant_space: found .*, allowed: 1$"):
        SearchSpace.parse(text, "s.yaml")


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(SpecError, match="did you mean 'transformer'"):
        SearchSpace.load("transfomer")
    with pytest.raises(SpecError, match="cannot read"):
        SearchSpace.load("./nothing.yaml")

from dataclasses import dataclass

import pytest

from autoquant.errors import SpecError
from autoquant.spec.recipe import SiteRecipe, WeightScheme
from autoquant.spec.space import DIMENSIONS, SearchSpace, shipped


@dataclass(frozen=True)
class Layer:
    name: str
    layer: str = "Linear"
    matrix: tuple[int, int] = (64, 128)
    activation: bool = True


LAYERS = (
    Layer("stem", "Conv2d", (16, 27)),
    Layer("body.fc1"),
    Layer("body.fc2"),
    Layer("words", "Embedding", (100, 64), activation=False),
    Layer("rnn.weight_ih_l0", "GRU", (192, 64)),
)


def space(rules):
    return SearchSpace.parse(f"autoquant_space: 1\nname: s\nrules:\n{rules}", "s.yaml")


@pytest.mark.parametrize("name", shipped())
def test_shipped_spaces_resolve_on_every_layer(name):
    resolved = SearchSpace.load(name).resolve(LAYERS)
    assert set(resolved) == {layer.name for layer in LAYERS}
    for choices in (s.choices for s in resolved.values()):
        assert set(choices) == set(DIMENSIONS)
        assert all(choices.values())


def test_the_issue_of_seven_names():
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
    ],
)
def test_a_wrong_space_is_one_line_that_says_where(rules, words):
    with pytest.raises(SpecError) as caught:
        space(rules).resolve(LAYERS)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(SpecError, match="did you mean 'transformer'"):
        SearchSpace.load("transfomer")
    with pytest.raises(SpecError, match="cannot read"):
        SearchSpace.load("./nothing.yaml")

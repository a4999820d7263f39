import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.errors import SpecError, UserError
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.spec.calibration import ACTIVATION_CALIBRATIONS, WEIGHT_CALIBRATIONS
from autoquant.spec.costs import LatencyEvidence
from autoquant.spec.formats import FORMATS
from autoquant.spec.granularity import WEIGHT_GRANULARITIES
from autoquant.spec.recipe import (
    ActivationScheme,
    Evidence,
    ModelIdentity,
    Recipe,
    SiteRecipe,
    SplitResult,
    WeightScheme,
)
from autoquant.spec.recipe_file import dumps, load, loads, save
from autoquant.spec.site_file import SCHEMES
from autoquant.spec.techniques import NEAREST, UNCORRECTED
from autoquant.spec.verdict import Verdict

BIAS = BiasCorrection()
ASSETS = Path(__file__).resolve().parents[1] / "assets"

weights = st.builds(
    WeightScheme,
    st.sampled_from(list(FORMATS)),
    st.sampled_from(WEIGHT_GRANULARITIES),
    st.sampled_from(SCHEMES),
    st.sampled_from(WEIGHT_CALIBRATIONS),
    st.just(NEAREST)
    | st.builds(LearnedRounding, st.floats(1e-6, 1.0))
    | st.builds(GPTQ, st.floats(1e-6, 1.0), st.booleans()),
)


@st.composite
def activations(draw):
    bits = draw(st.sampled_from(list(FORMATS)))
    scheme = draw(st.sampled_from(SCHEMES))
    calibration = draw(st.sampled_from(ACTIVATION_CALIBRATIONS))
    if draw(st.booleans()):
        return ActivationScheme(bits, "per_token", scheme, "max")
    static = draw(st.booleans())
    zero = 0
    if scheme == "asymmetric":
        zero = draw(st.integers(FORMATS[bits].qmin, FORMATS[bits].qmax))
    scale = draw(st.floats(1e-30, 1e30)) if static else None
    return ActivationScheme(
        bits, "per_tensor", scheme, calibration, scale, zero if static else None
    )


sites = st.builds(
    SiteRecipe,
    st.none() | weights,
    st.none() | activations(),
    st.sampled_from([UNCORRECTED, BIAS]),
).map(SiteRecipe.canonical)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)


def recipe(**layers):
    return Recipe(layers or {"fc": SiteRecipe(WeightScheme(4))})


@given(st.dictionaries(names, sites, min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_recipe_survives_yaml(layers, seed):
    evidence = Evidence(
        "accuracy",
        True,
        SplitResult(400, 0.83, 0.82, 0.01, (0.0, 0.02)),
        SplitResult(401, 0.84, 0.835, 0.005, None),
        5.25,
        123,
        456,
    )
    identity = ModelIdentity("net", "0" * 64)
    first = Recipe(layers, identity, evidence, {"bn": "conv"}, seed)
    again = loads(dumps(first))
    assert dict(again.sites) == dict(first.sites)
    assert (again.model, again.evidence, again.seed) == (identity, evidence, seed)
    assert dict(again.folded) == {"bn": "conv"}
    assert again.key() == first.key()


def test_the_layers_own_width_is_written_where_it_differs():
    result = SplitResult(4, 0.5, 0.4, 0.1)
    plain = Evidence("evaluate", True, result, None, 8.0, 1, 4)
    assert "layer_weight_bits" not in dumps(Recipe({"fc": SiteRecipe()}, None, plain))
    mixed = replace(plain, average_weight_bits=12.5, layer_weight_bits=8.0)
    text = dumps(Recipe({"fc": SiteRecipe()}, None, mixed))
    assert "average_weight_bits: 12.5\nlayer_weight_bits: 8.0\n" in text
    assert loads(text).evidence == mixed


def test_a_recipe_without_a_second_split_says_so(tmp_path):
    result = SplitResult(0, 0.5, 0.4, 0.1)
    evidence = Evidence("evaluate", True, result, None, 8.0, 1, 4)
    text = dumps(Recipe({"fc": SiteRecipe()}, None, evidence))
    assert "the drop is on what search saw" in text
    assert loads(text).evidence.confirm is None


COSTLY = Evidence(
    "accuracy",
    True,
    SplitResult(0, 0.5, 0.4, 0.1),
    None,
    8.0,
    1,
    4,
    LatencyEvidence(0.0123, 0.0125, 0.02, 64, "a processor"),
    1e9,
    4e9,
)


def test_costs_survive_yaml_where_they_were_asked_for():
    for evidence in (
        COSTLY,
        replace(COSTLY, latency=replace(COSTLY.latency, measured=None)),
        replace(COSTLY, latency=None),
        replace(COSTLY, bit_operations=None, float_bit_operations=None),
    ):
        text = dumps(Recipe({"fc": SiteRecipe()}, None, evidence))
        assert loads(text).evidence == evidence
        assert ("latency" in text) == (evidence.latency is not None)
        assert ("bit_operations" in text) == (evidence.bit_operations is not None)


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict("PASS", 0.01, -0.0025, (-0.0123, 0.0071), 0.0321, 436, 120),
        Verdict("NOT PROVEN", 1e-3, 0.1, None, None, 0, None),
    ],
)
def test_a_verdict_survives_yaml(verdict):
    evidence = replace(COSTLY, verdict=verdict)
    assert loads(dumps(Recipe({"fc": SiteRecipe()}, None, evidence))).evidence == evidence
    assert "verdict" not in dumps(Recipe({"fc": SiteRecipe()}, None, COSTLY))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("outcome: FAIL", "outcome: MAYBE", "verdict: outcome: found 'MAYBE', allowed: PASS"),
        ("max_drop: 0.01", "max_drop: -1", "verdict: max_drop: found -1"),
        ("flip_rate: 0.5", "flip_rate: 2", "verdict: flip_rate: found 2, allowed: a number, 0 … 1"),
        ("samples_needed: null", "samples_needed: 1.5", "verdict: samples_needed: found 1.5"),
        ("interval: [0.1, 0.3]", "interval: [0.1]", "verdict: interval: found"),
        ("samples: 40", "sample: 40", "verdict: unknown field 'sample'"),
    ],
)
def test_verdicts_that_are_wrong(old, new, words):
    verdict = Verdict("FAIL", 0.01, 0.2, (0.1, 0.3), 0.5, 40, None)
    text = dumps(Recipe({"fc": SiteRecipe()}, None, replace(COSTLY, verdict=verdict)))
    assert old in text
    with pytest.raises(SpecError) as raised:
        loads(text.replace(old, new))
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("float_seconds: 0.02", "float_seconds: fast", "latency: float_seconds: found 'fast'"),
        ("seconds: 0.0125", "seconds: -1", "latency: seconds: found -1"),
        ("device: a processor", "device: 3", "latency: device: found 3"),
        ("samples: 64", "sample: 64", "latency: unknown field 'sample'"),
        ("\nbit_operations: 1", "\nbit_operations: -1", "bit_operations: found"),
    ],
)
def test_costs_that_are_wrong(old, new, words):
    text = dumps(Recipe({"fc": SiteRecipe()}, None, COSTLY))
    assert old in text
    with pytest.raises(SpecError) as raised:
        loads(text.replace(old, new))
    assert words in str(raised.value)


def test_version_1_is_readable_for_ever():
    found = load(ASSETS / "recipe_v1.yaml")
    static = ActivationScheme(
        8, "per_tensor", "asymmetric", "percentile_99.999", 0.003921568859368563, -128
    )
    assert dict(found.sites) == {
        "features.0": SiteRecipe(WeightScheme(8, "per_channel", "symmetric", "mse"), static),
        "hidden": SiteRecipe(
            WeightScheme(4, "per_group_32", "asymmetric", "percentile_99.9", LearnedRounding(0.01)),
            ActivationScheme(8, "per_token", "symmetric", "max"),
        ),
        "classifier": SiteRecipe(),
    }
    assert dict(found.folded) == {"features.1": "features.0"}
    assert found.model.name == "model"
    assert found.model.sha256.startswith("c9f01768")
    assert found.evidence == Evidence(
        "accuracy",
        True,
        SplitResult(449, 0.9577, 0.9488, 0.0089, (0.0, 0.0178)),
        SplitResult(448, 0.9643, 0.9621, 0.0022, (0.0, 0.0067)),
        4.5,
        27100,
        206184,
    )
    assert found.seed == 0
    assert loads(dumps(found)) == found


GOOD = dumps(
    recipe(
        fc=SiteRecipe(
            WeightScheme(4, rounding=LearnedRounding(0.25)),
            ActivationScheme(8, scale=0.5, zero_point=3),
            BIAS,
        )
    )
)
ROUNDING = "rounding: {method: learned_rounding, learning_rate: 0.25}"
CORRECTION = "correction: {method: bias}"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("bits: 4", "bits: 0", ["fc: weight: bits", "found 0", "allowed: 2, 3"]),
        ("bits: 4", "bits: 99", ["fc: weight: bits", "found 99"]),
        ("bits: 4", "bits: four", ["fc: weight: bits", "'four'"]),
        ("bits: 4", "bits: true", ["fc: weight: bits", "True"]),
        ("bits: 4, ", "", ["fc: weight: bits is missing"]),
        ("bits: 4", "bits: 16", ["fc: weight: unknown field 'granularity'", "allowed: bits"]),
        ("per_channel", "per_chanel", ["granularity", "per_chanel", "per_channel"]),
        ("calibration: max", "calibration: maxx", ["calibration", "maxx", "mse"]),
        ("calibration: max", "calibration: percentile_12", ["percentile_12"]),
        ("calibration: max", "calibraton: max", ["calibraton", "did you mean 'calibration'"]),
        ("scale: 0.5", "scale: -1", ["scale", "-1"]),
        ("scale: 0.5", "scale: .nan", ["scale", "nan"]),
        ("scale: 0.5", "scael: 0.5", ["fc: activation: zero_point: found 3", "scale"]),
        ("scale: 0.5, zero_point: 3", "scael: 0.5", ["'scael': did you mean 'scale'?"]),
        ("zero_point: 3", "zero_point: 300", ["zero_point", "300", "-128 … 127"]),
        ("zero_point: 3", "zero_point: 3.0", ["zero_point", "3.0", "an integer"]),
        ("zero_point: 3", "zero_point: true", ["zero_point", "True", "an integer"]),
        ("asymmetric", "symmetric", ["fc: activation: zero_point", "found 3", "allowed: 0"]),
        ("per_tensor", "per_token", ["fc: activation: scale", "none: a per_token scale"]),
        ("per_tensor", "per_group_32", ["activation: granularity", "per_tensor, per_token"]),
        ("per_channel", "per_token", ["weight: granularity", "per_group_128"]),
        ("per_channel", "per_group_48", ["weight: granularity", "per_group_48"]),
        ("weight: {", "weight: [", ["not valid YAML"]),
        (ROUNDING, "learning_rate: 0", ["learning_rate", "a number > 0, or null"]),
        (ROUNDING, "learning_rate: none", ["fc: learning_rate", "'none'", "or null"]),
        (ROUNDING, "learning_rte: 1", ["fc", "'learning_rte'", "'learning_rate'"]),
        (ROUNDING, f"{ROUNDING}\n    learning_rate: 0.1", ["learning_rate", "beside rounding"]),
        (CORRECTION, "bias_correction: 1", ["fc: bias_correction", "found 1", "True, False"]),
        (CORRECTION, f"{CORRECTION}\n    bias_correction: true", ["beside correction"]),
        ("rounding: {", "roundng: {", ["fc", "'roundng'", "did you mean 'rounding'"]),
        ("method: learned_rounding, ", "", ["fc: rounding: method is missing"]),
        ("learned_rounding", "lerned_rounding", ["fc: rounding", "did you mean 'learned_roundi"]),
        ("learning_rate: 0.25", "learning_rate: 0", ["rounding: learning_rate", "found 0", "> 0"]),
        ("learning_rate: 0.25", "rate: 1", ["fc: rounding", "'rate'", "allowed: method, learn"]),
        ("method: bias", "method: bais", ["fc: correction", "'bais'", "did you mean 'bias'"]),
        ("method: bias", "method: bias, by: 1", ["fc: correction", "'by'", "allowed: method"]),
        (CORRECTION, "correction: [bias]", ["fc: correction", "found ['bias']"]),
        ("autoquant_recipe: 2", "autoquant_recipe: 3", ["version 3"]),
        ("autoquant_recipe: 2", "autoquant_recipe: true", ["version True", "reads 1 and 2"]),
        ("autoquant_recipe: 2", "autoquant_recipe: 1.0", ["version 1.0"]),
        ("autoquant_recipe: 2", "autoquant_recipe: '1'", ["version '1'"]),
        ("autoquant_recipe: 2", "other: 1", ["not a recipe"]),
        ("seed: 0", "seed: -1", ["seed", "found -1", "an integer ≥ 0"]),
        ("seed: 0", "sed: 0", ["'sed'", "did you mean 'seed'"]),
        ("seed: 0", "size_bytes: -5", ["size_bytes", "found -5"]),
        ("seed: 0", "average_weight_bits: -1", ["average_weight_bits", "≥ 0"]),
        ("seed: 0", "folded: [bn]", ["folded", "['bn']"]),
        ("seed: 0", "folded: {bn: 1}", ["folded"]),
        ("seed: 0", "model: net", ["model", "expected fields, found 'net'"]),
        ("seed: 0", "model: {name: net}", ["model: sha256 is missing"]),
        ("seed: 0", "metric: {name: a}", ["metric: higher_is_better is missing"]),
        ("layers:", "layers: []\nlayer:", ["layers"]),
        ("layers:", "layer:", ["layers is missing"]),
        ("  fc:", "  3:", ["layers: 3 is not a layer name; put it in quotes"]),
        ("  fc:", "  fc:\n    weight: {bits: 8}\n    activation: {bits: 8}\n  fc:", ["twice"]),
        ("seed: 0", "seed: &a 0\nx: *a", ["aliases"]),
        ("seed: 0", "seed: !!python/object/new:int [0]", ["not valid YAML"]),
    ],
)
def test_a_wrong_field_is_one_line_that_says_where(tmp_path, old, new, words):
    assert old in GOOD
    path = tmp_path / "r.yaml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(SpecError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


@given(st.integers(0, len(GOOD) - 1))
@settings(max_examples=80)
def test_a_truncated_recipe_is_refused_or_whole(length):
    text = GOOD[:length]
    if text.rstrip() == GOOD.rstrip():
        return
    with contextlib.suppress(SpecError):  # anything else would be a crash on a user's file
        assert set(loads(text).sites) == {"fc"}


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"- 1\n- 2\n", b"a: b: c"])
def test_what_is_no_recipe_is_one_line(tmp_path, data):
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(SpecError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match="cannot read"):
        load(tmp_path / "absent.yaml")


def test_numbers_as_people_write_them():
    """YAML 1.1 takes 1e-3, which has no dot, for text."""
    for rounding in (ROUNDING.replace("0.25", "1e-3"), "learning_rate: 1e-3"):
        text = GOOD.replace(ROUNDING, rounding).replace("0.5", "5e-1")
        site = loads(text).sites["fc"]
        assert site.weight.rounding == LearnedRounding(0.001)
        assert site.activation.scale == 0.5


def test_what_is_left_out_has_its_default():
    text = "autoquant_recipe: 1\nlayers: {fc: {weight: {bits: 4}, activation: {bits: 8}}, out: {}}"
    found = loads(text)
    assert found.sites["fc"] == SiteRecipe(WeightScheme(4), ActivationScheme(8))
    assert found.sites["out"] == SiteRecipe()
    assert (found.model, found.evidence, dict(found.folded), found.seed) == (None, None, {}, 0)


VERSION_1 = (ASSETS / "recipe_v1.yaml").read_text()
WHOLE = [yaml.safe_load(text) for text in (VERSION_1, dumps(replace(loads(VERSION_1), seed=7)))]
odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-300, 300)
    | st.sampled_from([10**400, -(10**400), 2**63, 1e308, 5e-324])
    | st.floats()
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6)
    | st.sampled_from(["mse", "per_token", "per_group_32", "percentile_60", "symmetric", "1e-3"])
    | st.dates()
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner)
    ),
    max_leaves=5,
)


def places(data, path=()):
    """Yield the path of everything in a document."""
    yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from places(value, (*path, key))


def read(text):
    """Return a recipe, or None after checking that the refusal is one line."""
    with contextlib.suppress(SpecError):
        return loads(text, "r.yaml")
    with pytest.raises(SpecError) as caught:
        loads(text, "r.yaml")
    message = str(caught.value)
    assert message.startswith("r.yaml:")
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return None


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([(i, p) for i, whole in enumerate(WHOLE) for p in places(whole) if p]),
    odd,
    st.sampled_from(["set", "add", "drop"]),
)
def test_whatever_is_in_a_field_is_a_recipe_or_one_line(place, value, act):
    version, path = place
    data = copy.deepcopy(WHOLE[version])
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    if act == "set":
        parent[path[-1]] = value
    elif act == "add":
        parent["an odd one"] = value
    else:
        del parent[path[-1]]
    found = read(yaml.safe_dump(data, allow_unicode=True))
    assert found is None or loads(dumps(found)) == found


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, len(GOOD)),
    st.text(st.sampled_from("ab:-[]{}'\"&*!|>?#%@,.019 \n\t"), min_size=1, max_size=4),
    st.integers(0, 5),
)
def test_whatever_is_typed_into_a_recipe(at, typed, over):
    found = read(GOOD[:at] + typed + GOOD[at + over :])
    assert found is None or loads(dumps(found)) == found


def test_a_name_that_is_two_lines_stays_on_one():
    with pytest.raises(SpecError) as caught:
        loads('autoquant_recipe: 1\nlayers: {"a\\nb": {weight: {bits: 99}}}', "r.yaml")
    assert str(caught.value).startswith(r"r.yaml: 'a\nb': weight: bits: found 99")


def test_a_recipe_needs_a_layer():
    with pytest.raises(SpecError, match=r"r\.yaml: layers: found \{\}, allowed: one entry or more"):
        loads("autoquant_recipe: 1\nlayers: {}", "r.yaml")


@pytest.mark.parametrize("name", ["0", "1.weight", "null", "on", "~", "bits", "", "ä b", "- x"])
def test_names_that_yaml_could_take_for_something_else(name):
    layers = {name: SiteRecipe(WeightScheme(4)), "samples": SiteRecipe()}
    assert dict(loads(dumps(Recipe(layers))).sites) == layers


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    save(recipe(), path)
    before = path.read_text()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save(recipe(other=SiteRecipe()), path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


SCALED = ActivationScheme(8, "per_tensor", "asymmetric", "mse", 0.02, -3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bits: 8, granularity: per_t", "bits: 4, granularity: per_t"),
        ("scheme: asymmetric, calibration: mse", "scheme: symmetric, calibration: mse"),
        ("calibration: mse", "calibration: max"),
    ],
)
def test_a_scale_beside_another_scheme_than_it_was_calibrated_for(old, new):
    text = dumps(recipe(fc=SiteRecipe(WeightScheme(4), replace(SCALED, zero_point=0))))
    changed = text.replace(old, new)
    assert changed != text
    with pytest.raises(SpecError) as raised:
        loads(changed, "r.yaml")
    message = str(raised.value)
    assert message.startswith("r.yaml: fc: activation: scale 0.02 was calibrated for '8 bits asym")
    assert "delete scale and zero_point" in message
    # Done as told, with or without the word on what it was calibrated for.
    bare = changed.replace("scale: 0.02, zero_point: 0, ", "")
    for done in (bare, bare.replace(", calibrated_for: 8 bits asymmetric mse", "")):
        assert loads(done).sites["fc"].activation.scale is None


def test_other_edits_leave_a_scale_in_peace():
    text = dumps(recipe(fc=SiteRecipe(WeightScheme(8), SCALED)))
    edited = text.replace("weight: {bits: 8", "weight: {bits: 4").replace("0.02", "0.03")
    assert loads(edited).sites["fc"].activation == replace(SCALED, scale=0.03)


def test_a_file_of_before_scales_said_what_they_are_for():
    assert "calibrated_for" not in (ASSETS / "recipe_v1.yaml").read_text()
    assert load(ASSETS / "recipe_v1.yaml").sites["features.0"].activation.zero_point == -128


@pytest.mark.parametrize("letters", ["mmmm", "no", "on", "y", "null", "yes", "a" * 700])
def test_factors_of_smoothed_inputs_are_read_as_they_were_written(letters):
    sites = {"a": SiteRecipe(WeightScheme(8), ActivationScheme(8)), "off": SiteRecipe()}
    recipe = Recipe(sites, transforms={"a": letters, "off": letters})
    found = loads(dumps(recipe))
    assert dict(found.transforms) == {"a": letters, "off": letters}
    assert found == recipe


def test_a_recipe_says_what_its_rest_is_where_that_is_not_float32():
    sites = {"a": SiteRecipe(WeightScheme(8))}
    assert "rest" not in dumps(Recipe(sites))
    assert loads(dumps(Recipe(sites))).rest == "float32"
    low = Recipe(sites, rest="bf16")
    assert "\nrest: bf16\n" in dumps(low)
    assert loads(dumps(low)) == low != Recipe(sites)
    with pytest.raises(SpecError) as raised:
        loads(dumps(low).replace("bf16", "fp8"))
    assert str(raised.value) == "recipe: rest: found 'fp8', allowed: float32 or bf16"

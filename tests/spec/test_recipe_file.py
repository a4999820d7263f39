import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.errors import SpecError
from autoquant.spec.calibration import ACTIVATION_CALIBRATIONS, WEIGHT_CALIBRATIONS
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
from autoquant.spec.recipe_file import SCHEMES, dumps, load, loads, save

ASSETS = Path(__file__).resolve().parents[1] / "assets"

weights = st.builds(
    WeightScheme,
    st.sampled_from(list(FORMATS)),
    st.sampled_from(WEIGHT_GRANULARITIES),
    st.sampled_from(SCHEMES),
    st.sampled_from(WEIGHT_CALIBRATIONS),
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
    SiteRecipe, st.none() | weights, st.none() | activations(), st.none() | st.floats(1e-6, 1.0)
)
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


def test_a_recipe_without_a_second_split_says_so(tmp_path):
    result = SplitResult(0, 0.5, 0.4, 0.1)
    evidence = Evidence("evaluate", True, result, None, 8.0, 1, 4)
    text = dumps(Recipe({"fc": SiteRecipe()}, None, evidence))
    assert "the drop is on what search saw" in text
    assert loads(text).evidence.confirm is None


def test_version_1_is_readable_for_ever():
    found = load(ASSETS / "recipe_v1.yaml")
    assert found.sites["features.0"].activation.scale == 0.003921568859368563
    assert found.sites["hidden"].learning_rate == 0.01
    assert found.sites["classifier"] == SiteRecipe()
    assert found.folded["features.1"] == "features.0"


GOOD = dumps(recipe(fc=SiteRecipe(WeightScheme(4), ActivationScheme(8, scale=0.5, zero_point=3))))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("bits: 4", "bits: 0", ["fc: weight: bits", "found 0", "allowed: 2, 3"]),
        ("bits: 4", "bits: 99", ["fc: weight: bits", "found 99"]),
        ("bits: 4", "bits: four", ["fc: weight: bits", "'four'"]),
        ("bits: 4", "bits: true", ["fc: weight: bits", "True"]),
        ("bits: 4, ", "", ["fc: weight: bits is missing"]),
        ("per_channel", "per_chanel", ["granularity", "per_chanel", "per_channel"]),
        ("calibration: max", "calibration: maxx", ["calibration", "maxx", "mse"]),
        ("calibration: max", "calibration: percentile_12", ["percentile_12"]),
        ("calibration: max", "calibraton: max", ["calibraton", "did you mean 'calibration'"]),
        ("scale: 0.5", "scale: -1", ["scale", "-1"]),
        ("scale: 0.5", "scale: .nan", ["scale", "nan"]),
        ("zero_point: 3", "zero_point: 300", ["zero_point", "300", "-128 … 127"]),
        ("learning_rate: null", "learning_rate: 0", ["learning_rate"]),
        ("autoquant_recipe: 1", "autoquant_recipe: 2", ["version 2"]),
        ("autoquant_recipe: 1", "other: 1", ["not a recipe"]),
        ("layers:", "layers: []\nlayer:", ["layers"]),
        ("  fc:", "  fc:\n    weight: {bits: 8}\n    activation: {bits: 8}\n  fc:", ["twice"]),
        ("seed: 0", "seed: &a 0\nx: *a", ["aliases"]),
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


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"- 1\n- 2\n", b"[" * 5000, b"a: b: c"])
def test_what_is_no_recipe_is_one_line(tmp_path, data):
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(SpecError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match="cannot read"):
        load(tmp_path / "absent.yaml")


def test_numbers_as_people_write_them():
    text = GOOD.replace("learning_rate: null", "learning_rate: 1e-3")
    assert loads(text).sites["fc"].learning_rate == 0.001


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    save(recipe(), path)
    before = path.read_text()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SpecError, match="No space left"):
        save(recipe(other=SiteRecipe()), path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]

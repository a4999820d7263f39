"""Recipes whose layers were learned together: what of that is in the YAML, and where it may be."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from autoquant.errors import SpecError, StudyError
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.reconstruction.sequential import Sequential
from autoquant.methods.rounding.coordinate_descent import CoordinateDescent
from autoquant.spec.need import Need
from autoquant.spec.needs import needs_of
from autoquant.spec.recipe import ActivationScheme, LearnedFile, Recipe, SiteRecipe, WeightScheme
from autoquant.spec.recipe_file import dumps, load, loads, save
from autoquant.spec.space import SearchSpace
from autoquant.study.parameters import ParameterMap

DIGEST = "0123456789abcdef" * 2
WEIGHT = WeightScheme(4, rounding=CoordinateDescent(0.02, 3))
SITE = SiteRecipe(WEIGHT, ActivationScheme(8), BiasCorrection(), DIGEST)
FILE = LearnedFile("tuned.learned.safetensors", "f" * 64)
RECIPE = Recipe(
    {"fc": SITE, "out": SiteRecipe(WeightScheme(8))},
    reconstruction=Sequential(20.0, 0.1, 4),
    learned=FILE,
)


def line_of(caught):
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_it_survives_yaml():
    text = dumps(RECIPE)
    assert text.startswith("autoquant_recipe: 2\n")
    assert (
        "reconstruction: {method: sequential, ridge: 20.0, damping: 0.1, passes: 4, far: 4.0}"
        in text
    )
    again = loads(text)
    assert again == RECIPE
    assert (again.reconstruction, again.learned) == (RECIPE.reconstruction, FILE)
    assert again.sites["fc"].learned == DIGEST
    assert again.sites["out"].learned == ""
    assert dumps(again) == text


def test_a_recipe_that_learned_nothing_says_nothing_of_it():
    text = dumps(Recipe({"fc": replace(SITE, learned="")}))
    assert "learned" not in text
    assert "reconstruction" not in text
    found = loads(text)
    assert (found.reconstruction, found.learned) == (None, None)


def test_the_file_is_looked_for_beside_the_recipe(tmp_path, monkeypatch):
    path = tmp_path / "some where" / "tuned.yaml"
    save(replace(RECIPE, learned=LearnedFile(str(path.parent / FILE.path), FILE.sha256)), path)
    assert str(tmp_path) not in path.read_text()
    assert load(path).learned == LearnedFile(str(path.parent / FILE.path), FILE.sha256)
    monkeypatch.chdir(path.parent)
    # Absolute: a task may change the folder before what was learned is read.
    known = LearnedFile(str(path.parent / FILE.path), FILE.sha256)
    assert load(path.relative_to(path.parent)).learned == known


@pytest.mark.parametrize(
    "name", ["../x", "/abs", "a/b", "./x", "..", ".", "", "a/", "../../etc/passwd"]
)
def test_a_file_that_is_not_beside_the_recipe_is_refused(name):
    text = dumps(RECIPE).replace(f"file: {FILE.path}", f"file: {name!r}")
    assert text != dumps(RECIPE)
    with pytest.raises(SpecError) as caught:
        loads(text, "r.yaml")
    assert line_of(caught).startswith(f"r.yaml: learned: file: found {name!r}")
    assert "beside the recipe" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (f"  file: {FILE.path}\n", "", "r.yaml: learned: file is missing"),
        (f"  sha256: {FILE.sha256}\n", "", "r.yaml: learned: sha256 is missing"),
        (f"file: {FILE.path}", "file: 3", "r.yaml: learned: file: found 3"),
        (f"file: {FILE.path}", f"flie: {FILE.path}", "r.yaml: learned: "),
        (f"sha256: {FILE.sha256}", "sha256: [1]", "r.yaml: learned: sha256: found [1]"),
        ("method: sequential", "method: sequentail", "did you mean 'sequential'"),
        ("ridge: 20.0", "ridge: -1", "reconstruction: ridge: found -1"),
        ("passes: 4", "passes: 0", "reconstruction: passes: found 0"),
        ("reconstruction: {", "reconstructoin: {", "did you mean 'reconstruction'"),
        (f"learned: {DIGEST}", "learned: 3", "r.yaml: fc: learned: found 3"),
        (f"learned: {DIGEST}", "learned: [a]", "r.yaml: fc: learned: found ['a']"),
    ],
)
def test_a_wrong_field_is_one_line_that_says_where(old, new, words):
    text = dumps(RECIPE).replace(old, new)
    assert text != dumps(RECIPE)
    with pytest.raises(SpecError) as caught:
        loads(text, "r.yaml")
    assert words in line_of(caught)


def test_a_digest_without_a_file_is_refused():
    text = dumps(replace(RECIPE, learned=None))
    with pytest.raises(SpecError) as caught:
        loads(text, "r.yaml")
    assert line_of(caught) == "r.yaml: fc: learned: the recipe names no learned file"
    # Without the digest, it is a recipe like any other.
    plain = text.replace(f"    learned: {DIGEST}\n", "")
    assert loads(plain).sites["fc"] == replace(SITE, learned="")


def test_what_was_learned_is_part_of_what_the_model_is():
    keys = {
        recipe.key()
        for recipe in (
            RECIPE,
            RECIPE.with_sites({**RECIPE.sites, "fc": replace(SITE, learned="")}),
            RECIPE.with_sites({**RECIPE.sites, "fc": replace(SITE, learned=DIGEST[::-1])}),
        )
    }
    assert len(keys) == 3
    # But not where it lies.
    assert replace(RECIPE, learned=replace(FILE, path="other")).key() == RECIPE.key()


def test_a_layer_in_float_learned_nothing():
    assert SiteRecipe(None, None, BiasCorrection(), DIGEST).canonical() == SiteRecipe()
    assert SITE.canonical() == SITE
    text = dumps(RECIPE).replace("weight: {bits: 4", "weight: {bits: 16}\n    # {bits: 4")
    assert loads(text).sites["fc"].learned == ""


def test_a_weight_that_was_learned_needs_no_calibration_data():
    static = replace(SITE, activation=ActivationScheme(8, scale=0.1, zero_point=0))
    assert needs_of(static) == frozenset()
    assert needs_of(replace(static, learned="")) >= {Need.MOMENTS}
    assert needs_of(SITE) == {Need.RANGE}


LOCK = f"{{weight: {{bits: 4}}, learned: {DIGEST}}}"


def test_a_space_locks_no_layer_to_what_was_learned():
    text = f"autoquant_space: 1\nrules: [{{lock: {LOCK}}}]"
    with pytest.raises(SpecError) as caught:
        SearchSpace.parse(text, "s.yaml")
    assert line_of(caught).startswith("s.yaml: rule 1: lock: learned: ")
    assert SearchSpace.parse(text.replace(f", learned: {DIGEST}", ""), "s").rules[0].fixed


def test_no_parameters_of_a_study_stand_for_what_was_learned():
    layer = SimpleNamespace(
        name="fc", layer="Linear", matrix=(4, 8), activation=True, corrects=True
    )
    space = SearchSpace.parse(
        "autoquant_space: 1\nrules: [{weight_bits: [4, 8], correction: [none, bias]}]", "s"
    )
    mapping = ParameterMap(space.resolve([layer]))
    plain = SiteRecipe(WeightScheme(4), ActivationScheme(8), BiasCorrection())
    assert mapping.decode(mapping.encode({"fc": plain})) == {"fc": plain}
    with pytest.raises(StudyError) as caught:
        mapping.encode({"fc": replace(plain, learned=DIGEST)})
    assert line_of(caught).startswith("fc: it was learned with other layers")

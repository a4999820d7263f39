"""YAML that a stranger may have written: a sound value or one line, whatever is in the file."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from autoquant.errors import SpecError
from autoquant.spec import documents
from autoquant.spec.documents import (
    Fields,
    as_number,
    is_one_of,
    label,
    parse_yaml,
    read_yaml,
    show,
)


def refusal(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "recipe", "r.yaml")
    message = str(caught.value)
    assert message.startswith("r.yaml:")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", ["line 2", "'a' is given twice"]),
        ("a: {b: 1, c: 2, b: 3}", ["line 1", "'b' is given twice"]),
        ("1: x\ntrue: y", ["line 2", "given twice"]),  # equal keys in Python
        ("a: &x 1\nb: *x", ["line 2", "aliases"]),
        ("a: &x [*x]", ["aliases"]),
        ("a: [1\nb: 2", ["line 2", "not valid YAML"]),
        ("a: b: c", ["line 1", "not valid YAML"]),
        ("a: 'open", ["not valid YAML"]),
        ("\ta: 1", ["line 1", "not valid YAML"]),
        ("a: \x00", ["not valid YAML"]),
        ("? [1, 2]\n: x", ["line 1", "a key must be plain text"]),
        ("? {a: 1}\n: x", ["line 1", "a key must be plain text"]),
        ("2020-01-02: x", ["line 1", "a key must be plain text"]),
        ("null: x", ["line 1", "a key must be plain text"]),
        ("a: !!python/object/apply:os.system [echo]", ["line 1", "not valid YAML"]),
        ("a: !!python/name:os.system", ["not valid YAML"]),
        ("a: !!bool maybe", ["does not fit"]),
        ("a: !!int ''", ["does not fit"]),
        ("a: !!int x", ["does not fit"]),
        ("a: !!timestamp soon", ["does not fit"]),
        ("a: 2020-99-99", ["does not fit"]),
        ("a: !!map [b, c]", ["not valid YAML"]),
        ("a: !!set abc", ["not valid YAML"]),
        ("!!map abc", ["not valid YAML"]),
        ("a: " + "9" * 5000, ["does not fit"]),
        ("<<: {a: 1}", ["not valid YAML"]),
        ("", ["not a recipe", "found nothing"]),
        ("# only a remark", ["found nothing"]),
        ("- 1", ["found list"]),
        ("just words", ["found str"]),
        ("--- {a: 1}\n--- {b: 1}", ["not valid YAML"]),
        ("[" * 3000, ["nested too deeply for a recipe"]),
        ("a: " * 2000, ["not valid YAML"]),
        ("{a: " * 3000, ["nested too deeply"]),
    ],
)
def test_what_is_refused(text, words):
    message = refusal(text)
    for word in words:
        assert word in message


def test_ten_levels_of_aliases_are_not_expanded():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)]
    assert "line 2" in refusal("\n".join(lines))


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(text, plain, min_size=1, max_size=3))
def test_what_yaml_wrote_is_read_as_it_was(data):
    assert parse_yaml(yaml.safe_dump(data, allow_unicode=True), "recipe", "r.yaml") == data


@given(st.text(st.sampled_from("ab:-[]{}'\"&*!|>?#%@,.0189e+ \n\t~<=\x85\ufeff"), max_size=40))
def test_any_text_is_data_or_one_line(text):
    try:
        found = parse_yaml(text, "recipe", "r.yaml")
    except SpecError:
        refusal(text)
    else:
        assert isinstance(found, dict)


def test_files_that_are_no_text_or_too_large(tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: \xe9")
    with pytest.raises(SpecError, match=r"r\.yaml: not a recipe: it is not text"):
        read_yaml(path, "recipe")
    with pytest.raises(SpecError, match=r"cannot read the recipe: Is a directory"):
        read_yaml(tmp_path, "recipe")
    with pytest.raises(SpecError, match=r"cannot read the recipe: No such file"):
        read_yaml(tmp_path / "absent.yaml", "recipe")
    monkeypatch.setattr(documents, "MOST_BYTES", 10)
    path.write_text("a: 1\n" * 10)
    with pytest.raises(SpecError, match="larger than"):
        read_yaml(path, "recipe")


def test_a_byte_order_mark_is_no_matter(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: two\r\n")
    assert read_yaml(path, "recipe") == {"a": 1, "b": "two"}


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (0.5, 0.5),
        ("1e-3", 0.001),
        ("  2 ", 2.0),
        (True, None),
        (None, None),
        ("nan", None),
        ("inf", None),
        (math.nan, None),
        (-math.inf, None),
        (10**400, None),
        ("many", None),
        ([1], None),
    ],
)
def test_numbers_as_people_write_them(value, number):
    assert as_number(value) == number


def test_one_of_tells_true_from_one():
    assert is_one_of(1, (1, 2))
    assert not is_one_of(True, (1, 2))
    assert not is_one_of(1.0, (1, 2))
    assert not is_one_of([], (1, 2))
    assert is_one_of(None, (None,))


@given(plain | st.just(16**6000))
def test_what_was_found_is_one_short_line(value):
    text = show(value)
    assert len(text) <= 60
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [("layer.0", "layer.0"), ("", "''"), ("a\nb", r"'a\nb'"), ("x" * 300, "'" + "x" * 56 + "…")],
)
def test_a_name_stays_on_one_line(name, shown):
    assert label(name) == shown


def fields(**data):
    return Fields(data, "r.yaml: fc")


def message_of(call):
    with pytest.raises(SpecError) as caught:
        call()
    return str(caught.value)


def test_a_missing_and_an_unknown_field():
    assert message_of(lambda: fields().take("bits")) == "r.yaml: fc: bits is missing"
    assert fields().take("bits", 3) == 3
    some = fields(bts=4)
    some.take("bits", 8)
    assert message_of(some.close) == (
        "r.yaml: fc: unknown field 'bts': did you mean 'bits'? allowed: bits"
    )
    odd = Fields({3: 4}, "r.yaml")
    odd.take("bits", 8)
    assert message_of(odd.close) == "r.yaml: 3 is no field, allowed: bits"
    huge = Fields({"x" * 10**6: 4}, "r.yaml")
    assert len(message_of(huge.close)) < 200


@pytest.mark.parametrize(
    ("value", "low", "ok"),
    [
        (0, 0, True),
        (-1, 0, False),
        (-1, None, True),
        (5, 5, True),
        (4, 5, False),
        (True, 0, False),
        (2.0, 0, False),
        ("2", 0, False),
        (None, None, False),
    ],
)
def test_integers(value, low, ok):
    if ok:
        assert fields(n=value).integer("n", low=low) == value
    else:
        message = message_of(lambda: fields(n=value).integer("n", low=low))
        assert message.startswith(f"r.yaml: fc: n: found {value!r}, allowed: an integer")


def test_numbers_have_bounds():
    assert fields(x=0).number("x", low=0) == 0.0
    assert "allowed: a number > 0" in message_of(lambda: fields(x=0).number("x", low=0, above=True))
    assert "allowed: a number ≥ 1" in message_of(lambda: fields(x=0.5).number("x", low=1))
    assert "allowed: a number" in message_of(lambda: fields(x="much").number("x"))


def test_text_and_flags():
    assert fields(a="b").text("a") == "b"
    assert "allowed: text" in message_of(lambda: fields(a=3).text("a"))
    assert fields(a=False).flag("a") is False
    assert "allowed: True, False" in message_of(lambda: fields(a=1).flag("a"))
    assert "expected fields, found [1]" in message_of(lambda: Fields([1], "r.yaml"))

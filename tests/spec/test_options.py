"""What a user asks for, as values."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.errors import UserError
from autoquant.spec.costs import OBJECTIVES
from autoquant.spec.options import (
    TRIALS,
    Options,
    check,
    check_budget,
    narrowest,
    parse_duration,
    parse_latency,
    parse_memory,
    parse_size,
)
from autoquant.spec.recipe import SiteRecipe, WeightScheme
from autoquant.spec.space import SiteSpace

options = st.builds(
    Options,
    max_drop=st.text(max_size=5),
    bits=st.none() | st.floats(2, 16),
    size=st.none() | st.text(max_size=5),
    trials=st.none() | st.integers(1),
    timeout=st.none() | st.floats(1, 1e6),
    seed=st.integers(0, 2**32 - 1),
    max_latency=st.none() | st.text(max_size=5),
    objective=st.none() | st.sampled_from(OBJECTIVES),
    memory=st.none() | st.text(max_size=5),
)


@given(options)
def test_a_study_keeps_them_as_json(found):
    plain = json.loads(json.dumps(found.plain()))
    assert Options.read(plain) == found
    assert Options.read(plain | {"from a later release": 1}) == found
    before = {k: v for k, v in plain.items() if k not in ("max_latency", "objective")}
    assert Options.read(before) == replace(found, max_latency=None, objective=None)


def test_how_many_trials():
    assert Options().most_trials == TRIALS
    assert Options(trials=7).most_trials == 7
    assert Options(trials=7, timeout=9.0).most_trials == 7
    assert Options(timeout=9.0).most_trials is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), (" 2H ", 7200), ("1d", 86400), ("10 m", 600)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "5w", "m", "1e3", "1:30", "9" * 400, "5ms"])
def test_what_is_no_duration(text):
    with pytest.raises(UserError, match=r"^--timeout .*: write a time such as 90s, 10m or 2h$"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("25%", 25_000),
        ("33.3333%", 33_333),
        ("4MB", 4_000_000),
        ("4 MiB", 4 << 20),
        ("1.5kb", 1500),
        ("1.5KiB", 1536),
        ("7b", 7),
        ("1gb", 10**9),
    ],
)
def test_sizes(text, size):
    assert parse_size(text, 100_000) == size


@pytest.mark.parametrize("text", ["", "4", "0%", "-3%", "4 apples", "MB", "9" * 400 + "MB", "%"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match=r"^--size .*: write a share of the float size"):
        parse_size(text, 100_000)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20ms", 0.02), ("0.5s", 0.5), ("300us", 3e-4), (" 5 µs ", 5e-6), ("1S", 1), ("60%", 1.2)],
)
def test_latencies(text, seconds):
    assert parse_latency(text, 2.0) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "20", "0ms", "0%", "-3ms", "5 m", "ms", "9" * 400 + "s", "%"])
def test_what_is_no_latency(text):
    words = r"^--max-latency .*: write a time \(20ms, 0\.5s, 300us\) or a share of the float"
    for refuse in (
        lambda: parse_latency(text, 1.0),
        lambda: check(Options(max_latency=text)),
    ):
        with pytest.raises(UserError, match=words):
            refuse()


def test_who_asks_for_latency():
    assert not Options().asks_latency
    assert not Options(objective="bitops").asks_latency
    assert Options(objective="latency").asks_latency
    assert Options(max_latency="60%").asks_latency


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Options(bits=1.9), "--bits 1.9: average weight bits lie between 2 and 16"),
        (Options(bits=17), "--bits 17"),
        (Options(bits=float("nan")), "--bits nan"),
        (Options(bits=4, size="25%"), "--bits and --size are two budgets; give one"),
        (Options(objective="speed"), "--objective 'speed': give size, bits, latency, bitops"),
        (Options(trials=0), "--trials 0: give at least 1"),
        (Options(trials=-3), "--trials -3"),
        (Options(seed=-1), "--seed -1: give an integer from 0 to 4294967295"),
        (Options(seed=2**32), "--seed 4294967296"),
        (Options(memory="much"), "--memory 'much'"),
    ],
)
def test_what_no_model_could_satisfy(found, words):
    with pytest.raises(UserError, match=words):
        check(found)


def test_what_is_fine():
    for found in (Options(), Options(bits=2), Options(bits=16, trials=1), Options(seed=2**32 - 1)):
        check(found)


def space(*bits):
    return SiteSpace({"weight_bits": bits})


def test_a_budget_below_the_narrowest_recipe():
    locked = SiteSpace({}, SiteRecipe(WeightScheme(6)))
    spaces = {"a": space(8, 4, 16), "b": locked, "c": SiteSpace({}, SiteRecipe())}
    assert [narrowest(s) for s in spaces.values()] == [4, 6, 16]
    numel = {"a": 600, "b": 300, "c": 100}
    least = (4 * 600 + 6 * 300 + 16 * 100) / 1000
    check_budget(None, spaces, numel)
    check_budget(least, spaces, numel)
    with pytest.raises(UserError, match=r"--bits 5: .* has 5\.8 average .* give --bits 5\.8 or"):
        check_budget(5, spaces, numel)
    thirds = {"a": space(4), "b": space(8)}
    with pytest.raises(UserError, match=r"has 5\.333 average .* give --bits 5\.34 or more"):
        check_budget(5, thirds, {"a": 2, "b": 1})


def test_weights_that_stay_in_float_count_in_a_bit_budget():
    spaces = {"a": SiteSpace({"weight_bits": (8, 4)}, None)}
    check_budget(10, spaces, {"a": 50}, rest=50)
    words = r"has 10 average weight bits, for 50% of the weights stay in float; give --bits 10 or"
    with pytest.raises(UserError, match=words):
        check_budget(8, spaces, {"a": 50}, rest=50)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("0MB", 0), ("512MB", 512 * 10**6), (" 2 GiB", 2**31), ("1.5kb", 1500), ("9b", 9)],
)
def test_memory(text, size):
    assert parse_memory(text) == Options(memory=text).memory_bytes == size
    assert Options().memory_bytes is None


@pytest.mark.parametrize("text", ["", "5", "25%", "-1MB", "1TB", "MB", "0%"])
def test_what_is_no_memory(text):
    message = r"^--memory .*: write a size such as 512MB or 2GB, or 0 for none$"
    with pytest.raises(UserError, match=message):
        parse_memory(text)

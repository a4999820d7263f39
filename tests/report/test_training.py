"""How training goes, in words."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autoquant.report.training import (
    BARS,
    LONGEST,
    PLAIN_BARS,
    live_lines,
    moment_line,
    rates_line,
    sparkline,
)
from autoquant.training.rates import Rate
from autoquant.training.train import Moment

RATES = (
    Rate("a", "weight", 1e-3, 1.0),
    Rate("a", "scale", 2e-5, 0.5),
    Rate("b", "weight", 0.0, 0.0),
    Rate("b", "scale", 3e-4, 1.0),
)
MOMENT = Moment(30, 400, 0.25, 0.125, 0.0625, 0.01, (), "accuracy", 0.875, RATES, 0.2)


def test_a_line_of_a_check():
    assert moment_line(MOMENT) == (
        "step 30 of 400: loss 0.2500, on the search data 0.1250, best 0.0625; accuracy 0.8750; "
        "1.00% of the weights frozen, 20.00% rounded to 0"
    )
    without = moment_line(replace(MOMENT, held=math.inf, value=None, metric=""))
    assert "on the search data inf, best 0.0625; 1.00% of the weights frozen" in without


def test_rates_of_those_that_learn():
    assert rates_line(RATES) == "rates 2e-05 to 0.001 (1 of 4 lowered, 1 stopped)"
    assert rates_line(RATES[:1]) == "rates 0.001 to 0.001"
    assert rates_line(RATES[2:3]) == "no rates (0 of 1 lowered, 1 stopped)"
    assert rates_line(()) == "no rates"


def test_a_sparkline_is_of_logarithms():
    assert sparkline([10.0**-i for i in range(8)]) == BARS[::-1]
    assert sparkline([10.0**-i for i in range(8)], PLAIN_BARS) == PLAIN_BARS[::-1]
    assert len(BARS) == len(PLAIN_BARS)
    assert PLAIN_BARS.isascii()
    assert sparkline([0.5, 0.5]) == BARS[0] * 2
    assert sparkline([1.0, math.inf, 4.0, math.nan, 0.0]) == f"{BARS[0]}x{BARS[-1]}xx"
    assert sparkline([math.nan]) == "x"
    assert sparkline([]) == ""


def test_the_lines_of_a_live_view():
    assert list(live_lines((), (1.0, 3.0))) == ["loss 2.0000; not yet measured on the search data"]
    assert next(live_lines((), ())).startswith("loss; ")
    moments = (replace(MOMENT, held=0.5, loss=0.5), MOMENT)
    high, low = BARS[-1], BARS[0]
    assert list(live_lines(moments, (math.nan, 0.3, 0.1))) == [
        f"loss 0.2000 {high}{low}",
        f"on the search data 0.1250 {high}{low} best 0.0625",
        "accuracy 0.8750; rates 2e-05 to 0.001 (1 of 4 lowered, 1 stopped)",
        "1.00% of the weights frozen, 20.00% rounded to 0",
    ]
    lines = list(live_lines((replace(MOMENT, value=None),) * 99, (math.nan,), ascii_only=True))
    assert lines[0] == "loss " + PLAIN_BARS[0] * LONGEST
    assert lines[2].startswith("rates ")
    assert all(line.isascii() for line in lines)


@pytest.mark.parametrize("ascii_only", [False, True])
def test_lines_fit_an_ordinary_terminal(ascii_only):
    moments = [replace(MOMENT, loss=1.234e-11 / i, held=1.234e-9 / i) for i in range(1, 11)]
    lines = list(live_lines(moments, [1.234e-11], ascii_only=ascii_only))
    assert max(map(len, lines)) <= 80

"""What people are told of a drop."""

import pytest

from autoquant.report.verdicts import reported_line, verdict_line
from autoquant.spec.recipe import Evidence, SplitResult
from autoquant.spec.verdict import Verdict


@pytest.mark.parametrize(
    ("metric", "verdict", "line"),
    [
        (
            "accuracy",
            Verdict("NOT PROVEN", 0.01, 0.0046, (-0.009, 0.018), 0.032, 436, 2871),
            "drop ≤ 1 point: NOT PROVEN (drop +0.46, 95% interval -0.90 … +1.80; 3.2% of samples "
            "flip; a proof would need about 2,900 samples, there are 436)",
        ),
        (
            "accuracy",
            Verdict("PASS", 0.005, -0.001, (-0.003, 0.002), 0.002, 20000, 900),
            "drop ≤ 0.5 points: PASS (drop -0.10, 95% interval -0.30 … +0.20; 0.2% of samples "
            "flip)",
        ),
        (
            "mae",
            Verdict("FAIL", 0.02, 0.5, (0.4, 0.6), None, 100, None),
            "drop ≤ 0.02: FAIL (drop +0.5, 95% interval +0.4 … +0.6)",
        ),
        (
            "mae",
            Verdict("NOT PROVEN", 0.02, 0.03, (-0.4, 0.6), None, 100, None),
            "drop ≤ 0.02: NOT PROVEN (drop +0.03, 95% interval -0.4 … +0.6; it is not below the "
            "limit, so more samples would hardly prove it)",
        ),
        (
            "evaluate",
            Verdict("NOT PROVEN", 0.02, 0.0, None, None, 0, None),
            "drop ≤ 0.02: NOT PROVEN (drop +0; how sure that is can't be told from what was "
            "measured)",
        ),
    ],
)
def test_the_verdict_is_one_line(metric, verdict, line):
    assert verdict_line(verdict, metric) == line


def test_the_confirmed_number_stands_beside_the_searched_one():
    seen, fresh = SplitResult(400, 0.83, 0.82, 0.01), SplitResult(436, 0.84, 0.8, 0.04)
    line = reported_line(Evidence("accuracy", True, seen, fresh, 4.0, 1, 4))
    assert line == (
        "accuracy (higher is better): float 0.8400, quantized 0.8000, drop 0.0400 (confirmed on "
        "436 samples; on the 400 searched by: quantized 0.8200, drop 0.0100)"
    )
    line = reported_line(Evidence("accuracy", True, seen, None, 4.0, 1, 4))
    assert line.endswith("drop 0.0100 (measured on the data that the search saw, 400 samples)")
    bare = SplitResult(0, 0.84, 0.8, 0.04)
    line = reported_line(Evidence("evaluate", True, bare, bare, 4.0, 1, 4))
    assert "drop 0.0400 (confirmed; on the data searched by: quantized 0.8000" in line
    line = reported_line(Evidence("evaluate", True, bare, None, 4.0, 1, 4))
    assert line.endswith("(measured on the data that the search saw)")

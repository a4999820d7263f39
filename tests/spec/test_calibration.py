"""Names of calibration methods; the methods themselves are tested with the observers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.observers import calibration_names, is_calibration
from autoquant.spec.calibration import (
    ACTIVATION_CALIBRATIONS,
    PERCENTILES,
    WEIGHT_CALIBRATIONS,
    percentile_of,
)
from autoquant.spec.needs import WEIGHT_NEEDS


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        ("percentile_99.9", 99.9),
        ("percentile_99.9999", 99.9999),
        ("percentile_100", 100.0),
        ("percentile_51", 51.0),
        ("percentile_50", None),
        ("percentile_100.1", None),
        ("percentile_101", None),
        ("percentile_9", None),
        ("percentile_-99", None),
        ("percentile_99.", None),
        ("percentile_1e2", None),
        ("percentile_nan", None),
        ("percentile", None),
        ("xpercentile_99", None),
        ("percentile_99\n", None),
        ("max", None),
    ],
)
def test_percentiles_by_name(name, percent):
    assert percentile_of(name) == percent


@given(st.floats(50.001, 100))
def test_any_percentile_can_be_named(percent):
    assert percentile_of(f"percentile_{percent}") == percent


def test_every_name_has_a_method():
    """The names are here, the methods with the observers: neither without the other."""
    assert [percentile_of(p) for p in PERCENTILES] == [99.9, 99.99, 99.999, 99.9999]
    plain = set(WEIGHT_CALIBRATIONS) - set(WEIGHT_NEEDS)
    for name in plain | set(ACTIVATION_CALIBRATIONS):
        assert is_calibration(name)
    assert {"max", "moving_average", "entropy", "mse"} <= set(calibration_names())

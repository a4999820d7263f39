import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization import HistogramObserver, MovingAverageMinMaxObserver

from autoquant.errors import SpecError, TrialError
from autoquant.observers import (
    CALIBRATIONS,
    activation_range,
    calibration_names,
    is_calibration,
    quantization_error,
)
from autoquant.observers.statistics import StatisticsCollector, TensorStatistics
from autoquant.quant.affine import QParams, choose_qparams, fake_quantize
from autoquant.spec.calibration import ACTIVATION_CALIBRATIONS


def collect(*calls: torch.Tensor) -> TensorStatistics:
    collector = StatisticsCollector()
    for call in calls:
        collector.update(call)
    return collector.finish()


def error_of(x: torch.Tensor, lo: float, hi: float, bits: int, symmetric: bool) -> float:
    p = choose_qparams(torch.tensor(lo), torch.tensor(hi), bits, symmetric=symmetric)
    return (fake_quantize(x, p).double() - x.double()).square().mean().item()


def normal(n: int = 8_000) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


TENSORS = {
    "normal": normal(),
    "relu": normal().relu(),
    "negative": -normal().abs() - 0.1,
    "gelu": torch.nn.functional.gelu(normal() * 3),
    "heavy": normal() * torch.exp(1.5 * normal().flip(0)),
    "outliers": torch.cat([normal() * 0.05, torch.tensor([-7.0, 9.0, 11.0])]),
    "binary": (normal() > 0.3).float(),
    "shifted": normal() + 20,
}


def test_names_are_those_that_recipes_document() -> None:
    assert calibration_names() == CALIBRATIONS.names() == ACTIVATION_CALIBRATIONS
    assert all(is_calibration(name) for name in calibration_names())
    assert is_calibration("percentile_99.5")
    assert not is_calibration("percentile_50")
    assert not is_calibration("minmax")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("entropi", "did you mean 'entropy'"),
        ("percentile_50", "50 < P ≤ 100"),
        ("percentile_100.1", "50 < P ≤ 100"),
        ("percentile_x", "50 < P ≤ 100"),
        ("percentile", "50 < P ≤ 100"),
    ],
)
def test_unknown_names_are_one_helpful_line(name: str, says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        activation_range(collect(normal()), name, 8, True)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ACTIVATION_CALIBRATIONS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_unusable_statistics_are_refused(name: str, symmetric: bool) -> None:
    with pytest.raises(TrialError, match="NaN or Inf"):
        activation_range(collect(torch.tensor([1.0, math.nan])), name, 8, symmetric)
    with pytest.raises(TrialError, match="no numbers"):
        activation_range(collect(), name, 8, symmetric)


@settings(max_examples=150, deadline=None)
@given(
    numbers=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False) | st.just(0.0),
        min_size=1,
        max_size=40,
    ),
    name=st.sampled_from([*ACTIVATION_CALIBRATIONS, "percentile_75"]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_ranges_hold_zero_and_stay_within_the_largest(
    numbers: list[float], name: str, bits: int, symmetric: bool
) -> None:
    stats = collect(torch.tensor(numbers))
    lo, hi = activation_range(stats, name, bits, symmetric)
    assert lo <= 0 <= hi
    if symmetric:
        assert lo == -hi
        assert hi <= stats.absmax
    else:
        assert min(stats.minimum, 0) <= lo
        assert hi <= max(stats.maximum, 0)
    if any(numbers):
        assert hi > lo


@pytest.mark.parametrize("name", ACTIVATION_CALIBRATIONS)
def test_one_sided_tensors_have_one_sided_ranges(name: str) -> None:
    lo, hi = activation_range(collect(TENSORS["relu"]), name, 8, False)
    assert lo == 0.0
    assert hi > 1.0
    lo, hi = activation_range(collect(TENSORS["negative"]), name, 8, False)
    assert hi == 0.0
    assert lo < -1.0


@pytest.mark.parametrize("name", ACTIVATION_CALIBRATIONS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_constants_survive(name: str, symmetric: bool) -> None:
    for value in (0.0, 0.7, -123.0):
        lo, hi = activation_range(collect(torch.full((50,), value)), name, 8, symmetric)
        assert max(-lo, hi) == pytest.approx(abs(value))


def test_max_covers_everything() -> None:
    stats = collect(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 0.0]))
    assert activation_range(stats, "max", 8, False) == (-1.0, 3.0)
    assert activation_range(stats, "max", 8, True) == (-3.0, 3.0)


def test_moving_average_is_pytorch_s() -> None:
    calls = torch.randn(30, 100, generator=torch.Generator().manual_seed(0)) + 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observer = MovingAverageMinMaxObserver(averaging_constant=0.01)
    for call in calls:
        observer(call)
    lo, hi = activation_range(collect(*calls), "moving_average", 8, False)
    assert lo == pytest.approx(observer.min_val.item(), rel=1e-5)
    assert hi == pytest.approx(observer.max_val.item(), rel=1e-5)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("p", [75, 99, 99.9, 99.99, 100])
def test_percentiles_are_numpy_s(name: str, p: float) -> None:
    x = TENSORS[name]
    stats, data = collect(x), x.double().numpy()
    lo, hi = activation_range(stats, f"percentile_{p}", 8, False)
    assert lo == pytest.approx(min(np.percentile(data, 100 - p), 0), abs=stats.bin_width)
    assert hi == pytest.approx(max(np.percentile(data, p), 0), abs=stats.bin_width)
    _, top = activation_range(stats, f"percentile_{p}", 8, True)
    assert top == pytest.approx(np.percentile(np.abs(data), p), abs=stats.bin_width)


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_of_hardly_anything_but_zeros_is_the_maximum(symmetric: bool) -> None:
    x = torch.zeros(10_000)
    x[0] = 2.0
    _, hi = activation_range(collect(x), "percentile_99.9", 8, symmetric)
    assert hi == 2.0


def ranges(x: torch.Tensor, symmetric: bool) -> list[tuple[float, float]]:
    """A dense grid, of parts of the largest range."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    if symmetric or not low or not high:
        if symmetric:
            high = max(-low, high)
            low = -high
        return [(low * f, high * f) for f in np.linspace(0.004, 1, 250)]
    parts = np.linspace(0, 1, 17)
    return [(low * f, high * g) for f in parts for g in parts if f or g]


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_the_best_of_a_dense_grid(name: str, bits: int, symmetric: bool) -> None:
    x = TENSORS[name]
    lo, hi = activation_range(collect(x), "mse", bits, symmetric)
    low, high = zip(*ranges(x, symmetric), strict=True)
    p = choose_qparams(torch.tensor(low), torch.tensor(high), bits, symmetric=symmetric)
    best = min(
        (fake_quantize(x, QParams(scale, zero, bits)) - x).square().mean().item()
        for scale, zero in zip(p.scale, p.zero_point, strict=True)
    )
    assert error_of(x, lo, hi, bits, symmetric) <= best * 1.02 + 1e-9


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_never_worse_than_any_other(name: str, bits: int, symmetric: bool) -> None:
    stats = collect(TENSORS[name])
    errors = {
        method: quantization_error(
            stats, *activation_range(stats, method, bits, symmetric), bits, symmetric
        )
        for method in ACTIVATION_CALIBRATIONS
    }
    assert errors["mse"] <= errors["max"]
    assert errors["mse"] <= min(errors.values()) * 1.01 + 1e-12


@pytest.mark.parametrize("name", ["normal", "gelu", "heavy"])
def test_mse_is_at_least_as_good_as_pytorch_s_histogram_observer(name: str) -> None:
    x = TENSORS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observer = HistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_affine)
        observer(x)
        scale, zero_point = observer.calculate_qparams()
    theirs = torch.fake_quantize_per_tensor_affine(
        x, scale.item(), int(zero_point.item()), -128, 127
    )
    lo, hi = activation_range(collect(x), "mse", 8, False)
    ours = error_of(x, lo, hi, 8, False)
    assert ours <= (theirs - x).double().square().mean().item() * 1.01


@pytest.mark.parametrize("symmetric", [True, False])
def test_entropy_clips_heavy_tails_badly_and_a_high_percentile_does_not(symmetric: bool) -> None:
    """As published for BERT (Wu et al. 2020, table 5), where a few channels are far out."""
    generator = torch.Generator().manual_seed(0)
    bulk = torch.randn(400_000, generator=generator) * 0.3
    tail = torch.randn(400, generator=generator) * 3 + 15
    x = torch.cat([bulk, tail[:200], -tail[200:]])
    stats = collect(x)
    signal = x.square().mean().item()

    def sqnr(method: str) -> float:
        lo, hi = activation_range(stats, method, 8, symmetric)
        return 10 * math.log10(signal / error_of(x, lo, hi, 8, symmetric))

    _, entropy_top = activation_range(stats, "entropy", 8, symmetric)
    assert entropy_top < 0.5 * stats.maximum
    assert sqnr("percentile_99.999") > sqnr("entropy") + 10
    assert sqnr("mse") >= sqnr("percentile_99.999") - 0.1
    assert sqnr("percentile_99.9") < sqnr("percentile_99.999") - 1

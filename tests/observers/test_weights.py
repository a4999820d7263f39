import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.errors import SpecError, TrialError
from autoquant.observers import weight_range, weights
from autoquant.quant.affine import QParams, choose_qparams, fake_quantize
from autoquant.spec.calibration import WEIGHT_CALIBRATIONS

SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False])


def blocks(n: int = 6, k: int = 300) -> torch.Tensor:
    """Rows of several shapes: normal, heavy-tailed, one outlier, one-sided, far from zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, k, generator=generator) * 0.02
    x[1] = x[1] ** 3 * 1000
    x[2, 7] = 1.0
    x[3] = x[3].abs()
    x[4] = x[4] - 0.3
    return x


def errors(
    x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, bits: int, symmetric: bool
) -> torch.Tensor:
    p = choose_qparams(lo, hi, bits, symmetric=symmetric)
    p = QParams(p.scale[:, None], p.zero_point[:, None], bits)
    return (fake_quantize(x, p) - x).double().square().sum(1)


def test_max() -> None:
    x = torch.tensor([[-1.0, 0.5], [2.0, 3.0]])
    lo, hi = weight_range(x, "max", 8, symmetric=False)
    assert (lo.tolist(), hi.tolist()) == ([-1.0, 2.0], [0.5, 3.0])
    lo, hi = weight_range(x, "max", 8, symmetric=True)
    assert (lo.tolist(), hi.tolist()) == ([-1.0, -3.0], [1.0, 3.0])


@pytest.mark.parametrize("p", [50.1, 75, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("k", [1, 2, 7, 300])
def test_percentiles_are_numpy_s(p: float, k: int) -> None:
    x = blocks(k=300)[:, :k]
    data = x.double().numpy()
    lo, hi = weight_range(x, f"percentile_{p}", 8, symmetric=False)
    np.testing.assert_allclose(hi, np.percentile(data, p, axis=1), rtol=1e-5)
    np.testing.assert_allclose(lo, np.percentile(data, 100 - p, axis=1), rtol=1e-5)
    lo, hi = weight_range(x, f"percentile_{p}", 8, symmetric=True)
    np.testing.assert_allclose(hi, np.percentile(np.abs(data), p, axis=1), rtol=1e-5)
    assert torch.equal(lo, -hi)


@SYMMETRIC
def test_percentile_of_a_pruned_block_is_its_maximum(symmetric: bool) -> None:
    x = torch.zeros(2, 5000)
    x[0, 3] = 2.0
    _, hi = weight_range(x, "percentile_99.9", 8, symmetric)
    assert hi.tolist() == [2.0, 0.0]


@SYMMETRIC
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_is_the_best_of_a_dense_grid(bits: int, symmetric: bool) -> None:
    x = blocks()
    low, high = weight_range(x, "max", bits, symmetric)
    low, high = low.clamp(max=0), high.clamp(min=0)
    grid = torch.linspace(0.02, 1, 500)
    best = torch.stack([errors(x, low * f, high * f, bits, symmetric) for f in grid]).amin(0)
    lo, hi = weight_range(x, "mse", bits, symmetric)
    assert (errors(x, lo, hi, bits, symmetric) <= best * 1.02 + 1e-12).all()


@SYMMETRIC
@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(
        st.floats(-(2.0**60), 2.0**60, width=32) | st.floats(-1, 1, width=32),
        min_size=1,
        max_size=30,
    ),
    bits=st.integers(2, 8),
)
def test_mse_is_never_worse_than_max(numbers: list[float], bits: int, symmetric: bool) -> None:
    x = torch.tensor([numbers])
    largest = weight_range(x, "max", bits, symmetric)
    found = weight_range(x, "mse", bits, symmetric)
    before, after = (errors(x, *r, bits, symmetric).item() for r in (largest, found))
    assert after <= before * (1 + 1e-6)


@SYMMETRIC
def test_blocks_larger_than_a_chunk_give_the_same(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = blocks()
    expected = weight_range(x, "mse", 3, symmetric)
    for chunk in (130, 700):
        monkeypatch.setattr(weights, "_CHUNK", chunk)
        for found, wanted in zip(weight_range(x, "mse", 3, symmetric), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0.01, atol=0)


@SYMMETRIC
@pytest.mark.parametrize("method", WEIGHT_CALIBRATIONS)
def test_zeros_constants_and_empty_blocks(method: str, symmetric: bool) -> None:
    lo, hi = weight_range(torch.tensor([[0.0] * 4, [0.7] * 4, [-3.0] * 4]), method, 8, symmetric)
    assert torch.maximum(-lo, hi).tolist() == pytest.approx([0.0, 0.7, 3.0])
    for shape in ((0, 4), (3, 0)):
        lo, hi = weight_range(torch.empty(shape), method, 8, symmetric)
        assert lo.shape == hi.shape == shape[:1]


@SYMMETRIC
@pytest.mark.parametrize("method", WEIGHT_CALIBRATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_taken_as_float32(
    dtype: torch.dtype, method: str, symmetric: bool
) -> None:
    x = blocks().to(dtype)
    found = weight_range(x, method, 4, symmetric)
    expected = weight_range(x.float(), method, 4, symmetric)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", WEIGHT_CALIBRATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_weights_fail_the_trial(method: str, bad: float) -> None:
    x = blocks()
    x[5, 5] = bad
    with pytest.raises(TrialError, match="NaN or Inf"):
        weight_range(x, method, 8, symmetric=True)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(SpecError, match="did you mean 'mse'"):
        weight_range(blocks(), "msee", 8, symmetric=True)
    with pytest.raises(SpecError, match="percentile_50"):
        weight_range(blocks(), "percentile_50", 8, symmetric=True)

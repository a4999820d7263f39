import numpy as np
import pytest
import torch
from scipy.integrate import quad

from autoquant.errors import TrialError
from autoquant.observers import quantization_error, token_error
from autoquant.observers.distortion import Distortion
from autoquant.observers.statistics import StatisticsCollector, TensorStatistics
from autoquant.quant.affine import choose_qparams, fake_quantize


def collect(x: torch.Tensor, token_dim: int | None = None) -> TensorStatistics:
    collector = StatisticsCollector(token_dim)
    collector.update(x)
    return collector.finish()


def error_of(x: torch.Tensor, lo: float, hi: float, bits: int, symmetric: bool) -> float:
    """Quantize the numbers themselves."""
    p = choose_qparams(torch.tensor(lo), torch.tensor(hi), bits, symmetric=symmetric)
    return (fake_quantize(x, p).double() - x.double()).square().mean().item()


def normal(n: int = 100_000) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


TENSORS = {
    "normal": normal(),
    "relu": normal().relu(),
    "negative": -normal().abs() - 0.1,
    "gelu": torch.nn.functional.gelu(normal() * 3),
    "heavy": normal() * torch.exp(1.5 * normal().flip(0)),
    "binary": (normal() > 0.3).float(),
    "shifted": normal() + 20,
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matches_the_quantizer_on_the_numbers(name: str, bits: int, symmetric: bool) -> None:
    x = TENSORS[name]
    stats = collect(x)
    for part in (0.02, 0.3, 0.77, 1.0):
        lo, hi = part * x.min().item(), part * x.max().item()
        found = quantization_error(stats, lo, hi, bits, symmetric)
        assert found == pytest.approx(error_of(x, lo, hi, bits, symmetric), rel=0.03, abs=1e-9)


def test_is_exact_for_steps_much_finer_than_a_bin() -> None:
    x = torch.cat([torch.rand(200_000) - 0.5, torch.tensor([2000.0])])
    stats = collect(x)
    assert stats.bin_width == 0.5
    scale = 0.2 / 127
    inside = quad(lambda v: (v - scale * round(v / scale)) ** 2, 0, 0.2, limit=500)[0]
    outside = quad(lambda v: (v - 0.2) ** 2, 0.2, 0.5)[0]
    expected = 2 * (inside + outside) + (2000 - 0.2) ** 2 / len(x)
    assert quantization_error(stats, -0.2, 0.2, 8, True) == pytest.approx(expected, rel=1e-3)


def test_many_ranges_at_once_equal_one_by_one() -> None:
    stats = collect(TENSORS["gelu"])
    lo, hi = np.linspace(-0.2, 0, 7), np.linspace(0.5, 12, 7)
    errors = Distortion(stats)(lo, hi, 4, False)
    for i in range(7):
        assert errors[i] == quantization_error(stats, lo[i], hi[i], 4, False)


def test_zeros_and_constants_at_the_end_of_the_range_cost_nothing() -> None:
    assert quantization_error(collect(torch.zeros(5)), 0.0, 0.0, 2, False) == 0.0
    assert quantization_error(collect(torch.full((5,), 3.0)), 0.0, 3.0, 2, False) < 1e-12
    assert quantization_error(collect(torch.full((5,), -3.0)), -3.0, 3.0, 8, True) < 1e-12


def per_token(x: torch.Tensor, bits: int, symmetric: bool) -> float:
    p = choose_qparams(
        x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits, symmetric=symmetric
    )
    if symmetric:
        top = x.abs().amax(-1, keepdim=True)
        p = choose_qparams(-top, top, bits, symmetric=True)
    return (fake_quantize(x, p) - x).double().square().mean().item()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [5, 6, 8])
@pytest.mark.parametrize("shape", ["normal", "relu"])
def test_token_error_predicts_dynamic_quantization(shape: str, bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    spread = torch.exp(torch.randn(500, 1, generator=generator))
    x = torch.randn(500, 256, generator=generator) * spread
    x = x.relu() if shape == "relu" else x
    predicted = token_error(collect(x, token_dim=-1), bits, symmetric)
    assert predicted == pytest.approx(per_token(x, bits, symmetric), rel=0.1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_token_error_of_coarse_steps_is_near(bits: int, symmetric: bool) -> None:
    x = normal().reshape(-1, 250)
    predicted = token_error(collect(x, token_dim=-1), bits, symmetric)
    assert 0.6 < predicted / per_token(x, bits, symmetric) < 1.7


def test_unusable_statistics_are_refused() -> None:
    with pytest.raises(TrialError, match="NaN or Inf"):
        quantization_error(collect(torch.tensor([1.0, torch.nan])), 0, 1, 8, False)
    with pytest.raises(TrialError, match="no numbers"):
        quantization_error(collect(torch.empty(0)), 0, 1, 8, False)
    with pytest.raises(TrialError, match="no tokens"):
        token_error(collect(torch.ones(3)), 8, True)

"""Output error against its definition, and ranges against brute force."""

import numpy as np
import pytest
import torch

from autoquant.observers import output_error as module
from autoquant.observers.output_error import OutputError, output_qparams
from autoquant.observers.weights import weight_range
from autoquant.quant.affine import QParams, choose_qparams, dequantize, quantize
from autoquant.quant.blocks import from_blocks, to_blocks

SCHEMES = (True, False)


def inputs(groups, n, seed=0, rows=500):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((groups, rows, n)) @ rng.standard_normal((groups, n, n))
    return torch.from_numpy(np.einsum("gri,grj->gij", mixed, mixed) / rows).float()


@pytest.mark.parametrize("groups", [1, 3])
def test_the_error_is_that_of_the_definition(groups):
    moments = inputs(groups, 6)
    delta = torch.randn(4 * groups, 6)
    d = delta.reshape(groups, 4, 6)
    expected = torch.einsum("gci,gij,gcj->gc", d, moments, d).flatten()
    found = OutputError.of(moments).of_blocks(delta, 1)
    assert torch.allclose(found[:, 0], expected, rtol=1e-4)


def test_blocks_are_taken_one_by_one():
    moments = inputs(1, 8)
    delta = torch.randn(3, 8)
    found = OutputError.of(moments).of_blocks(delta, 2)
    for block in (0, 1):
        part = slice(4 * block, 4 * block + 4)
        d, c = delta[:, part], moments[0, part, part]
        assert torch.allclose(found[:, block], ((d @ c) * d).sum(1), rtol=1e-4)


def test_a_diagonal_serves_where_there_is_no_more():
    diagonal = torch.rand(2, 5)
    delta = torch.randn(6, 5)
    expected = (delta.reshape(2, 3, 5).square() * diagonal[:, None]).sum(2).flatten()
    assert torch.allclose(OutputError.of(diagonal).of_blocks(delta, 1)[:, 0], expected)


def test_a_wide_input_keeps_its_strong_directions(monkeypatch):
    torch.manual_seed(0)
    strong = torch.randn(40, 3)
    moments = (strong @ strong.T + 0.01 * torch.eye(40))[None]
    monkeypatch.setattr(module, "EXACT", 8)
    monkeypatch.setattr(module, "RANK", 5)
    delta = torch.randn(50, 40)
    exact = ((delta @ moments[0]) * delta).sum(1)
    found = OutputError.of(moments).of_blocks(delta, 1)[:, 0]
    assert torch.allclose(found, exact, rtol=1e-2)
    again = OutputError.of(moments).of_blocks(delta, 1)[:, 0]
    assert torch.equal(found, again)


def error_of(matrix, p, granularity, moments):
    blocks = to_blocks(matrix, granularity)
    made = from_blocks(dequantize(quantize(blocks, p), p), tuple(matrix.shape))
    delta = (made - matrix).double()
    return ((delta @ moments[0].double()) * delta).sum(1)


@pytest.mark.parametrize("symmetric", SCHEMES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_channels_are_near_the_best_of_very_many_ranges(bits, symmetric):
    torch.manual_seed(bits)
    moments, matrix = inputs(1, 12, bits), torch.randn(5, 12)
    error = OutputError.of(moments)
    p = output_qparams(matrix, error, "per_channel", bits, symmetric=symmetric)
    found = error_of(matrix, p, "per_channel", moments)
    lo, hi = weight_range(matrix, "max", bits, symmetric)
    best = torch.full((5,), torch.inf, dtype=torch.float64)
    for factor in np.linspace(0.15, 1.0, 1500):
        tried = choose_qparams(
            (lo * factor)[:, None], (hi * factor)[:, None], bits, symmetric=symmetric
        )
        best = torch.minimum(best, error_of(matrix, tried, "per_channel", moments))
    widest = choose_qparams(lo[:, None], hi[:, None], bits, symmetric=symmetric)
    assert bool((found <= error_of(matrix, widest, "per_channel", moments) * 1.0001).all())
    # A coarse search does not find every spike of a jagged function; on average it comes near.
    assert float((found / best).mean()) < 1.35


@pytest.mark.parametrize("granularity", ["per_tensor", "per_group_32"])
@pytest.mark.parametrize("symmetric", SCHEMES)
def test_other_granularities_are_no_worse_than_max(granularity, symmetric):
    torch.manual_seed(0)
    moments, matrix = inputs(1, 64), torch.randn(6, 64)
    p = output_qparams(matrix, OutputError.of(moments), granularity, 4, symmetric=symmetric)
    lo, hi = weight_range(to_blocks(matrix, granularity), "max", 4, symmetric)
    widest = choose_qparams(lo[:, None], hi[:, None], 4, symmetric=symmetric)
    assert isinstance(p, QParams)
    assert p.scale.shape == widest.scale.shape
    mine = error_of(matrix, p, granularity, moments).sum()
    assert mine < error_of(matrix, widest, granularity, moments).sum()


def test_zeros_and_constants_keep_usable_scales():
    matrix = torch.zeros(3, 4)
    matrix[1] = 0.5
    p = output_qparams(matrix, OutputError.of(inputs(1, 4)), "per_channel", 4, symmetric=True)
    assert bool((p.scale > 0).all())
    assert torch.equal(dequantize(quantize(matrix, p), p)[0], torch.zeros(4))

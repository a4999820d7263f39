"""Quantized weights against NumPy, block by block."""

import numpy as np
import pytest
import torch
from torch import nn

from autoquant.errors import SpecError, TrialError
from autoquant.nn.sites import find_sites
from autoquant.nn.weights import quantize_weight
from autoquant.spec.recipe import WeightScheme

LAYERS = {
    "linear": lambda: nn.Linear(64, 3),
    "conv": lambda: nn.Conv2d(64, 4, (2, 1), groups=2),
    "conv_transpose": lambda: nn.ConvTranspose2d(32, 3, 2),
    "embedding": lambda: nn.Embedding(3, 32),
}


def rows_of(weight, channel_axis):
    """Return the weights of each output channel, as a matrix."""
    return np.stack(
        [np.take(weight, c, channel_axis).ravel() for c in range(weight.shape[channel_axis])]
    )


def by_hand(block, bits, symmetric):
    """Return ``block`` rounded to the grid that covers all of it, and its integers."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    lo, hi = np.minimum(block.min(), 0), np.maximum(block.max(), 0)
    if symmetric:
        scale, zero_point = max(-lo, hi) / np.float32(qmax), np.float32(0)
    else:
        scale = (hi - lo) / np.float32(qmax - qmin)
        zero_point = qmin - np.rint(lo / scale)
    q = (np.rint(block / scale) + zero_point).clip(qmin, qmax)
    return (q - zero_point) * scale, q


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group_32"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_every_block_is_rounded_to_its_own_grid(kind, bits, granularity, scheme):
    torch.manual_seed(bits)
    layer = LAYERS[kind]()
    (site,), _ = find_sites(nn.Sequential(layer))
    made = quantize_weight(layer.weight, site, WeightScheme(bits, granularity, scheme))
    rows = rows_of(layer.weight.detach().numpy(), site.channel_axis)
    columns = {"per_tensor": rows.size, "per_channel": rows.shape[1], "per_group_32": 32}
    blocks = rows.reshape(-1, columns[granularity])
    real, integers = zip(*(by_hand(b, bits, scheme == "symmetric") for b in blocks), strict=True)
    assert np.array_equal(made.q.numpy(), np.stack(integers).reshape(rows.shape))
    assert made.qparams.scale.shape == (len(blocks), 1)
    expected = np.stack(real).reshape(rows.shape)
    assert np.array_equal(made.matrix().numpy(), expected)
    found = made.dequantize()
    assert found.shape == layer.weight.shape
    assert np.array_equal(rows_of(found.numpy(), site.channel_axis), expected)


@pytest.mark.parametrize("calibration", ["percentile_99.9", "mse", "percentile_90"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_other_calibrations_round_to_the_nearest_point_of_a_narrower_grid(calibration, scheme):
    torch.manual_seed(0)
    layer = nn.Linear(200, 3)
    with torch.no_grad():
        layer.weight[:, 0] = 0.2  # far from the others
    (site,), _ = find_sites(nn.Sequential(layer))
    widest = quantize_weight(layer.weight, site, WeightScheme(3, scheme=scheme))
    made = quantize_weight(layer.weight, site, WeightScheme(3, "per_channel", scheme, calibration))
    scale, zero_point = made.qparams.scale, made.qparams.zero_point
    assert (scale < widest.qparams.scale).all()
    points = (torch.arange(-4, 4)[None] - zero_point) * scale
    distance = (layer.weight[..., None] - points[:, None]).abs()
    nearest = (layer.weight - made.matrix()).abs()
    torch.testing.assert_close(nearest, distance.amin(-1), atol=1e-6, rtol=0)


def test_weights_in_half_precision_are_quantized_in_float32():
    layer = nn.Linear(8, 4).half()
    (site,), _ = find_sites(nn.Sequential(layer))
    made = quantize_weight(layer.weight, site, WeightScheme(4))
    same = quantize_weight(layer.weight.float(), site, WeightScheme(4))
    assert torch.equal(made.q, same.q)
    assert made.dequantize().dtype == torch.float32
    assert made.dequantize(torch.float16).dtype == torch.float16


def test_groups_that_do_not_divide_and_weights_that_are_not_finite_are_refused():
    layer = nn.Linear(48, 2)
    (site,), _ = find_sites(nn.Sequential(layer))
    with pytest.raises(SpecError, match="per_group_32 does not divide the 48 inputs"):
        quantize_weight(layer.weight, site, WeightScheme(4, "per_group_32"))
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            layer.weight[0, 0] = bad
        with pytest.raises(TrialError, match="NaN or Inf"):
            quantize_weight(layer.weight, site, WeightScheme(4))

"""Quantized layers against the float layer's function on weights and inputs made by NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.nn.layouts import LAYOUTS
from autoquant.nn.modules import QUANTIZED
from autoquant.observers.calibration import activation_range
from autoquant.observers.weights import weight_range
from autoquant.spec.calibration import (
    ACTIVATION_CALIBRATIONS,
    WEIGHT_CALIBRATIONS,
)
from autoquant.spec.needs import WEIGHT_NEEDS
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

Array = np.ndarray
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(32, 5), (4, 3, 32)),
    "conv1d": (lambda: nn.Conv1d(32, 4, 3, padding="same", padding_mode="reflect"), (2, 32, 6)),
    "conv2d": (lambda: nn.Conv2d(64, 4, 2, groups=2, stride=2, padding=1), (2, 64, 4, 4)),
    "conv_depthwise": (lambda: nn.Conv2d(4, 8, (4, 8), groups=4, bias=False), (2, 4, 5, 9)),
    "conv3d": (lambda: nn.Conv3d(16, 3, (1, 2, 1), dilation=(1, 2, 1)), (2, 16, 2, 3, 2)),
    "transposed1d": (lambda: nn.ConvTranspose1d(32, 3, 2, stride=2), (2, 32, 4)),
    "transposed2d": (lambda: nn.ConvTranspose2d(32, 4, 1, groups=2), (2, 32, 3, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(32, 2, 1), (1, 32, 2, 2, 2)),
}


def qparams(lo: float, hi: float, bits: int, symmetric: bool) -> tuple[np.float32, np.float32]:
    lo, hi = np.float32(min(lo, 0)), np.float32(max(hi, 0))
    if lo == hi:
        return np.float32(1), np.float32(0)
    if symmetric:
        return max(-lo, hi) / np.float32(2 ** (bits - 1) - 1), np.float32(0)
    scale = (hi - lo) / np.float32(2**bits - 1)
    return scale, np.float32(np.clip(-(2 ** (bits - 1)) - np.rint(lo / scale), -128, 127))


def rounded(x: Array, scale: np.float32, zero_point: np.float32, bits: int) -> Array:
    q = np.rint(x / scale) + zero_point
    return (q.clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) - zero_point) * scale


def quantized_weight(weight: Tensor, channel_axis: int, scheme: WeightScheme) -> Tensor:
    rows = np.moveaxis(weight.detach().numpy(), channel_axis, 0)
    matrix = rows.reshape(rows.shape[0], -1)
    width = {"per_tensor": matrix.size, "per_channel": matrix.shape[1]}
    blocks = matrix.reshape(-1, width.get(scheme.granularity, 32))
    lows, highs = blocks.min(1), blocks.max(1)
    if scheme.calibration != "max":  # the ranges of the others have tests of their own
        ranges = weight_range(
            torch.from_numpy(blocks), scheme.calibration, scheme.bits, scheme.symmetric
        )
        lows, highs = (ends.numpy() for ends in ranges)
    done = [
        rounded(block, *qparams(lo, hi, scheme.bits, scheme.symmetric), scheme.bits)
        for block, lo, hi in zip(blocks, lows, highs, strict=True)
    ]
    back = np.moveaxis(np.stack(done).reshape(rows.shape), 0, channel_axis)
    return torch.from_numpy(np.ascontiguousarray(back))


def quantized_input(x: Tensor, kind: str, scheme: ActivationScheme, statistics: Any) -> Tensor:
    tokens = x.flatten(1) if "conv" in kind or "transposed" in kind else x.flatten(0, -2)
    done = []
    for token in tokens.numpy():
        if scheme.dynamic:
            lo, hi = token.min(), token.max()
        elif scheme.calibration == "max":
            lo, hi = x.min().item(), x.max().item()
        else:
            lo, hi = activation_range(
                statistics.inputs, scheme.calibration, scheme.bits, scheme.symmetric
            )
        done.append(rounded(token, *qparams(lo, hi, scheme.bits, scheme.symmetric), scheme.bits))
    return torch.from_numpy(np.stack(done)).reshape(x.shape)


def function(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Compute what the float ``layer`` does, by the function of torch."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        call = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[x.dim()]
        return call(x, weight, layer.bias, layer.stride, groups=layer.groups)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, (1, 1), layer.padding_mode), 0
    call = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    return call(x, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


class Bench:
    """One layer, made ready once, for many recipes."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        make, shape = LAYERS[kind]
        self.kind = kind
        self.layer = make()
        self.x = torch.randn(shape) + 0.2
        self.weight = self.layer.weight.detach().clone()
        self.channel_axis = 1 if "transposed" in kind else 0
        self.prepared = prepare(nn.Sequential(self.layer).eval(), self.run)
        self.statistics = calibrate(self.prepared, [None], self.run)
        self.applier = Applier(self.prepared, self.statistics)

    def run(self, model: nn.Module, _: Any = None) -> Tensor:
        with torch.inference_mode():
            return model(self.x)

    def check(self, weight: WeightScheme | None, activation: ActivationScheme | None) -> None:
        self.applier.apply({"0": SiteRecipe(weight, activation)})
        x, w = self.x, self.weight
        if activation is not None:
            x = quantized_input(x, self.kind, activation, self.statistics["0"])
        if weight is not None:
            w = quantized_weight(w, self.channel_axis, weight)
        with torch.no_grad():
            expected = function(self.layer, x, w)
        found = self.run(self.prepared.model)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


SCHEMES = ["symmetric", "asymmetric"]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group_32"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_computes_with_its_quantized_weight(kind, granularity, scheme):
    bench = Bench(kind)
    for calibration in sorted(set(WEIGHT_CALIBRATIONS) - set(WEIGHT_NEEDS)):
        for bits in range(2, 9):
            bench.check(WeightScheme(bits, granularity, scheme, calibration), None)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_computes_with_its_quantized_input(kind, scheme):
    bench = Bench(kind)
    for calibration in ACTIVATION_CALIBRATIONS:
        for bits in range(4, 9):
            bench.check(None, ActivationScheme(bits, "per_tensor", scheme, calibration))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_computes_with_both_and_with_a_scale_for_each_token(kind, scheme):
    bench = Bench(kind)
    for bits in range(4, 9):
        activation = ActivationScheme(bits, "per_token", scheme)
        bench.check(None, activation)
        bench.check(WeightScheme(bits, "per_group_32", scheme), activation)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group_32"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_embedding_looks_rows_up_in_its_quantized_table(granularity, scheme):
    torch.manual_seed(0)
    table = nn.Embedding(7, 64, padding_idx=0)
    weight = table.weight.detach().clone()
    prepared = prepare(table)
    applier = Applier(prepared, {})
    indices = torch.tensor([[0, 6, 6], [2, 1, 0]])
    for bits in range(2, 9):
        choice = WeightScheme(bits, granularity, scheme)
        applier.apply({"weight": SiteRecipe(choice)})
        assert torch.equal(table(indices), quantized_weight(weight, 0, choice)[indices])


def test_every_layer_type_has_a_way_to_compute():
    assert {layout.base for layout in LAYOUTS} == set(QUANTIZED)

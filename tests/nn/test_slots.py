"""What a site computes with, against NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from autoquant.kernels.engine import Engine
from autoquant.nn.held import HeldWeight
from autoquant.nn.sites import find_sites
from autoquant.nn.slots import SiteSlot
from autoquant.nn.weights import quantize_weight
from autoquant.quant.activation import ActivationQuantizer, token_dims
from autoquant.spec.recipe import FLOAT_SITE, ActivationScheme, WeightScheme


def by_hand(x, bits, scale, zero_point):
    """Return the quantized numbers of float32 ``x``, from the definition."""
    q = np.rint(x / np.float32(scale)) + zero_point
    return (q.clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) - zero_point) * np.float32(scale)


def token_by_hand(x, bits, symmetric):
    lo, hi = np.minimum(x.min(), 0), np.maximum(x.max(), 0)
    if symmetric:
        scale, zero_point = max(-lo, hi) / np.float32(2 ** (bits - 1) - 1), 0
    else:
        scale = (hi - lo) / np.float32(2**bits - 1)
        zero_point = -(2 ** (bits - 1)) - np.rint(lo / scale)
    return by_hand(x, bits, scale, zero_point)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero_point", [0, -1, 1])
def test_a_static_quantizer_uses_the_numbers_of_the_recipe(bits, zero_point):
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(bits))
    scheme = ActivationScheme(bits, scale=0.137, zero_point=zero_point)
    expected = by_hand(x.numpy(), bits, 0.137, zero_point)
    assert np.array_equal(ActivationQuantizer(scheme, "linear")(x).numpy(), expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "tokens"),
    [
        ("linear", (2, 3, 5), 6),
        ("linear", (5,), 1),
        ("rnn", (4, 3, 5), 12),
        ("attention", (4, 5), 4),
        ("conv", (3, 2, 4, 4), 3),
        ("conv_transpose", (3, 2, 4), 3),
        ("conv", (2, 6), 1),
    ],
)
def test_every_token_has_a_scale_of_its_own(bits, symmetric, kind, shape, tokens):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) + 0.3
    scheme = ActivationScheme(bits, "per_token", "symmetric" if symmetric else "asymmetric")
    rows = x.reshape(tokens, -1).numpy()
    expected = np.stack([token_by_hand(row, bits, symmetric) for row in rows])
    found = ActivationQuantizer(scheme, kind)(x)
    assert found.shape == x.shape
    assert np.array_equal(found.reshape(tokens, -1).numpy(), expected.astype(np.float32))


def test_tokens_of_zeros_and_no_tokens_at_all():
    quantize = ActivationQuantizer(ActivationScheme(4, "per_token"), "linear")
    assert torch.equal(quantize(torch.zeros(2, 3)), torch.zeros(2, 3))
    for shape in ((0, 3), (2, 0)):
        assert quantize(torch.zeros(shape)).shape == shape
    assert token_dims("linear", 3) == (2,)


def test_a_static_scheme_without_its_numbers_is_a_mistake():
    with pytest.raises(ValueError, match="must be calibrated"):
        ActivationQuantizer(ActivationScheme(8), "linear")


def test_a_slot_is_float_until_told_otherwise_and_tells_who_asks():
    layer = nn.Linear(3, 3)
    (site,), _ = find_sites(layer)
    slot = SiteSlot(site, layer.weight, Engine())
    x, seen = torch.randn(2, 3), []
    assert slot.weight is layer.weight
    assert slot.quantize_input(x) is x
    slot.read = lambda: seen.append("read")
    slot.observe = seen.append
    held = HeldWeight(quantize_weight(layer.weight, site, WeightScheme(4)), Engine())
    slot.switch(held, ActivationScheme(8, scale=1.0, zero_point=0))
    assert torch.equal(slot.weight, held.quantized.dequantize())
    assert torch.equal(slot.quantize_input(x), x.round())
    assert seen[0] == "read"
    assert seen[1] is x  # what is observed is not quantized yet


def test_a_slot_tells_before_anything_depends_on_its_choice():
    layer = nn.Linear(3, 3)
    (site,), _ = find_sites(layer)
    slot = SiteSlot(site, layer.weight, Engine())
    assert slot.choice == FLOAT_SITE
    slot.use()
    seen = []
    slot.used = lambda: seen.append("used")
    slot.observe = lambda _: seen.append("observed")
    slot.read = lambda: seen.append("read")
    slot.quantize_input(torch.randn(2, 3))
    assert slot.weight is layer.weight
    slot.use()
    assert seen == ["used", "observed", "used", "read", "used"]

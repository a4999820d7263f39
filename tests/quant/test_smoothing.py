"""Smoothing by powers of two changes no number of a float layer, and reads as it was written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from autoquant.errors import SpecError
from autoquant.quant.input_layout import Layout
from autoquant.quant.smoothing import LEAST, MOST, Smoothing, as_text, from_text, rounded

LAYOUTS = {
    "linear": Layout("linear", (5, 6), 1, 0),
    "transposed": Layout("linear", (6, 5), 1, 1),
    "rnn": Layout("rnn", (12, 6), 1, 0),
    "conv1d": Layout("conv", (4, 6, 3), 1, 0),
    "conv2d": Layout("conv", (4, 6, 3, 2), 1, 0),
    "grouped": Layout("conv", (8, 3, 3, 3), 2, 0),
    "depthwise": Layout("conv", (12, 1, 3, 3), 6, 0),
}


def computed(layout: Layout, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if layout.kind == "conv":
        conv = F.conv1d if len(layout.shape) == 3 else F.conv2d
        return conv(x, weight, groups=layout.groups)
    return F.linear(x, weight if layout.channel_axis == 0 else weight.T)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_float_layer_gives_the_same_bits(name, dtype):
    layout = LAYOUTS[name]
    assert layout.channels == 6
    generator = torch.Generator().manual_seed(1)
    inner = (6,) if layout.kind != "conv" else (6, *[7] * (len(layout.shape) - 2))
    x = torch.randn(3, *inner, generator=generator).to(dtype)
    weight = torch.randn(layout.shape, generator=generator).to(dtype)
    factors = torch.exp2(torch.tensor([0.0, 3, -5, 1, -1, 12]))
    smoothing = Smoothing(factors, layout)
    assert torch.equal(smoothing.input_back(smoothing.of_input(x)), x)
    assert torch.equal(smoothing.weight_back(smoothing.of_weight(weight)), weight)
    assert smoothing.of_input(x).dtype == smoothing.of_weight(weight).dtype == dtype
    # One product at a time, so that the order of sums is the same.
    found = computed(layout, smoothing.of_input(x).double(), smoothing.of_weight(weight).double())
    torch.testing.assert_close(
        found, computed(layout, x.double(), weight.double()), rtol=1e-13, atol=1e-13
    )
    for channel in range(6):
        axis = -1 if layout.kind != "conv" else 1
        one = torch.zeros_like(x)
        one.select(axis, channel).copy_(x.select(axis, channel))
        whole = computed(layout, one, weight)
        assert torch.equal(
            computed(layout, smoothing.of_input(one), smoothing.of_weight(weight)), whole
        )
    largest = layout.over_channels(x.abs())
    assert torch.equal(largest, x.abs().movedim(1, 0).reshape(6, -1).amax(1))
    if layout.kind == "conv":  # without a batch
        assert torch.equal(layout.over_channels(x[0].abs()), x[0].abs().flatten(1).amax(1))


@given(st.lists(st.integers(LEAST, MOST), min_size=1, max_size=40))
def test_text_is_read_as_it_was_written(exponents):
    factors = torch.exp2(torch.tensor(exponents, dtype=torch.float32))
    text = as_text(factors)
    assert len(text) == len(exponents)
    assert torch.equal(from_text(text, len(exponents), "layer"), factors)


@pytest.mark.parametrize(("text", "channels"), [("", 1), ("mm", 3), ("mM", 2), ("m1", 2), ("ñ", 1)])
def test_other_texts_are_refused(text, channels):
    with pytest.raises(SpecError, match=rf"layer: transforms: found .* {channels} letters"):
        from_text(text, channels, "layer")


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_factors_are_powers_of_two_within_bounds_and_near(values):
    given_factors = torch.tensor(values, dtype=torch.float64)
    found = torch.log2(rounded(given_factors).double())
    assert torch.equal(found, found.round())
    assert bool(((found >= LEAST) & (found <= MOST)).all())
    wanted = torch.log2(given_factors) - torch.log2(given_factors).mean()
    within = (wanted > LEAST) & (wanted < MOST)
    assert bool(((found - wanted).abs()[within] <= 0.5 + 1e-6).all())

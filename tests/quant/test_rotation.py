"""Rotations against scipy's matrix: their own inverse, and layers compute what they did."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from autoquant.errors import SpecError
from autoquant.quant.input_layout import Layout
from autoquant.quant.rotation import Rotation, block_from_text, block_of, hadamard
from autoquant.spec.transforms import BLOCKS

LAYOUTS = {
    "linear": Layout("linear", (5, 48), 1, 0),
    "transposed": Layout("linear", (48, 5), 1, 1),
    "rnn": Layout("rnn", (12, 48), 1, 0),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_matrix_is_that_of_scipy(block):
    found = hadamard(block, torch.ones(1, dtype=torch.float64))
    expected = torch.from_numpy(scipy.linalg.hadamard(block) / block**0.5)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    eye = torch.eye(block, dtype=torch.float64)
    torch.testing.assert_close(found @ found, eye, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [8, 16])
def test_a_layer_computes_the_same(name, dtype, block):
    layout = LAYOUTS[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 48, generator=generator).to(dtype)
    weight = torch.randn(layout.shape, generator=generator).to(dtype)
    rotation = Rotation(hadamard(block, x), layout)
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(rotation.input_back(rotation.of_input(x)), x, **tolerance)
    torch.testing.assert_close(
        rotation.weight_back(rotation.of_weight(weight)), weight, **tolerance
    )
    assert rotation.of_input(x).dtype == rotation.of_weight(weight).dtype == dtype
    assert rotation.of_weight(weight).shape == weight.shape

    def computed(x, weight):
        return F.linear(x, weight if layout.channel_axis == 0 else weight.T)

    found = computed(rotation.of_input(x), rotation.of_weight(weight))
    torch.testing.assert_close(found, computed(x, weight), **tolerance)


def test_one_large_channel_is_spread_over_its_block_alone():
    x = torch.zeros(1, 48)
    x[0, 20] = 4.0
    found = Rotation(hadamard(16, x), LAYOUTS["linear"]).of_input(x)
    assert torch.equal(found[0, 16:32].abs(), torch.ones(16))
    assert int(found.count_nonzero()) == 16


def test_autocast_does_not_round_it():
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    rotation = Rotation(hadamard(16, x), LAYOUTS["linear"])
    expected = rotation.of_input(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotation.of_input(x), expected)


@given(st.integers(1, 5000), st.sampled_from(BLOCKS))
def test_blocks_are_the_largest_that_divide(channels, most):
    expected = [b for b in BLOCKS if b <= most and channels % b == 0]
    assert block_of(channels, most) == (expected[-1] if expected else None)


@pytest.mark.parametrize("block", BLOCKS)
def test_text_is_read_as_it_was_written(block):
    rotation = Rotation(hadamard(block, torch.ones(1)), Layout("linear", (2, 2048), 1, 0))
    assert block_from_text(rotation.text, 2048, "layer") == block


@pytest.mark.parametrize(
    "text", ["hadamard", "hadamard_", "hadamard_7", "hadamard_2048", "hadamard_08"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(SpecError, match=rf"layer: transforms: found '{text}', .*hadamard_16$"):
        block_from_text(text, 48, "layer")

"""Sequential reconstruction of one layer: its regression, its rounding, and its bias."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoquant.methods.reconstruction.sequential import Sequential, regress, shares_of
from autoquant.nn.sites import Site
from autoquant.quant.affine import QParams
from autoquant.quant.blocks import from_blocks, to_blocks
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import WeightScheme
from autoquant.spec.techniques import RECONSTRUCTIONS, technique_of


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(rows=400, n=6, groups=1, seed=0, noise=0.3):
    """Return X̂ and X [groups, rows, n], with a mean that quantization moved."""
    clean = numbers(groups, rows, n, seed=seed) @ numbers(n, n, seed=seed + 1) + 0.7
    quantized = clean + noise * numbers(groups, rows, n, seed=seed + 2) + 0.2
    return quantized, clean


def equal(x):
    """Return the shares of rows that all count the same."""
    return torch.full((*x.shape[:2], 1), 1 / x.shape[1], dtype=torch.float64)


def least_squares(weight, hat, x, ridge, *, centered, shares=None):
    """Return the regression of one group by numpy: rows for the ridge are added to the data."""
    hat, x, weight = (part.double().numpy() for part in (hat, x, weight))
    shares = np.full((len(hat), 1), 1 / len(hat)) if shares is None else shares.numpy()
    if centered:
        hat, x = hat - (hat * shares).sum(0), x - (x * shares).sum(0)
    n = hat.shape[1]
    drawn = (ridge * n + 1e-6) * (hat**2 * shares).sum(0).mean()
    more = np.sqrt(drawn) * np.eye(n)
    data = np.concatenate([hat * np.sqrt(shares), more])
    target = np.concatenate([(x @ weight.T) * np.sqrt(shares), more @ weight.T])
    return torch.from_numpy(np.linalg.lstsq(data, target, rcond=None)[0].T)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 10.0])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_least_squares(ridge, centered, groups):
    hat, x = seen(groups=groups)
    weight = numbers(6, 6, seed=9)
    found, moments = regress(weight, hat, x, equal(x), ridge, centered=centered)
    assert found.dtype == moments.dtype == torch.float32
    assert found.shape == weight.shape
    size = 6 // groups
    for i in range(groups):
        rows = slice(i * size, (i + 1) * size)
        wanted = least_squares(weight[rows], hat[i], x[i], ridge, centered=centered)
        torch.testing.assert_close(found[rows].double(), wanted, rtol=1e-4, atol=1e-5)
        own = hat[i] - hat[i].mean(0) if centered else hat[i]
        torch.testing.assert_close(moments[i], own.T @ own / len(own), rtol=1e-4, atol=1e-5)
    if ridge == 0:
        assert not torch.allclose(found, weight, atol=1e-2)


@pytest.mark.parametrize("centered", [False, True])
def test_rows_count_by_their_shares(centered):
    hat, x = seen(groups=2)
    shares = torch.rand(2, 400, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    shares /= shares.sum(1, keepdim=True)
    weight = numbers(6, 6, seed=9)
    found, _ = regress(weight, hat, x, shares, 0.01, centered=centered)
    for i in range(2):
        rows = slice(3 * i, 3 * i + 3)
        wanted = least_squares(
            weight[rows], hat[i], x[i], 0.01, centered=centered, shares=shares[i]
        )
        torch.testing.assert_close(found[rows].double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_row_that_is_far_off_counts_no_more_than_a_few():
    hat, x = seen(groups=2, rows=5)
    x = hat + torch.tensor([1.0, 2.0, 3.0, -4.0, 100.0])[:, None] / 6**0.5  # errors 1 … 10,000
    shares = shares_of(hat, x, 1.5)
    expected = torch.tensor([1.0, 1.0, 1.0, 1.5 * 9 / 16, 1.5 * 9 / 10_000]).double()
    for own in shares:
        torch.testing.assert_close(own[:, 0], expected / expected.sum(), rtol=1e-4, atol=0)
    assert torch.equal(shares_of(hat, x, 1e9), equal(x))
    # Where most rows have no error, or none has any, all count the same.
    x[:, :3] = hat[:, :3]
    assert torch.equal(shares_of(hat, x, 4.0), equal(x))


def test_numbers_that_a_range_cuts_off_do_not_rule_the_fit():
    site, scheme = site_of("linear", (4, 32)), WeightScheme(8)
    hat, x = seen(rows=1000, n=32, noise=0.05)
    hat -= 0.2  # of the mean error
    x[0, ::50] *= 100  # a few rows that quantization cuts off
    weight = numbers(4, 32, seed=9)
    usual = torch.ones(1000, dtype=torch.bool)
    usual[::50] = False
    errors = {}
    for far in (4.0, 1e9):
        learned = Sequential(20.0, far=far).fit(site, scheme, weight, hat, x, 1000)
        made = outputs(dequantized(learned, site, scheme), hat) + learned.shift.double()
        errors[far] = float((made - outputs(weight, x))[usual].square().mean())
    assert errors[4.0] < 0.01 * errors[1e9]


def test_without_a_ridge_the_error_is_what_nothing_makes_less():
    hat, x = seen()
    weight = numbers(4, 6, seed=9)
    found, _ = regress(weight, hat, x, equal(x), 0.0, centered=False)
    rest = (x[0] @ weight.T - hat[0] @ found.T).double()
    before = (x[0] @ weight.T - hat[0] @ weight.T).double()
    assert rest.square().sum() < before.square().sum()
    # What is left has nothing to do with any input.
    assert float((hat[0].double().T @ rest / len(rest)).abs().max()) < 1e-3


@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize("centered", [False, True])
def test_inputs_that_nothing_changed_give_the_weight_back(ridge, centered):
    _, x = seen(groups=2)
    weight = numbers(4, 6, seed=9)
    found, _ = regress(weight, x.clone(), x, equal(x), ridge, centered=centered)
    torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centered", [False, True])
def test_the_more_ridge_the_nearer_the_float_weight(centered):
    hat, x = seen()
    weight = numbers(4, 6, seed=9)
    off = [
        float((regress(weight, hat, x, equal(x), ridge, centered=centered)[0] - weight).norm())
        for ridge in (0.0, 0.01, 1.0, 100.0, 1e6)
    ]
    assert off == sorted(off, reverse=True)
    assert off[-1] < 1e-4 < 1e-2 < off[0]


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_inputs_that_are_always_0_keep_their_weights(ridge):
    hat, x = seen(groups=2)
    hat[0], x[0] = 0.0, 0.0  # all inputs of one group,
    hat[1, :, 2], x[1, :, 2] = 0.0, 0.0  # and one of another
    weight = numbers(4, 6, seed=9)
    found, moments = regress(weight, hat, x, equal(x), ridge, centered=False)
    assert torch.equal(found[:2], weight[:2])
    torch.testing.assert_close(found[2:, 2], weight[2:, 2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[2:], weight[2:], atol=1e-2)
    assert not bool(moments[0].any())
    # Inputs that never differ are as good as none where means are taken off.
    constant = torch.full((1, 50, 6), 3.0)
    own = equal(constant)
    found, _ = regress(weight, constant, constant - 1, own, ridge, centered=True)
    assert torch.equal(found, weight)


def test_an_input_that_quantization_silenced_gives_numbers():
    hat, x = seen()
    hat[:, :, 3] = 0.0
    weight = numbers(4, 6, seed=9)
    found, _ = regress(weight, hat, x, equal(x), 0.0, centered=False)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:, 3], weight[:, 3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_more_inputs_than_rows(ridge, centered, rows):
    hat, x = seen(rows=rows, n=12, noise=0.1)
    weight = numbers(4, 12, seed=9)
    found, _ = regress(weight, hat, x, equal(x), ridge, centered=centered)
    assert bool(found.isfinite().all())
    if rows == 1 and centered:
        assert torch.equal(found, weight)
        return
    if ridge:  # without one the regression follows the noise as far as it can
        wanted = least_squares(weight, hat[0], x[0], ridge, centered=centered)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    if not centered:
        rest = (x[0] @ weight.T - hat[0] @ found.T).square().sum()
        assert rest < (x[0] @ weight.T - hat[0] @ weight.T).square().sum()


# ---- fit: the weight, its grid and its bias


def site_of(kind, shape, groups=1):
    return Site("layer", kind, "Layer", shape, 0, (("layer", "weight"),), groups)


def dequantized(learned, site, scheme):
    p = QParams(learned.scale, learned.zero_point, scheme.bits, scheme.symmetric)
    return QuantizedWeight(learned.q, p, scheme, site.shape, site.channel_axis).matrix()


SITES = {
    "linear": site_of("linear", (6, 32)),
    "conv": site_of("conv", (6, 8, 2, 2)),
    "grouped": site_of("conv", (6, 8, 2, 2), 3),
    "depthwise": site_of("conv", (6, 1, 2, 2), 6),
    "rnn": site_of("rnn", (6, 32)),
    "attention": site_of("attention", (6, 32)),
}
SCHEMES = [
    WeightScheme(4),
    WeightScheme(3, "per_tensor"),
    WeightScheme(3, "per_channel", "asymmetric", "mse"),
    WeightScheme(8, "per_channel", "asymmetric"),
]


def outputs(weight, x):
    """Return what a weight makes of rows [groups, rows, n]: [rows, channels], in float64."""
    own = weight.double().reshape(len(x), -1, weight.shape[1])
    return torch.cat(list(x.double() @ own.mT), 1)


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_shift_makes_the_mean_output_right(kind, scheme):
    site = SITES[kind]
    n = site.matrix[1]
    hat, x = seen(rows=200, n=n, groups=site.groups)
    weight = numbers(6, n, seed=9)
    learned = Sequential(20.0, far=1e9).fit(site, scheme, weight, hat, x, 1000)
    assert learned.q.dtype == torch.int8
    assert learned.q.shape == (6, n)
    assert learned.scale.shape == learned.zero_point.shape
    assert int(learned.q.min()) >= -(2 ** (scheme.bits - 1))
    assert int(learned.q.max()) < 2 ** (scheme.bits - 1)
    if scheme.symmetric:
        assert not bool(learned.zero_point.any())
    if not site.corrects:
        assert learned.shift.shape == (0,)
        return
    made = outputs(dequantized(learned, site, scheme), hat).mean(0) + learned.shift.double()
    torch.testing.assert_close(made, outputs(weight, x).mean(0), rtol=1e-5, atol=1e-5)
    assert learned.shift.dtype == torch.float32


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("bits", [3, 4])
def test_the_output_is_nearer_than_that_of_the_float_weight_rounded(kind, bits):
    site, scheme = SITES[kind], WeightScheme(bits)
    n = site.matrix[1]
    hat, x = seen(rows=400, n=n, groups=site.groups)
    weight = numbers(6, n, seed=9)
    learned = Sequential(0.0, passes=3).fit(site, scheme, weight, hat, x, 400)
    made = outputs(dequantized(learned, site, scheme), hat)
    if site.corrects:
        made = made + learned.shift.double()
    wanted = outputs(weight, x)
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    nearest = outputs((weight / scale).round() * scale, hat)
    if site.corrects:
        nearest = nearest + (wanted - nearest).mean(0)
    assert (made - wanted).square().sum() < (nearest - wanted).square().sum()


def test_groups_of_inputs_have_scales_of_their_own():
    site, scheme = site_of("linear", (4, 64)), WeightScheme(4, "per_group_32")
    hat, x = seen(rows=300, n=64)
    weight = numbers(4, 64, seed=9)
    learned = Sequential().fit(site, scheme, weight, hat, x, 300)
    assert learned.scale.shape == (8, 1)
    real = to_blocks(learned.q, "per_group_32") * learned.scale
    matrix = from_blocks(real, (4, 64))
    assert torch.equal(matrix, dequantized(learned, site, scheme))


def test_of_few_rows_the_float_weight_is_trusted():
    site, scheme = site_of("linear", (4, 32)), WeightScheme(8)
    hat, x = seen(rows=20, n=32)
    weight = numbers(4, 32, seed=9)
    ways = ((Sequential(0.0), 20), (Sequential(200.0), 100_000), (Sequential(200.0), 20))
    learned = [technique.fit(site, scheme, weight, hat, x, rows) for technique, rows in ways]
    off = [float((dequantized(found, site, scheme) - weight).norm()) for found in learned]
    assert off == sorted(off, reverse=True)


def test_it_gives_the_same_every_time():
    site = SITES["grouped"]
    hat, x = seen(n=32, groups=3)
    weight = numbers(6, 32, seed=9)
    one, two = (Sequential().fit(site, WeightScheme(3), weight, hat, x, 400) for _ in range(2))
    assert one.digest == two.digest


def test_it_is_a_technique_that_a_recipe_names():
    technique = Sequential(20.0, 0.1, 3)
    assert "sequential" in RECONSTRUCTIONS.names()
    assert technique_of(RECONSTRUCTIONS, technique.plain(), "here") == technique
    assert technique_of(RECONSTRUCTIONS, "sequential", "here") == Sequential()

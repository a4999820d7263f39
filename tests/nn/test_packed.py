"""What a saved model carries computes what the switched model computes."""

import copy

import pytest
import torch
from torch import nn

from autoquant.methods.applier import Applier
from autoquant.nn.convert import prepare
from autoquant.nn.packed import PackedSite
from autoquant.nn.sites import find_sites
from autoquant.nn.weights import quantize_weight
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

SCHEMES = ["symmetric", "asymmetric"]
GRANULARITIES = ["per_tensor", "per_channel", "per_group_32"]


def packed_and_quantized(layer, scheme, activation=None):
    (site,), _ = find_sites(nn.Sequential(layer))
    weight = quantize_weight(layer.weight, site, scheme)
    return PackedSite(site.kind, torch.float32, weight, activation), weight


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_weight_and_its_rows_are_the_quantized_weights_bit_for_bit(bits, granularity, scheme):
    torch.manual_seed(bits)
    choice = WeightScheme(bits, granularity, scheme)
    for layer in (nn.Conv2d(64, 4, (1, 3), groups=2), nn.ConvTranspose1d(32, 5, 1)):
        packed, weight = packed_and_quantized(layer, choice)
        assert torch.equal(packed.weight, weight.dequantize())
    packed, weight = packed_and_quantized(nn.Embedding(9, 64), choice)
    assert torch.equal(packed.weight, weight.dequantize())
    for indices in (torch.tensor([[8, 0], [3, 3]]), torch.tensor(4), torch.tensor([], dtype=int)):
        assert torch.equal(packed.rows(indices), weight.dequantize()[indices])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_table_of_one_row_and_one_block(granularity):
    packed, weight = packed_and_quantized(nn.Embedding(1, 32), WeightScheme(5, granularity))
    assert torch.equal(packed.rows(torch.tensor([0, 0])), weight.dequantize()[[0, 0]])


def test_it_holds_packed_integers_scales_and_zero_points():
    layer = nn.Linear(33, 4)
    packed, _ = packed_and_quantized(layer, WeightScheme(3, "per_channel", "asymmetric"))
    shapes = {key: (tuple(t.shape), t.dtype) for key, t in packed.state_dict().items()}
    assert shapes == {
        "packed": ((4, 9 + 5), torch.uint8),
        "scale": ((4, 1), torch.float32),
        "zero_point": ((4, 1), torch.int8),
        "like": ((0,), torch.float32),
    }
    packed, _ = packed_and_quantized(layer, WeightScheme(8, "per_tensor"))
    assert set(packed.state_dict()) == {"packed", "scale", "like"}
    activation = ActivationScheme(8, scale=0.5, zero_point=0)
    kept = PackedSite("linear", torch.float32, layer.weight, activation)
    assert set(kept.state_dict()) == {"unquantized", "like"}
    assert torch.equal(kept.weight, layer.weight)
    assert not kept.weight.requires_grad
    assert torch.equal(kept.quantize_input(torch.tensor([0.3])), torch.tensor([0.5]))


@pytest.mark.parametrize("activation", ["per_tensor", "per_token"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [3, 8])
def test_a_deployed_model_computes_what_the_switched_one_does(
    case, uniform, equal, activation, scheme, bits
):
    applier = case.applier()
    sites = uniform(applier.prepared, bits, activation, scheme=scheme)
    applier.apply(sites)
    expected = case.run(applier.prepared.model)
    deployed = applier.deploy(sites)
    assert equal(case.run(deployed), expected)
    assert equal(case.run(copy.deepcopy(deployed)), expected)
    floats = {site.name for site in applier.prepared.sites}
    assert not floats & {name.removesuffix(".weight") for name, _ in deployed.named_parameters()}


def test_any_mixture_of_choices_can_be_deployed(case):
    applier = case.applier()
    choices = [
        SiteRecipe(WeightScheme(4), None),
        SiteRecipe(None, ActivationScheme(6)),
        SiteRecipe(),
        SiteRecipe(WeightScheme(7, "per_tensor", "asymmetric"), ActivationScheme(5, "per_token")),
    ]
    for turn in range(len(choices)):
        sites = {
            site.name: choices[(turn + i) % len(choices)]
            for i, site in enumerate(applier.prepared.sites)
        }
        applier.apply(sites)
        expected = case.run(applier.prepared.model)
        found = case.run(applier.deploy(sites))
        for one, other in zip(found, expected, strict=True):
            # A layer that is all float runs the fused kernel again, which rounds otherwise.
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_a_deployed_recurrent_layer_can_be_moved_and_copied(make_case, uniform, equal):
    case = make_case("recurrent")
    applier = case.applier()
    deployed = applier.deploy(uniform(applier.prepared, 4))
    expected = case.run(deployed)
    moved = copy.deepcopy(deployed).to("cpu").requires_grad_(False)
    assert equal(case.run(moved), expected)
    assert not any(name.startswith("lstm.weight") for name in deployed.state_dict())


def test_a_layer_read_by_name_gives_its_dequantized_weight():
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    prepared = prepare(model)
    applier = Applier(prepared, {})
    one = {"0": SiteRecipe(WeightScheme(2))}
    applier.apply(one)
    expected = model[0].weight.clone()
    assert torch.equal(applier.deploy(one)[0].weight, expected)

"""Transformed inputs: float layers are as before, quantized ones as the formula has them."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import scipy.linalg
import torch
from torch import nn

from autoquant.errors import SpecError
from autoquant.kernels.cpu import onednn
from autoquant.kernels.engine import Engine, make_engine
from autoquant.methods.applier import Applier
from autoquant.nn.archive import load_archive, save_archive
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.nn.transforms import layout_of, transform, transform_as, transforms_of
from autoquant.quant.activation import fake_quantize_activation
from autoquant.quant.blocks import to_matrix
from autoquant.quant.rotation import Rotation, hadamard
from autoquant.quant.smoothing import Smoothing
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme

CPU = torch.device("cpu")
SITE = SiteRecipe(WeightScheme(6), ActivationScheme(8))


class Net(nn.Module):
    """All kinds of layers whose inputs have channels, each with two of them far from the rest."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 8, 3, padding=1)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.rnn = nn.GRU(8, 6, batch_first=True)
            self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.conv(x))))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.rnn(x)[0][:, -1])


def inputs() -> torch.Tensor:
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    return x * torch.tensor([1.0, 30.0, 0.01, 1.0])[:, None, None]


FACTORS = {
    "conv": torch.tensor([1.0, 32, 2**-6, 1]),
    "depthwise": torch.exp2(torch.arange(-3.0, 5)),
    "attention.in_proj_weight": torch.exp2(torch.arange(-3.0, 5).flip(0)),
    "rnn.weight_ih_l0": torch.tensor([0.5, 2, 1, 1, 4, 0.25, 1, 1]),
    "rnn.weight_hh_l0": torch.tensor([0.5, 2, 1, 1, 4, 0.25]),
    "head": torch.tensor([8.0, 1, 1, 1, 1, 0.125]),
}


ROTATED = ("attention.in_proj_weight", "attention.out_proj", "rnn.weight_ih_l0")
"""Of 8 input channels."""


def made(engine: Engine, factors=FACTORS, rotated=()):
    prepared = prepare(Net().eval(), lambda m: m(inputs()), engine=engine)
    layouts = {site.name: layout_of(site) for site in prepared.sites}
    found = {name: Smoothing(own, layouts[name]) for name, own in factors.items()}
    found |= {name: Rotation(hadamard(8, torch.ones(1)), layouts[name]) for name in rotated}
    transform(prepared, found)
    statistics = calibrate(prepared, [inputs()], lambda m, x: m(x))
    return prepared, Applier(prepared, statistics)


@pytest.mark.parametrize("fast", [False, True])
def test_the_float_model_gives_the_same_bits_and_its_weights_are_its_own(fast):
    engine = make_engine(CPU) if fast else Engine()
    (prepared, _), (plain, _) = made(engine), made(engine, {})
    with torch.no_grad():
        assert torch.equal(prepared.model(inputs()), plain.model(inputs()))
    assert torch.equal(prepared.model.conv.weight, Net().conv.weight)
    assert set(transforms_of(prepared)) == set(FACTORS)
    turned, _ = made(engine, {}, ROTATED)
    with torch.no_grad():
        assert torch.equal(turned.model(inputs()), plain.model(inputs()))
    assert transforms_of(turned) == dict.fromkeys(ROTATED, "hadamard_8")


def test_what_is_observed_is_on_the_other_side():
    (prepared, applier), seen = made(Engine()), {}
    prepared.slots["conv"].observe = lambda x: seen.setdefault("conv", x)
    with torch.no_grad():
        prepared.model(inputs())
    assert torch.equal(seen["conv"], inputs() / FACTORS["conv"][:, None, None])
    largest = applier.statistics["conv"].distribution().absmax
    assert largest == float((inputs() / FACTORS["conv"][:, None, None]).abs().max())


@pytest.mark.parametrize("name", ["conv", "depthwise", "head"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
@pytest.mark.parametrize("fast", [False, True])
def test_a_quantized_layer_is_what_the_formula_says(name, granularity, fast):
    prepared, applier = made(make_engine(CPU) if fast else Engine())
    recipe = SiteRecipe(WeightScheme(6), ActivationScheme(8, granularity))
    done = applier.apply({name: recipe})[name]
    layer, slot = getattr(prepared.model, name), prepared.slots[name]
    x = {"conv": inputs(), "head": torch.randn(5, 6) * 3}.get(name, torch.rand(4, 8, 5, 5))
    t, kind = FACTORS[name], "linear" if name == "head" else "conv"
    beside = t if kind == "linear" else t[:, None, None]
    own = getattr(Net(), name)
    columns = {"conv": t[:, None, None], "depthwise": t[:, None, None, None], "head": t}[name]
    matrix = to_matrix(own.weight.detach() * columns, 0)
    scale = (matrix.abs().amax(1) / 31).reshape(-1, *[1] * (own.weight.dim() - 1))
    rounded = (own.weight.detach() * columns / scale).round().clamp(-32, 31) * scale / columns
    x_hat = fake_quantize_activation(x / beside, done.activation, kind) * beside
    with torch.no_grad():
        found = layer(x)
        expected = (
            nn.functional.linear(x_hat, rounded, own.bias)
            if kind == "linear"
            else (nn.functional.conv2d(x_hat, rounded, own.bias, padding=1, groups=own.groups))
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight, rounded)
    assert slot.transform is not None


class Chain(nn.Module):
    """Layers that hand integers on, as those of a mobile network do."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(4, 8, 1)
            self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.third = nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.first(x), inplace=True)
        return self.third(torch.relu(self.second(x)))


@pytest.mark.skipif(onednn.missing(CPU) is not None, reason="no products of integers here")
def test_smoothed_layers_are_handed_integers_and_compute_the_reference(monkeypatch):
    given = []
    handed = onednn.ConvProduct.handed
    monkeypatch.setattr(
        onednn.ConvProduct, "handed", lambda *words: given.append(handed(*words)) or given[-1]
    )
    found = {}
    engine = make_engine(CPU)
    prepared = prepare(Chain().eval(), lambda m: m(inputs()), engine=engine)
    layouts = {site.name: layout_of(site) for site in prepared.sites}
    transform(
        prepared,
        {
            "second": Smoothing(torch.exp2(torch.arange(-3.0, 5)), layouts["second"]),
            "third": Smoothing(torch.exp2(torch.arange(-3.0, 5)).flip(0), layouts["third"]),
        },
    )
    applier = Applier(prepared, calibrate(prepared, [inputs()], lambda m, x: m(x)))
    site = SiteRecipe(WeightScheme(6), ActivationScheme(8, "per_tensor", "asymmetric"))
    applier.apply(dict.fromkeys(("first", "second", "third"), site))
    with torch.no_grad():
        found["fast"] = prepared.model(inputs())
        assert [y is not None and y.dtype == torch.uint8 for y in given] == [True, True]
        with engine.reference():
            found["reference"] = prepared.model(inputs())
    assert len(given) == 2
    # Numbers next to the middle between two integers may go to either.
    size = found["reference"].abs().max()
    assert (found["fast"] - found["reference"]).abs().max() < 0.02 * size
    assert (found["fast"] - found["reference"]).abs().mean() < 1e-3 * size


def test_large_channels_no_longer_cost_the_small_ones_their_steps():
    errors = {}
    for smoothed in (False, True):
        prepared, applier = made(Engine(), FACTORS if smoothed else {})
        applier.apply({"conv": SiteRecipe(None, ActivationScheme(8))})
        with torch.no_grad():
            y = prepared.model.conv(inputs())
            errors[smoothed] = float((y - Net().conv(inputs())).square().mean())
    # What is left is what the large channel itself has: it is one of four.
    assert errors[True] < 0.6 * errors[False]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
@pytest.mark.parametrize("fast", [False, True])
def test_a_rotated_layer_is_what_the_formula_says(granularity, fast):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer, x = nn.Linear(16, 5), torch.randn(7, 16) * torch.logspace(-2, 1, 16)
    h = torch.from_numpy(scipy.linalg.hadamard(8) / 8**0.5).float()
    h = torch.block_diag(h, h)
    prepared = prepare(
        nn.Sequential(layer), lambda m: m(x), engine=make_engine(CPU) if fast else Engine()
    )
    transform_as(prepared, {"0": "hadamard_8"})
    applier = Applier(prepared, calibrate(prepared, [x], lambda m, x: m(x)))
    recipe = SiteRecipe(WeightScheme(6), ActivationScheme(8, granularity))
    done = applier.apply({"0": recipe})["0"]
    weight = layer.weight.detach() @ h
    scale = weight.abs().amax(1, keepdim=True) / 31
    rounded = (weight / scale).round().clamp(-32, 31) * scale
    x_hat = fake_quantize_activation(x @ h, done.activation, "linear")
    with torch.no_grad():
        expected = nn.functional.linear(x_hat, rounded, layer.bias)
        torch.testing.assert_close(prepared.model(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prepared.model[0].weight, rounded @ h, rtol=1e-4, atol=1e-5)


def test_what_few_channels_have_too_much_of_is_spread_over_all():
    errors = {}
    for rotated in ((), ("head",)):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = nn.Sequential(OrderedDict(head=nn.Linear(64, 8)))
            x = torch.randn(100, 64)
        x[:, 5] *= 100
        expected = model(x).detach()
        prepared = prepare(model, lambda m, x=x: m(x))
        transform_as(prepared, dict.fromkeys(rotated, "hadamard_64"))
        applier = Applier(prepared, calibrate(prepared, [x], lambda m, x: m(x)))
        applier.apply({"head": SiteRecipe(None, ActivationScheme(8))})
        with torch.no_grad():
            errors[bool(rotated)] = float((prepared.model(x) - expected).square().mean())
    assert errors[True] < 0.1 * errors[False]


@pytest.mark.parametrize("rotated", [(), ROTATED])
@pytest.mark.parametrize("how", ["archive", "exported"])
def test_saved_models_give_the_same_bits(how, rotated, tmp_path):
    prepared, applier = made(Engine(), {} if rotated else FACTORS, rotated)
    sites = {site.name: SITE for site in prepared.sites}
    done = applier.apply(sites)
    with torch.no_grad():
        expected = prepared.model(inputs())
    deployed = applier.deploy(sites)
    recipe = Recipe(done, transforms=transforms_of(prepared))
    with torch.no_grad():
        assert torch.equal(deployed(inputs()), expected)
        assert torch.equal(copy.deepcopy(deployed).double().float()(inputs()), expected)
    if how == "archive":
        save_archive(deployed, recipe, tmp_path / "q.safetensors")
        other = Net()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        loaded = load_archive(tmp_path / "q.safetensors", other)
    else:
        torch.export.save(torch.export.export(deployed, (inputs(),)), tmp_path / "q.pt2")
        loaded = torch.export.load(tmp_path / "q.pt2").module()
    with torch.no_grad():
        assert torch.equal(loaded(inputs()), expected)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"nowhere": "mm"}, "transforms: layer 'nowhere' is not in the model"),
        (
            {"conv": "mmm"},
            "conv: transforms: found 3 characters, allowed: hadamard_N, or 4 letters",
        ),
        (
            {"conv": "mm4m"},
            "conv: transforms: found 4 characters, allowed: hadamard_N, or 4 letters",
        ),
        ({"conv": "hadamard_8"}, "layer 'conv' has no input channels that can be rotated"),
        ({"head": "hadamard_8"}, "head: transforms: found 'hadamard_8', .*: no rotation"),
        ({"rnn.weight_ih_l0": "hadamard_7"}, "found 'hadamard_7', .*: hadamard_8"),
        ({"rnn.weight_ih_l0": "hadamard_16"}, "found 'hadamard_16', .*: hadamard_8"),
    ],
)
def test_what_does_not_fit_is_refused(texts, words):
    prepared = prepare(Net().eval(), lambda m: m(inputs()))
    with pytest.raises(SpecError, match=words):
        transform_as(prepared, texts)


def test_float16_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 2).half())
    prepared = prepare(model, lambda m: m(torch.ones(1, 4).half()))
    with pytest.raises(SpecError, match="layer '0' has no input channels that can be smoothed"):
        transform_as(prepared, {"0": "mmmm"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_not_rotated(dtype):
    model = nn.Sequential(nn.Linear(8, 2).to(dtype))
    prepared = prepare(model, lambda m: m(torch.ones(1, 8).to(dtype)))
    with pytest.raises(SpecError, match="layer '0' has no input channels that can be rotated"):
        transform_as(prepared, {"0": "hadamard_8"})


def test_bfloat16_weights_are_scaled_without_a_loss():
    model = nn.Sequential(nn.Linear(4, 2).bfloat16())
    prepared = prepare(model, lambda m: m(torch.ones(1, 4).bfloat16()))
    transform_as(prepared, {"0": "amzn"})
    slot = prepared.slots["0"]
    assert torch.equal(slot.transform.weight_back(slot.target).bfloat16(), model[0].weight)


def test_an_embedding_has_no_input_to_smooth():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    prepared = prepare(model, lambda m: m(torch.arange(5)))
    with pytest.raises(SpecError, match="layer '0' has no input channels that can be smoothed"):
        transform_as(prepared, {"0": "mmmm"})

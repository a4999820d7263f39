"""Conversion: nothing changes in float, every site takes effect, and all can be undone."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from autoquant.errors import ModelFileError
from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import deploy, prepare, use_channels_last
from autoquant.nn.fold import without_norms
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

MODES = [torch.no_grad, torch.inference_mode]


def test_preparing_changes_nothing_in_float(case):
    model, before = case.model, case.run(case.model)
    keys, modules = set(model.state_dict()), dict(model.named_modules())
    kinds = {path: type(module) for path, module in modules.items()}
    fired = []
    for path, module in modules.items():
        module.register_forward_hook(lambda *_, path=path: fired.append(path))
    folded = {path for path, module in modules.items() if isinstance(module, nn.BatchNorm2d)}
    taking = {"stem.0", "grouped"} if folded else set()
    for path in folded | taking:  # where a hook is, nothing is folded
        modules[path]._forward_hooks.clear()
    prepared = prepare(model, case.run)
    assert prepared.model is model
    assert set(prepared.folded) == folded
    fired.clear()
    for old, new in zip(before, case.run(model), strict=True):
        torch.testing.assert_close(new, old, atol=2e-6, rtol=1e-5)
    assert {site.users[0][0] for site in prepared.sites} <= set(fired) | taking
    assert keys <= set(model.state_dict())
    for path, module in model.named_modules():
        assert module is modules[path]
        assert type(module) is kinds[path]


@pytest.mark.parametrize("mode", MODES)
def test_every_site_takes_effect_and_reset_undoes_it_bit_for_bit(case, mode, equal):
    case.mode = mode
    applier = case.applier()
    model = applier.prepared.model
    before = case.run(model)
    for site in applier.prepared.sites:
        applier.apply({site.name: SiteRecipe(WeightScheme(2))})
        assert not equal(case.run(model), before), site.name
        if site.activation:
            applier.apply({site.name: SiteRecipe(None, ActivationScheme(2))})
            assert not equal(case.run(model), before), site.name
        applier.to_float()
        assert equal(case.run(model), before), site.name


@pytest.mark.parametrize("mode", MODES)
def test_the_inputs_of_every_site_are_seen_and_quantized_in_every_call(case, mode, monkeypatch):
    case.mode = mode
    prepared = case.prepared()
    reads, inputs, quantized, names = {}, {}, {}, []

    def count(table, name):
        table[name] = table.get(name, 0) + 1

    for name, slot in prepared.slots.items():
        slot.read = lambda name=name: count(reads, name)
        slot.observe = lambda _, name=name: count(inputs, name)
        slot.activation = ActivationScheme(8, scale=1.0, zero_point=len(names))
        names.append(name)

    def fake_quantize(x, scheme, kind):
        count(quantized, names[scheme.zero_point])
        return x

    monkeypatch.setattr(prepared.engine, "fake_quantize", fake_quantize)
    case.run(prepared.model)
    used = {site.name for site in prepared.sites}
    assert set(reads) == used
    assert set(inputs) == {site.name for site in prepared.sites if site.activation}
    assert quantized == inputs


def test_eight_bits_are_close_and_switching_back_and_forth_is_a_fresh_conversion(
    case, uniform, equal
):
    applier = case.applier()
    prepared, before = applier.prepared, case.run(applier.prepared.model)
    applier.apply(uniform(prepared, 3, "per_token", scheme="asymmetric"))
    applier.apply(uniform(prepared, 8))
    eight = case.run(prepared.model)
    for quantized, original in zip(eight, before, strict=True):
        assert (quantized - original).norm() < 0.05 * original.norm()
    fresh = case.applier()
    fresh.apply(uniform(prepared, 8))
    assert equal(case.run(fresh.prepared.model), eight)


def test_sites_are_in_the_order_of_use_and_what_is_not_used_is_a_float_part(make_case):
    prepared = make_case("branches").prepared()
    assert [site.name for site in prepared.sites] == ["enter.a", "steps.0", "steps.1"]
    unused = {part.name for part in prepared.float_parts if "never used" in part.reason}
    assert unused == {"enter.b", "seldom"}


def test_all_parameters_are_in_sites_or_float_parts(case):
    prepared = case.prepared()
    sites = sum(site.numel for site in prepared.sites)
    parts = sum(part.parameters for part in prepared.float_parts)
    with without_norms(prepared.model):
        assert sites + parts == sum(p.numel() for p in prepared.model.parameters())


def test_tied_weights_are_one_site_and_stay_tied(make_case):
    case = make_case("language")
    applier = case.applier()
    model = applier.prepared.model
    tied = [site for site in applier.prepared.sites if len(site.users) == 2]
    assert [site.name for site in tied] == ["words"]
    applier.apply({"words": SiteRecipe(WeightScheme(2, "per_tensor"))})
    assert model.words.weight is model.out.weight
    assert len(model.words.weight.unique()) <= 4
    deployed = applier.deploy({"words": SiteRecipe(WeightScheme(2, "per_tensor"))})
    assert deployed.words._autoquant["weight"] is deployed.out._autoquant["weight"]


def test_a_module_at_two_places_is_one_site_with_one_recipe():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared).eval()
    x = torch.randn(2, 3)
    prepared = prepare(model, lambda m: m(x))
    assert [site.name for site in prepared.sites] == ["0"]
    applier = Applier(prepared, {})
    applier.apply({"0": SiteRecipe(WeightScheme(3))})
    weight = prepared.slots["0"].weight
    expected = F.linear(F.linear(x, weight, shared.bias).tanh(), weight, shared.bias)
    assert torch.equal(model(x), expected)


def test_nothing_to_quantize_says_what_was_found():
    with pytest.raises(ModelFileError, match="1× LayerNorm"):
        prepare(nn.Sequential(nn.LayerNorm(3), nn.ReLU()))
    with pytest.raises(ModelFileError, match="no parameters at all"):
        prepare(nn.ReLU())
    vocoder = nn.Sequential(*(parametrizations.weight_norm(nn.Conv1d(2, 2, 1)) for _ in range(5)))
    with pytest.raises(ModelFileError, match=r": 0, 1, 2 and 2 more: .*remove_parametrizations"):
        prepare(vocoder)
    idle = nn.ModuleDict({"a": nn.Linear(2, 2)})
    with pytest.raises(ModelFileError, match="none of the 1 quantizable layers is used"):
        prepare(idle, lambda m: None)


class Weighted(nn.Conv2d):
    """Computes otherwise than its base, in a place other than forward."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


def test_a_layer_that_computes_in_its_own_way_is_left_alone():
    own = nn.Linear(4, 4)
    own.forward = types.MethodType(lambda self, x: F.linear(x, self.weight) * 2, own)
    model = nn.Sequential(Weighted(3, 2, 3), nn.Flatten(), nn.Linear(2, 4), own).eval()
    x = torch.randn(2, 3, 3, 3)
    before = model(x)
    prepared = prepare(model, lambda m: m(x))
    assert [site.name for site in prepared.sites] == ["2"]
    assert torch.equal(model(x), before)
    assert isinstance(model[0], Weighted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_float_type_keep_it(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype).eval()
    x = torch.randn(5, 6, dtype=dtype)
    prepared = prepare(model, lambda m: m(x))
    applier = Applier(prepared, calibrate(prepared, [x], lambda m, batch: m(batch)))
    recipe = {n: SiteRecipe(WeightScheme(8), ActivationScheme(8)) for n in ("0", "2")}
    before = model(x)
    applier.apply(recipe)
    quantized = model(x)
    assert model[0].weight.dtype == quantized.dtype == dtype
    assert (quantized - before).norm() < 0.05 * before.norm()
    assert torch.equal(applier.deploy(recipe)(x), quantized)


def test_deploying_leaves_the_model_as_it_is(case, uniform, equal):
    applier = case.applier()
    model = applier.prepared.model
    before, state = case.run(model), copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    deployed = applier.deploy(uniform(applier.prepared, 4))
    assert equal(case.run(model), before)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    mine = {p.data_ptr() for p in model.parameters()}
    theirs = (*deployed.parameters(), *deployed.buffers())
    assert not mine & {p.data_ptr() for p in theirs if p.numel()}


def test_layers_left_in_float_are_again_what_they_were(case):
    kinds = [type(module) for module in case.model.modules()]
    prepared = case.prepared()
    restored = deploy(prepared, {})
    assert [type(m) for m in restored.modules()] == kinds
    for old, new in zip(case.run(prepared.model), case.run(restored), strict=True):
        torch.testing.assert_close(new, old, atol=2e-6, rtol=1e-5)
    assert not any("_autoquant" in key for key in restored.state_dict())


def test_attention_whose_output_projection_is_quantized_calls_it():
    torch.manual_seed(0)
    x = torch.randn(3, 1, 8)

    @torch.inference_mode()
    def run(model):
        return model(x, x, x, need_weights=False)[0]

    prepared = prepare(nn.MultiheadAttention(8, 2).eval(), run)
    before = run(prepared.model)
    applier = Applier(prepared, {})
    one = {"out_proj": SiteRecipe(None, ActivationScheme(3, "per_token"))}
    applier.apply(one)
    expected = run(prepared.model)
    assert not torch.equal(expected, before)
    assert torch.equal(run(applier.deploy(one)), expected)


def test_channels_last_changes_the_layout_and_not_the_numbers(make_case):
    case = make_case("convolutions")
    applier = case.applier()
    model = applier.prepared.model
    before = case.run(model)[0]
    use_channels_last(model)
    assert model.grouped(torch.randn(2, 8, 9, 9)).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(case.run(model)[0], before, atol=2e-6, rtol=1e-5)
    use_channels_last(model, on=False)
    assert torch.equal(case.run(model)[0], before)


@pytest.mark.parametrize("batch", [3, 1, 0])
def test_channels_last_begins_at_an_input_of_one_channel(batch):
    """One channel lies the same in both formats: its strides alone say which one is meant."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    x = torch.randn(3, 1, 6, 5)
    prepared = prepare(net, lambda m, _=None: m(x))
    prepared.reset()
    given = x[:batch]
    before = prepared.model(given)
    use_channels_last(prepared.model)
    between = prepared.model[0](given)
    assert between.shape == (batch, 4, 6, 5)
    if batch:
        assert between.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(prepared.model(given), before, atol=2e-6, rtol=1e-5)

"""A converted module is, to the user's code, the module that it was."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.errors import UserError
from autoquant.methods.applier import Applier
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.nn.converted import NAME
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme

INT8 = SiteRecipe(WeightScheme(8), ActivationScheme(8))
TAKEN = (
    *("sites", "clamp", "reader", "gelu", "operation", "float_class", "packed_sites", "path"),
    *("channels_last", "compute", "module", "layer", "reads", "own", "_product", "_step", "_run"),
    *("_heads", "_join", "_mask", "_layers", "_check", "_engine", "_project", "_given"),
)
"""Names that this package uses for its own."""


class Busy(nn.Linear):
    """A layer whose every attribute could be taken for one of ours."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        for name in TAKEN:
            setattr(self, name, name)


class BusyLSTM(nn.LSTM):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, batch_first=True)
        for name in TAKEN:
            setattr(self, name, name)


class Net(nn.Module):
    """Asks its layers and parameters what they are, as user code does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Busy(6, 8)
        self.conv = nn.Conv2d(1, 2, 3, bias=False)
        self.lstm = BusyLSTM(8, 8)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.words = nn.Embedding(5, 8)
        self.last = nn.Linear(8, 3, bias=False)
        self.clamp = "mine"

    def forward(self, x: Tensor) -> Tensor:
        like = next(self.last.parameters())
        x = x.to(like.dtype).to(like.device)
        assert self.last.weight.dtype == like.dtype
        assert self.last.weight.shape == (3, 8)
        assert self.conv.weight.device == like.device
        x = self.first(x) + self.conv(x[:, None]).mean((1, 2, 3))[:, None, None]
        for layer in (self.lstm, self.own):
            if type(layer) is BusyLSTM:
                x, _ = layer(x)
            elif type(layer) is nn.MultiheadAttention:
                x, _ = layer(x, x, x)
        x = x + self.words(torch.arange(x.shape[1]))
        return self.last(x)


def random() -> Tensor:
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def applier() -> Applier:
    torch.manual_seed(0)
    prepared = prepare(Net().eval(), lambda m: m(random()))
    return Applier(prepared, calibrate(prepared, [random()], lambda m, x: m(x)))


def int8(applier: Applier) -> dict[str, SiteRecipe]:
    return {s.name: INT8 for s in applier.prepared.sites}


def test_nothing_of_the_users_is_touched_and_one_name_is_added():
    torch.manual_seed(0)
    model, x = Net().eval(), random()
    before, expected = copy.deepcopy(model), model(x)
    prepared = prepare(model, lambda m: m(x))
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    deployed = Applier(prepared, {}).deploy({})
    for path, module in before.named_modules():
        for now in (model.get_submodule(path), deployed.get_submodule(path)):
            assert type(now) is type(module)
            own = {n for n in vars(now) if n not in vars(module)}
            assert own <= {NAME, "forward"}
            for name in TAKEN:
                assert vars(now).get(name) == vars(module).get(name)
            assert set(now.state_dict()) == set(module.state_dict())
    assert not any(NAME in vars(m) for m in deployed.modules())


def test_its_own_code_runs_on_while_it_is_searched_and_after_it_was_applied(applier):
    x, sites = random(), int8(applier)
    applier.apply(sites)
    model = applier.prepared.model
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(model.last.weight, model.last.forward.sites["weight"].weight)
    deployed = applier.deploy(sites)
    assert torch.equal(deployed(x), expected)
    for path, module in deployed.named_modules():
        if NAME not in path:
            assert type(module) is type(model.get_submodule(path))
    for name in TAKEN:
        assert vars(deployed.first)[name] == vars(deployed.lstm)[name] == name
    assert deployed.clamp == "mine"
    assert [p.shape for p in deployed.last.parameters()] == [(0,)]


def test_what_is_read_of_a_layer_is_what_it_computes_with(applier):
    recipe = {"last": SiteRecipe(WeightScheme(2), None), "first": SiteRecipe(WeightScheme(3), None)}
    applier.apply(recipe)
    deployed = applier.deploy(recipe)
    applier.apply(recipe)
    for model in (applier.prepared.model, deployed):
        assert len(model.last.weight[0].unique()) <= 4
        x = torch.randn(2, 8)
        assert torch.equal(model.last(x), F.linear(x, model.last.weight))
        assert model.lstm.all_weights[0][0].shape == (32, 8)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: saved(m),
        lambda m: m.to("cpu"),
        lambda m: m.double().float(),
        lambda m: m.requires_grad_(False),
        lambda m: torch.compile(m, backend="eager"),
        lambda m: torch.compile(m, backend="aot_eager"),
        lambda m: torch.jit.trace(m, random(), check_trace=False),
        lambda m: torch.export.export(m, (random(),)).module(),
        lambda m: lambda x: torch.func.functional_call(m, {**named(m)}, (x,)),
    ],
    ids=str.split(
        "deepcopy pickle torch.save to double-float requires_grad_ eager aot_eager trace export "
        "functional_call"
    ),
)
@pytest.mark.filterwarnings("ignore")
def test_an_applied_model_is_a_model_like_any_other(applier, copied):
    deployed = applier.deploy(int8(applier))
    with torch.no_grad():
        expected = deployed(random())
        found = copied(deployed)(random())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_applied_model_moves_to_another_dtype_with_its_scales_as_they_are(applier, dtype):
    deployed = applier.deploy(int8(applier))
    expected, scale = deployed(random()), deployed.last._autoquant["weight"].scale.clone()
    moved = copy.deepcopy(deployed).to(dtype)
    assert torch.equal(moved.last._autoquant["weight"].scale, scale)
    assert moved.last.weight.dtype == dtype
    found = moved(random())
    assert found.dtype == dtype
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    assert not any(isinstance(w, Tensor) for w in moved.lstm._flat_weights)


def test_an_applied_model_takes_transforms_of_torch_func(applier):
    deployed = applier.deploy(int8(applier))
    x = random()
    found = torch.vmap(lambda row: deployed(row[None])[0])(x)
    torch.testing.assert_close(found, deployed(x), atol=1e-5, rtol=1e-5)
    assert torch.func.jacrev(deployed)(x[:1]).shape == (1, 5, 3, 1, 5, 6)


def test_weights_from_outside_have_no_place_in_a_quantized_layer(applier):
    sites = int8(applier)
    deployed = applier.deploy(sites)
    given = {"last.weight": torch.zeros(3, 8), "lstm.bias_ih_l0": torch.zeros(32)}
    applier.apply(sites)
    for model in (applier.prepared.model, deployed):
        before = model(random())
        with pytest.raises(UserError, match=r"^last.weight is quantized, so no other weight"):
            torch.func.functional_call(model, given, (random(),))
        assert torch.equal(model(random()), before)
    x, many = random(), torch.zeros(2, 3, 8)
    with pytest.raises(UserError, match=r"^last.weight is quantized"):
        torch.vmap(lambda w: torch.func.functional_call(deployed, {"last.weight": w}, x))(many)
    # In float they are what is computed with.
    applier.to_float()
    model = applier.prepared.model
    assert not torch.func.functional_call(model, given, (random(),)).any()
    assert model(random()).any()


class Transformed(nn.Module):
    """Runs one layer inside a transform, gives one its weight, and calls one."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.given, self.plain = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.vmap(self.inside)(x)
        x = torch.func.functional_call(self.given, {"weight": self.given.weight * 2}, (x,))
        return self.plain(x)


def test_layers_inside_transforms_stay_in_float_by_name():
    torch.manual_seed(0)
    model, x = Transformed().eval(), torch.randn(3, 4)
    expected = model(x)
    prepared = prepare(model, lambda m: m(x))
    assert [site.name for site in prepared.sites] == ["plain"]
    reasons = {(part.name, part.reason) for part in prepared.float_parts}
    assert {
        ("inside", "runs inside a transform of torch.func or a trace of torch.jit"),
        ("given", "its weight is replaced while the model runs"),
    } <= reasons
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["per_tensor", "per_token"])
def test_a_trace_of_a_searched_model_has_all_of_it(applier, activation):
    recipe = SiteRecipe(WeightScheme(4), ActivationScheme(8, activation))
    applier.apply({s.name: recipe for s in applier.prepared.sites})
    model, other = applier.prepared.model, random() * 0.7
    with torch.no_grad():
        traced = torch.jit.trace(model, random(), check_trace=False)
        torch.testing.assert_close(traced(other), model(other), atol=1e-5, rtol=1e-5)

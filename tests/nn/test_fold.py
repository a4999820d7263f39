"""Folding BatchNorm: the same arithmetic, and only where nothing else uses the output."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from autoquant.errors import SpecError, TrialError
from autoquant.methods.applier import Applier
from autoquant.nn.agreement import disagreement
from autoquant.nn.convert import prepare
from autoquant.nn.fold import fold
from autoquant.nn.untouched import Confirming, look
from autoquant.spec.recipe import SiteRecipe, WeightScheme


def pairs_of(model, *runs):
    return look(model, runs).pairs


def trained(model):
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.uniform_(-1, 1, generator=generator)
            norm.running_var.uniform_(0.1, 2, generator=generator)
            if norm.affine:
                with torch.no_grad():
                    norm.weight.uniform_(-2, 2, generator=generator)
                    norm.bias.uniform_(-1, 1, generator=generator)
    return model.eval()


PAIRS = [
    ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], (2, 3, 6, 6)),
    ([nn.Conv2d(3, 4, 3, bias=False, padding=1), nn.BatchNorm2d(4)], (2, 3, 6, 6)),
    ([nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4, eps=0.1)], (2, 4, 6, 6)),
    ([nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)], (2, 4, 6, 6)),
    ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, affine=False)], (2, 3, 6)),
    ([nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)], (2, 3, 3, 3, 3)),
    ([nn.Linear(3, 4), nn.BatchNorm1d(4)], (5, 3)),
    ([nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)], (5, 3)),
    ([nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)], (2, 3, 6, 6)),
    ([nn.ConvTranspose1d(3, 3, 2, bias=False), nn.BatchNorm1d(3)], (2, 3, 6)),
]


@pytest.mark.parametrize(("layers", "shape"), PAIRS)
def test_folding_is_exact_and_undoing_restores_every_bit(layers, shape):
    model = trained(nn.Sequential(*copy.deepcopy(layers))).double()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        before, state = model(x), copy.deepcopy(model.state_dict())
        norm = model[1]
        assert pairs_of(model, lambda m: m(x)) == {"1": "0"}
        prepared = prepare(model, lambda m: m(x))
        assert prepared.folded == {"1": "0"}
        torch.testing.assert_close(model(x), before, atol=1e-12, rtol=1e-12)
        # The norm is there for whoever asks for its weights, and does nothing.
        assert torch.equal(model.state_dict()["1.running_mean"], state["1.running_mean"])
        found = model(x)
        for on in (False, True, False):
            prepared.turn_fold("1", on=on)
            assert torch.equal(model(x), found if on else before)
            assert model[0].weight is prepared.slots["0"].parameter
        assert prepared.folded == {}
        assert not model._forward_hooks
    assert model[1] is norm
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_the_folded_numbers_are_computed_in_float64_and_rounded_once():
    conv, norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
    model = trained(nn.Sequential(conv, norm))
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = conv.weight.double() * gain.reshape(2, 1, 1, 1)
    bias = (conv.bias.double() - norm.running_mean.double()) * gain + norm.bias.double()
    fold(model, {"1": "0"}).settle()
    torch.testing.assert_close(model[0].weight, weight.float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(model[0].bias, bias.float(), rtol=1e-7, atol=1e-9)


class Block(nn.Module):
    def __init__(self, between=None, bias=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=bias), nn.BatchNorm2d(3)
        self.between = between or (lambda y: y)

    def forward(self, x):
        return self.norm(self.between(self.conv(x)))


class Residual(Block):
    """Uses the convolution's output beside the norm, so folding would change it."""

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Auxiliary(Block):
    def forward(self, x):
        y = self.conv(x)
        return {"main": self.norm(y), "raw": [y]}


class Twice(Block):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x * 2)


class TwoNorms(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + self.other(y)

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(3)


class NormTwice(Block):
    def forward(self, x):
        return self.norm(self.norm(self.conv(x)))


class Functional(Block):
    def forward(self, x):
        return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight)


IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "model",
    [
        Residual(),
        Auxiliary(),
        Functional(),
        Twice(),
        TwoNorms(),
        NormTwice(),
        Block(torch.relu),
        Block(torch.relu_),
        Block(lambda y: y.mul_(2)),
        Block(lambda y: y.transpose(2, 3)),
        Block(nn.Identity()),
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_outputs_stay_the_same_whatever_the_model_does_with_the_convolution(model, mode):
    model = trained(copy.deepcopy(model))
    run = mode()(lambda m: m(IMAGE))
    before, state = run(model), copy.deepcopy(model.state_dict())
    prepared = prepare(model, run)
    plain = isinstance(model.between, nn.Identity)
    assert prepared.folded == ({"norm": "conv"} if plain else {})
    assert disagreement(before, run(model), tolerance=1e-6) is None
    if not plain:
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_one_bad_pair_does_not_keep_the_others_from_folding():
    model = trained(nn.Sequential(Residual(), Block(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    before = model(IMAGE)
    assert prepare(model, lambda m: m(IMAGE)).folded == {"1.norm": "1.conv", "3": "2"}
    assert torch.allclose(model(IMAGE), before, atol=1e-5)


class Domains(nn.Module):
    """A norm for each domain, as the batch says."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 3, 1), nn.ModuleList(nn.BatchNorm2d(3) for _ in "ab")

    def forward(self, x, domain=0, raw=False):
        y = self.conv(x)
        return y if raw else self.norms[domain](y)


class Kept(Block):
    """Keeps the convolution's output where no output shows it."""

    def forward(self, x):
        self.kept = self.conv(x)
        return self.norm(self.kept)


class Direct(Block):
    """Calls the layer past its hooks too."""

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv.forward(x)


def test_what_any_batch_does_otherwise_is_not_folded():
    for other in (lambda m: m(IMAGE, 1), lambda m: m(IMAGE, raw=True)):
        model = trained(Domains())
        assert pairs_of(model, lambda m: m(IMAGE)) == {"norms.0": "conv"}
        assert pairs_of(model, lambda m: m(IMAGE), other) == {}
        assert pairs_of(model, other, lambda m: m(IMAGE)) == {}
        # Whole passes are watched more lightly.
        confirming = Confirming(model, {"norms.0": "conv"})
        for run in (lambda m: m(IMAGE), other):
            assert confirming.pairs
            with confirming.watching(), torch.no_grad():
                held = run(model)
            del held
        assert not confirming.pairs
    for model in (Kept(), Direct()):
        assert pairs_of(trained(model), lambda m: m(IMAGE)) == {}


def test_two_calls_of_one_pair_are_folded():
    class Siamese(Block):
        def forward(self, x):
            return super().forward(x) - super().forward(x + 1)

    model = trained(Siamese())
    before = model(IMAGE)
    assert prepare(model, lambda m: m(IMAGE)).folded == {"norm": "conv"}
    torch.testing.assert_close(model(IMAGE), before, atol=1e-5, rtol=1e-5)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", ["prepared", "applied", "float", "copied", "loaded"])
@pytest.mark.parametrize(
    "astray", [lambda m: m(IMAGE, 1), lambda m: m(IMAGE, raw=True), lambda m: m.norms[0](IMAGE)]
)
def test_a_run_that_takes_another_way_ends_in_an_error_and_not_in_other_numbers(kind, astray):
    model = trained(Domains())
    before = model(IMAGE)
    prepared = prepare(model, lambda m: m(IMAGE))
    recipe = {} if kind == "float" else {"conv": SiteRecipe(WeightScheme(8))}
    if kind != "prepared":
        model = Applier(prepared, {}).deploy(recipe)
    model = {"copied": copy.deepcopy, "loaded": saved}.get(kind, lambda m: m)(model)
    assert type(model.norms[0]) is nn.BatchNorm2d
    for _ in range(2):
        torch.testing.assert_close(model(IMAGE), before, atol=0.05, rtol=0.05)
        with pytest.raises(TrialError, match=r"^conv: its output .* norms.0"):
            astray(model)
    torch.testing.assert_close(model(IMAGE), before, atol=0.05, rtol=0.05)


def hooked(model):
    model[1].register_forward_hook(lambda *_: None)
    return model


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(max=1e6)


def shared_weights():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    return model


def shared_modules():
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3))


def training():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    model[1].train()
    return model


def reparametrized():
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)).eval()


@pytest.mark.parametrize(
    "model",
    [
        shared_weights().eval(),
        shared_modules().eval(),
        training(),
        reparametrized(),
        hooked(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()),
        nn.Sequential(nn.Conv2d(3, 3, 1), Activated(3)).eval(),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval(),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(), nn.ReLU(), nn.BatchNorm2d(3)).eval(),
        nn.Sequential(nn.ConvTranspose2d(3, 6, 1, groups=3), nn.BatchNorm2d(6)).eval(),
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).eval(),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3, affine=True)).eval(),
    ],
    ids=lambda m: f"{type(m[0]).__name__}-{type(m[1]).__name__}",
)
def test_what_is_not_a_plain_pair_is_left_alone(model):
    assert pairs_of(model, lambda m: m(IMAGE)) == {}


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Linear(4, 6), nn.BatchNorm1d(5)], (2, 5, 4)),
        ([nn.Linear(4, 5), nn.BatchNorm1d(5)], (2, 5, 4)),
        ([nn.Conv1d(4, 6, 1), nn.BatchNorm1d(7)], (4, 7)),
    ],
    ids=["sequence", "square", "no batch"],
)
def test_a_norm_over_another_axis_is_left_alone(layers, shape):
    model, x = trained(nn.Sequential(*layers)), torch.randn(shape)
    before = model(x)
    assert pairs_of(model, lambda m: m(x)) == {}
    assert torch.equal(model(x), before)


def test_a_fold_of_another_model_is_refused():
    conv = nn.Conv2d(3, 3, 1)
    with pytest.raises(SpecError, match="9 → 0 is not in the model"):
        fold(nn.Sequential(conv), {"9": "0"})
    for other in (nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(3, track_running_stats=False)):
        with pytest.raises(SpecError, match="1 → 0 is no BatchNorm after a layer"):
            fold(nn.Sequential(conv, other), {"1": "0"})
    with pytest.raises(SpecError, match="1 → 0 is no BatchNorm after a layer"):
        fold(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), {"1": "0"})

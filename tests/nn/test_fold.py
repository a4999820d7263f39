"""Folding BatchNorm: the same arithmetic, and only where nothing else uses the output."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from autoquant.errors import SpecError
from autoquant.nn.fold import find_folds, fold, fold_checked, same_outputs


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
        assert find_folds(model, lambda m: m(x)) == {"1": "0"}
        undo = fold(model, {"1": "0"})
        assert isinstance(model[1], nn.Identity)
        torch.testing.assert_close(model(x), before, atol=1e-12, rtol=1e-12)
        undo()
        assert torch.equal(model(x), before)
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
    fold(model, {"1": "0"})
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
    before, state = run(model), model.state_dict()
    pairs = fold_checked(model, run)
    plain = isinstance(model.between, nn.Identity)
    assert pairs == ({"norm": "conv"} if plain else {})
    assert same_outputs(before, run(model), 1e-6)
    if not plain:
        assert isinstance(model.norm, nn.BatchNorm2d)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_one_bad_pair_does_not_keep_the_others_from_folding():
    model = trained(nn.Sequential(Residual(), Block(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    before = model(IMAGE)
    assert fold_checked(model, lambda m: m(IMAGE)) == {"1.norm": "1.conv", "3": "2"}
    assert torch.allclose(model(IMAGE), before, atol=1e-5)
    assert isinstance(model[0].norm, nn.BatchNorm2d)


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
    assert find_folds(model, lambda m: m(IMAGE)) == {}
    assert fold_checked(model, lambda m: m(IMAGE)) == {}


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
    assert fold_checked(model, lambda m: m(x)) == {}
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


def test_outputs_are_compared_leaf_by_leaf():
    a = {"x": torch.ones(3), "n": [1, None, torch.tensor([2])]}
    b = copy.deepcopy(a)
    assert same_outputs(a, b)
    b["x"] += 5e-4
    assert same_outputs(a, b)
    assert not same_outputs(a, b, 1e-4)
    for key, value in (("x", torch.ones(4)), ("n", [2, None, torch.tensor([2])])):
        assert not same_outputs(a, {**a, key: value})
    assert not same_outputs(a, {"x": torch.ones(3)})
    assert not same_outputs(torch.tensor([1.0]), torch.tensor([float("nan")]))
    masked = torch.tensor([1.0, -float("inf")])
    assert same_outputs({"a": {"b": masked}}, {"a": {"b": masked.clone()}})
    assert not same_outputs(torch.tensor([1]), torch.tensor([2]))
    assert not same_outputs(torch.ones(1), 1.0)

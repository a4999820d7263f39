import copy

import pytest
import torch
from torch import nn

from autoquant.errors import SpecError
from autoquant.nn.fold import find_folds, fold, fold_checked


def trained(model):
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.uniform_(norm.bias, -1, 1)
    return model.eval()


@pytest.mark.parametrize(
    ("layers", "x"),
    [
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], torch.randn(2, 3, 6, 6)),
        ([nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4)], torch.randn(2, 4, 6, 6)),
        ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, affine=False)], torch.randn(2, 3, 6)),
        ([nn.Linear(3, 4), nn.BatchNorm1d(4)], torch.randn(5, 3)),
        ([nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)], torch.randn(2, 3, 6, 6)),
    ],
)
def test_folding_keeps_the_outputs_and_undoing_restores_them(layers, x):
    model = trained(nn.Sequential(*layers))
    original = copy.deepcopy(model)
    before = model(x)
    assert find_folds(model, lambda m: m(x)) == {"1": "0"}
    undo = fold(model, {"1": "0"})
    assert isinstance(model[1], nn.Identity)
    assert torch.allclose(model(x), before, atol=1e-5)
    undo()
    assert torch.equal(model(x), before)
    assert original.state_dict().keys() == model.state_dict().keys()


class Branch(nn.Module):
    """Uses the convolution's output beside the norm, so folding would change it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x).relu_())


def test_only_what_keeps_the_outputs_is_folded():
    x = torch.randn(2, 3, 4, 4)
    model = nn.Sequential(trained(Branch()), nn.Conv2d(3, 3, 1), trained(nn.BatchNorm2d(3))).eval()
    before = model(x)
    assert fold_checked(model, lambda m: m(x)) == {"2": "1"}
    assert torch.allclose(model(x), before, atol=1e-5)


def test_what_is_not_a_pair_is_left_alone():
    x = torch.randn(2, 3, 4, 4)
    assert find_folds(trained(InPlace()), lambda m: m(x)) == {}
    shared = nn.Conv2d(3, 3, 1)
    twice = nn.Sequential(shared, nn.BatchNorm2d(3), shared, nn.BatchNorm2d(3))
    assert find_folds(trained(twice), lambda m: m(x)) == {}
    training = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert find_folds(training.train(), lambda m: m(x)) == {}


def test_a_fold_of_another_model_is_refused():
    with pytest.raises(SpecError, match="another model"):
        fold(nn.Sequential(nn.Conv2d(3, 3, 1)), {"9": "0"})
    with pytest.raises(SpecError, match="no BatchNorm"):
        fold(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), {"1": "0"})

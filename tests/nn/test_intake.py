"""A model is unwrapped, looked over and copied, or refused by the name of what is at fault."""

import io
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from autoquant.errors import ModelFileError
from autoquant.nn.intake import copied, take


def plain():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_what_a_compiled_model_stands_for_is_taken():
    model = plain()
    assert take(torch.compile(model)) is model
    assert take(model) is model


def test_compiled_parts_are_unwrapped_and_the_users_own_stay_compiled():
    inner = plain()
    compiled = torch.compile(inner)
    model = nn.ModuleDict({"a": compiled, "b": nn.ModuleList([compiled, nn.Linear(2, 2)])})
    found = take(model)
    assert found["a"] is inner
    assert found["b"][0] is inner
    assert found["b"][1] is model["b"][1]
    assert model["a"] is compiled
    assert model["b"][0] is compiled
    assert set(found.state_dict()) == {
        "a.0.weight", "a.0.bias", "a.2.weight", "a.2.bias",
        "b.0.0.weight", "b.0.0.bias", "b.0.2.weight", "b.0.2.bias", "b.1.weight", "b.1.bias",
    }  # fmt: skip


def sharded():
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(TwoTensor(torch.randn(3, 4), torch.randn(3, 4)))
    return layer


def dynamic(kind):
    model = nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {kind})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.LazyLinear(2)), "0.weight: lazy and not initialized"),
        (nn.Sequential(plain().to("meta")), "0.0.weight: on the meta device"),
        (nn.DataParallel(plain()), "the model is a DataParallel"),
        (nn.Sequential(nn.DataParallel(plain())), "0: a DataParallel"),
        (None, "TorchScript"),
        (nn.Sequential(sharded(), plain()), "0.weight: a TwoTensor, quantized already or sharded"),
        (nn.Sequential(plain(), dynamic(nn.Linear)), "1.0: quantized already, by torch.ao"),
        (dynamic(nn.LSTM), "1: quantized already, by torch.ao"),
    ],
    ids=["lazy", "meta", "parallel", "parallel part", "scripted", "subclass", "linear", "lstm"],
)
def test_what_cannot_be_searched_is_refused_by_name(model, words):
    model = torch.jit.script(plain()) if model is None else model
    with pytest.raises(ModelFileError, match=words) as caught:
        take(model)
    assert "\n" not in str(caught.value)


def test_tensors_with_a_graph_are_copied_without_it():
    model = plain()
    hidden = model[0](torch.randn(2, 4))
    model.hidden, model.kept = hidden, {"all": [hidden, hidden * 2]}
    found = copied(model)
    assert torch.equal(found.hidden, hidden)
    assert found.hidden.grad_fn is None
    assert found.kept["all"][0] is found.hidden  # one tensor stays one
    assert hidden.grad_fn is not None
    assert model[0].weight.requires_grad
    assert found[0].weight.requires_grad


class Guard:
    def __init__(self):
        self.lock = threading.Lock()


class Stubborn:
    def __deepcopy__(self, memo):
        raise ValueError("not\nme")


@pytest.mark.parametrize(
    ("put", "path"),
    [
        (lambda m: setattr(m[0], "lock", threading.Lock()), r"^0\.lock: "),
        (lambda m: setattr(m, "log", open(__file__)), r"^log: .*TextIOWrapper"),  # noqa: SIM115
        (lambda m: setattr(m[2], "a", {"b": [1, Guard()]}), r"^2\.a\['b'\]\[1\]\.lock: "),
        (lambda m: setattr(m, "stream", io.BufferedReader(io.FileIO(__file__))), "^stream: "),
        (lambda m: setattr(m, "odd", Stubborn()), "^odd: can't be copied .ValueError: not me"),
    ],
    ids=["lock", "file", "nested", "stream", "own copy"],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_cannot_be_copied_is_named(put, path):
    model = plain()
    put(model)
    with pytest.raises(ModelFileError, match=path) as caught:
        copied(model)
    assert "\n" not in str(caught.value)

"""What stays in float is named, with the reason and how many weights that are."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from autoquant.nn.sites import find_sites

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def parts(model):
    return {part.name: part for part in find_sites(model)[1]}


@pytest.mark.parametrize(
    ("compute", "words", "parameters"),
    [
        (nn.utils.weight_norm, "nn.utils.remove_weight_norm", 12 + 3 + 3),
        (nn.utils.spectral_norm, "nn.utils.remove_spectral_norm", 12 + 3),
        (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "prune.remove", 12 + 3),
        (nn.utils.parametrizations.weight_norm, "remove_parametrizations", 12 + 3 + 3),
    ],
    ids=["weight_norm", "spectral_norm", "prune", "parametrization"],
)
def test_a_weight_that_is_computed_is_named_with_what_undoes_it(compute, words, parameters):
    found = parts(nn.Sequential(compute(nn.Linear(4, 3)), nn.Linear(3, 2)))
    assert words in found["0"].reason
    assert found["0"].parameters == parameters
    assert set(found) == {"0", "1"}


def buffered_bias(layer):
    bias = layer.bias.detach().clone()
    del layer.bias
    layer.register_buffer("bias", bias)
    return layer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda layer: prune.random_unstructured(layer, "bias", 0.5), "'bias' makes the mask"),
        (buffered_bias, "its bias is not a parameter"),
        (lambda layer: layer, None),
        (lambda layer: nn.Linear(4, 3, bias=False), None),
    ],
    ids=["pruned", "buffer", "plain", "none"],
)
def test_a_layer_whose_bias_is_no_plain_parameter_is_left(change, words):
    sites, _ = find_sites(model := nn.Sequential(change(nn.Linear(4, 3))))
    assert [site.name for site in sites] == ([] if words else ["0"])
    if words:
        assert words in parts(model)["0.weight"].reason


def test_matrices_in_buffers_are_named_and_counted():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    frozen = nn.Linear(4, 3)
    weight = frozen.weight.detach().clone()
    del frozen.weight
    frozen.register_buffer("weight", weight)
    model.append(frozen)
    model.register_buffer("directions", torch.randn(5, 2))
    model.register_buffer("turns", torch.randn(5, 2), persistent=False)
    model.register_buffer("mask", torch.ones(5, 2, dtype=torch.bool))
    found = parts(model)
    assert found["2.weight"].reason == found["directions"].reason == "a buffer, not a parameter"
    assert (found["2.weight"].weights, found["directions"].weights) == (12, 10)
    assert set(found) == {"2.weight", "directions", "0", "1", "2"}


def test_scripted_parts_are_named_once():
    inner = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    found = parts(nn.Sequential(inner, nn.Linear(2, 2)))
    assert set(found) == {"0", "1"}
    assert found["0"].reason == "TorchScript, whose layers can't be switched"
    assert (found["0"].parameters, found["0"].weights) == (12 + 3 + 6 + 2, 12 + 6)


def test_biases_and_norms_are_no_weights():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.LayerNorm((3, 4)))
    found = parts(model)
    assert [found[name].weights for name in ("0", "1", "2")] == [0, 0, 24]

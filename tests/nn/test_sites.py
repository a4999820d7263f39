"""Which weights are sites, how they are named, and why the others are not."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from autoquant.nn.sites import find_sites

LAYERS = [
    (nn.Linear(6, 4), "linear", {"weight": (4, 6)}),
    (nn.Conv1d(6, 4, 3), "conv", {"weight": (4, 18)}),
    (nn.Conv2d(6, 4, (3, 2), groups=2), "conv", {"weight": (4, 18)}),
    (nn.Conv2d(6, 6, 3, groups=6), "conv", {"weight": (6, 9)}),
    (nn.Conv3d(2, 4, 3), "conv", {"weight": (4, 54)}),
    (nn.ConvTranspose1d(6, 4, 3), "conv_transpose", {"weight": (4, 18)}),
    (nn.ConvTranspose2d(6, 4, 3, groups=2), "conv_transpose", {"weight": (2, 54)}),
    (nn.ConvTranspose3d(2, 4, 3), "conv_transpose", {"weight": (4, 54)}),
    (nn.Embedding(7, 5), "embedding", {"weight": (7, 5)}),
    (
        nn.LSTM(3, 4, 1, bidirectional=True, proj_size=2),
        "rnn",
        {
            f"weight_{part}_l0{end}": shape
            for end in ("", "_reverse")
            for part, shape in (("ih", (16, 3)), ("hh", (16, 2)), ("hr", (2, 4)))
        },
    ),
    (
        nn.GRU(3, 4, 2),
        "rnn",
        {
            "weight_ih_l0": (12, 3),
            "weight_hh_l0": (12, 4),
            "weight_ih_l1": (12, 4),
            "weight_hh_l1": (12, 4),
        },
    ),
    (nn.RNN(3, 4), "rnn", {"weight_ih_l0": (4, 3), "weight_hh_l0": (4, 4)}),
    (nn.LSTMCell(3, 4), "rnn", {"weight_ih": (16, 3), "weight_hh": (16, 4)}),
    (nn.GRUCell(3, 4), "rnn", {"weight_ih": (12, 3), "weight_hh": (12, 4)}),
    (nn.RNNCell(3, 4), "rnn", {"weight_ih": (4, 3), "weight_hh": (4, 4)}),
    (
        nn.MultiheadAttention(4, 2),
        "attention",
        {"in_proj_weight": (12, 4), "out_proj.weight": (4, 4)},
    ),
    (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        "attention",
        {
            "q_proj_weight": (4, 4),
            "k_proj_weight": (4, 3),
            "v_proj_weight": (4, 5),
            "out_proj.weight": (4, 4),
        },
    ),
]


def summed(model):
    sites, parts = find_sites(model)
    return sum(site.numel for site in sites) + sum(part.parameters for part in parts)


def names(model):
    return [site.name for site in find_sites(model)[0]]


def reasons(model):
    return {part.name: part.reason for part in find_sites(model)[1]}


@pytest.mark.parametrize(("layer", "kind", "weights"), LAYERS, ids=lambda v: type(v).__name__)
def test_every_layer_type_has_its_sites_with_rows_of_output_channels(layer, kind, weights):
    model = nn.ModuleDict({"layer": layer})
    sites, parts = find_sites(model)
    expected = {f"layer.{name}".removesuffix(".weight"): shape for name, shape in weights.items()}
    assert {site.name: site.matrix for site in sites} == expected
    for site in sites:
        assert site.kind == ("linear" if "out_proj" in site.name else kind)
        assert site.activation == (kind != "embedding")
        assert site.groups == getattr(layer, "groups", 1)
        assert [f"{path}.{name}" for path, name in site.users] == [
            site.name if kind in ("rnn", "attention") and "out" not in site.name
            else f"{site.name}.weight"
        ]  # fmt: skip
    assert {part.reason for part in parts} <= {"biases are added in float"}
    assert summed(model) == sum(p.numel() for p in model.parameters())


def test_every_parameter_is_accounted_for_exactly_once(case):
    sites, parts = find_sites(case.model)
    assert summed(case.model) == sum(p.numel() for p in case.model.parameters())
    assert len({site.name for site in sites}) == len(sites)
    assert len({part.name for part in parts}) == len(parts)


def test_a_model_that_is_itself_a_layer_has_a_name():
    assert names(nn.Linear(2, 3)) == ["weight"]
    assert names(nn.GRU(2, 3)) == ["weight_ih_l0", "weight_hh_l0"]


def test_tied_weights_are_one_site_of_all_that_use_them():
    model = nn.ModuleDict({"words": nn.Embedding(7, 4), "a": nn.Linear(4, 7), "b": nn.Linear(4, 7)})
    model["a"].weight = model["b"].weight = model["words"].weight
    (site,), _ = find_sites(model)
    assert site.name == "words"
    assert site.users == (("words", "weight"), ("a", "weight"), ("b", "weight"))
    assert site.activation
    assert summed(model) == 28 + 14


def test_a_module_at_two_paths_is_one_site():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    assert names(model) == ["a"]
    assert summed(model) == 12


def test_weights_that_are_tied_to_something_else_stay_in_float():
    class Decoder(nn.Module):
        def __init__(self, words):
            super().__init__()
            self.words, self.table = words, words.weight

        def forward(self, x):
            return F.linear(self.words(x), self.table)

    model = Decoder(nn.Embedding(4, 3))
    assert names(model) == []
    assert "also held by table" in reasons(model)["words"]
    assert summed(model) == 12

    one, two = nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1)
    two.weight = one.weight
    model = nn.Sequential(one, two)
    assert names(model) == []
    assert reasons(model)["0.weight"] == "shared with 1.weight, which lays it out differently"
    assert summed(model) == 16 + 8


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Plain(nn.Linear):
    def describe(self):
        return "the same arithmetic"


def patched():
    layer = nn.Linear(2, 2)
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight) * 2, layer)
    return layer


def emptied():
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.empty(2, 0))
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Own(2, 2), "Own has a forward of its own"),
        (Standardized(2, 2, 1), "Standardized has a forward of its own"),
        (patched(), "Linear has a forward of its own"),
        (parametrizations.weight_norm(nn.Linear(2, 2)), "remove_parametrizations"),
        (nn.Linear(2, 2, dtype=torch.complex64), "holds torch.complex64 numbers"),
        (nn.Embedding(2, 2, max_norm=1.0), "max_norm rewrites the weight"),
        (emptied(), "empty"),
        (nn.LayerNorm(2), "LayerNorm is not a layer type that is quantized"),
        (nn.Bilinear(2, 2, 2), "Bilinear is not a layer type that is quantized"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_cannot_be_quantized_is_refused_with_its_reason(layer, reason):
    model = nn.Sequential(layer, nn.Linear(3, 3), Plain(3, 3))
    assert names(model) == ["1", "2"]
    assert any(reason in text for text in reasons(model).values())
    assert summed(model) == sum(p.numel() for p in model.parameters())


def test_a_tied_weight_with_one_user_that_cannot_be_quantized_is_refused():
    for layers in ([nn.Linear(2, 2), Own(2, 2)], [Own(2, 2), nn.Linear(2, 2)]):
        layers[0].weight = layers[1].weight
        model = nn.Sequential(*layers, nn.Linear(2, 2))
        assert names(model) == ["2"]
        assert summed(model) == 4 + 4 + 6


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_that_hooks_compute_are_no_sites():
    lstm = torch.nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    model = nn.Sequential(lstm, torch.nn.utils.weight_norm(nn.Linear(4, 2)))
    assert names(model) == ["0.weight_ih_l0"]
    assert "nn.utils.remove_weight_norm(layer)" in reasons(model)["0"]
    assert summed(model) == sum(p.numel() for p in model.parameters())


def test_parameters_of_the_model_itself_are_listed():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("offset", nn.Parameter(torch.zeros(3)))
    assert "parameters of Sequential itself" in reasons(model)["offset"]
    assert summed(model) == 9


class Box:
    def __init__(self, part):
        self.part = part


@pytest.mark.parametrize(
    ("hide", "where"),
    [
        (lambda layer: [layer], "kept[0].weight"),
        (lambda layer: {"a": (layer,)}, "kept['a'][0].weight"),
        (lambda layer: Box(layer), "kept.part.weight"),
        (lambda layer: [layer.weight], "kept[0]"),
        (lambda layer: Box([nn.Sequential(layer)]), "kept.part[0].0.weight"),
    ],
)
def test_a_weight_that_is_reached_past_torch_stays_in_float(hide, where):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LSTM(4, 4))
    head = nn.Linear(4, 5, bias=False)
    head.weight = model[0].weight
    model.kept = hide(head)
    model.me = [model]  # a cycle, and what is registered anyhow
    sites, parts = find_sites(model)
    assert [s.name for s in sites] == ["1", "2.weight_ih_l0", "2.weight_hh_l0"]
    reasons = {part.name: part.reason for part in parts}
    assert reasons["0"] == f"also held by {where}, which the model does not register"

"""Bit operations: multiplications counted from the shapes that one batch has."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from autoquant.measure.cost import BitOperations, CostModel, count_macs
from autoquant.nn.convert import prepare
from autoquant.spec.costs import Costs, describe_seconds
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme


def macs(model, *args, **kwargs):
    def run(m):
        return m(*args, **kwargs)

    with torch.no_grad():
        prepared = prepare(model.eval(), run)
    return dict(count_macs(prepared, run).macs)


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, padding="same", dilation=2),
    nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
    nn.Conv2d(4, 8, (3, 1), padding=(2, 0), padding_mode="circular"),
    nn.Conv3d(4, 2, (1, 3, 3), padding=(0, 1, 1)),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_a_convolution_multiplies_its_kernel_at_every_output(layer):
    sizes = (9, 8, 7)[: len(layer.kernel_size)]
    x = torch.randn(3, 4, *sizes)
    out = layer(x)
    each = layer.weight[0].numel()
    assert macs(nn.Sequential(layer), x) == {"0": out.numel() * each}


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose1d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, stride=2)]
)
def test_a_transposed_convolution_multiplies_its_kernel_at_every_input(layer):
    x = torch.randn(3, 4, *(5, 6)[: len(layer.kernel_size)])
    each = layer.weight[0].numel()
    assert macs(nn.Sequential(layer), x) == {"0": x.numel() * each}


def test_linear_layers_lookups_and_keywords():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.twice = nn.Embedding(7, 8), nn.Linear(8, 8)

        def forward(self, ids):
            return self.twice(self.twice(input=self.words(ids)))

    assert macs(Net(), torch.tensor([[1, 2, 3], [4, 5, 6]])) == {
        "words": 0,
        "twice": 2 * 6 * 8 * 8,
    }


def test_recurrent_layers_multiply_at_every_step_that_is_no_padding():
    x = torch.randn(2, 5, 4)
    layer = nn.LSTM(4, 6, batch_first=True, bidirectional=True)
    names = ("weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse")
    sizes = {n: getattr(layer, n).numel() for n in names}
    assert macs(layer, x) == {n: 10 * size for n, size in sizes.items()}
    packed = pack_padded_sequence(x, [5, 2], batch_first=True)
    assert macs(nn.LSTM(4, 6, batch_first=True, bidirectional=True), packed) == {
        n: 7 * size for n, size in sizes.items()
    }
    assert sum(macs(nn.GRUCell(4, 6), torch.randn(3, 4)).values()) == 3 * 3 * 6 * (4 + 6)


def test_attention_multiplies_queries_keys_and_values():
    q, k = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    found = macs(nn.MultiheadAttention(8, 2, batch_first=True), q, key=k, value=k)
    assert found == {"in_proj_weight": 64 * (6 + 10 + 10), "out_proj": 64 * 6}
    other = macs(nn.MultiheadAttention(8, 2, kdim=6, batch_first=True), q, k[..., :6], k)
    assert other == {
        "q_proj_weight": 64 * 6,
        "k_proj_weight": 48 * 10,
        "v_proj_weight": 64 * 10,
        "out_proj": 64 * 6,
    }


def test_bit_operations_are_products_of_widths():
    operations = BitOperations({"a": 100, "b": 10})
    assert operations.total({}) == 110 * 16 * 16
    sites = {
        "a": SiteRecipe(WeightScheme(4), ActivationScheme(8)),
        "b": SiteRecipe(WeightScheme(8)),
    }
    assert operations.total(sites) == 100 * 4 * 8 + 10 * 8 * 16


def test_costs_are_none_unless_asked_for():
    sizes = SimpleNamespace(average_bits=lambda sites: 4.5, bytes=lambda sites: 9)
    assert CostModel(sizes).of({}) == Costs(4.5, 9, None, None)
    assert CostModel(sizes).indifferent
    operations = BitOperations({"a": 1})
    assert CostModel(sizes, None, operations).of({}) == Costs(4.5, 9, None, 256.0)
    assert CostModel(sizes, None, operations).price("bitops", "a", SiteRecipe()) == 256


@pytest.mark.parametrize(
    ("seconds", "text", "up"),
    [
        (1.5, "1.50 s", "1.50 s"),
        (0.0201, "20.1 ms", "20.1 ms"),
        (0.02011, "20.1 ms", "20.2 ms"),
        (0.00012345, "123 us", "124 us"),
        (3.2e-9, "0.00320 us", "0.00320 us"),
        (123.4, "123 s", "124 s"),
        (0.0, "0 us", "0 us"),
    ],
)
def test_times_as_a_person_reads_them(seconds, text, up):
    assert describe_seconds(seconds) == text
    assert describe_seconds(seconds, up=True) == up

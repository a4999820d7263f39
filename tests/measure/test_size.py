"""Sizes are counted from shapes, and are those of the tensors that are saved."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from autoquant.measure.size import SizeModel, float_bytes, weight_bytes
from autoquant.methods.applier import Applier
from autoquant.nn.archive import save_archive
from autoquant.nn.convert import prepare
from autoquant.nn.fold import without_norms
from autoquant.nn.sites import find_sites
from autoquant.nn.transforms import transform_as
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme


class Mixed(nn.Module):
    """Convolutions with a BatchNorm to fold, a tied embedding, a GRU, attention, an idle layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(32, 64, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(64)
        self.words = nn.Embedding(9, 32)
        self.gru = nn.GRU(64, 32, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.head = nn.Linear(32, 9, bias=False)
        self.head.weight = self.words.weight
        self.idle = nn.Linear(5, 3)
        self.register_buffer("offset", torch.ones(7, dtype=torch.float64))

    def forward(self, ids):
        x = self.norm(self.conv(self.words(ids).mT)).mT
        x, _ = self.gru(x)
        x, _ = self.attention(x, x, x)
        return self.head(x[..., :32])


IDS = torch.tensor([[1, 2, 3]])
FLOAT_SIZE = float_bytes(Mixed())
PREPARED = prepare(Mixed().eval(), lambda m: m(IDS))
REALIZER = Applier(PREPARED, {})
SIZES = SizeModel(PREPARED, FLOAT_SIZE)

SMOOTHED = prepare(Mixed().eval(), lambda m: m(IDS))
transform_as(SMOOTHED, {"conv": "n" * 32, "gru.weight_ih_l0": "l" * 64})
SMOOTHED_APPLIER = Applier(SMOOTHED, {})
SMOOTHED_SIZES = SizeModel(SMOOTHED, FLOAT_SIZE)

WEIGHTS = st.builds(
    WeightScheme,
    st.integers(2, 8),
    st.sampled_from(["per_tensor", "per_channel", "per_group_32"]),
    st.sampled_from(["symmetric", "asymmetric"]),
)
SITES = st.builds(
    SiteRecipe,
    st.none() | WEIGHTS,
    st.sampled_from([None, ActivationScheme(8, "per_token")]),
)
RECIPES = st.fixed_dictionaries(
    {
        site.name: SITES.filter(
            lambda s, site=site: (
                s.weight is None
                or s.weight.granularity != "per_group_32"
                or site.matrix[1] % 32 == 0
            )
        )
        for site in PREPARED.sites
    }
)


def saved_bytes(model):
    with without_norms(model):
        tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@given(RECIPES)
@settings(deadline=None, max_examples=40)
def test_the_size_of_a_recipe_is_that_of_the_model_it_gives(sites):
    assert SIZES.bytes(sites) == saved_bytes(REALIZER.deploy(sites))


@given(RECIPES)
@settings(deadline=None, max_examples=20)
def test_what_smooths_inputs_counts_where_it_is_saved(sites):
    assert SMOOTHED_SIZES.bytes(sites) == saved_bytes(SMOOTHED_APPLIER.deploy(sites))
    assert SMOOTHED_SIZES.bytes(sites) <= SMOOTHED_SIZES.rest + SIZES.bytes(sites) - SIZES.rest


def test_the_size_is_that_of_the_tensors_in_the_file(tmp_path):
    sites = {site.name: SiteRecipe(WeightScheme(3)) for site in PREPARED.sites}
    path = tmp_path / "model.safetensors"
    save_archive(REALIZER.deploy(sites), Recipe(sites), path)
    with safe_open(str(path), "pt") as file:
        keys = list(file.keys())
        total = sum(file.get_tensor(k).numel() * file.get_tensor(k).element_size() for k in keys)
    assert SIZES.bytes(sites) == total
    assert total < path.stat().st_size < total + 20_000


def test_in_float_a_recipe_is_as_large_as_the_folded_model():
    assert SIZES.bytes({}) == saved_bytes(PREPARED.model)
    # The BatchNorm's 2 × 64 parameters, 2 × 64 statistics and its count are folded away.
    assert SIZES.bytes({}) == SIZES.float_size_bytes - 4 * 256 - 8


def test_float_bytes_count_shared_tensors_once_and_every_type_by_its_size():
    model = nn.Sequential(nn.Linear(3, 2).half(), nn.BatchNorm1d(2))
    assert float_bytes(model) == 2 * 8 + 4 * 8 + 8
    model[0].other = model[0].weight
    assert float_bytes(model) == 2 * 8 + 4 * 8 + 8
    assert saved_bytes(copy.deepcopy(PREPARED.model)) + 4 * 256 + 8 == FLOAT_SIZE


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (WeightScheme(8, "per_tensor"), 5 * 64 + 4),
        (WeightScheme(4, "per_channel"), 5 * 32 + 5 * 4),
        (WeightScheme(4, "per_channel", "asymmetric"), 5 * 32 + 5 * 5),
        (WeightScheme(3, "per_group_32"), 5 * 24 + 10 * 4),
        (WeightScheme(7, "per_group_64", "asymmetric"), 5 * 56 + 5 * 5),
    ],
)
def test_a_weight_takes_its_integers_scales_and_zero_points(scheme, expected):
    (site,), _ = find_sites(nn.Sequential(nn.Linear(64, 5)))
    assert weight_bytes(site, scheme) == expected


def test_average_bits_weigh_every_weight_of_the_model_and_float_counts_sixteen():
    layers = sum(site.numel for site in PREPARED.sites)
    total = layers + 5 * 3  # the layer that is never used is in the file too
    assert SIZES.rest_weights == 15
    five = {s.name: SiteRecipe(WeightScheme(5)) for s in PREPARED.sites}
    assert SIZES.average_bits({}) == SIZES.layer_bits({}) == 16
    assert SIZES.layer_bits(five) == 5
    assert SIZES.average_bits(five) == pytest.approx((5 * layers + 16 * 15) / total)
    (conv,) = (site for site in PREPARED.sites if site.name == "conv")
    one = {"conv": SiteRecipe(WeightScheme(4), ActivationScheme(8, "per_token"))}
    assert SIZES.average_bits(one) == pytest.approx(16 - 12 * conv.numel / total)
    assert not any(site.name == "idle" for site in PREPARED.sites)
    assert layers == sum(math.prod(site.shape) for site in PREPARED.sites)


class Half(nn.Module):
    """A model the larger part of which no layer type holds."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.randn(30, 8)), nn.LayerNorm(8)
        self.register_buffer("turns", torch.randn(5, 8))
        self.register_buffer("cache", torch.randn(9, 8), persistent=False)
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        return self.head(self.norm(self.table[ids] + self.turns[0] + self.cache[0]))


def test_weights_that_no_layer_holds_count_and_biases_norms_and_caches_do_not():
    model = Half().eval()
    sizes = SizeModel(prepare(model, lambda m: m(torch.tensor([[1, 2]]))), float_bytes(model))
    assert sizes.rest_weights == 30 * 8 + 5 * 8
    recipe = {"head": SiteRecipe(WeightScheme(8))}
    assert sizes.layer_bits(recipe) == 8
    assert sizes.average_bits(recipe) == pytest.approx((8 * 32 + 16 * 280) / 312)


def test_sparse_buffers_are_sized_by_what_they_hold():
    model = nn.Linear(2, 2)
    model.register_buffer("edges", torch.eye(1000).to_sparse())
    assert float_bytes(model) == 4 * 6 + 1000 * (4 + 2 * 8)

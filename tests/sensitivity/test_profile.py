"""The damage a profile predicts is the noise that a forward pass shows."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from autoquant.measure.size import SizeModel, float_bytes, weight_bytes
from autoquant.methods.applier import Applier
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.sensitivity.profile import ROWS, activation_schemes, profile, weight_schemes
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import DEFAULTS, DIMENSIONS, SearchSpace, SiteSpace
from autoquant.spec.techniques import NEAREST, Axis, Offer


class Net(nn.Module):
    """A convolution, a grouped one, a linear layer wider than the sample, and an embedding."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.group = nn.Conv2d(8, 8, 3, groups=4)
            self.wide = nn.Linear(8 * 16, 96)
            self.words = nn.Embedding(20, 96)

    def forward(self, x):
        y = self.group(self.stem(x).relu()).relu()
        return self.wide(y.flatten(1)) + self.words(torch.arange(len(x)) % 20)


def inputs(seed=0, n=40):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


CHOICES = {
    **DEFAULTS,
    "weight_bits": (8, 6, 4, 16),
    "weight_granularity": ("per_channel", "per_tensor", "per_group_32"),
    "weight_calibration": ("max", "mse"),
    "activation_bits": (8, 4, 16),
    "activation_granularity": ("per_tensor", "per_token"),
    "activation_calibration": ("max", "mse"),
}
RULE = "\n".join(f"    {key}: {list(CHOICES[key])}" for key in DIMENSIONS)
SPACE = SearchSpace.parse(f"autoquant_space: 1\nrules:\n  -\n{RULE}", "s.yaml")


def run(model, batch):
    return model(batch)


@pytest.fixture(scope="module")
def made():
    prepared = prepare(Net().eval(), lambda m: m(inputs()))
    statistics = calibrate(prepared, [inputs()], run)
    spaces = SPACE.resolve(prepared.sites)
    return prepared, statistics, spaces, profile(prepared, statistics, spaces)


def test_weights_that_are_kept_give_the_same_profile(made):
    prepared, statistics, spaces, found = made
    applier = Applier(prepared, statistics)
    asked = []

    def quantize(site, scheme, correction):
        asked.append((site.name, scheme))
        held = applier.held(site.name, SiteRecipe(scheme, None, correction))
        return held.quantized

    again = profile(prepared, statistics, spaces, quantize=quantize)
    assert again.weight_damage == found.weight_damage
    assert again.activation_damage == found.activation_damage
    # Wide weights are measured on some of their rows, and so are not quantized whole.
    wide = [s.name for s in prepared.sites if s.groups == 1 and s.shape[s.channel_axis] > ROWS]
    assert wide
    assert {name for name, _ in asked} == {s.name for s in prepared.sites} - set(wide)


def noise(prepared, statistics, name, recipe):
    """Return the noise at the output of site ``name`` as a share of its power, by running it."""
    seen = {}
    module = prepared.model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, out: seen.__setitem__("out", out))
    applier = Applier(prepared, statistics)
    try:
        with torch.no_grad():
            applier.to_float()
            prepared.model(inputs())
            clean = seen["out"]
            applier.apply({name: recipe})
            prepared.model(inputs())
            noisy = seen["out"]
    finally:
        handle.remove()
        applier.to_float()
    bias = getattr(module, "bias", None)
    if bias is not None:
        shape = (1, -1, *[1] * (clean.dim() - 2))
        clean, noisy = (x - bias.detach().reshape(shape) for x in (clean, noisy))
    return float((noisy - clean).square().sum() / clean.square().sum())


@pytest.mark.parametrize("name", ["stem", "group", "wide", "words"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_weight_damage_is_the_noise_of_the_output(made, name, bits, granularity):
    prepared, statistics, _, found = made
    recipe = SiteRecipe(WeightScheme(bits, granularity, "symmetric", "max"))
    # The sampled channels of a wide weight, and rows of a lookup table used unevenly, are near.
    tolerance = 0.35 if name in ("wide", "words") else 0.02
    measured = noise(prepared, statistics, name, recipe)
    assert found.damage(name, recipe) == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("name", ["stem", "group", "wide"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_activation_damage_is_the_noise_of_the_output_nearly(made, name, bits, granularity):
    """Rounding errors are taken for independent of each other and of the input: within twice."""
    prepared, statistics, _, found = made
    recipe = SiteRecipe(None, ActivationScheme(bits, granularity, "asymmetric", "max"))
    measured = noise(prepared, statistics, name, recipe)
    assert measured / 2 <= found.damage(name, recipe) <= 2 * measured


def test_damages_add_up_and_float_does_none(made):
    _, _, _, found = made
    weight, activation = WeightScheme(4), ActivationScheme(8)
    both = SiteRecipe(weight, activation)
    parts = SiteRecipe(weight), SiteRecipe(None, activation)
    assert found.damage("stem", both) == pytest.approx(sum(found.damage("stem", p) for p in parts))
    assert found.damage("stem", SiteRecipe()) == 0.0
    calibrated = dataclasses.replace(activation, scale=0.5, zero_point=3)
    assert found.damage("stem", SiteRecipe(weight, calibrated)) == found.damage("stem", both)


def test_what_has_no_row_takes_the_least_of_its_width(made):
    _, _, _, found = made
    table = found.weight_damage["wide"]
    other = WeightScheme(4, "per_channel", "asymmetric", "percentile_99.9")
    assert other not in table
    least = min(d for w, d in table.items() if w.bits == 4)
    assert found.damage("wide", SiteRecipe(other)) == least
    assert found.damage("wide", SiteRecipe(WeightScheme(2))) == 0.0


def test_options_are_the_best_of_each_width_and_granularity(made):
    prepared, _, spaces, found = made
    for site in prepared.sites:
        table = found.weight_damage[site.name]
        rows = {
            (o.bits, o.recipe.weight and o.recipe.weight.granularity): o
            for o in found.options[site.name]
        }
        assert len(rows) == len(found.options[site.name])
        grains = spaces[site.name].choices["weight_granularity"]
        assert set(rows) == {*itertools.product((8, 6, 4), grains), (16, None)}
        for (bits, granularity), option in rows.items():
            if bits == 16:
                assert (option.recipe, option.damage) == (SiteRecipe(), 0.0)
                assert option.bytes == 4 * site.numel
                continue
            same = [d for w, d in table.items() if (w.bits, w.granularity) == (bits, granularity)]
            assert table[option.recipe.weight] == min(same)
            assert option.damage == pytest.approx(found.damage(site.name, option.recipe))
            assert option.bytes == weight_bytes(site, option.recipe.weight)
            activation = option.recipe.activation
            assert (activation is None) == (site.name == "words")
            if activation is not None:
                assert activation.bits == 8
                eight = {a: d for a, d in found.activation_damage[site.name].items() if a.bits == 8}
                assert eight[activation] == min(eight.values())


def test_sizes_are_those_of_the_size_model(made):
    prepared, _, _, found = made
    sizes = SizeModel(prepared, float_bytes(prepared.model))
    for pick in range(3):
        chosen = {name: row[pick % len(row)] for name, row in found.options.items()}
        total = sizes.rest + sum(o.bytes for o in chosen.values())
        assert total == sizes.bytes({name: o.recipe for name, o in chosen.items()})
        bits = sum(found.numel[name] * o.bits for name, o in chosen.items())
        recipes = {name: o.recipe for name, o in chosen.items()}
        assert sizes.average_bits(recipes) == pytest.approx(bits / sum(found.numel.values()))


def test_more_bits_less_damage(made):
    _, _, _, found = made
    for name, table in found.weight_damage.items():
        for scheme, damage in table.items():
            for wider in (b for b in (6, 8) if b > scheme.bits):
                assert table[dataclasses.replace(scheme, bits=wider)] < damage, name


def test_a_locked_site_has_one_option(made):
    prepared, statistics, _, _ = made
    fixed = SiteRecipe(WeightScheme(4), ActivationScheme(8, scale=0.1, zero_point=0))
    spaces = {s.name: SiteSpace(CHOICES, fixed) for s in prepared.sites if s.name != "words"}
    spaces["words"] = SiteSpace(CHOICES, SiteRecipe())
    found = profile(prepared, statistics, spaces)
    assert [o.recipe for o in found.options["stem"]] == [fixed]
    assert found.options["stem"][0].damage == pytest.approx(found.damage("stem", fixed))
    assert [(o.recipe, o.bits, o.damage) for o in found.options["words"]] == [(SiteRecipe(), 16, 0)]
    assert weight_schemes(prepared.sites[0], spaces["words"]) == []
    assert activation_schemes(spaces["words"]) == []
    assert activation_schemes(spaces["stem"]) == [ActivationScheme(8)]


@pytest.mark.parametrize("schemes", [("symmetric",), ("asymmetric",), ("symmetric", "asymmetric")])
def test_a_zero_point_is_worth_a_look_at_few_bits(made, schemes):
    prepared, statistics, _, _ = made
    space = SiteSpace({**CHOICES, "weight_scheme": schemes})
    found = {(w.bits, w.scheme) for w in weight_schemes(prepared.sites[0], space)}
    assert found == {
        (bits, scheme)
        for bits in (8, 6, 4)
        for scheme in schemes
        if bits < 8 or scheme == schemes[0]
    }
    # Whoever asks for the damage of what was left out is told that of its like.
    table = profile(prepared, statistics, {s.name: space for s in prepared.sites[:1]} | {
        s.name: SiteSpace(CHOICES, SiteRecipe()) for s in prepared.sites[1:]
    })  # fmt: skip
    wide = SiteRecipe(WeightScheme(8, scheme="asymmetric", calibration="max"))
    assert table.damage(prepared.sites[0].name, wide) > 0


def test_where_learning_is_demanded_every_option_learns(made):
    prepared, statistics, _, _ = made
    rates = Axis("learning_rate", 0.01, 0.1, log=True)
    learned = Offer("learned_rounding", LearnedRounding(0.03), (rates,))
    choices = {**CHOICES, "weight_granularity": ("per_channel",), "rounding": (learned,)}
    spaces = {site.name: SiteSpace(choices) for site in prepared.sites}
    spaces["words"] = SiteSpace({**choices, "activation_bits": (16,)})
    found = profile(prepared, statistics, spaces)
    for row in found.options.values():
        for option in row:
            weight = option.recipe.weight
            assert weight is None or weight.rounding == LearnedRounding(0.03)


@pytest.mark.parametrize("correction", [[], [Offer("bias", BiasCorrection())]])
def test_other_roundings_are_measured_on_the_best_grids_and_compete(made, correction):
    prepared, statistics, spaces, _ = made
    # What has an open option is left to the trials, and not measured here.
    left = Offer("learned_rounding", LearnedRounding(), (Axis("learning_rate", 0.001, 0.1),))
    added = {"rounding": (Offer("nearest", NEAREST), left, Offer("gptq", GPTQ()))}
    if correction:
        added["correction"] = tuple(correction)
    spaces = {n: SiteSpace({**s.choices, **added}) for n, s in spaces.items() if n != "words"}
    spaces["words"] = SiteSpace({**CHOICES, "activation_bits": (16,)})
    found = profile(prepared, statistics, spaces)
    for name in ("stem", "group", "wide"):
        table = found.weight_damage[name]
        nearest = {w: d for w, d in table.items() if w.rounding == NEAREST}
        other = {w: d for w, d in table.items() if w.rounding == GPTQ()}
        assert set(table) == {*nearest, *other}
        grids = {}
        for scheme, damage in nearest.items():
            grids.setdefault((scheme.bits, scheme.granularity, scheme.scheme), []).append(damage)
        assert len(other) == len(grids)
        for scheme, damage in other.items():
            plain = dataclasses.replace(scheme, rounding=NEAREST)
            best = min(grids[scheme.bits, scheme.granularity, scheme.scheme])
            assert nearest[plain] == best
            assert damage <= best
        for option in found.options[name]:
            if option.recipe.weight is not None:
                same = [
                    d
                    for w, d in table.items()
                    if (w.bits, w.granularity) == (option.bits, option.recipe.weight.granularity)
                ]
                assert table[option.recipe.weight] == min(same)
                assert option.recipe.correction.centers is bool(correction)
    # Inputs of a convolution's neighbouring pixels are correlated: it is there that it pays.
    taken = [o.recipe.weight for row in found.options.values() for o in row if o.recipe.weight]
    assert any(weight.rounding == GPTQ() for weight in taken)


def test_per_token_is_one_scheme_whatever_its_calibration():
    found = activation_schemes(SiteSpace(CHOICES))
    dynamic = [a for a in found if a.dynamic]
    assert len(found) == len(set(found)) == 2 * 2 + 2
    assert [(a.bits, a.calibration) for a in dynamic] == [(8, "max"), (4, "max")]


def test_progress_names_every_site(made):
    prepared, statistics, spaces, _ = made
    heard = []
    profile(prepared, statistics, spaces, heard.append)
    assert heard == [site.name for site in prepared.sites]

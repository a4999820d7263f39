"""The belief in layers' weights, against general optimizers and simulated studies."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from autoquant.samplers.knapsack import posterior as module
from autoquant.samplers.knapsack.clustering import groups
from autoquant.samplers.knapsack.posterior import NOISE, Row, Sums, believe, infer, prior
from autoquant.sensitivity.profile import Option, Profile
from autoquant.spec.recipe import SiteRecipe, WeightScheme

BITS = (8, 6, 4)


def profile_of(damages, numel=None):
    """Return a profile with ``damages`` (name → damage of 8, 6 and 4 bits)."""
    options = {
        name: tuple(
            Option(SiteRecipe(WeightScheme(b)), d, b, 100 * b)
            for b, d in zip(BITS, row, strict=True)
        )
        for name, row in damages.items()
    }
    weights = {n: {o.recipe.weight: o.damage for o in row} for n, row in options.items()}
    sizes = numel or dict.fromkeys(damages, 800)
    return Profile(options, weights, {name: {} for name in damages}, sizes, samples=96)


def blocks(count, kinds=("attn.q", "attn.v", "mlp.up", "mlp.down")):
    """Return a model of repeated blocks: layers at the same place have like damages."""
    rng = np.random.default_rng(0)
    base = {kind: 10.0 ** rng.uniform(-3, -2.5) for kind in kinds}
    return {
        f"layers.{i}.{kind}": [base[kind] * rng.lognormal(0, 0.1) * 16.0**k for k in range(3)]
        for i, kind in itertools.product(range(count), kinds)
    }


def test_alike_are_layers_at_one_place_whose_profiles_are():
    damages = blocks(30)
    damages["layers.7.mlp.up"] = [1e3 * d for d in damages["layers.7.mlp.up"]]
    names = list(damages)
    numel = dict.fromkeys(names, 800) | {"layers.3.attn.q": 1600}
    damages["head"] = damages["layers.0.attn.q"]
    names, numel = [*names, "head"], numel | {"head": 800}
    found = groups(names, profile_of(damages, numel))
    assert sorted(i for group in found for i in group) == list(range(len(names)))
    together = {frozenset(names[i] for i in group) for group in found}
    alone = {"layers.7.mlp.up", "layers.3.attn.q", "head"}
    assert {g for g in together if len(g) == 1} == {frozenset([n]) for n in alone}
    assert len(together) == 4 + 3


def test_few_layers_are_known_by_themselves():
    damages = blocks(module.FEW_LAYERS // 4)
    profile = profile_of(damages)
    assert np.array_equal(prior(list(damages), profile) * profile.spread**2, np.eye(len(damages)))


def test_the_prior_of_many_layers_is_a_common_part_and_their_own():
    damages = blocks(30)
    names, profile = list(damages), profile_of(damages)
    found = np.linalg.inv(prior(names, profile)) / profile.spread**2
    for i, j in itertools.product(range(len(names)), repeat=2):
        alike = names[i].split(".", 2)[2] == names[j].split(".", 2)[2]
        assert found[i, j] == pytest.approx(1.0 if i == j else module.SHARED * alike, abs=1e-9)


def study(names, damages, true, trials, seed):
    """Return trials of random widths whose losses are sums of weight × damage, a bit off."""
    rng = np.random.default_rng(seed)
    table = np.array([damages[n] for n in names])
    rows = []
    for number in range(trials):
        damage = table[np.arange(len(names)), rng.integers(0, 3, len(names))]
        rows.append(Row(number, damage, float(true @ damage) * rng.lognormal(0, 0.05)))
    return rows


def errors(names, damages, true, rows):
    """Return how far off the logarithms of the weights are, with and without groups."""
    profile = profile_of(damages)
    found = []
    for precision in (prior(names, profile), np.eye(len(names)) / profile.spread**2):
        known = believe(rows, Sums(len(names)), precision)
        off = np.log(known.typical * known.mean / true)
        found.append(float(np.sqrt(np.mean(off**2))))
    return found


def test_what_a_trial_says_of_a_layer_it_says_of_those_that_are_alike():
    damages = blocks(40)
    names = list(damages)
    ratios = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        common = {
            kind: rng.normal(0, 0.5) for kind in dict.fromkeys(n.split(".", 2)[2] for n in names)
        }
        true = np.exp([common[n.split(".", 2)[2]] + rng.normal(0, 0.1) for n in names])
        grouped, alone = errors(names, damages, true, study(names, damages, true, 300, seed))
        ratios.append(grouped / alone)
    assert np.median(ratios) < 0.75
    assert max(ratios) < 1.0


def test_layers_that_are_unlike_after_all_are_told_apart():
    damages = blocks(40)
    names = list(damages)
    true = np.ones(len(names))
    own = max(range(20, 24), key=lambda i: damages[names[i]][2])
    true[own] = 20.0
    rows = study(names, damages, true, 200, 0)
    known = believe(rows, Sums(len(names)), prior(names, profile_of(damages)))
    assert known.mean.argmax() == own
    assert known.mean[own] > 1.1 * np.delete(known.mean, own).max()


@pytest.mark.parametrize("spread", [0.35, 0.8])
@pytest.mark.parametrize("trials", [0, 3, 40])
def test_the_belief_is_the_mode_that_a_general_optimizer_finds(trials, spread):
    rng = np.random.default_rng(trials)
    true = rng.lognormal(0, 1.5, 6)
    rows = rng.uniform(0.1, 2.0, (trials, 6))
    rows /= (rows @ true)[:, None] * rng.lognormal(0, 0.1, (trials, 1))

    def cost(u):
        return np.square(rows @ np.exp(u) - 1.0).sum() / (2 * NOISE**2) + u @ u / (2 * spread**2)

    center, lower = infer(rows.T @ rows, rows.sum(0), np.eye(6) / spread**2)
    best = minimize(
        cost,
        np.zeros(6),
        method="Nelder-Mead",
        options={"maxfev": 40_000, "xatol": 1e-9, "fatol": 1e-12},
    )
    assert cost(center) <= cost(best.x) + 1e-4 * (1 + cost(best.x))
    assert np.all(np.diag(lower) > 0)
    if not trials:
        assert np.allclose(center, 0.0)
        assert np.allclose(lower @ lower.T, np.eye(6) / spread**2)

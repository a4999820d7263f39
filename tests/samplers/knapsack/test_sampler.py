"""The default sampler: within the space, within the budget, and soon at the optimum."""

import datetime
import itertools
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.methods.rounding.learned_rounding import LearnedRounding
from autoquant.samplers.knapsack.sampler import KnapsackSampler
from autoquant.sensitivity.profile import Option, Profile
from autoquant.spec.costs import Costs
from autoquant.spec.goal import Goal, Measurement
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme, choices_key
from autoquant.spec.space import DEFAULTS, DIMENSIONS, SiteSpace
from autoquant.spec.techniques import NEAREST, UNCORRECTED, Axis, Offer
from autoquant.spec.uniform import baselines
from autoquant.study.ledger import MEASURED, finished
from autoquant.study.parameters import ParameterMap

FLOAT_BYTES = 2
NEAR = Offer("nearest", NEAREST)
LEARNED = Offer(
    "learned_rounding", LearnedRounding(0.01), (Axis("learning_rate", 1e-3, 0.1, log=True),)
)
ROUNDINGS = [
    (NEAR,),
    (NEAR, LEARNED),
    (LEARNED,),
    (NEAR, Offer("learned_rounding", LearnedRounding(0.01))),
    (Offer("gptq", GPTQ(), (Axis("act_order", choices=(True, False)),)), NEAR),
]
CORRECTIONS = [Offer("bias", BiasCorrection()), Offer("none", UNCORRECTED)]


def product(space, prefix):
    keys = ("bits", "granularity", "scheme", "calibration")
    return itertools.product(*(space.choices[f"{prefix}_{key}"] for key in keys))


def make_profile(spaces, numel):
    """Return a profile in which a bit less is four times the noise and all else is a detail."""
    options, weights, activations = {}, {}, {}
    for site, space in spaces.items():
        if space.fixed is not None:
            fixed = space.fixed.canonical()
            options[site] = (Option(fixed, 0.0, fixed.weight_bits, 2 * numel[site]),)
            weights[site], activations[site] = {}, {}
            continue
        rounding = space.choices["rounding"][0].technique
        correction = space.choices["correction"][0].technique
        rows = [row for row in product(space, "weight") if row[0] < 16]
        found = [WeightScheme(*row, rounding=rounding) for row in rows]
        weights[site] = {w: 4.0**-w.bits * (1 + i / 50) for i, w in enumerate(found)}
        acts = (ActivationScheme(*row) for row in product(space, "activation") if row[0] < 16)
        acts = [SiteRecipe(None, a).canonical().activation for a in acts]
        activations[site] = {a: 4.0**-a.bits * 0.1 for a in acts}
        activation = max(acts, key=lambda a: a.bits, default=None)
        best = {}
        for w, damage in weights[site].items():
            size = numel[site] * w.bits // 8
            recipe = SiteRecipe(w, activation, correction)
            option = Option(recipe, damage, w.bits, size)
            best.setdefault((w.bits, w.granularity), option)
        if 16 in space.choices["weight_bits"]:
            floats = 16 in space.choices["activation_bits"]
            recipe = SiteRecipe(None, None if floats else activation)
            best["float"] = Option(recipe, 0.0, 16, FLOAT_BYTES * numel[site])
        options[site] = tuple(best.values())
    return Profile(options, weights, activations, numel)


class Problem:
    """A model whose loss is a sum over sites of importance × damage."""

    def __init__(self, spaces, goal, seed=0, rest=100, rest_weights=0):
        rng = np.random.default_rng(seed)
        self.spaces, self.goal, self.rest = spaces, goal, rest
        self.rest_weights = rest_weights
        self.mapping = ParameterMap(spaces)
        self.numel = {site: int(rng.integers(100, 2000)) for site in spaces}
        self.profile = make_profile(spaces, self.numel)
        self.importance = {site: float(rng.lognormal(0, 1.0)) for site in spaces}

    def sampler(self, seed=0):
        return KnapsackSampler(
            self.mapping,
            self.profile,
            self.goal,
            self.rest,
            seed,
            rest_weights=self.rest_weights,
        )

    def measure(self, sites):
        loss = sum(w * self.profile.damage(n, sites[n]) for n, w in self.importance.items())
        bits = sum(self.numel[n] * s.weight_bits for n, s in sites.items())
        size = self.rest + bits // 8
        average = (bits + 16 * self.rest_weights) / (sum(self.numel.values()) + self.rest_weights)
        return Measurement(1.0, 3 * loss, max(loss, 1e-9), average, size, 0.0)

    def trial(self, number, sites):
        m = self.measure(sites)
        found = {
            key: getattr(m, key) for key in ("drop", "loss", "average_weight_bits", "size_bytes")
        }
        found |= {"objective": self.goal.objective(m), "feasible": self.goal.feasible(m)}
        trial = finished(
            TrialState.COMPLETE,
            params=self.mapping.encode(sites),
            distributions=self.mapping.distributions,
            started=datetime.datetime.now(),
            value=self.goal.objective(m),
            user_attrs={MEASURED: found},
        )
        trial.number = number
        return trial

    def run(self, trials, seed=0):
        """Return the trials of a search: the uniform recipes, then what the sampler proposes."""
        sampler = self.sampler(seed)
        done = [self.trial(i, s) for i, s in enumerate(baselines(self.spaces))]
        while len(done) < trials:
            done.append(self.trial(len(done), sampler.propose(done, len(done))))
        return done

    def random(self, trials, seed=0):
        rng = np.random.default_rng(seed)
        found = [
            {n: row[int(rng.integers(len(row)))].recipe for n, row in self.profile.options.items()}
            for _ in range(trials)
        ]
        return [self.trial(i, sites) for i, sites in enumerate(found)]

    def optimum(self):
        """Return the best objective of all recipes that differ in bits alone, by brute force."""
        best = np.inf
        for row in itertools.product(*self.profile.options.values()):
            m = self.measure({n: o.recipe for n, o in zip(self.spaces, row, strict=True)})
            if self.goal.feasible(m):
                best = min(best, self.goal.objective(m))
        return best


def best_of(trials):
    rows = [t.user_attrs[MEASURED] for t in trials]
    return min((m["objective"] for m in rows if m["feasible"]), default=np.inf)


def plain_spaces(layers, bits=(8, 6, 4)):
    space = SiteSpace({**DEFAULTS, "weight_bits": bits, "activation_bits": (16,)})
    return {f"layer{i}": space for i in range(layers)}


def test_the_optimum_is_found_in_far_fewer_trials_than_random_needs():
    """Against brute force over 729 recipes, on sixteen problems."""
    goals = [Goal(0.05, 20_000), Goal(0.05, 20_000, bits=5.2)]
    found, by_luck = 0, 0
    for goal, seed in itertools.product(goals, range(8)):
        problem = Problem(plain_spaces(6), goal, seed)
        optimum = problem.optimum()
        ours, theirs = best_of(problem.run(30)), best_of(problem.random(120))
        assert optimum - 1e-9 <= ours
        assert np.isfinite(ours)
        found += ours <= optimum + 1e-9
        by_luck += theirs <= optimum + 1e-9
    assert found >= 13
    assert by_luck <= 6


@pytest.mark.parametrize("bits", [4.0, 4.01, 5.0, 7.3, 8.0, 16.0])
def test_a_bit_budget_is_always_kept(bits):
    spaces = plain_spaces(9, (8, 7, 6, 5, 4, 16))
    spaces["layer0"] = SiteSpace(spaces["layer0"].choices, SiteRecipe(WeightScheme(4)))
    problem = Problem(spaces, Goal(0.05, 20_000, bits=bits))
    sampler, done = problem.sampler(), []
    for number in range(20):
        sites = sampler.propose(done, number)
        assert problem.measure(sites).average_weight_bits <= bits + 1e-9
        done.append(problem.trial(number, sites))


def test_weights_that_stay_in_float_take_their_part_of_a_bit_budget():
    spaces = plain_spaces(9, (8, 7, 6, 5, 4))
    problem = Problem(spaces, Goal(0.05, 20_000, bits=9.0), rest_weights=4000)
    sampler, done = problem.sampler(), []
    spent = []
    for number in range(10):
        found = problem.measure(sampler.propose(done, number)).average_weight_bits
        spent.append(found)
        done.append(problem.trial(number, sampler.propose(done, number)))
    assert max(spent) <= 9.0 + 1e-9
    assert max(spent) > 8.8  # and what the layers may have is spent
    for point in sampler.sweep(done, 5):
        assert 16 > point.average_weight_bits > 16 * 4000 / (4000 + sum(problem.numel.values()))


@st.composite
def resolved(draw):
    names = [f"layer{i}" for i in range(draw(st.integers(1, 4)))]
    found = {}
    for name in names:
        choices = {
            dimension: tuple(
                draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=3, unique=True))
            )
            for dimension, allowed in DIMENSIONS.items()
        }
        choices["rounding"] = draw(st.sampled_from(ROUNDINGS))
        corrections = st.lists(st.sampled_from(CORRECTIONS), min_size=1, unique=True)
        choices["correction"] = tuple(draw(corrections))
        fixed = draw(st.sampled_from([None, None, None, SiteRecipe(WeightScheme(8)), SiteRecipe()]))
        found[name] = SiteSpace(choices, fixed)
    return found


goals = st.sampled_from(
    [Goal(0.05, 20_000), Goal(0.05, 20_000, bits=6.0), Goal(0.05, 20_000, size_bytes=3000)]
)


@given(resolved(), goals, st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_every_proposal_lies_within_the_space(spaces, goal, seed):
    problem = Problem(spaces, goal)
    done = [problem.trial(i, s) for i, s in enumerate(baselines(spaces))]
    sampler = problem.sampler(seed)
    for number in range(len(done), len(done) + 6):
        sites = sampler.propose(done, number)
        params = problem.mapping.encode(sites)  # raises on what is not offered
        assert problem.mapping.decode(params) == {n: s.canonical() for n, s in sites.items()}
        for name, value in params.items():
            distribution = problem.mapping.distributions[name]
            assert distribution._contains(distribution.to_internal_repr(value))
        done.append(problem.trial(number, sites))


def test_a_proposal_is_a_function_of_seed_number_and_trials():
    problem = Problem(plain_spaces(8), Goal(0.05, 20_000))
    done = problem.run(12)
    used = problem.sampler()
    for number in range(3, 13):
        fresh = problem.sampler().propose(done[:number], number)
        assert fresh == used.propose(done[:number], number)
    numbers = {choices_key(problem.sampler().propose(done, n)) for n in range(12, 24)}
    seeds = {choices_key(problem.sampler(seed).propose(done, 12)) for seed in range(12)}
    assert min(len(numbers), len(seeds)) > 3


def test_trials_that_failed_or_came_from_elsewhere_are_passed_over():
    problem = Problem(plain_spaces(8), Goal(0.05, 20_000))
    done = problem.run(8)
    failed = finished(
        TrialState.FAIL,
        params=done[0].params,
        distributions=problem.mapping.distributions,
        started=datetime.datetime.now(),
        user_attrs={"reason": "no"},
    )
    failed.number = 8
    assert problem.sampler().propose([*done, failed], 9) == problem.sampler().propose(done, 9)


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from test_sampler import Problem, Goal, plain_spaces
for trial in Problem(plain_spaces(6), Goal(0.05, 20_000)).run(10):
    print(trial.params, trial.value)
"""


def test_another_process_gives_the_same_trials(request):
    def once():
        folder = str(request.path.parent)
        command = [sys.executable, "-c", PROGRAM, folder]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    here = Problem(plain_spaces(6), Goal(0.05, 20_000)).run(10)
    assert once().splitlines() == [f"{t.params} {t.value}" for t in here]


def test_no_recipe_is_tried_twice_while_there_are_others():
    problem = Problem(plain_spaces(10), Goal(0.05, 20_000))
    keys = [choices_key(problem.mapping.decode(t.params)) for t in problem.run(60)]
    assert len(set(keys)) >= 58


def test_what_matters_is_learned():
    """After some trials the layers that matter most are the ones that keep the most bits."""
    problem = Problem(plain_spaces(8), Goal(0.05, 20_000, bits=5.5))
    sampler, done = problem.sampler(), problem.run(40)
    seen = [s for s in map(sampler._read, done) if s is not None]
    belief = sampler._posterior(seen)
    typical, mean = belief.typical, belief.mean
    covariance = np.linalg.inv(belief.lower @ belief.lower.T)
    true = np.array([problem.importance[n] for n in sampler.names])
    assert np.corrcoef(np.log(typical * mean), np.log(true))[0, 1] > 0.7
    assert np.all(np.linalg.eigvalsh(covariance) > 0)
    prior = sampler._posterior([]).lower
    assert np.trace(covariance) < np.trace(np.linalg.inv(prior @ prior.T))
    # Sums that were kept from earlier calls are those of a sampler that begins anew.
    fresh = problem.sampler()
    few, all_again = fresh._posterior(seen[:20]), fresh._posterior(seen)
    assert not np.allclose(few.mean, belief.mean)
    assert np.array_equal(all_again.mean, belief.mean)
    # The logarithms of draws follow the covariance.
    rng = np.random.default_rng(0)
    draws = np.log(np.stack([belief.draw(rng) for _ in range(4000)])) - belief.center
    assert np.allclose(np.cov(draws.T), covariance, atol=0.06 * np.diag(covariance).max())


def test_a_front_is_foretold_without_a_trial():
    """By a belief that knows the truth: what no choice of widths within each budget beats."""
    problem = Problem(plain_spaces(5), Goal(0.05, 20_000, bits=5.5))
    sampler, done = problem.sampler(), problem.run(60)
    found = sampler.sweep(done, 9)
    sizes = [f.size_bytes for f in found]
    losses = [f.loss for f in found]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert len(found) > 4
    drops = [f.drop for f in found]
    assert drops == sorted(drops, reverse=True)
    every = []
    for chosen in itertools.product(*(problem.profile.options[n] for n in problem.spaces)):
        sites = {n: o.recipe for n, o in zip(problem.spaces, chosen, strict=True)}
        m = problem.measure(sites)
        every.append((m.average_weight_bits, m.loss))
    for f in found:
        # The greedy last step of the knapsack and the weights' uncertainty cost a little.
        best = min(loss for bits, loss in every if bits <= f.average_weight_bits + 1e-9)
        assert f.loss <= 1.6 * best
    # Before any trial the profile alone foretells it.
    assert [f.drop for f in sampler.sweep([], 3)] == [None] * 3


def test_a_layer_in_float_must_pay_for_it():
    """A layer without influence is quantized nevertheless: in float it would be slow."""
    spaces = plain_spaces(3, (8, 16))
    problem = Problem(spaces, Goal(1e9, 20_000))
    sites = problem.sampler().propose(problem.run(3), 3)
    assert all(s.weight is not None for s in sites.values())


class Table:
    """Costs with a latency: so many seconds for each weight, fewer where it is narrow."""

    indifferent = False

    def __init__(self, problem):
        self.problem = problem
        self.latency = SimpleNamespace(rest=50.0)
        rng = np.random.default_rng(3)
        self.speed = {name: float(rng.uniform(0.2, 3.0)) for name in problem.spaces}

    def price(self, kind, name, recipe):
        assert kind == "latency"
        return self.problem.numel[name] * self.speed[name] * (1.0 + (recipe.weight_bits >= 6))

    def of(self, sites):
        m = self.problem.measure(sites)
        return Costs(m.average_weight_bits, m.size_bytes, m.latency)


class Timed(Problem):
    def sampler(self, seed=0):
        table = Table(self)
        return KnapsackSampler(self.mapping, self.profile, self.goal, self.rest, seed, table)

    def measure(self, sites):
        table = Table(self)
        seconds = sum(table.price("latency", name, recipe) for name, recipe in sites.items())
        return replace(super().measure(sites), latency=50.0 + seconds)


def share_of_slowest(problem, share):
    """Return the seconds that are a share of what lies between the fastest and the slowest."""
    rows = [
        [Table(problem).price("latency", n, o.recipe) for o in row]
        for n, row in problem.profile.options.items()
    ]
    low, high = sum(map(min, rows)), sum(map(max, rows))
    return 50.0 + low + share * (high - low)


@pytest.mark.parametrize(
    "words",
    [
        {"bits": 5.5, "latency": 0.5},
        {"size_bytes": 5500, "latency": 0.4},
        {"latency": 0.8},
        {"minimize": "latency"},
        {"minimize": "latency", "bits": 5.5},
        {"minimize": "bits", "latency": 0.8},
    ],
)
def test_limits_on_latency_are_kept_and_the_optimum_is_found(words):
    goal = Goal(0.05, 20_000, float_latency=1e4, **words)
    problem = Timed(plain_spaces(7), goal)
    if goal.latency is not None:
        problem.goal = replace(goal, latency=share_of_slowest(problem, goal.latency))
    start = len(list(baselines(problem.spaces)))
    done = problem.run(60)
    table = Table(problem)
    for trial in done[start:]:
        assert problem.goal.affords(table.of(problem.mapping.decode(trial.params)))
    best = problem.optimum()
    assert np.isfinite(best)
    assert best_of(done) <= 1.15 * best

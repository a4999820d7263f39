"""Finalists, and which of them is returned, with sessions that know the answers beforehand."""

import datetime
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from autoquant.errors import TrialError
from autoquant.kernels.engine import Engine
from autoquant.measure.divergence import Distance
from autoquant.measure.evaluator import Reading
from autoquant.models.metrics import METRICS
from autoquant.selection.confirmation import confirm, confirm_one
from autoquant.selection.finalists import FINALISTS, finalists, incumbent
from autoquant.spec.goal import Goal, Measurement
from autoquant.spec.recipe import ModelIdentity, Recipe, SiteRecipe, WeightScheme
from autoquant.spec.space import DEFAULTS, SiteSpace
from autoquant.study.ledger import MEASURED, finished
from autoquant.study.parameters import ParameterMap
from autoquant.study.trials import measured

ACCURACY = METRICS.get("accuracy")
BITS = (8, 6, 4, 2)
SPACE = SiteSpace({**DEFAULTS, "weight_bits": BITS, "activation_bits": (16,)})
MAPPING = ParameterMap({"a": SPACE, "b": SPACE})
DROP = Goal(0.02, 1600)
BUDGET = Goal(0.02, 1600, bits=5.0)


def make(number, a, b, drop, goal=DROP, loss=None, state=TrialState.COMPLETE):
    loss = max(drop, 1e-6) if loss is None else loss
    bits = (a + b) / 2
    m = Measurement(0.9 - drop, drop, loss, bits, int(100 * bits), 0.0)
    found = {"drop": m.drop, "loss": m.loss, "size_bytes": m.size_bytes}
    found |= {"objective": goal.objective(m), "feasible": goal.feasible(m)}
    trial = finished(
        state,
        params={"a.weight_bits": a, "b.weight_bits": b},
        distributions=MAPPING.distributions,
        started=datetime.datetime.now(),
        value=goal.objective(m) if state == TrialState.COMPLETE else None,
        user_attrs={MEASURED: found} if state != TrialState.FAIL else {},
    )
    trial.number = number
    return trial


@st.composite
def studies(draw):
    goal = draw(st.sampled_from([DROP, BUDGET]))
    states = st.sampled_from([TrialState.COMPLETE] * 5 + [TrialState.PRUNED, TrialState.FAIL])
    width = st.sampled_from(BITS)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    trials = []
    for number in range(draw(st.integers(0, 25))):
        a = b = BITS[number] if number < len(BITS) else 0
        a, b = a or draw(width), b or draw(width)
        drop = (4.0**-a + 4.0**-b) * 3 * float(rng.lognormal(0, 0.3))
        trials.append(make(number, a, b, drop, goal, state=draw(states)))
    return trials, goal


@given(studies())
@settings(deadline=None)
def test_finalists_are_few_different_and_complete(study):
    trials, goal = study
    found = finalists(trials, MAPPING, goal, len(BITS))
    assert len(found) <= FINALISTS
    assert all(t.state == TrialState.COMPLETE for t in found)
    assert len({tuple(t.params.items()) for t in found}) == len(found)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    assert bool(found) == bool(complete)


@given(studies())
@settings(deadline=None)
def test_the_safe_ways_out_are_among_them(study):
    trials, goal = study
    recipes = [t.params for t in finalists(trials, MAPPING, goal, len(BITS))]
    rows = [(t, m) for t in trials if (m := measured(t)) is not None]
    if goal.budgeted:
        rows = [r for r in rows if r[1]["feasible"]] or rows
        plain = [r for r in rows if r[1]["feasible"] and r[0].number < len(BITS)]
        if plain:  # the best uniform recipe
            best = min(plain, key=lambda r: (r[1]["objective"], r[0].number))
            assert best[0].params in recipes
    if rows:  # the one of least loss
        assert min(rows, key=lambda r: (r[1]["loss"], r[0].number))[0].params in recipes


def test_with_a_maximum_drop_the_smallest_come_first_and_the_lucky_one_does_not():
    """Drops follow 2 × loss, but for one trial that had luck on the search data."""
    losses = {8: 0.0005, 6: 0.002, 4: 0.007, 2: 0.08}
    pairs = [(8, 8), (6, 6), (4, 4), (2, 2), *itertools.permutations(BITS, 2)]
    pairs.remove((2, 4))
    rows = [(a, b, losses[a] + 1.1 * losses[b]) for a, b in pairs]
    trials = [make(i, a, b, 2 * loss, loss=loss) for i, (a, b, loss) in enumerate(rows)]
    lucky = make(len(trials), 2, 4, 0.015, loss=0.0877)
    assert measured(lucky)["feasible"]
    found = finalists([*trials, lucky], MAPPING, DROP, 4)
    sizes = [t.user_attrs[MEASURED]["size_bytes"] for t in found]
    assert sizes == sorted(sizes)
    numbers = [t.number for t in found]
    assert lucky.number not in numbers
    widths = [tuple(t.params.values()) for t in found]
    assert widths[0] == (4, 6)
    assert (6, 6) in widths  # the best uniform one
    assert (8, 8) in widths  # the one of least loss


def test_where_all_that_promise_little_break_it_there_is_more_than_the_uniform_recipe():
    """Between what may lose a third of the maximum drop and the recipe of least loss."""
    drops = {
        (8, 8): 1e-4,
        (6, 8): 0.001,
        (6, 6): 0.0025,
        (6, 4): 0.005,
        (4, 4): 0.01,
        (4, 2): 0.019,
    }
    trials = [make(i, a, b, drop) for i, ((a, b), drop) in enumerate(drops.items())]
    found = finalists(trials, MAPPING, DROP, 1)
    assert [tuple(t.params.values()) for t in found] == list(reversed(drops))


def test_where_all_are_better_than_float_by_luck_ever_nearer_ones_are_finalists():
    losses = {(8, 8): 1e-4, (6, 6): 0.002, (6, 4): 0.01, (4, 4): 0.04, (4, 2): 0.09, (2, 2): 0.1}
    trials = [
        make(i, a, b, -0.02 - loss / 10, loss=loss)
        for i, ((a, b), loss) in enumerate(losses.items())
    ]
    found = [tuple(t.params.values()) for t in finalists(trials, MAPPING, DROP, 1)]
    assert found == [(2, 2), (4, 4), (6, 4), (6, 6), (8, 8)]


def test_with_a_budget_the_least_drop_comes_first():
    rows = [(4, 4, 0.04), (2, 2, 0.3), (6, 4, 0.02), (4, 6, 0.03), (8, 2, 0.2), (8, 8, 0.0)]
    trials = [make(i, a, b, drop, BUDGET) for i, (a, b, drop) in enumerate(rows)]
    found = finalists(trials, MAPPING, BUDGET, 2)
    assert [t.number for t in found] == [2, 3, 0]


def test_a_recipe_that_was_tried_twice_is_one_finalist():
    trials = [make(i, 8, 8, 0.001) for i in range(4)]
    assert [t.number for t in finalists(trials, MAPPING, DROP, 1)] == [0]


class FakeSession:
    """A session whose confirmed drops are given by (a, b) bits; None fails."""

    def __init__(self, drops, *, confirms=True):
        self.drops = drops
        self.asked = []
        self.model = None
        self.identity = ModelIdentity("net", "ab")
        self.prepared = SimpleNamespace(folded={"bn": "a"}, engine=Engine())
        self.sizes = SimpleNamespace(float_size_bytes=1600, rest_weights=0)
        self.costs = SimpleNamespace(latency=None, operations=None)
        self.evaluator = SimpleNamespace(
            confirms=confirms,
            baseline=lambda model, split: self.baseline(split),
        )

    def recipe(self, sites):
        return Recipe(sites, self.identity, None, self.prepared.folded)

    def baseline(self, split):
        return Reading(ACCURACY, 0.9 if split == "search" else 0.8, 10, None, None, 0.0)

    def measure(self, sites, split, **_):
        key = tuple(s.weight.bits for s in sites.values())
        drop = self.drops[key]
        self.asked.append((key, split))
        if drop is None:
            raise TrialError("out of memory")
        drop = drop if split == "confirm" or not self.evaluator.confirms else 0.001
        value = self.baseline(split).value - drop
        bits = sum(key) / 2
        m = Measurement(value, drop, drop, bits, int(100 * bits), 0.0)
        return m, Reading(ACCURACY, value, 10, None, None, 0.0), dict(sites)


def trials_of(*rows):
    return [make(i, a, b, 0.001) for i, (a, b) in enumerate(rows)]


def test_the_first_that_keeps_its_promise_is_returned():
    session = FakeSession({(4, 4): 0.05, (6, 4): 0.019, (8, 8): 0.0})
    chosen, done = confirm(session, MAPPING, DROP, trials_of((4, 4), (6, 4), (8, 8)), 0)
    assert (chosen.trial, chosen.holds, len(done)) == (1, True, 2)
    assert chosen is done[1]
    assert ((8, 8), "confirm") not in session.asked
    evidence = chosen.recipe.evidence
    assert chosen.result is evidence.confirm
    assert (evidence.search.drop, evidence.confirm.drop) == (0.001, 0.019)
    assert (evidence.search.baseline, evidence.confirm.baseline) == (0.9, 0.8)
    assert evidence.confirm.quantized == pytest.approx(0.781)
    assert (evidence.average_weight_bits, evidence.size_bytes) == (5.0, 500)
    assert dict(chosen.recipe.folded) == {"bn": "a"}


def test_where_none_holds_the_nearest_is_returned():
    session = FakeSession({(4, 4): 0.05, (6, 4): 0.03, (8, 8): 0.04})
    chosen, done = confirm(session, MAPPING, DROP, trials_of((4, 4), (6, 4), (8, 8)), 0)
    assert (chosen.trial, chosen.holds, len(done)) == (1, False, 3)


def test_with_a_budget_the_least_confirmed_drop_wins():
    session = FakeSession({(4, 4): 0.01, (6, 4): 0.03, (4, 6): 0.002})
    chosen, done = confirm(session, MAPPING, BUDGET, trials_of((4, 4), (6, 4), (4, 6)), 0)
    assert (chosen.trial, len(done)) == (2, 3)


def test_a_finalist_that_fails_is_passed_over():
    session = FakeSession({(4, 4): None, (6, 4): 0.01})
    chosen, done = confirm(session, MAPPING, DROP, trials_of((4, 4), (6, 4)), 0)
    assert (chosen.trial, len(done)) == (1, 1)
    with pytest.raises(TrialError, match="no finalist could be measured again: out of memory"):
        confirm(session, MAPPING, DROP, trials_of((4, 4)), 0)
    with pytest.raises(TrialError, match="there is none"):
        confirm(session, MAPPING, DROP, [], 0)


def test_without_a_second_split_the_drop_is_the_searched_one():
    session = FakeSession({(4, 4): 0.015}, confirms=False)
    sites = {"a": SiteRecipe(WeightScheme(4)), "b": SiteRecipe(WeightScheme(4))}
    found = confirm_one(session, sites, DROP, seed=3)
    assert found.recipe.evidence.confirm is None
    assert found.result.drop == 0.015
    assert (found.trial, found.holds, found.recipe.seed) == (-1, True, 3)
    assert {split for _, split in session.asked} == {"search"}


class PairedSession(FakeSession):
    """A session that has evidence: which confirm samples each recipe has right.

    The float model has ``right`` of ``n`` right; a recipe is (lost, gained), and by the reference
    what ``exact`` says of it, where that differs.
    """

    def __init__(self, recipes, n=200, right=150, exact=None):
        super().__init__(dict.fromkeys(recipes, 0.0))
        self.prepared.engine.fast = True
        self.recipes, self.n, self.right = recipes, n, right
        self.exact = exact or {}

    def hits(self, lost=0, gained=0):
        found = np.arange(self.n) < self.right
        found[:lost] = False
        found[self.right : self.right + gained] = True
        return found

    def read(self, hits):
        outputs = torch.tensor(~hits).long()
        evidence = ACCURACY.evidence([(outputs, torch.zeros_like(outputs))])
        return Reading(ACCURACY, evidence.score(), self.n, evidence, None, 0.0)

    def baseline(self, split):
        return self.read(self.hits())

    def measure(self, sites, split, **_):
        key = tuple(s.weight.bits for s in sites.values())
        self.asked.append((key, split))
        known = self.recipes if self.prepared.engine.fast else {**self.recipes, **self.exact}
        if known[key] is None:
            raise TrialError("out of memory")
        reading = self.read(self.hits(*known[key]))
        drop = self.right / self.n - reading.value
        bits = sum(key) / 2
        m = Measurement(reading.value, drop, 1 / bits, bits, int(100 * bits), 0.0)
        return m, reading, dict(sites)


WIDE = Goal(0.02, 1600, bits=8.0)


def confirmed(session, goal=WIDE, rival=None):
    """Confirm every recipe of a session, in the order that it names them."""
    trials = trials_of(*session.recipes)
    by_bits = dict(zip(session.recipes, trials, strict=True))
    found, done = confirm(session, MAPPING, goal, trials, 0, by_bits.get(rival))
    return tuple(s.weight.bits for s in found.recipe.sites.values()), found, done


def test_of_recipes_that_the_data_can_not_tell_apart_the_cheapest_wins():
    # (6, 6) is one sample of 200 worse than the best, and they differ on 9: SE is 3 samples.
    session = PairedSession({(8, 8): (4, 0), (6, 6): (5, 0), (4, 4): (30, 0)})
    session.recipes[6, 6] = (8, 3)
    bits, _, done = confirmed(session)
    assert (bits, len(done)) == ((6, 6), 3)
    # Ten samples worse on ten that differ is more than one standard error.
    assert confirmed(PairedSession({(8, 8): (0, 0), (6, 6): (10, 0)}))[0] == (8, 8)


class WithOutputs(PairedSession):
    """A paired session whose readings also say how far outputs are: the KL of each sample."""

    def __init__(self, recipes, distances):
        super().__init__(recipes)
        self.distances = distances

    def measure(self, sites, split, **_):
        m, reading, done = super().measure(sites, split)
        distance = self.distances[tuple(s.weight.bits for s in sites.values())]
        if distance is None:
            return m, reading, done
        kl = METRICS.get("kl")
        stats = np.stack([distance, np.ones_like(distance)], axis=1)
        found = Distance(kl, replace(kl.evidence([LOGITS]), stats=stats))
        return m, replace(reading, divergence=found.evidence.score(), distance=found), done


LOGITS = torch.zeros(1, 2), torch.zeros(1, 2)


def test_what_the_metric_can_not_tell_apart_the_outputs_can():
    rng = np.random.default_rng(0)
    near = rng.exponential(0.01, 200)
    recipes = {(8, 8): (4, 0), (6, 6): (4, 0), (4, 4): (30, 0)}
    # Smaller, with the very same hits, but twice as far from the float model.
    distances = {(8, 8): near, (6, 6): 2 * near, (4, 4): near}
    assert confirmed(WithOutputs(recipes, distances))[0] == (8, 8)
    # As far, with noise: the smaller one.
    distances[6, 6] = rng.permutation(near)
    assert confirmed(WithOutputs(recipes, distances))[0] == (6, 6)
    # Nearest of all, but of another accuracy: the metric comes first.
    distances[4, 4] = near / 100
    assert confirmed(WithOutputs(recipes, distances))[0] == (6, 6)
    # Where outputs can't be compared the metric alone decides.
    assert confirmed(WithOutputs(recipes, dict.fromkeys(recipes)))[0] == (6, 6)


def test_within_a_budget_nothing_is_worse_than_the_incumbent():
    recipes = {(8, 8): (4, 0), (6, 6): (8, 3)}
    assert confirmed(PairedSession(recipes))[0] == (6, 6)
    # The same recipes: what is within one standard error still loses to the uniform recipe.
    assert confirmed(PairedSession(recipes), rival=(8, 8))[0] == (8, 8)
    assert confirmed(PairedSession(recipes), rival=(6, 6))[0] == (6, 6)
    # As good as the uniform recipe, and smaller.
    recipes[4, 4] = (6, 2)
    assert confirmed(PairedSession(recipes), rival=(8, 8))[0] == (4, 4)


def test_within_a_budget_to_be_better_than_float_counts_for_nothing():
    """A narrow uniform recipe that was lucky does not beat one that is nearer and loses nothing."""
    rng = np.random.default_rng(0)
    near = rng.exponential(0.01, 200)
    recipes = {(8, 8): (2, 3), (4, 4): (0, 20), (6, 6): (9, 0)}
    distances = {(8, 8): near, (4, 4): 5 * near, (6, 6): near / 2}
    bits, chosen, _ = confirmed(WithOutputs(recipes, distances), rival=(4, 4))
    assert bits == (8, 8)
    assert chosen.result.drop == pytest.approx(-1 / 200)
    # Nearer too, but both lose more than luck explains where the uniform one loses nothing.
    recipes[8, 8] = (9, 0)
    assert confirmed(WithOutputs(recipes, distances), rival=(4, 4))[0] == (4, 4)


def test_a_coarse_incumbent_that_is_lucky_on_few_samples_does_not_shut_out_what_is_nearer():
    rng = np.random.default_rng(0)
    near = rng.exponential(0.01, 200)
    recipes = {(8, 8): (1, 0), (4, 4): (3, 3)}
    distances = {(8, 8): near, (4, 4): 5 * near}
    # One sample of 200 worse, on seven that differ, and five times as near.
    assert confirmed(WithOutputs(recipes, distances), rival=(4, 4))[0] == (8, 8)
    # Worse by more than one standard error, or no nearer for sure: the incumbent stays.
    recipes[8, 8] = (9, 0)
    assert confirmed(WithOutputs(recipes, distances), rival=(4, 4))[0] == (4, 4)
    recipes[8, 8] = (1, 0)
    distances[4, 4] = rng.permutation(near)
    assert confirmed(WithOutputs(recipes, distances), rival=(4, 4))[0] == (4, 4)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=2, max_size=5),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=5, max_size=5),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_the_incumbent_is_never_beaten_by_luck_of_the_arithmetic(counts, again, same):
    """Whatever the fast arithmetic says: by the reference the choice is no worse."""
    keys = [(8, 8), (6, 6), (8, 4), (4, 4), (4, 6)][: len(counts)]
    recipes = dict(zip(keys, counts, strict=True))
    exact = {} if same else dict(zip(keys, again, strict=False))
    session = PairedSession(recipes, exact=exact)
    _, chosen, done = confirmed(session, rival=(6, 6))
    lost, gained = (recipes | exact)[6, 6]
    assert chosen.result.drop <= max((lost - gained) / session.n, 0.0) + 1e-12
    assert chosen in done
    assert len(done) == len(keys)
    assert len({key for key, split in session.asked if split == "confirm"}) <= FINALISTS


def test_an_incumbent_that_fails_is_no_incumbent():
    session = PairedSession({(8, 8): None, (6, 6): (5, 0)})
    assert confirmed(session, rival=(8, 8))[0] == (6, 6)
    session = PairedSession({(8, 8): (1, 0), (6, 6): (5, 0)}, exact={(8, 8): None})
    assert confirmed(session, rival=(8, 8))[0] == (6, 6)
    with pytest.raises(TrialError, match="no finalist could be measured again: out of memory"):
        confirmed(PairedSession({(8, 8): (1, 0)}, exact={(8, 8): None}), rival=(8, 8))


def test_under_a_maximum_drop_a_challenger_must_not_be_inferior_to_the_incumbent():
    goal = Goal(0.02, 1600)
    # The challenger loses 2 of 200 and keeps 2%; the uniform recipe is hardly better.
    bits, found, done = confirmed(PairedSession({(4, 4): (2, 0), (8, 8): (0, 1)}), goal, (8, 8))
    assert (bits, found.holds, len(done)) == ((4, 4), True, 2)
    # It gains 30: the challenger is surely more than 2 points worse than that.
    bits, found, _ = confirmed(PairedSession({(4, 4): (2, 0), (8, 8): (0, 30)}), goal, (8, 8))
    assert (bits, found.holds) == ((8, 8), True)


def test_a_challenger_that_breaks_its_promise_asks_nothing_of_the_incumbent():
    session = PairedSession({(4, 4): (9, 0), (6, 6): (1, 0), (8, 8): (0, 0)})
    bits, _, done = confirmed(session, Goal(0.02, 1600), (6, 6))
    assert (bits, len(done)) == ((6, 6), 2)
    assert ((8, 8), "confirm") not in session.asked


def test_the_verdict_is_recorded():
    _, found, _ = confirmed(PairedSession({(4, 4): (5, 2)}), Goal(0.02, 1600))
    verdict = found.recipe.evidence.verdict
    assert (verdict.outcome, verdict.margin, verdict.samples) == ("NOT PROVEN", 0.02, 200)
    assert verdict.flip_rate == pytest.approx(7 / 200)
    assert verdict.drop == found.result.drop == pytest.approx(0.015)
    assert verdict.interval == found.result.interval
    assert verdict.samples_needed > 200
    _, found, _ = confirmed(PairedSession({(4, 4): (5, 2)}), Goal(float("inf"), 1600))
    assert found.recipe.evidence.verdict is None


def test_who_the_incumbent_is():
    rows = [(8, 8, 0.001), (6, 6, 0.01), (4, 4, 0.2), (4, 6, 0.0)]
    trials = [make(i, a, b, drop, BUDGET) for i, (a, b, drop) in enumerate(rows)]
    assert incumbent(trials, BUDGET, 3).number == 2  # wider ones cost more than 5 bits
    trials = [make(i, a, b, drop) for i, (a, b, drop) in enumerate(rows)]
    assert incumbent(trials, DROP, 3).number == 1  # the smallest that keeps the drop
    assert incumbent(trials[2:3], DROP, 3) is None
    assert incumbent([], DROP, 3) is None

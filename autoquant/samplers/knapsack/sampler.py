"""The default sampler: every proposal solves a knapsack; what is learned is what bends its table.

The loss of a recipe is modelled as a sum over sites of (how much the site's noise matters) ×
(the noise that its choice makes, from the profile). The first factor is the unknown; its posterior
given all measured trials, a Bayesian regression, is sampled for each proposal (Thompson
sampling: Thompson 1933; Russo et al. 2018, arXiv 1707.02038) and the knapsack solved for it. With
a budget, the budget is spent; with a maximum drop, the cheapest recipe is taken whose predicted
loss is about the one at which all trials together say that the drop is reached. A layer that could
be quantized and stays in float must pay for the speed that it costs: it is priced above its size,
unless the speed is known. More than one limit at a time makes the knapsack an integer program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from autoquant.measure.cost import CostModel
from autoquant.measure.speed import speed_class
from autoquant.samplers.knapsack.mutation import inherit, mutate, rounded_as
from autoquant.samplers.knapsack.posterior import Posterior, Row, Sums, believe, prior
from autoquant.selection.drop_curve import fit_drops
from autoquant.sensitivity.profile import Option, Profile
from autoquant.solvers.convex_hull import cheapest, solve
from autoquant.solvers.integer_program import solve_within
from autoquant.spec.costs import average_bits, layer_budget
from autoquant.spec.goal import Goal
from autoquant.spec.recipe import SiteRecipe, choices_key
from autoquant.study.ledger import MEASURED
from autoquant.study.parameters import ParameterMap
from autoquant.study.tuned import TUNED

MUTATIONS = 0.5
"""Chance that a proposal also changes a dimension other than the bits of a few sites."""
AIM = 0.25
"""Standard deviation of the logarithm of the loss that is aimed at, around the estimated limit."""
FLOAT_SURCHARGE = 0.005
"""What a layer that stays in float costs above its size, as a share of all layers in float."""
FARTHEST = 3.0
"""How many times the largest loss that keeps the drop is aimed at, at most."""
LIKELY = 1.05
"""How many times the damage of the best choice another may do, by the profile, and be kept."""
BROKEN = 4.0
"""How many times the damage of what it replaces a choice may do, by the profile, to be tried."""
POINTS = 12
"""Budgets of a foretold front."""
DRAWS = 32
"""Draws of the posterior over which the expected gain of more trials is averaged."""
TRIES = 8
"""Proposals drawn before a recipe that was measured already is proposed again."""

Sites = dict[str, SiteRecipe]


@dataclass(frozen=True)
class Foretold:
    """A recipe that nobody measured: what it costs, and its loss and drop as foretold.

    ``drop`` is None before any trial.
    """

    average_weight_bits: float
    size_bytes: int
    loss: float
    drop: float | None


@dataclass(frozen=True)
class Seen:
    """One measured trial, as the sampler uses it."""

    number: int
    sites: Sites
    key: str
    row: Row
    loss: float
    objective: float
    drop: float
    feasible: bool
    complete: bool


WORKER = 2
"""Sets the random numbers of workers apart from all others of a study."""


class KnapsackSampler(BaseSampler):
    """Proposes the solutions of knapsacks whose terms are learned from the trials.

    A proposal depends on the seed, the trial's number and the finished trials before it, and on
    nothing else, so a resumed study goes on as if it had never stopped. Of several that work on a
    study at a time each has another ``worker`` number, and draws others. ``rest_bytes`` is the size
    of what is not quantized, ``rest_weights`` the weights in it; ``costs`` knows the latency and
    the bit operations, where the goal is about them, and keeps proposals within every limit.
    """

    def __init__(
        self,
        mapping: ParameterMap,
        profile: Profile,
        goal: Goal,
        rest_bytes: int,
        seed: int,
        costs: CostModel | None = None,
        worker: int = 0,
        rest_weights: int = 0,
    ) -> None:
        self.worker = worker
        self.mapping = mapping
        self.profile = profile
        self.goal = goal
        self.rest_bytes = rest_bytes
        self.rest_weights = rest_weights
        self.seed = seed
        self.names = list(mapping.spaces)
        self.costs = costs
        self._seen: dict[int, Seen | None] = {}
        self._sums = Sums(len(self.names))
        self._prior = prior(self.names, profile)
        self._options = {n: self._worth(n, profile.options[n]) for n in self.names}
        options = [self._options[n] for n in self.names]
        self._damage = [np.array([o.damage for o in row]) for row in options]
        self._cost = self._prices(goal.cost)
        self._budgets = self._limits()
        if goal.cost in ("size", "bits") and goal.latency is None:
            surcharge = FLOAT_SURCHARGE * sum(float(cost.max()) for cost in self._cost)
            for row, cost in zip(options, self._cost, strict=True):
                floats = np.array([o.recipe.weight is None for o in row])
                if not floats.all():
                    cost[floats] += surcharge

    def _worth(self, name: str, options: tuple[Option, ...]) -> tuple[Option, ...]:
        """Return the options that a search may propose of itself.

        A quantized weight with a float activation is one only where that is what makes it fast.
        """
        if self.costs is None or self.costs.latency is None:
            return options
        fastest: dict[object, float] = {}
        for o in options:
            if o.recipe.weight is not None and o.recipe.activation is not None:
                seconds = self.costs.price("latency", name, o.recipe)
                fastest[o.recipe.weight] = min(seconds, fastest.get(o.recipe.weight, np.inf))
        return tuple(
            o
            for o in options
            if o.recipe.activation is not None
            or o.recipe.weight not in fastest
            or self.costs.price("latency", name, o.recipe) < fastest[o.recipe.weight]
        )

    def _prices(self, kind: str) -> list[np.ndarray]:
        """Return what each option of each site adds to a cost of the ``kind``."""
        rows = ((name, self._options[name]) for name in self.names)
        return [np.array([self._price(kind, name, o) for o in row]) for name, row in rows]

    def _price(self, kind: str, name: str, option: Option) -> float:
        if kind == "size":
            return float(option.bytes)
        if kind == "bits":
            return float(self.profile.numel[name] * option.recipe.weight_bits)
        assert self.costs is not None
        return self.costs.price(kind, name, option.recipe)

    def _limits(self) -> list[tuple[list[np.ndarray], float]]:
        """Return the budgets of the goal: the prices of all options, and their most in all."""
        goal, found = self.goal, []
        if goal.bits is not None:
            weights = sum(self.profile.numel[n] for n in self.names)
            limit = layer_budget(goal.bits, weights, self.rest_weights)
            found.append((self._prices("bits"), limit))
        if goal.size_bytes is not None:
            found.append((self._prices("size"), float(goal.size_bytes - self.rest_bytes)))
        if goal.latency is not None:
            assert self.costs is not None
            assert self.costs.latency is not None
            found.append((self._prices("latency"), goal.latency - self.costs.latency.rest))
        return found

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return every parameter: all are proposed together."""
        return self.mapping.distributions

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return a random value for a parameter that the search space does not know."""
        sampler = optuna.samplers.RandomSampler(seed=self.seed + trial.number)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Return the parameters of the next proposal."""
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return self.mapping.encode(self.propose(trials, trial.number))

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Sites:
        """Return the recipe to try as trial ``number``."""
        draws = (self.seed, number, WORKER, self.worker) if self.worker else (self.seed, number)
        rng = np.random.default_rng(draws)
        seen = [s for s in map(self._read, trials) if s is not None]
        taken = {s.key for s in seen}
        incumbent, target = self._aim(seen)
        belief = self._posterior(seen)
        sites: Sites = {}
        for attempt in range(TRIES):
            # The first worker tries the likeliest recipe itself, too; others would try the same.
            sure = attempt == 0 and number % 3 == 0 and not self.worker
            spread = 0.0 if sure else 1.0 + attempt / 4
            weights = belief.draw(rng, spread)
            # In units of the typical weight, as the weights are.
            limit = target / belief.typical * float(np.exp(AIM * rng.standard_normal()))
            sites = self._solve(weights, limit, incumbent)
            if attempt or rng.random() < MUTATIONS:
                mutated = self._mutate(sites, rng)
                sites = mutated if self._affords(mutated) else sites
            if choices_key(sites) not in taken:
                break
        return sites

    def _aim(self, seen: Sequence[Seen]) -> tuple[Seen | None, float]:
        """Return the best trial so far, and the loss at which the maximum drop is reached."""
        curve = fit_drops([s.loss for s in seen], [s.drop for s in seen])
        expected = curve.drops([s.loss for s in seen])
        keep = [s for s, e in zip(seen, expected, strict=True) if e <= self.goal.max_drop]
        good = [s for s in seen if s.feasible] if self.goal.budgeted else keep
        incumbent = min((s for s in good if s.complete), key=_rank, default=None)
        target = curve.loss_at(self.goal.max_drop)
        if keep:  # one step at a time beyond what was measured
            target = min(target, FARTHEST * max(s.loss for s in keep))
        return incumbent, target

    def cheaper(self, trials: Sequence[FrozenTrial], losses: Sequence[float]) -> list[Sites]:
        """Return the cheapest recipes that lose more than the goal allows, as foretold.

        One for each of ``losses``, in units of the loss at which the maximum drop is reached;
        each recipe once, and none that costs as much as the best trial.
        """
        seen = [s for s in map(self._read, trials) if s is not None]
        incumbent, target = self._aim(seen)
        if self.goal.budgeted or not math.isfinite(target):
            return []
        belief, found = self._posterior(seen), dict[str, Sites]()
        least = math.inf if incumbent is None else self._cost_of(incumbent.sites)
        for loss in losses:
            sites = self._solve(belief.mean, loss * target / belief.typical, incumbent)
            if self._cost_of(sites) < least:
                found.setdefault(choices_key(sites), sites)
        return list(found.values())

    def expected_gain(self, trials: Sequence[FrozenTrial]) -> float | None:
        """Return what knowing the layers' true weights would gain, as a share of the objective.

        The mean over draws of the posterior; see ``optimize.termination``. None where no trial is
        feasible yet.
        """
        seen = [s for s in map(self._read, trials) if s is not None]
        good = [s for s in seen if s.feasible and s.complete]
        if not good:
            return None
        best = min(good, key=_rank)
        rng = np.random.default_rng((self.seed, len(trials), 1))
        belief = self._posterior(seen)
        cost = self._cost_of(best.sites)
        gains = []
        for _ in range(DRAWS):
            weights = belief.draw(rng)
            damage = [w * d for w, d in zip(weights, self._damage, strict=True)]
            own = float(weights @ best.row.damage)
            chosen = self._choose(damage, own)
            if self.goal.budgeted:
                found = sum(float(d[i]) for d, i in zip(damage, chosen, strict=True))
                gains.append(1.0 - found / own if own > 0 else 0.0)
            else:
                found = sum(float(c[i]) for c, i in zip(self._cost, chosen, strict=True))
                gains.append(1.0 - found / cost if cost > 0 else 0.0)
        return max(float(np.mean(gains)), 0.0)

    def _cost_of(self, sites: Sites) -> float:
        """Return what a recipe costs in the unit of the goal's cost, as its options are priced."""
        total = 0.0
        for name, cost in zip(self.names, self._cost, strict=True):
            row = self._options[name]
            wanted = sites[name].weight
            same = [i for i, o in enumerate(row) if o.recipe == sites[name]]
            same = same or [i for i, o in enumerate(row) if o.recipe.weight == wanted]
            same = same or [
                i for i, o in enumerate(row) if o.recipe.weight_bits == sites[name].weight_bits
            ]
            total += float(cost[same].min()) if same else float(cost.max())
        return total

    def _read(self, trial: FrozenTrial) -> Seen | None:
        if trial.number not in self._seen:
            self._seen[trial.number] = self._parse(trial)
        return self._seen[trial.number]

    def _parse(self, trial: FrozenTrial) -> Seen | None:
        measured = trial.user_attrs.get(MEASURED)
        if measured is None or TUNED in trial.user_attrs:
            return None
        sites = self.mapping.decode(trial.params)
        damage = np.array([self.profile.damage(n, sites[n]) for n in self.names])
        loss = float(measured["loss"])
        return Seen(
            trial.number,
            sites,
            choices_key(sites),
            Row(trial.number, damage, loss),
            loss,
            float(measured["objective"]),
            float(measured["drop"]),
            bool(measured["feasible"]),
            trial.state == TrialState.COMPLETE,
        )

    def _posterior(self, seen: Sequence[Seen]) -> Posterior:
        """Return what the trials say of how much each site's noise matters."""
        return believe([s.row for s in seen], self._sums, self._prior)

    def sweep(self, trials: Sequence[FrozenTrial], points: int = POINTS) -> list[Foretold]:
        """Return the best recipes from the cheapest to the best, as foretold: none is measured.

        ``points`` budgets, evenly spread over what the goal's cost may be; one of each recipe.
        """
        seen = [s for s in map(self._read, trials) if s is not None]
        belief = self._posterior(seen)
        curve = fit_drops([s.loss for s in seen], [s.drop for s in seen])
        weights = belief.typical * belief.mean
        damage = [w * d for w, d in zip(weights, self._damage, strict=True)]
        cost = self._prices(self.goal.cost)
        sizes = [np.array([o.bytes for o in self._options[n]], dtype=float) for n in self.names]
        bits = [
            np.array([float(o.recipe.weight_bits) for o in self._options[n]]) for n in self.names
        ]
        numel = [self.profile.numel[n] for n in self.names]
        found: dict[tuple[int, ...], Foretold] = {}
        low, high = (sum(float(f(c)) for c in cost) for f in (np.min, np.max))
        for budget in np.linspace(low, high, points):
            chosen = solve(damage, cost, float(budget))
            if chosen is None:
                continue
            loss, size = (
                sum(float(row[k]) for row, k in zip(table, chosen, strict=True))
                for table in (damage, sizes)
            )
            widths = [float(row[k]) for row, k in zip(bits, chosen, strict=True)]
            found[tuple(chosen)] = Foretold(
                average_bits(zip(numel, widths, strict=True), self.rest_weights),
                int(size) + self.rest_bytes,
                loss,
                float(curve.drops([loss])[0]) if seen else None,
            )
        return list(found.values())

    def _solve(self, weights: np.ndarray, limit: float, incumbent: Seen | None) -> Sites:
        """Return the least damage within the budgets, or the least cost with damage ``limit``."""
        damage = [w * d for w, d in zip(weights, self._damage, strict=True)]
        chosen = self._choose(damage, limit)
        rows = zip(self.names, chosen, strict=True)
        sites = {name: self._options[name][index].recipe for name, index in rows}
        if incumbent is None:
            return sites
        known = {n: self._inherit(n, r, incumbent.sites[n]) for n, r in sites.items()}
        return known if self._affords(known) else sites

    def _choose(self, damage: list[np.ndarray], limit: float) -> list[int]:
        """Return the option of each site."""
        if not self._budgets:
            return cheapest(damage, self._cost, limit)
        if len(self._budgets) == 1 and self.goal.budgeted:
            found = solve(damage, self._cost, self._budgets[0][1])
            found = found or [int(np.argmin(c)) for c in self._cost]
        elif self.goal.budgeted:
            found = solve_within(damage, self._budgets)
        else:
            found = solve_within(self._cost, [*self._budgets, (damage, limit)])
            # No recipe keeps both the drop and the budgets: the least damage within the budgets.
            found = found or solve_within(damage, self._budgets)
        return found or [int(np.argmin(c)) for c in self._budgets[-1][0]]

    def _inherit(self, site: str, recipe: SiteRecipe, known: SiteRecipe) -> SiteRecipe:
        """Return ``recipe`` with what was learned of its site; never as slow as another choice."""
        found = inherit(recipe, known)
        # Gradients know calibrations apart; what a trial that did well had by chance does not.
        likely = LIKELY * self.profile.damage(site, recipe)
        if self.profile.samples and self.profile.damage(site, found) > likely:
            found = rounded_as(recipe, known)
        if self.costs is None or self.costs.indifferent:
            return found
        return found if speed_class(found) == speed_class(recipe) else recipe

    def _affords(self, sites: Sites) -> bool:
        return self.costs is None or self.goal.affords(self.costs.of(sites))

    def _mutate(self, sites: Sites, rng: np.random.Generator) -> Sites:
        """Return ``sites`` with a dimension other than the bits changed at a few of them."""
        sites = dict(sites)
        for name in rng.permutation(self.names)[: 1 + rng.poisson(1.0)].tolist():
            space = self.mapping.spaces[name]
            if space.fixed is not None:
                continue
            moved = mutate(sites[name], space, rng)
            limit = BROKEN * self.profile.damage(name, sites[name])
            # A calibration that breaks a tensor is not worth a trial.
            if self.profile.damage(name, moved) <= limit:
                sites[name] = moved
        return sites


def _rank(seen: Seen) -> tuple[float, int]:
    return seen.objective, seen.number

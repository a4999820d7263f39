"""The last word: a few finalists on data that the search never saw, and which of them to return."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from optuna.trial import FrozenTrial

from autoquant.errors import TrialError
from autoquant.measure.evaluator import Reading
from autoquant.models.evidence import Evidence as Samples
from autoquant.models.intervals import UNKNOWN, Interval
from autoquant.models.metrics import MetricInfo, drop
from autoquant.models.noninferiority import drop_interval, judge
from autoquant.selection.schedule import Schedule
from autoquant.session.session import Session
from autoquant.spec.costs import LatencyEvidence
from autoquant.spec.goal import Goal, Measurement
from autoquant.spec.recipe import Evidence, Recipe, SiteRecipe, SplitResult, choices_key
from autoquant.spec.verdict import FAIL, Verdict
from autoquant.study.parameters import ParameterMap
from autoquant.study.tuned import sites_of


@dataclass(frozen=True)
class Finalist:
    """One recipe that went to the confirm split.

    ``holds`` says whether the reported drop is within the maximum, ``recipe.evidence.verdict``
    whether that is proven; ``reading`` is of the split that is reported.
    """

    trial: int
    recipe: Recipe
    measurement: Measurement
    holds: bool
    reading: Reading

    @property
    def result(self) -> SplitResult:
        """The result to report."""
        assert self.recipe.evidence is not None
        return self.recipe.evidence.reported


def _always(_: str) -> bool:
    return True


def confirm(
    session: Session,
    mapping: ParameterMap,
    goal: Goal,
    trials: Sequence[FrozenTrial],
    seed: int,
    rival: FrozenTrial | None = None,
    schedule: Schedule | None = None,
) -> tuple[Finalist, list[Finalist]]:
    """Measure finalists until the choice is sure; return the choice and all that were measured.

    ``rival`` is the incumbent, one of ``trials``: the uniform recipe that is returned unless
    another is not inferior to it.

    With a maximum drop: the first (smallest) whose confirmed drop keeps it and which is not
    significantly worse than the incumbent by more than that; where none does, the one that comes
    nearest. With a budget all are measured, and the smallest is taken of those within one standard
    error of the best, by the metric and by the distance to the float model's outputs, that lose no
    more than the incumbent; one whose outputs are surely nearer than its may lose more by what the
    metric can't tell. To be better than the float model counts for nothing there: it is luck, of
    which the best of many has most. The choice is measured
    once more by the reference, so that whoever loads what is written finds the very numbers that
    are reported. The verdict is that of a single test: it is not corrected for the up to FINALISTS
    recipes that were looked at. Where the ``schedule`` has no time for all finalists, the safest
    are measured, and how sure a drop is may be left open. Raises TrialError where every finalist
    fails.
    """
    if schedule is not None:
        fit = schedule.finalists(len(trials))
        # With a budget the best come first, else the smallest, and the safest last.
        trials = trials[:fit] if goal.budgeted else trials[len(trials) - fit :]
        rival = rival if any(rival is trial for trial in trials) else None
    jury = _Jury(session, mapping, goal, seed, schedule)
    if goal.budgeted:
        return _within_budget(jury, trials, rival)
    return _within_drop(jury, trials, rival)


class _Jury:
    """Measures finalists, each once: in turn, or the incumbent before its turn."""

    def __init__(
        self,
        session: Session,
        mapping: ParameterMap,
        goal: Goal,
        seed: int,
        schedule: Schedule | None = None,
    ) -> None:
        self.schedule = schedule
        self.session = session
        self.mapping = mapping
        self.goal = goal
        self.seed = seed
        self.done: list[Finalist] = []
        self._heard: dict[str, Finalist | None] = {}
        self._reason = "there is none"

    def hear(self, trial: FrozenTrial) -> Finalist | None:
        """Return the trial's recipe as confirmed, for whichever trial; None where it fails."""
        sites = sites_of(trial, self.mapping)
        key = choices_key(sites)
        if key in self._heard:
            return self._heard[key]
        found = None
        try:
            # Against the clock it is only said of the choice how sure its drop is.
            found = confirm_one(
                self.session,
                sites,
                self.goal,
                self.seed,
                trial.number,
                lambda _: self.schedule is None,
            )
            self.done.append(found)
        except TrialError as error:
            self._reason = str(error)
        self._heard[key] = found
        return found

    def exactly(self, finalist: Finalist) -> Finalist | None:
        """Return a finalist as the reference measures it; None where it fails."""
        try:
            with self.session.prepared.engine.reference():
                found = confirm_one(
                    self.session,
                    finalist.recipe.sites,
                    self.goal,
                    self.seed,
                    finalist.trial,
                    _always if self.schedule is None else self.schedule.affords_interval,
                )
        except TrialError as error:
            self._dismiss(finalist, error)
            return None
        self.done[self.done.index(finalist)] = found
        self._heard[finalist.recipe.key()] = found
        return found

    def exact_drop(self, finalist: Finalist) -> float | None:
        """Return the reported drop as the reference measures it; None where it fails."""
        split = "confirm" if self.session.evaluator.confirms else "search"
        try:
            with self.session.prepared.engine.reference():
                return self.session.measure(finalist.recipe.sites, split)[0].drop
        except TrialError as error:
            self._dismiss(finalist, error)
            return None

    def _dismiss(self, finalist: Finalist, error: TrialError) -> None:
        self._reason = str(error)
        self.done.remove(finalist)
        self._heard[finalist.recipe.key()] = None

    def best(self) -> Finalist:
        """Return the finalist with the least confirmed drop; TrialError where all failed."""
        if not self.done:
            raise TrialError(f"no finalist could be measured again: {self._reason}")
        return min(self.done, key=lambda f: f.result.drop)

    def best_by_loss(self) -> Finalist:
        """Return the one that loses least, of several that lose nothing the nearest to float."""
        self.best()
        return min(self.done, key=lambda f: (_lost(f), _divergence(f)))

    def inferior(self, finalist: Finalist, rival: Finalist) -> bool:
        """Return whether a recipe surely loses more than the maximum drop against the incumbent."""
        metric = finalist.reading.metric
        worse = finalist.result.drop - rival.result.drop
        one, two = rival.reading.evidence, finalist.reading.evidence
        if one is None or two is None or not self._compares():
            return worse > self.goal.max_drop
        found = drop_interval(one, two, metric, self.seed)
        return judge(one, two, metric, self.goal.max_drop, worse, found).outcome == FAIL

    def spread(self, best: Finalist, other: Finalist) -> float:
        """Return the standard error of the difference between two finalists; 0 if not known."""
        one, two = best.reading, other.reading
        return self._error(one.evidence, two.evidence, one.metric)

    def as_near(self, best: Finalist, other: Finalist) -> bool:
        """Return whether ``other`` is as near to the float model's outputs as ``best`` is.

        Within one standard error of the paired difference; true where that can't be told.
        """
        one, two = best.reading.distance, other.reading.distance
        if one is None or two is None or one.metric != two.metric:
            return True
        more = drop(one.metric, one.evidence.score(), two.evidence.score())
        return more <= self._error(one.evidence, two.evidence, one.metric)

    def _compares(self) -> bool:
        """Return whether there is time to say how sure the difference of two finalists is."""
        return self.schedule is None or self.schedule.affords_comparison()

    def _error(self, one: Samples | None, two: Samples | None, metric: MetricInfo) -> float:
        if one is None or two is None or not self._compares():
            return 0.0
        found = drop_interval(one, two, metric, self.seed).standard_error
        return 0.0 if math.isnan(found) else found


def _within_drop(
    jury: _Jury, trials: Sequence[FrozenTrial], rival: FrozenTrial | None
) -> tuple[Finalist, list[Finalist]]:
    for trial in trials:
        found = jury.hear(trial)
        if found is None or not found.holds:
            continue
        found = jury.exactly(found)
        if found is None or not found.holds:
            continue
        against = None if rival is None else jury.hear(rival)
        if against is None or against is found or not jury.inferior(found, against):
            return found, jury.done
    while True:
        nearest = jury.exactly(jury.best())
        if nearest is not None and nearest is jury.best():
            return nearest, jury.done


def _within_budget(
    jury: _Jury, trials: Sequence[FrozenTrial], rival: FrozenTrial | None
) -> tuple[Finalist, list[Finalist]]:
    for trial in trials:
        jury.hear(trial)
    plain = None if rival is None else jury.hear(rival)
    # By the same arithmetic as the choice, so that whoever compares the two finds the same.
    exact = None if plain is None else jury.exact_drop(plain)
    if exact is None:
        plain = None
    while True:
        chosen = _cheapest_of_the_best(jury, plain, exact) or plain
        assert chosen is not None
        found = jury.exactly(chosen)
        if found is not None and _stands(jury, found, plain, exact):
            return found, jury.done
        if found is None and chosen is plain:
            plain = None


def _stands(jury: _Jury, finalist: Finalist, plain: Finalist | None, exact: float | None) -> bool:
    """Return whether the incumbent, whose drop is ``exact``, leaves a recipe standing.

    One that loses no more than it does, and no more than nothing. Or one that loses more by no more
    than a standard error, and whose outputs are nearer to the float model's by more than one: of
    few hundred samples a coarse recipe has some right by luck, and what is nearer has them wrong.
    """
    if plain is None or exact is None or finalist.recipe.key() == plain.recipe.key():
        return True
    more = finalist.result.drop - max(exact, 0.0)
    if more <= 0:
        return True
    return more <= jury.spread(plain, finalist) and not jury.as_near(finalist, plain)


def _cheapest_of_the_best(
    jury: _Jury, plain: Finalist | None, exact: float | None
) -> Finalist | None:
    """Return the smallest recipe within one standard error of the best that is left standing.

    The error is that of the paired difference to the best (Breiman et al. 1984, Classification and
    Regression Trees, §3.4.3: among those that the data can not tell apart, the simplest). It is
    the best by the metric, and then, of what the metric can not tell apart, the nearest to the
    float model's outputs, which differ by far less noise. Of equal sizes the one of least loss.
    None where the incumbent ``plain`` leaves nothing standing.
    """
    best = jury.best_by_loss()
    near = [
        f
        for f in jury.done
        if _stands(jury, f, plain, exact)
        and (f is best or _lost(f) - _lost(best) <= jury.spread(best, f))
    ]
    if not near:
        return None
    nearest = min(near, key=_divergence)
    near = [f for f in near if f is nearest or jury.as_near(nearest, f)]
    return min(near, key=lambda f: (f.measurement.size_bytes, f.measurement.loss))


def _lost(finalist: Finalist) -> float:
    """Return the confirmed drop, 0 where the recipe is better than the float model."""
    return max(finalist.result.drop, 0.0)


def _divergence(finalist: Finalist) -> float:
    """Return how far the outputs are from the float model's; infinite where that is not known."""
    found = finalist.reading.divergence
    return math.inf if found is None else found


def confirm_one(
    session: Session,
    sites: Mapping[str, SiteRecipe],
    goal: Goal,
    seed: int,
    number: int = -1,
    sure: Callable[[str], bool] = _always,
) -> Finalist:
    """Measure one recipe on both splits, and return it with its evidence.

    ``sure`` says of which split the evidence is to tell how sure the drop is.
    """
    m, searched, done = session.measure(sites, "search")
    base, reading = session.evaluator.baseline(session.model, "search"), searched
    splits: list[SplitResult] = []
    if session.evaluator.confirms:
        base = session.baseline("confirm")
        confirmed, reading, _ = session.measure(sites, "confirm")
        result, interval = _result(
            session, "confirm", confirmed.drop, reading, seed, sure("confirm")
        )
        splits.append(result)
    other, its = _result(session, "search", m.drop, searched, seed, sure("search"))
    splits.insert(0, other)
    if len(splits) == 1:
        result, interval = other, its
    metric = base.metric
    verdict: Verdict | None = None
    if math.isfinite(goal.max_drop):
        both = base.evidence, reading.evidence
        verdict = judge(*both, metric, goal.max_drop, result.drop, interval)
    evidence = Evidence(
        metric.name,
        metric.higher_is_better,
        splits[0],
        splits[1] if len(splits) > 1 else None,
        m.average_weight_bits,
        m.size_bytes,
        session.sizes.float_size_bytes,
        *_costs(session, m),
        verdict,
        session.sizes.layer_bits(done) if session.sizes.rest_weights else None,
    )
    recipe = replace(session.recipe(done), evidence=evidence, seed=seed)
    holds = evidence.reported.drop <= goal.max_drop + 1e-12
    return Finalist(number, recipe, m, holds, reading)


def _costs(
    session: Session, m: Measurement
) -> tuple[LatencyEvidence | None, float | None, float | None]:
    """Return what the evidence says of latency and bit operations, where a search asked."""
    table, operations = session.costs.latency, session.costs.operations
    latency = None
    if table is not None and m.latency is not None:
        latency = table.evidence(m.latency)
    return latency, m.bit_operations, None if operations is None else operations.total({})


def _result(
    session: Session, split: str, drop: float, reading: Reading, seed: int, sure: bool
) -> tuple[SplitResult, Interval]:
    """Return what a split gave and, where asked for and known, how ``sure`` its drop is."""
    baseline = session.evaluator.baseline(session.model, split)
    found = UNKNOWN
    if sure and reading.evidence is not None and baseline.evidence is not None:
        found = drop_interval(baseline.evidence, reading.evidence, baseline.metric, seed)
    ends = (found.low, found.high) if found.known else None
    return SplitResult(reading.samples, baseline.value, reading.value, drop, ends), found

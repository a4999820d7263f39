"""The last word: a few finalists on data that the search never saw, and which of them to return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial

from autoquant.errors import TrialError
from autoquant.measure.evaluator import Reading
from autoquant.models.intervals import paired_bootstrap
from autoquant.search.estimate import fit_drops
from autoquant.search.goal import Goal, Measurement
from autoquant.search.params import ParameterMap
from autoquant.search.session import Session
from autoquant.search.trials import measured
from autoquant.spec.costs import LatencyEvidence
from autoquant.spec.recipe import Evidence, Recipe, SiteRecipe, SplitResult, choices_key

Row = tuple[FrozenTrial, dict[str, Any]]

FINALISTS = 5
"""Most recipes that are measured on the confirm split: each one more is a chance of luck."""
CAUTION = (1.0, 0.6, 0.3)
"""Shares of the maximum drop within which a finalist's estimated drop lies, one after the other."""


@dataclass(frozen=True)
class Finalist:
    """One recipe that went to the confirm split."""

    trial: int
    recipe: Recipe
    measurement: Measurement
    holds: bool

    @property
    def result(self) -> SplitResult:
        """The result to report."""
        assert self.recipe.evidence is not None
        return self.recipe.evidence.reported


def finalists(
    trials: Sequence[FrozenTrial], mapping: ParameterMap, goal: Goal, uniforms: int
) -> list[FrozenTrial]:
    """Return the trials to confirm, best first: at most FINALISTS, no recipe twice.

    With a maximum drop: the smallest recipes whose drop, estimated from all trials, is within
    ever smaller shares of it; with a budget: the best ones. Then the best of the first
    ``uniforms`` trials (the uniform recipes) and the one of least loss: the safe ways out.
    """
    rows = [(t, m) for t in trials if (m := measured(t)) is not None]
    if not rows:
        return []
    losses = [m["loss"] for _, m in rows]
    curve = fit_drops(losses, [m["drop"] for _, m in rows])
    expected = {t.number: e for (t, _), e in zip(rows, curve.drops(losses), strict=True)}

    def within(share: float) -> list[Row]:
        if goal.budgeted:
            kept = [r for r in rows if r[1]["feasible"]]
        else:
            kept = [r for r in rows if expected[r[0].number] <= share * goal.max_drop]
        return sorted(kept, key=lambda r: (r[1]["objective"], r[0].number))

    plain = [r for r in within(1.0) if r[0].number < uniforms]
    affordable = (within(1.0) if goal.budgeted else rows) or rows
    safest = min(affordable, key=lambda r: (r[1]["loss"], r[0].number))
    if goal.budgeted:
        order = [*within(1.0)[: len(CAUTION)], *plain[:1], safest]
    else:
        order = [*(r for share in CAUTION for r in within(share)[:1]), *plain[:1], safest]
        order.sort(key=lambda r: (r[1]["objective"], r[0].number))
    chosen: dict[str, FrozenTrial] = {}
    for trial, _ in order:
        chosen.setdefault(choices_key(mapping.decode(trial.params)), trial)
    return list(chosen.values())[:FINALISTS]


def confirm(
    session: Session,
    mapping: ParameterMap,
    goal: Goal,
    trials: Sequence[FrozenTrial],
    seed: int,
) -> tuple[Finalist, list[Finalist]]:
    """Measure finalists in turn until one keeps its promise; return the choice and all measured.

    With a maximum drop: the first (smallest) whose confirmed drop keeps it; where none does, the
    one that comes nearest. With a budget: the one with the least confirmed drop. The choice is
    measured once more by the reference, so that whoever loads what is written finds the very
    numbers that are reported. Raises TrialError where every finalist fails.
    """
    done: list[Finalist] = []
    reason = "there is none"
    for trial in trials:
        sites = mapping.decode(trial.params)
        try:
            finalist = confirm_one(session, sites, goal, seed, trial.number)
            if finalist.holds and not goal.budgeted:
                finalist = _exactly(session, finalist, goal, seed)
        except TrialError as error:
            reason = str(error)
            continue
        done.append(finalist)
        if finalist.holds and not goal.budgeted:
            return finalist, done
    if not done:
        raise TrialError(f"no finalist could be measured again: {reason}")
    best = min(range(len(done)), key=lambda i: done[i].result.drop)
    done[best] = _exactly(session, done[best], goal, seed)
    return done[best], done


def _exactly(session: Session, finalist: Finalist, goal: Goal, seed: int) -> Finalist:
    """Return a finalist as the reference measures it."""
    with session.prepared.engine.reference():
        return confirm_one(session, finalist.recipe.sites, goal, seed, finalist.trial)


def confirm_one(
    session: Session,
    sites: Mapping[str, SiteRecipe],
    goal: Goal,
    seed: int,
    number: int = -1,
) -> Finalist:
    """Measure one recipe on both splits, with an interval, and return it with its evidence."""
    m, reading, done = session.measure(sites, "search")
    splits = [_result(session, "search", m.drop, reading, seed)]
    if session.evaluator.confirms:
        session.baseline("confirm")
        confirmed, again, _ = session.measure(sites, "confirm")
        splits.append(_result(session, "confirm", confirmed.drop, again, seed))
    metric = session.evaluator.metric
    assert metric is not None
    evidence = Evidence(
        metric.name,
        metric.higher_is_better,
        splits[0],
        splits[1] if len(splits) > 1 else None,
        m.average_weight_bits,
        m.size_bytes,
        session.sizes.float_size_bytes,
        *_costs(session, m),
    )
    recipe = Recipe(done, session.identity, evidence, session.prepared.folded, seed)
    holds = evidence.reported.drop <= goal.max_drop + 1e-12
    return Finalist(number, recipe, m, holds)


def _costs(
    session: Session, m: Measurement
) -> tuple[LatencyEvidence | None, float | None, float | None]:
    """Return what the evidence says of latency and bit operations, where a search asked."""
    table, operations = session.costs.latency, session.costs.operations
    latency = None
    if table is not None and m.latency is not None:
        latency = table.evidence(m.latency)
    return latency, m.bit_operations, None if operations is None else operations.total({})


def _result(session: Session, split: str, drop: float, reading: Reading, seed: int) -> SplitResult:
    baseline = session.evaluator.baseline(session.model, split)
    interval = None
    metric = session.evaluator.metric
    assert metric is not None
    if reading.evidence is not None and baseline.evidence is not None:
        found = paired_bootstrap(baseline.evidence, reading.evidence, metric, seed=seed)
        interval = (found.low, found.high) if found.known else None
    return SplitResult(reading.samples, baseline.value, reading.value, drop, interval)

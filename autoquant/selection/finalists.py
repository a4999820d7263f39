"""Which recipes go to the confirm split: few, as each one more is a chance of luck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from autoquant.selection.drop_curve import fit_drops
from autoquant.spec.goal import Goal
from autoquant.spec.recipe import choices_key
from autoquant.study.parameters import ParameterMap
from autoquant.study.trials import measured
from autoquant.study.tuned import TUNED, sites_of

Row = tuple[FrozenTrial, dict[str, Any]]

FINALISTS = 9
"""Most recipes that are measured on the confirm split, not counting what is tuned."""
TUNED_ERROR = 0.7
"""Relative error that the curve of all others is taken to have for what is tuned."""
BEST = 3
"""Finalists with a budget, beside the safe ways out."""
CAUTION = (1.0, 0.75, 0.55, 0.42, 0.3, 0.15, 0.07)
"""Shares of the maximum drop within which a finalist's estimated drop lies, one after the other,
and shares of the first one's distance from the float model.

The first that holds is taken, so the last ones are looked at only where all before them failed."""


def finalists(
    trials: Sequence[FrozenTrial], mapping: ParameterMap, goal: Goal, uniforms: int
) -> list[FrozenTrial]:
    """Return the trials to confirm, best first: at most FINALISTS untuned, no recipe twice.

    With a maximum drop: the smallest recipes whose drop, estimated from all trials, is within ever
    smaller shares of it, and ever nearer to the float model's outputs; with a budget: the best
    ones. Then the incumbent, and the one of least loss: the safe ways out. What is tuned takes
    nobody's place: the others are chosen as if it were not there, too.
    """
    rows = _rows(trials)
    if not rows:
        return []
    expected = _expected(rows)
    plain = [row for row in rows if TUNED not in row[0].user_attrs]
    order: list[Row] = []
    for some in (rows, plain) if len(plain) < len(rows) else (rows,):
        order += _some_finalists(some, expected, goal, uniforms)
    if not goal.budgeted:
        order.sort(key=_order)
    chosen: dict[str, FrozenTrial] = {}
    for trial, _ in order:
        chosen.setdefault(choices_key(sites_of(trial, mapping)), trial)
    return list(chosen.values())


def _some_finalists(
    rows: Sequence[Row], expected: Mapping[int, float], goal: Goal, uniforms: int
) -> list[Row]:
    """Return at most FINALISTS of some trials, with a budget the best first; some may be twice."""
    affordable = (_within(rows, expected, goal) if goal.budgeted else rows) or rows
    safest = min(affordable, key=lambda r: (r[1]["loss"], r[0].number))
    plain = _incumbent(rows, expected, goal, uniforms)
    safe = [*([] if plain is None else [plain]), safest]
    if goal.budgeted:
        return [*_within(rows, expected, goal)[:BEST], *safe]
    return _cautious(rows, expected, goal) + safe


def _cautious(rows: Sequence[Row], expected: Mapping[int, float], goal: Goal) -> list[Row]:
    """Return the smallest recipes within each share of the maximum drop, and of the first's loss.

    Where recipes are better than the float model on the search data, by luck, all are expected to
    lose nothing: then how far outputs are from its own tells which are the safer ones.
    """
    found: list[Row] = []
    for share in CAUTION:
        kept = _within(rows, expected, goal, share)
        if found:
            most = share * found[0][1]["loss"]
            kept = [r for r in kept if r[1]["loss"] <= most]
        found += kept[:1]
    return found


def incumbent(trials: Sequence[FrozenTrial], goal: Goal, uniforms: int) -> FrozenTrial | None:
    """Return the best of the first ``uniforms`` trials (the uniform recipes) that the goal affords.

    It is what a search has to beat. None where no uniform recipe keeps the goal.
    """
    rows = _rows(trials)
    found = _incumbent(rows, _expected(rows), goal, uniforms) if rows else None
    return None if found is None else found[0]


def estimated_drops(trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """Return the number and the drop of each measured trial, as all trials together tell it."""
    rows = _rows(trials)
    return _expected(rows) if rows else {}


def _rows(trials: Sequence[FrozenTrial]) -> list[Row]:
    return [(t, m) for t in trials if (m := measured(t)) is not None]


def _order(row: Row) -> tuple[float, int]:
    return row[1]["objective"], row[0].number


def _expected(rows: Sequence[Row]) -> dict[int, float]:
    """Return each trial's drop as all trials together tell it: less luck than its own.

    What is tuned loses less of its metric than the rest at the same distance from the float model's
    outputs, by a factor that is 1 ± TUNED_ERROR beforehand and is learned from all that are tuned.
    """
    plain = [m for t, m in rows if TUNED not in t.user_attrs]
    curve = fit_drops([m["loss"] for m in plain], [m["drop"] for m in plain])
    drops = curve.drops([m["loss"] for _, m in rows])
    tuned = np.array([TUNED in t.user_attrs for t, _ in rows])
    if curve.noise > 0 and tuned.any():
        own, foretold = np.array([m["drop"] for _, m in rows])[tuned], drops[tuned]
        sure = (TUNED_ERROR / curve.errors(foretold)) ** 2
        factor = (1.0 + (sure * own) @ foretold) / (1.0 + (sure * foretold) @ foretold)
        drops[tuned] *= max(factor, 0.0)
    return {t.number: float(drop) for (t, _), drop in zip(rows, drops, strict=True)}


def _within(
    rows: Sequence[Row], expected: Mapping[int, float], goal: Goal, share: float = 1.0
) -> list[Row]:
    """Return what keeps the goal, a drop being within ``share`` of the maximum; best first."""
    if goal.budgeted:
        kept = [r for r in rows if r[1]["feasible"]]
    else:
        kept = [r for r in rows if expected[r[0].number] <= share * goal.max_drop]
    return sorted(kept, key=_order)


def _incumbent(
    rows: Sequence[Row], expected: Mapping[int, float], goal: Goal, uniforms: int
) -> Row | None:
    plain = [r for r in rows if r[0].number < uniforms]
    feasible = sorted((r for r in plain if r[1]["feasible"]), key=_order)
    return next(iter([*_within(plain, expected, goal), *feasible]), None)

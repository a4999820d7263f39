"""Small changes of one site's recipe: what a search tries beside the solutions of its knapsack."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.space import SiteSpace


def inherit(recipe: SiteRecipe, known: SiteRecipe) -> SiteRecipe:
    """Return ``known`` where its weight is as wide, else the new weight with its activation."""
    if recipe.weight is None or known.weight is None:
        return recipe
    if recipe.weight.bits == known.weight.bits:
        return known
    return replace(recipe, activation=known.activation)


def mutate(recipe: SiteRecipe, space: SiteSpace, rng: np.random.Generator) -> SiteRecipe:
    """Return ``recipe`` with one dimension other than the bits drawn anew, where there is another.

    A learning rate is drawn as likely as two values of another dimension.
    """
    c = space.choices
    moves: list[SiteRecipe] = []
    if recipe.weight is not None:
        for field in ("granularity", "scheme", "calibration"):
            moves += [
                replace(recipe, weight=replace(recipe.weight, **{field: value}))
                for value in c[f"weight_{field}"]
            ]
    if recipe.activation is not None:
        for field in ("granularity", "scheme", "calibration"):
            moves += [
                replace(recipe, activation=replace(recipe.activation, **{field: value}))
                for value in c[f"activation_{field}"]
            ]
    rate = space.learning_rate
    if rate is not None and recipe.weight is not None:
        drawn = float(np.exp(rng.uniform(np.log(rate.low), np.log(rate.high))))
        moves += [replace(recipe, learning_rate=min(max(drawn, rate.low), rate.high))] * 2
        if rate.optional:
            moves.append(replace(recipe, learning_rate=None))
    others = [m for m in (_offered(move.canonical(), space) for move in moves) if m != recipe]
    return others[int(rng.integers(len(others)))] if others else recipe


def _offered(recipe: SiteRecipe, space: SiteSpace) -> SiteRecipe:
    """Return ``recipe`` with a calibration that the space has, where it just became static."""
    a, offered = recipe.activation, space.choices["activation_calibration"]
    if a is None or a.dynamic or a.calibration in offered:
        return recipe
    return replace(recipe, activation=replace(a, calibration=offered[0]))

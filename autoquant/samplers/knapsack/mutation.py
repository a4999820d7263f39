"""Small changes of one site's recipe: what a search tries beside the solutions of its knapsack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.space import SiteSpace
from autoquant.spec.techniques import Axis


def inherit(recipe: SiteRecipe, known: SiteRecipe) -> SiteRecipe:
    """Return ``known`` where its weight is as wide, else the new weight with its activation."""
    if recipe.weight is None or known.weight is None:
        return recipe
    if recipe.weight.bits == known.weight.bits:
        return known
    return replace(recipe, activation=known.activation)


def mutate(recipe: SiteRecipe, space: SiteSpace, rng: np.random.Generator) -> SiteRecipe:
    """Return ``recipe`` with one dimension other than the bits drawn anew, where there is another.

    A technique with an option that is open is drawn as likely as two values of another dimension.
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
    if recipe.weight is not None:
        for offer in c["rounding"]:
            rounding = offer.of({axis.name: _draw(axis, rng) for axis in offer.axes})
            moved = replace(recipe, weight=replace(recipe.weight, rounding=rounding))
            moves += [moved] * (2 if offer.axes else 1)
        for offer in c["correction"]:
            correction = offer.of({axis.name: _draw(axis, rng) for axis in offer.axes})
            moves += [replace(recipe, correction=correction)] * (2 if offer.axes else 1)
    others = [m for m in (_offered(move.canonical(), space) for move in moves) if m != recipe]
    return others[int(rng.integers(len(others)))] if others else recipe


def _draw(axis: Axis, rng: np.random.Generator) -> Any:
    """Return a value of an open option."""
    if axis.choices:
        return axis.choices[int(rng.integers(len(axis.choices)))]
    if not axis.log:
        return float(rng.uniform(axis.low, axis.high))
    drawn = float(np.exp(rng.uniform(np.log(axis.low), np.log(axis.high))))
    return min(max(drawn, axis.low), axis.high)


def rounded_as(recipe: SiteRecipe, known: SiteRecipe) -> SiteRecipe:
    """Return ``recipe`` with its weight rounded as that of ``known``, where both have one."""
    if recipe.weight is None or known.weight is None:
        return recipe
    return replace(recipe, weight=replace(recipe.weight, rounding=known.weight.rounding))


def _offered(recipe: SiteRecipe, space: SiteSpace) -> SiteRecipe:
    """Return ``recipe`` with a calibration that the space has, where it just became static."""
    a, offered = recipe.activation, space.choices["activation_calibration"]
    if a is None or a.dynamic or a.calibration in offered:
        return recipe
    return replace(recipe, activation=replace(a, calibration=offered[0]))

"""Speed classes: the choices of a layer that run the same code, so that one is timed for all.

What decides is the widths, the granularities, and whether there are zero points. Calibration and
learning change the numbers and never the code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from autoquant.spec.formats import FLOAT_BITS
from autoquant.spec.granularity import divides
from autoquant.spec.recipe import FLOAT_SITE, ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import SiteSpace

FLOAT = "float"
MOST_PAIRS = 48
"""Most pairs of weight and activation that are timed one by one; see ``pairs``."""

Pair = tuple[WeightScheme | None, ActivationScheme | None]


def speed_class(recipe: SiteRecipe) -> str:
    """Return the speed class of a choice, as text that a table is keyed by."""
    w, a = recipe.weight, recipe.activation
    parts = []
    if w is not None:
        parts.append(f"w{w.bits} {w.granularity} {w.scheme}")
    if a is not None:
        parts.append(f"a{a.bits} {a.granularity} {a.scheme}")
    return ", ".join(parts) or FLOAT


def weights_of(space: SiteSpace) -> list[WeightScheme | None]:
    """Return one weight scheme for each speed of a site, float (None) among them where offered."""
    if space.fixed is not None:
        return [space.fixed.weight]
    c = space.choices
    quantized = (b for b in c["weight_bits"] if b != FLOAT_BITS)
    rows = itertools.product(quantized, c["weight_granularity"], c["weight_scheme"])
    found: list[WeightScheme | None] = [WeightScheme(*row) for row in rows]
    return [*found, None] if FLOAT_BITS in c["weight_bits"] else found


def activations_of(space: SiteSpace) -> list[ActivationScheme | None]:
    """Return one activation scheme for each speed of a site, None where float is offered."""
    if space.fixed is not None:
        a = space.fixed.activation
        return [None if a is None else a.uncalibrated()]
    c = space.choices
    quantized = (b for b in c["activation_bits"] if b != FLOAT_BITS)
    rows = itertools.product(quantized, c["activation_granularity"], c["activation_scheme"])
    found: list[ActivationScheme | None] = [ActivationScheme(*row) for row in rows]
    return [*found, None] if FLOAT_BITS in c["activation_bits"] else found


def choices_of(space: SiteSpace, activation: bool, matrix: tuple[int, int]) -> list[SiteRecipe]:
    """Return one recipe for each speed class that a site may take."""
    weights = [w for w in weights_of(space) if w is None or divides(w.granularity, matrix)]
    activations = activations_of(space) if activation else [None]
    return [SiteRecipe(w, a).canonical() for w, a in itertools.product(weights, activations)]


def pairs(
    weights: Iterable[WeightScheme | None], activations: Iterable[ActivationScheme | None]
) -> list[SiteRecipe]:
    """Return the recipes to time: all pairs or, where they are many, a cross through them.

    The cross holds every weight with a float activation and with the first quantized one, and
    every activation with the first weight; ``seconds_of`` gives the rest.
    """
    ws, activation_list = list(dict.fromkeys(weights)), list(dict.fromkeys(activations))
    everything = [SiteRecipe(w, a).canonical() for w in ws for a in activation_list]
    if len(everything) > MOST_PAIRS:
        first_w = next((w for w in ws if w is not None), None)
        first_a = next((a for a in activation_list if a is not None), None)
        everything = [
            r
            for r in everything
            if r.weight in (None, first_w)
            or r.activation is None
            or r.activation == SiteRecipe(None, first_a).canonical().activation
        ]
    return list(dict.fromkeys([FLOAT_SITE, *everything]))


def adapted(recipe: SiteRecipe, matrix: tuple[int, int]) -> SiteRecipe:
    """Return ``recipe`` as a site with a weight ``matrix`` can take it: groups must divide."""
    w = recipe.weight
    if w is None or divides(w.granularity, matrix):
        return recipe
    return replace(recipe, weight=replace(w, granularity="per_channel"))


def seconds_of(times: dict[str, float], recipe: SiteRecipe) -> float:
    """Return the time of a choice from a table: speed class → seconds.

    What a cross left out is the weight's time and the activation's, less what both share; what
    was not timed at all is taken to be as slow as the slowest.
    """
    known = times.get(speed_class(recipe))
    if known is not None:
        return known
    w, a = recipe.weight, recipe.activation
    slowest = max(times.values())
    if w is None or a is None:
        return slowest
    weight_part = speed_class(SiteRecipe(w, None))
    activation_part = speed_class(SiteRecipe(None, a))
    rows = [k for k in times if k.startswith(weight_part + ", ")]
    columns = [k for k in times if k.endswith(", " + activation_part)]
    for row, column in itertools.product(rows, columns):
        corner = f"{column.split(', ')[0]}, {row.split(', ')[1]}"
        if corner in times:
            return max(times[row] + times[column] - times[corner], min(times.values()))
    return slowest

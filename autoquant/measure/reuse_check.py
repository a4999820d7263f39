"""Whether a model may have its results reused: found out by trying, before the search relies on it.

Three recipes are run on one batch as they are: float, the first layer changed, the last layer
changed. Then again with reuse, one after the other, so that whatever the model keeps between calls
is another recipe's by then. Every output must be the same, bit for bit. Where calls are known by
their arguments, one run makes each of them twice, to see whether the arguments say all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autoquant.errors import OutOfMemory, TrialError
from autoquant.measure.outputs import as_words
from autoquant.measure.reuse import Reuse
from autoquant.methods.applier import Applier
from autoquant.nn.leaves import frozen, leaves
from autoquant.spec.recipe import SiteRecipe, WeightScheme

CHANGED = SiteRecipe(WeightScheme(4))
"""What a changed layer is given: coarse enough to be seen in the outputs."""
ORDER = (0, 1, 0, 2, 1)
"""Recipes run with reuse: everything new, all changed, all known, the end changed, all known."""


def check(
    reuse: Reuse,
    applier: Applier,
    run: Callable[[], Any],
    key: Hashable,
    *,
    by_content: bool = False,
) -> bool:
    """Switch ``reuse`` off, saying why, where ``run`` gives other outputs with it.

    Return whether it is on. ``run`` runs the model on the data that ``key`` names; a recipe under
    which it raises TrialError is left out. Leaves the model in float. Raises TrialError where the
    float model fails.
    """
    if not reuse.on:
        return False
    sites = [site.name for site in applier.prepared.sites]
    recipes: list[Mapping[str, SiteRecipe]] = [{}, {sites[0]: CHANGED}, {sites[-1]: CHANGED}]
    random = _random_states(applier)
    try:
        expected = _expected(reuse, applier, recipes, run)
        drawn = not same_bits(random, _random_states(applier))
        reuse.watching = True
        for turn, i in enumerate(ORDER):
            if i not in expected:
                continue
            reuse.repeating = not turn
            applier.apply(recipes[i])
            with reuse.batch(key, by_content=by_content):
                found = run()
            if reuse.on and not same_bits(found, expected[i]):
                why = "draws random numbers" if drawn else "keeps something between calls"
                reuse.switch_off(f"the model {why}")
            if not reuse.on:
                break
    finally:
        reuse.watching = reuse.repeating = False
        applier.to_float()
    return reuse.on


def _random_states(applier: Applier) -> list[Tensor]:
    """Return the states of the generators that a model draws from: its device's, and the CPU's."""
    device = next(iter(applier.prepared.slots.values())).parameter.device
    there = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *there]


def _expected(
    reuse: Reuse,
    applier: Applier,
    recipes: Sequence[Mapping[str, SiteRecipe]],
    run: Callable[[], Any],
) -> dict[int, Any]:
    """Return what ``run`` gives without reuse under each of ``recipes`` that does not fail."""
    expected = {}
    for i, recipe in enumerate(recipes):
        try:
            applier.apply(recipe)
            with reuse.paused():
                expected[i] = [x for _, x in frozen(run())]
        except OutOfMemory:
            raise
        except TrialError:
            if not recipe:
                raise
    if len(expected) < 2:
        reuse.switch_off("no recipe but float could be tried")
    return expected


def same_bits(a: Any, b: Any) -> bool:
    """Return whether two outputs hold the same, bit for bit, NaN included."""
    ours, theirs = leaves(a), leaves(b)
    return len(ours) == len(theirs) and all(
        _same(x, y) for (_, x), (_, y) in zip(ours, theirs, strict=True)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        return torch.equal(as_words(a), as_words(b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and bool(a == b)

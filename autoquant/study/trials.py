"""Reading the trials of a study: measurements, the best one, the front, and their recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from autoquant.spec.costs import LatencyEvidence, average_bits
from autoquant.spec.recipe import FLOAT_SITE, Evidence, Recipe, SiteRecipe, SplitResult
from autoquant.study.header import Header
from autoquant.study.ledger import MEASURED

SCALES = "scales"
"""User attribute of a trial: site → [scale, zero point] of its static activation quantizer."""

FRONT = "front"
"""Field that a study notes: the front that it foretells, recipes that were not measured."""
RECIPE = "recipe"
"""Field that a study notes: the text of the recipe that it found, and its trial's number."""


def scales(sites: Mapping[str, SiteRecipe]) -> dict[str, list[float]]:
    """Return the calibrated numbers of ``sites``, as a trial keeps them."""
    found = {}
    for name, site in sites.items():
        if site.activation is not None and site.activation.scale is not None:
            found[name] = [site.activation.scale, site.activation.zero_point or 0]
    return found


def with_scales(
    sites: Mapping[str, SiteRecipe], numbers: Mapping[str, Sequence[float]]
) -> dict[str, SiteRecipe]:
    """Return ``sites`` with the calibrated numbers that a trial kept."""
    done = dict(sites)
    for name, (scale, zero_point) in numbers.items():
        activation = done[name].activation
        if activation is not None:
            static = replace(activation, scale=scale, zero_point=int(zero_point))
            done[name] = replace(done[name], activation=static)
    return done


def trial_recipe(trial: FrozenTrial, sites: Mapping[str, SiteRecipe], header: Header) -> Recipe:
    """Return a trial as a recipe, with what the search measured of it; not confirmed."""
    m = measured(trial)
    assert m is not None
    base = header.baseline
    result = SplitResult(base.samples, base.value, m["value"], m["drop"])
    evidence = Evidence(
        base.metric,
        base.higher_is_better,
        result,
        None,
        m["average_weight_bits"],
        m["size_bytes"],
        base.size_bytes,
        _latency(m, header),
        m.get("bit_operations"),
        header.costs.get("float_bit_operations"),
        layer_weight_bits=_layer_bits(sites, header, m["average_weight_bits"]),
    )
    calibrated = with_scales(sites, trial.user_attrs.get(SCALES, {}))
    options = header.options
    return Recipe(
        calibrated,
        header.model,
        evidence,
        header.folded,
        options.seed,
        transforms=header.transforms,
        rest=options.rest,
    )


def _layer_bits(sites: Mapping[str, SiteRecipe], header: Header, average: float) -> float | None:
    """Return the average width in the layers alone, None where all weights have ``average``."""
    widths = [
        (math.prod(site.matrix), sites.get(site.name, FLOAT_SITE).weight_bits)
        for site in header.sites
    ]
    found = average_bits(widths, 0)
    return None if math.isclose(found, average) else found


def _latency(m: Mapping[str, Any], header: Header) -> LatencyEvidence | None:
    """Return what a trial predicted of its latency, None where its study did not ask."""
    table = header.costs.get("latency")
    if table is None or m.get("latency") is None:
        return None
    return LatencyEvidence(
        m["latency"], None, table["float_seconds"], table["samples"], table["device"]
    )


def measured(trial: FrozenTrial) -> dict[str, Any] | None:
    """Return the measurement of a complete trial, or None."""
    if trial.state != TrialState.COMPLETE:
        return None
    found = trial.user_attrs.get(MEASURED)
    return found if isinstance(found, dict) else None


def better(a: FrozenTrial, b: FrozenTrial | None) -> bool:
    """Return whether ``a`` is a complete, feasible trial with a smaller objective than ``b``."""
    ours = measured(a)
    if ours is None or not ours["feasible"]:
        return False
    theirs = None if b is None else measured(b)
    return theirs is None or ours["objective"] < theirs["objective"]


def best_trial(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Return the feasible trial with the smallest objective, the earlier one of equals."""
    best = None
    for trial in trials:
        if better(trial, best):
            best = trial
    return best


def front(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that no other one beats in both size and drop, smallest first."""
    rows = [(t, m) for t in trials if (m := measured(t)) is not None]
    rows.sort(key=lambda row: (row[1]["size_bytes"], row[1]["drop"], row[1]["loss"]))
    kept: list[FrozenTrial] = []
    lowest = float("inf")
    for trial, m in rows:
        if m["drop"] < lowest:
            kept.append(trial)
            lowest = m["drop"]
    return kept

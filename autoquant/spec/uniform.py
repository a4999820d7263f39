"""Uniform recipes: every layer the same, as far as its space allows.

They are the first trials of every study, so that its answer is never worse than the best of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from autoquant.spec.formats import FLOAT_BITS
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import SiteSpace

Sites = dict[str, SiteRecipe]

Choice = tuple[str, str]
"""A dimension, and its choice for all sites that offer it."""

GLOBAL = ("activation_calibration", "activation_scheme", "activation_granularity")
"""What the whole model is tried with before layers are told apart: it costs least and matters most.
BERT-large on SQuAD has an F1 of 85.9 calibrated by max, 90.2 by the 99.999th percentile and 37.4 by
entropy (Wu et al. 2020, arXiv 2004.09602). Where a range is best cut, as that of GELU's outputs is
there, the profile finds out site by site."""


def uniform(spaces: Mapping[str, SiteSpace], bits: int, choice: Choice | None = None) -> Sites:
    """Return the recipe that gives each site ``bits``-bit weights, or the next width it may take.

    Every other dimension takes its first choice, but for ``choice``; activations have 8 bits or the
    nearest width below.
    """
    return {name: _site(space, bits, choice) for name, space in spaces.items()}


def _site(space: SiteSpace, bits: int, choice: Choice | None) -> SiteRecipe:
    if space.fixed is not None:
        return space.fixed.canonical()
    c = space.choices
    wide = [b for b in c["weight_bits"] if b >= bits]
    chosen = min(wide) if wide else max(c["weight_bits"])
    weight = None
    if chosen != FLOAT_BITS:
        weight = WeightScheme(
            chosen,
            c["weight_granularity"][0],
            c["weight_scheme"][0],
            c["weight_calibration"][0],
            c["rounding"][0].technique,
        )
    activation = None
    quantized = [b for b in c["activation_bits"] if b != FLOAT_BITS]
    if quantized and (weight is not None or FLOAT_BITS not in c["activation_bits"]):
        taken = {name: c[name][0] for name in GLOBAL}
        if choice is not None and choice[1] in c[choice[0]]:
            taken[choice[0]] = choice[1]
        activation = ActivationScheme(
            max(quantized),
            taken["activation_granularity"],
            taken["activation_scheme"],
            taken["activation_calibration"],
        )
    return SiteRecipe(weight, activation, c["correction"][0].technique).canonical()


def widths(spaces: Mapping[str, SiteSpace]) -> list[int]:
    """Return every quantized weight width on offer, widest first."""
    found: set[int] = set()
    for space in spaces.values():
        if space.fixed is None:
            found.update(b for b in space.choices["weight_bits"] if b != FLOAT_BITS)
    return sorted(found, reverse=True)


def choices(spaces: Mapping[str, SiteSpace]) -> list[Choice]:
    """Return every choice on offer for all activations, in the order of the space."""
    found: dict[Choice, None] = {}
    for name in GLOBAL:
        for space in spaces.values():
            if space.fixed is None and min(space.choices["activation_bits"]) != FLOAT_BITS:
                found |= dict.fromkeys((name, value) for value in space.choices[name])
    return list(found)


def baselines(spaces: Mapping[str, SiteSpace]) -> Iterator[Sites]:
    """Yield the uniform recipes in the order they are tried, each once.

    First the widest weights under each choice for all activations, one at a time, then narrower
    ones under the first of each.
    """
    seen = []
    wide = widths(spaces)
    for choice in choices(spaces) or [None]:  # type: ignore[list-item]
        for bits in wide[:1] or [FLOAT_BITS]:
            recipe = uniform(spaces, bits, choice)
            if recipe not in seen:
                seen.append(recipe)
                yield recipe
    for bits in wide[1:]:
        recipe = uniform(spaces, bits)
        if recipe not in seen:
            seen.append(recipe)
            yield recipe

"""Uniform recipes: every layer the same, as far as its space allows.

They are the first trials of every study, so that its answer is never worse than the best of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from autoquant.spec.formats import FLOAT_BITS
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import SiteSpace

Sites = dict[str, SiteRecipe]


def uniform(spaces: Mapping[str, SiteSpace], bits: int, calibration: str | None = None) -> Sites:
    """Return the recipe that gives each site ``bits``-bit weights, or the next width it may take.

    Every other dimension takes its first choice, and ``calibration``, where a site offers it, is
    that of its activation, at 8 bits or the nearest width below.
    """
    return {name: _site(space, bits, calibration) for name, space in spaces.items()}


def _site(space: SiteSpace, bits: int, calibration: str | None) -> SiteRecipe:
    if space.fixed is not None:
        return space.fixed.canonical()
    c = space.choices
    wide = [b for b in c["weight_bits"] if b >= bits]
    chosen = min(wide) if wide else max(c["weight_bits"])
    weight = None
    if chosen != FLOAT_BITS:
        first = (c["weight_granularity"][0], c["weight_scheme"][0], c["weight_calibration"][0])
        weight = WeightScheme(chosen, *first)
    activation = None
    quantized = [b for b in c["activation_bits"] if b != FLOAT_BITS]
    if quantized and (weight is not None or FLOAT_BITS not in c["activation_bits"]):
        names = c["activation_calibration"]
        method = calibration if calibration in names else names[0]
        first = (c["activation_granularity"][0], c["activation_scheme"][0], method)
        activation = ActivationScheme(max(quantized), *first)
    rate = space.learning_rate
    learned = rate.low if rate is not None and not rate.optional else None
    return SiteRecipe(weight, activation, learned, c["bias_correction"][0]).canonical()


def widths(spaces: Mapping[str, SiteSpace]) -> list[int]:
    """Return every quantized weight width on offer, widest first."""
    found: set[int] = set()
    for space in spaces.values():
        if space.fixed is None:
            found.update(b for b in space.choices["weight_bits"] if b != FLOAT_BITS)
    return sorted(found, reverse=True)


def calibrations(spaces: Mapping[str, SiteSpace]) -> list[str]:
    """Return every activation calibration on offer, in the order of the space."""
    found: dict[str, None] = {}
    for space in spaces.values():
        if space.fixed is None and min(space.choices["activation_bits"]) != FLOAT_BITS:
            found |= dict.fromkeys(space.choices["activation_calibration"])
    return list(found)


def baselines(spaces: Mapping[str, SiteSpace]) -> Iterator[Sites]:
    """Yield the uniform recipes in the order they are tried, each once.

    First the widest weights under each activation calibration, then narrower ones under the first.
    """
    seen = []
    wide = widths(spaces)
    for method in calibrations(spaces) or [None]:  # type: ignore[list-item]
        for bits in wide[:1] or [FLOAT_BITS]:
            recipe = uniform(spaces, bits, method)
            if recipe not in seen:
                seen.append(recipe)
                yield recipe
    for bits in wide[1:]:
        recipe = uniform(spaces, bits)
        if recipe not in seen:
            seen.append(recipe)
            yield recipe

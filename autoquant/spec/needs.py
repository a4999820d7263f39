"""What a choice needs to know of a layer's input: declared here, collected by calibration.

Whoever adds a choice says what it needs; calibration collects the union over a search space and
keeps it as long as any choice may ask for it. What is missing raises: no choice does without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autoquant.spec.need import Need
from autoquant.spec.recipe import SiteRecipe

EVERYTHING = frozenset(Need)


def output_error_need(corrected: bool) -> Need:
    """Return the output error that counts; where the bias is corrected, that about the mean."""
    return Need.CENTERED_OUTPUT_ERROR if corrected else Need.OUTPUT_ERROR


WEIGHT_NEEDS: Mapping[str, Callable[[bool], Need]] = {"output_mse": output_error_need}
"""Calibrations of weights that need the input: what, by whether the bias is corrected."""


def needs_of(recipe: SiteRecipe) -> frozenset[Need]:
    """Return what has to be known of a layer's input to quantize the layer by ``recipe``."""
    found: set[Need] = set()
    activation, weight = recipe.activation, recipe.weight
    if activation is not None and not activation.dynamic and activation.scale is None:
        found.add(Need.RANGE)
    if weight is not None and not recipe.learned:
        if weight.calibration in WEIGHT_NEEDS:
            found.add(WEIGHT_NEEDS[weight.calibration](recipe.correction.centers))
        found |= weight.rounding.needs | recipe.correction.needs
    return frozenset(found)

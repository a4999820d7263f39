"""Recipes ↔ Optuna parameters: every dimension of every layer that has a choice is a parameter.

Bit widths are ordered integers, so that samplers can use their order: the width itself where the
choices are evenly spaced (``layer.weight_bits``), otherwise the rank of the width among them,
smallest first (``layer.weight_bits_rank``). A dimension with one choice is no parameter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from autoquant.errors import StudyError
from autoquant.spec.formats import FLOAT_BITS
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import TECHNIQUES, SiteSpace
from autoquant.spec.techniques import Axis, Offer, Technique

Spaces = Mapping[str, SiteSpace]
Params = dict[str, Any]

_WEIGHT = ("weight_bits", "weight_granularity", "weight_scheme", "weight_calibration")
_ACTIVATION = (
    "activation_bits",
    "activation_granularity",
    "activation_scheme",
    "activation_calibration",
)


MOST_DECODED = 4096
"""Recipes of one site that are kept, so that the same parameters are not decoded again."""
MOST_OF_A_SITE = 4096
"""Combinations of one site's choices up to which those that differ are counted."""


def _choices(distribution: BaseDistribution) -> int:
    """Return how many values a distribution over a finite set has."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, IntDistribution)
    return (distribution.high - distribution.low) // distribution.step + 1


def _values(distribution: BaseDistribution) -> Sequence[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, IntDistribution)
    return range(distribution.low, distribution.high + 1, distribution.step)


class ParameterMap:
    """The parameters of one resolved search space, and both ways between them and recipes."""

    def __init__(self, spaces: Spaces) -> None:
        self.spaces = spaces
        self.distributions: dict[str, BaseDistribution] = {}
        self._codes: dict[str, dict[str, tuple[str, tuple[Any, ...]]]] = {}
        self._names: dict[str, list[str]] = {site: [] for site in spaces}
        self._decoded: dict[str, dict[tuple[Any, ...], SiteRecipe]] = {site: {} for site in spaces}
        for site, space in spaces.items():
            self._codes[site] = {}
            if space.fixed is not None:
                continue
            known = len(self.distributions)
            for dimension, choices in space.choices.items():
                if dimension in TECHNIQUES:
                    self._techniques(site, dimension, choices)
                elif len(choices) > 1:
                    self._add(site, dimension, choices)
            self._names[site] = list(self.distributions)[known:]

    def recipes(self, most: int) -> list[dict[str, SiteRecipe]] | None:
        """Return every recipe of the space, each once; None where there are more than ``most``."""
        if any(isinstance(d, FloatDistribution) for d in self.distributions.values()):
            return None
        own: dict[str, list[SiteRecipe]] = {}
        count = 1
        for site in self.spaces:
            mine = {name: self.distributions[name] for name in self._names[site]}
            if math.prod(map(_choices, mine.values())) > MOST_OF_A_SITE:
                return None
            values = itertools.product(*(_values(d) for d in mine.values()))
            found = [self._decode(site, dict(zip(mine, v, strict=True))) for v in values]
            own[site] = list(dict.fromkeys(found))
            count *= len(own[site])
            if count > most:
                return None
        return [dict(zip(own, row, strict=True)) for row in itertools.product(*own.values())]

    def _add(self, site: str, dimension: str, choices: tuple[Any, ...]) -> None:
        if not dimension.endswith("_bits"):
            self._categorical(site, dimension, choices)
            return
        order = tuple(sorted(choices))
        steps = {b - a for a, b in itertools.pairwise(order)}
        if len(steps) == 1:
            name = f"{site}.{dimension}"
            self.distributions[name] = IntDistribution(order[0], order[-1], step=steps.pop())
            self._codes[site][dimension] = (name, ())
        else:
            name = f"{site}.{dimension}_rank"
            self.distributions[name] = IntDistribution(0, len(order) - 1)
            self._codes[site][dimension] = (name, order)

    def _techniques(self, site: str, dimension: str, offers: tuple[Offer, ...]) -> None:
        """Make a parameter of which technique it is, and one of each option that is open."""
        if len(offers) > 1:
            self._categorical(site, dimension, tuple(offer.label for offer in offers))
        for offer in offers:
            for axis in offer.axes:
                name = _axis_name(site, dimension, offer, axis)
                if axis.choices:
                    self.distributions[name] = CategoricalDistribution(axis.choices)
                else:
                    self.distributions[name] = FloatDistribution(axis.low, axis.high, log=axis.log)

    def _categorical(self, site: str, dimension: str, choices: tuple[Any, ...]) -> None:
        name = f"{site}.{dimension}"
        self.distributions[name] = CategoricalDistribution(choices)
        self._codes[site][dimension] = (name, ())

    def decode(self, params: Mapping[str, Any]) -> dict[str, SiteRecipe]:
        """Return the recipe of each site, canonical, that ``params`` stand for.

        Raises StudyError where a parameter is missing: the study is of another space.
        """
        try:
            return {site: self._decode(site, params) for site in self.spaces}
        except KeyError as error:
            raise StudyError(f"the study's trials have no parameter {error}") from None

    def _decode(self, site: str, params: Mapping[str, Any]) -> SiteRecipe:
        """Return one site's recipe; what was decoded before is not made again."""
        key = tuple([params[name] for name in self._names[site]])
        known = self._decoded[site]
        found = known.get(key)
        if found is None:
            if len(known) >= MOST_DECODED:
                known.clear()
            found = known[key] = self._make(site, params)
        return found

    def _make(self, site: str, params: Mapping[str, Any]) -> SiteRecipe:
        space = self.spaces[site]
        if space.fixed is not None:
            return space.fixed.canonical()
        value = {d: self._value(site, d, params) for d in space.choices if d not in TECHNIQUES}
        weight = activation = None
        if value["weight_bits"] != FLOAT_BITS:
            rounding = self._technique(site, "rounding", params)
            weight = WeightScheme(*[value[d] for d in _WEIGHT], rounding)  # type: ignore[call-arg]
        if value["activation_bits"] != FLOAT_BITS:
            activation = ActivationScheme(*(value[d] for d in _ACTIVATION))
        correction = self._technique(site, "correction", params)
        return SiteRecipe(weight, activation, correction).canonical()

    def _technique(self, site: str, dimension: str, params: Mapping[str, Any]) -> Any:
        offers: tuple[Offer, ...] = self.spaces[site].choices[dimension]
        offer = offers[0]
        if len(offers) > 1:
            label = params[f"{site}.{dimension}"]
            offer = next(offer for offer in offers if offer.label == label)
        names = {axis.name: _axis_name(site, dimension, offer, axis) for axis in offer.axes}
        return offer.of({axis: params[name] for axis, name in names.items()})

    def _value(self, site: str, dimension: str, params: Mapping[str, Any]) -> Any:
        code = self._codes[site].get(dimension)
        if code is None:
            return self.spaces[site].choices[dimension][0]
        name, order = code
        return order[params[name]] if order else params[name]

    def encode(self, sites: Mapping[str, SiteRecipe]) -> Params:
        """Return the parameters of a recipe; dimensions without effect get their first choice.

        Raises StudyError where the recipe takes a choice that the space does not offer.
        """
        params: Params = {}
        for site, space in self.spaces.items():
            if space.fixed is None:
                self._encode(site, space, sites[site].canonical(), params)
        return params

    def _encode(self, site: str, space: SiteSpace, recipe: SiteRecipe, params: Params) -> None:
        values: dict[str, Any] = {"weight_bits": FLOAT_BITS, "activation_bits": FLOAT_BITS}
        w, a = recipe.weight, recipe.activation
        if w is not None:
            chosen = (w.bits, w.granularity, w.scheme, w.calibration)
            values |= dict(zip(_WEIGHT, chosen, strict=True))
        if a is not None:
            calibration: str | None = a.calibration
            if a.dynamic and calibration not in space.choices["activation_calibration"]:
                calibration = None
            values |= dict(
                zip(_ACTIVATION, (a.bits, a.granularity, a.scheme, calibration), strict=True)
            )
        if recipe.learned:
            raise StudyError(f"{site}: it was learned with other layers, which no space offers")
        own: dict[str, Technique | None] = {"rounding": None, "correction": None}
        if w is not None:
            own = {"rounding": w.rounding, "correction": recipe.correction}
        for dimension, technique in own.items():
            self._encode_technique(site, dimension, technique, params)
        for dimension, choices in space.choices.items():
            if dimension in TECHNIQUES:
                continue
            value = values.get(dimension)
            value = choices[0] if value is None else value
            if value not in choices:
                raise StudyError(f"{site}: {dimension}: {value} is not in the search space")
            code = self._codes[site].get(dimension)
            if code is not None:
                name, order = code
                params[name] = order.index(value) if order else value

    def _encode_technique(
        self, site: str, dimension: str, technique: Technique | None, params: Params
    ) -> None:
        """Add the parameters of a technique; None is what has no effect."""
        offers: tuple[Offer, ...] = self.spaces[site].choices[dimension]
        chosen, values = offers[0], None
        if technique is not None:
            for offer in offers:
                values = offer.values(technique)
                if values is not None:
                    chosen = offer
                    break
            else:
                raise StudyError(f"{site}: {dimension}: {technique} is not in the search space")
        if len(offers) > 1:
            params[f"{site}.{dimension}"] = chosen.label
        for offer in offers:
            for axis in offer.axes:
                own = values if offer is chosen and values is not None else {}
                name = _axis_name(site, dimension, offer, axis)
                params[name] = own.get(axis.name, axis.middle)


def _axis_name(site: str, dimension: str, offer: Offer, axis: Axis) -> str:
    return f"{site}.{dimension}.{offer.label}.{axis.name}"

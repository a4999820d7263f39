"""The damage that each choice does at its own site, from the statistics alone.

Damage is the noise that quantization adds to a site's output, as a fraction of the output's power:
tr(ΔW·G·ΔWᵀ) / tr(W·G·Wᵀ) for the weight, with G the second moments of its input, and
ε²·‖W‖² / tr(W·G·Wᵀ) for the activation, with ε² its mean squared rounding error. No forward pass
is needed. How much each site's noise matters to the whole model is what the sampler learns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoquant.measure.size import weight_bytes
from autoquant.methods.rounding import output_error
from autoquant.nn.calibrate import SiteStatistics
from autoquant.nn.convert import Prepared
from autoquant.nn.sites import Site
from autoquant.nn.weights import quantize_weight
from autoquant.observers import activation_range, quantization_error, token_error
from autoquant.spec.formats import FLOAT_BITS
from autoquant.spec.granularity import divides
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import SiteSpace

ROWS = 64
"""Output channels, evenly spread, on which the damage of a weight choice is measured."""
QUANTIZED_ACTIVATION = 8
"""Activation width that a profile prefers: narrower ones save nothing that is counted as size."""


@dataclass(frozen=True)
class Option:
    """One choice of one site: its recipe, damage, width in bits and size in bytes."""

    recipe: SiteRecipe
    damage: float
    bits: int
    bytes: int


@dataclass(frozen=True)
class Profile:
    """The options of every site, and the damage of each half of a recipe."""

    options: Mapping[str, tuple[Option, ...]]
    weight_damage: Mapping[str, Mapping[WeightScheme, float]]
    activation_damage: Mapping[str, Mapping[ActivationScheme, float]]
    numel: Mapping[str, int]

    def damage(self, name: str, recipe: SiteRecipe) -> float:
        """Return the damage of ``recipe`` at site ``name``; 0 for what stays in float."""
        total = 0.0
        if recipe.weight is not None:
            total += _nearest(self.weight_damage[name], recipe.weight)
        if recipe.activation is not None:
            total += _nearest(self.activation_damage[name], recipe.activation.uncalibrated())
        return total


def _nearest(
    table: Mapping[WeightScheme, float] | Mapping[ActivationScheme, float], key: object
) -> float:
    """Return the entry of ``key``, or the least one of its width where it has none."""
    if key in table:
        return table[key]  # type: ignore[index]
    same = [v for k, v in table.items() if k.bits == key.bits]  # type: ignore[attr-defined]
    return min(same, default=0.0)


def profile(
    prepared: Prepared,
    statistics: Mapping[str, SiteStatistics],
    spaces: Mapping[str, SiteSpace],
    progress: Callable[[str], None] = lambda _: None,
    *,
    speeds: bool = False,
) -> Profile:
    """Return the profile of every site over the choices of its space.

    ``speeds`` makes an option of every choice of activation, too, that may be faster or slower
    than another; without it an option has the one of least damage.
    """
    options, weights, activations = {}, {}, {}
    for site in prepared.sites:
        progress(site.name)
        space = spaces[site.name]
        parameter = prepared.slots[site.name].parameter
        known = statistics.get(site.name, SiteStatistics(None, None))
        part, sample = _sample(parameter.detach(), site, known.moments)
        matrix = sample.movedim(part.channel_axis, 0).flatten(1).float()
        signal = max(float(output_error(matrix, known.moments, part.groups)), 1e-30)
        weights[site.name] = {
            scheme: _weight_damage(sample, part, scheme, known.moments, matrix, signal)
            for scheme in weight_schemes(site, space)
        }
        power = float(matrix.square().sum()) / signal
        activations[site.name] = {
            scheme: activation_error(known, scheme) * power
            for scheme in activation_schemes(space)
            if known.inputs is not None
        }
        made = _options(site, space, weights[site.name], activations[site.name], speeds)
        floats = site.numel * parameter.element_size()
        options[site.name] = tuple(
            replace(o, bytes=floats) if o.recipe.weight is None else o for o in made
        )
    numel = {site.name: site.numel for site in prepared.sites}
    return Profile(options, weights, activations, numel)


def _sample(weight: Tensor, site: Site, moments: Tensor | None) -> tuple[Site, Tensor]:
    """Return evenly spread output channels of a wide weight: enough to measure an average."""
    channels = site.shape[site.channel_axis]
    if site.groups > 1 or channels <= ROWS:
        return site, weight
    rows = torch.arange(ROWS, device=weight.device) * channels // ROWS
    part = weight.index_select(site.channel_axis, rows)
    return replace(site, shape=tuple(part.shape)), part


def _weight_damage(
    weight: Tensor,
    site: Site,
    scheme: WeightScheme,
    moments: Tensor | None,
    matrix: Tensor,
    signal: float,
) -> float:
    delta = quantize_weight(weight, site, scheme).matrix() - matrix
    return float(output_error(delta, moments, site.groups)) / signal


def activation_error(known: SiteStatistics, scheme: ActivationScheme) -> float:
    """Return the mean squared rounding error of an activation under ``scheme``."""
    assert known.inputs is not None
    if scheme.dynamic:
        return token_error(known.inputs, scheme.bits, scheme.symmetric)
    lo, hi = activation_range(known.inputs, scheme.calibration, scheme.bits, scheme.symmetric)
    return quantization_error(known.inputs, lo, hi, scheme.bits, scheme.symmetric)


def weight_schemes(site: Site, space: SiteSpace) -> list[WeightScheme]:
    """Return every quantized weight choice of a site."""
    if space.fixed is not None:
        return [space.fixed.weight] if space.fixed.weight else []
    c = space.choices
    return [
        WeightScheme(*values)
        for values in itertools.product(
            (b for b in c["weight_bits"] if b != FLOAT_BITS),
            (g for g in c["weight_granularity"] if divides(g, site.matrix)),
            c["weight_scheme"],
            c["weight_calibration"],
        )
    ]


def activation_schemes(space: SiteSpace) -> list[ActivationScheme]:
    """Return every quantized activation choice of a site, in canonical form."""
    if space.fixed is not None:
        return [space.fixed.activation.uncalibrated()] if space.fixed.activation else []
    c = space.choices
    found = (
        SiteRecipe(None, ActivationScheme(*values)).canonical().activation
        for values in itertools.product(
            (b for b in c["activation_bits"] if b != FLOAT_BITS),
            c["activation_granularity"],
            c["activation_scheme"],
            c["activation_calibration"],
        )
    )
    return list(dict.fromkeys(a for a in found if a is not None))


def _options(
    site: Site,
    space: SiteSpace,
    weights: Mapping[WeightScheme, float],
    activations: Mapping[ActivationScheme, float],
    speeds: bool,
) -> tuple[Option, ...]:
    """Return for each width and granularity (and speed) the choice of least damage."""
    if space.fixed is not None:
        damage = sum(weights.values()) + sum(activations.values())
        return (_option(site, space.fixed.canonical(), damage),)
    floats = FLOAT_BITS in space.choices["activation_bits"]
    one = _best_activation(space, activations)
    beside = _fastest_activations(activations, floats) if speeds else [one]
    best: dict[tuple[object, ...], Option] = {}
    for scheme, damage in weights.items():
        for activation, activation_damage in beside:
            recipe = SiteRecipe(scheme, activation, _fixed_rate(space))
            option = _option(site, recipe, damage + activation_damage)
            key = (scheme.bits, scheme.granularity, scheme.scheme if speeds else "", activation)
            if key not in best or option.damage < best[key].damage:
                best[key] = option
    found = list(best.values())
    if FLOAT_BITS in space.choices["weight_bits"]:
        skip = SiteRecipe(None, None if floats else one[0])
        found.append(_option(site, skip, 0.0 if floats else one[1]))
    return tuple(found)


def _fastest_activations(
    activations: Mapping[ActivationScheme, float], floats: bool
) -> list[tuple[ActivationScheme | None, float]]:
    """Return the activation of least damage for each speed, and float where it is offered."""
    best: dict[tuple[object, ...], ActivationScheme] = {}
    for a, damage in activations.items():
        key = (a.bits, a.granularity, a.scheme)
        if key not in best or damage < activations[best[key]]:
            best[key] = a
    found: list[tuple[ActivationScheme | None, float]] = [
        (a, activations[a]) for a in best.values()
    ]
    return [*found, (None, 0.0)] if floats or not found else found


def _fixed_rate(space: SiteSpace) -> float | None:
    """Return the learning rate where the space insists on learning."""
    rate = space.learning_rate
    return None if rate is None or rate.optional else rate.low


def _best_activation(
    space: SiteSpace, activations: Mapping[ActivationScheme, float]
) -> tuple[ActivationScheme | None, float]:
    widths = {a.bits for a in activations if a.bits <= QUANTIZED_ACTIVATION}
    if not widths:
        return None, 0.0
    widest = max(widths)
    found = {a: d for a, d in activations.items() if a.bits == widest}
    best = min(found, key=lambda a: found[a])
    return best, found[best]


def _option(site: Site, recipe: SiteRecipe, damage: float) -> Option:
    if recipe.weight is None:
        return Option(recipe, damage, FLOAT_BITS, 0)  # its bytes depend on the model's dtype
    return Option(recipe, damage, recipe.weight.bits, weight_bytes(site, recipe.weight))

"""What each choice of each layer is expected to cost, before any trial.

First the damage at the layer itself, from the statistics alone: the noise that quantization adds to
its output, as a fraction of the output's power: tr(ΔW·C·ΔWᵀ) / tr(W·G·Wᵀ) for the weight, with
G the second moments of its input and C those about the mean where the bias is corrected (else G),
and ε²·‖W‖² / tr(W·G·Wᵀ) for the activation, with ε² its mean squared rounding error. That tells
which calibration is best at each width, with no forward pass. Then, where the model has gradients,
what the best ones do to the model's output (``fisher``); where it has none, how much each
layer's noise matters is left to the trials to say.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from autoquant.measure.size import weight_bytes
from autoquant.methods.problem import Bench
from autoquant.nn.calibrate import SiteStatistics
from autoquant.nn.convert import Prepared
from autoquant.nn.sites import Site
from autoquant.observers import (
    TensorStatistics,
    activation_range,
    quantization_error,
    token_error,
)
from autoquant.observers.output_error import exact_output_error
from autoquant.quant.weight import QuantizedWeight
from autoquant.sensitivity.fisher import Candidates, Score, Sensitivity
from autoquant.spec.formats import FLOAT_BITS, FORMATS
from autoquant.spec.granularity import divides
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.space import SiteSpace
from autoquant.spec.techniques import Correction

Scheme = TypeVar("Scheme", WeightScheme, ActivationScheme)

ROWS = 64
"""Output channels, evenly spread, on which the damage of a weight choice is measured."""
QUANTIZED_ACTIVATION = 8
"""Activation width that a profile prefers: narrower ones save nothing that is counted as size."""
MOST_ACTIVATIONS = 16
"""Most activation choices of a site whose effect on the model is taken by gradients."""
WIDENED = 0.7
"""Relative error that damage at a layer is taken to have as a measure of damage to the model."""
SPREAD_LOCAL, SPREAD_MEASURED = 0.8, 0.35
"""How much layers differ from the profile, relative to it: by local damage, by gradients."""


@dataclass(frozen=True)
class Option:
    """One choice of one site: its recipe, damage, width in bits and size in bytes."""

    recipe: SiteRecipe
    damage: float
    bits: int
    bytes: int


@dataclass(frozen=True)
class Profile:
    """The options of every site, and the damage of each half of a recipe.

    ``samples`` is how many gradients the damage comes from: it is then an estimate of the loss.
    With 0 of them it is a noise-to-signal ratio at the layer, and ``reason`` says why. ``layer`` is
    the one whose outputs stood for the model's, where those have no gradient. ``errors``
    are standard errors of the entries that were measured, by site and scheme.
    """

    options: Mapping[str, tuple[Option, ...]]
    weight_damage: Mapping[str, Mapping[WeightScheme, float]]
    activation_damage: Mapping[str, Mapping[ActivationScheme, float]]
    numel: Mapping[str, int]
    samples: int = 0
    reason: str = ""
    errors: Mapping[str, Mapping[WeightScheme | ActivationScheme, float]] = field(
        default_factory=dict
    )
    layer: str = ""

    @property
    def spread(self) -> float:
        """How much layers are taken to differ from the profile at first, relative to it."""
        return SPREAD_MEASURED if self.samples else SPREAD_LOCAL

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


Measure = Callable[[Mapping[str, Candidates]], Sensitivity | str]
"""Says what candidates do to the model's output, or in one line why that can't be said."""
Quantize = Callable[[Site, WeightScheme, Correction], QuantizedWeight]
"""Gives the whole weight of a site by a scheme, beside a correction."""


def profile(
    prepared: Prepared,
    statistics: Mapping[str, SiteStatistics],
    spaces: Mapping[str, SiteSpace],
    progress: Callable[[str], None] = lambda _: None,
    *,
    speeds: bool = False,
    measure: Measure | None = None,
    quantize: Quantize | None = None,
) -> Profile:
    """Return the profile of every site over the choices of its space.

    ``speeds`` makes an option of every choice of activation, too, that may be faster or slower
    than another; without it an option has the one of least damage. ``measure`` takes gradients.
    ``quantize`` keeps what it made, for gradients and trials to use again; without it weights are
    quantized for the profile alone.
    """
    weights: dict[str, dict[WeightScheme, float]] = {}
    activations: dict[str, dict[ActivationScheme, float]] = {}
    for site in prepared.sites:
        progress(site.name)
        target = prepared.slots[site.name].target
        weights[site.name], activations[site.name] = local_damage(
            site, target, statistics[site.name], spaces[site.name], quantize
        )
    found = None if measure is None else measure(_candidates(weights, activations, spaces))
    errors: dict[str, dict[WeightScheme | ActivationScheme, float]] = {}
    if isinstance(found, Sensitivity):
        for name in weights:
            scores, beside = found.weights[name], found.activations[name]
            errors[name] = {k: v.error for k, v in scores.items()}
            errors[name] |= {k: v.error for k, v in beside.items()}
            weights[name] = _combined(weights[name], scores)
            activations[name] = _combined(activations[name], beside)
    options = {}
    for site in prepared.sites:
        parameter = prepared.slots[site.name].parameter
        made = _options(site, spaces[site.name], weights[site.name], activations[site.name], speeds)
        floats = site.numel * parameter.element_size()
        options[site.name] = tuple(
            replace(o, bytes=floats) if o.recipe.weight is None else o for o in made
        )
    numel = {site.name: site.numel for site in prepared.sites}
    samples = found.samples if isinstance(found, Sensitivity) else 0
    reason = found if isinstance(found, str) else ""
    layer = found.layer if isinstance(found, Sensitivity) else ""
    return Profile(options, weights, activations, numel, samples, reason, errors, layer)


def local_damage(
    site: Site,
    parameter: Tensor,
    known: SiteStatistics,
    space: SiteSpace,
    quantize: Quantize | None = None,
) -> tuple[dict[WeightScheme, float], dict[ActivationScheme, float]]:
    """Return the damage of each choice at the site itself."""
    part, sample = _sample(parameter, site)
    matrix = sample.movedim(part.channel_axis, 0).flatten(1).float()
    everything, inputs = known.second_moments(centered=False), known.distribution()
    signal = max(float(exact_output_error(matrix, everything)), 1e-30)
    correction = _correction(space)
    moments = known.second_moments(centered=correction.centers)

    bench = Bench(sample, part, known, correction)

    def damage(scheme: WeightScheme) -> float:
        if quantize is not None and part is site:
            quantized = quantize(site, scheme, correction)
        else:
            quantized = bench.round(scheme)
        return float(exact_output_error(quantized.matrix() - matrix, moments)) / signal

    weights = {scheme: damage(scheme) for scheme in weight_schemes(site, space)}
    weights |= {scheme: damage(scheme) for scheme in _otherwise_rounded(weights, space)}
    power = float(matrix.square().sum()) / signal
    activations = {
        scheme: activation_error(inputs, scheme) * power
        for scheme in activation_schemes(space)
        if inputs is not None
    }
    return weights, activations


def _correction(space: SiteSpace) -> Correction:
    """Return the correction of a site in uniform recipes."""
    if space.fixed is not None:
        return space.fixed.correction
    found: Correction = space.choices["correction"][0].technique
    return found


def _otherwise_rounded(
    weights: Mapping[WeightScheme, float], space: SiteSpace
) -> list[WeightScheme]:
    """Return the best schemes of each grid with every other rounding on offer.

    A rounding works on a calibrated grid: what is best before it is taken to be best after it.
    What has an open option is left to the trials.
    """
    if space.fixed is not None:
        return []
    best: dict[tuple[object, ...], WeightScheme] = {}
    for scheme, damage in weights.items():
        key = scheme.bits, scheme.granularity, scheme.scheme
        if key not in best or damage < weights[best[key]]:
            best[key] = scheme
    others = [offer for offer in space.choices["rounding"][1:] if not offer.axes]
    return [replace(w, rounding=offer.technique) for w in best.values() for offer in others]


def _candidates(
    weights: Mapping[str, Mapping[WeightScheme, float]],
    activations: Mapping[str, Mapping[ActivationScheme, float]],
    spaces: Mapping[str, SiteSpace],
) -> dict[str, Candidates]:
    """Return what is worth taking gradients for: the best at each width and granularity."""
    found = {}
    for name, table in weights.items():
        best: dict[tuple[object, ...], WeightScheme] = {}
        for scheme, damage in table.items():
            key = scheme.bits, scheme.granularity
            if key not in best or damage < table[best[key]]:
                best[key] = scheme
        ranked = sorted(activations[name], key=lambda a, n=name: activations[n][a])  # type: ignore[misc]
        widest = max((a.bits for a in ranked), default=0)
        ranked.sort(key=lambda a: a.bits < min(widest, QUANTIZED_ACTIVATION))
        chosen = tuple(ranked[:MOST_ACTIVATIONS])
        found[name] = Candidates(tuple(best.values()), chosen, _correction(spaces[name]))
    return found


def _combined(local: Mapping[Scheme, float], scores: Mapping[Scheme, Score]) -> dict[Scheme, float]:
    """Return the estimated loss of each scheme: what gradients say, where they are sure.

    Damage at the layer, times what the layer's noise usually does to the model, is a second
    estimate of each entry; both are weighted by their precision. It is the only one for schemes
    whose gradients were not taken.
    """
    ratios = [s.loss / local[k] for k, s in scores.items() if local[k] > 0 and s.loss > 0]
    if not ratios:
        return {k: scores[k].loss if k in scores else 0.0 for k in local}
    typical = float(np.median(ratios))
    found = {}
    for scheme, damage in local.items():
        guess = typical * damage
        score = scores.get(scheme)
        if score is None:
            found[scheme] = guess
            continue
        own, other = 1.0 / max(score.error, 1e-12) ** 2, 1.0 / max(WIDENED * guess, 1e-12) ** 2
        found[scheme] = (own * score.loss + other * guess) / (own + other)
    return found


def _sample(weight: Tensor, site: Site) -> tuple[Site, Tensor]:
    """Return evenly spread output channels of a wide weight: enough to measure an average."""
    channels = site.shape[site.channel_axis]
    if site.groups > 1 or channels <= ROWS:
        return site, weight
    rows = torch.arange(ROWS, device=weight.device) * channels // ROWS
    part = weight.index_select(site.channel_axis, rows)
    return replace(site, shape=tuple(part.shape)), part


def activation_error(inputs: TensorStatistics, scheme: ActivationScheme) -> float:
    """Return the mean squared rounding error of an activation under ``scheme``."""
    if scheme.dynamic:
        return token_error(inputs, scheme.bits, scheme.symmetric)
    lo, hi = activation_range(inputs, scheme.calibration, scheme.bits, scheme.symmetric)
    return quantization_error(inputs, lo, hi, scheme.bits, scheme.symmetric)


def weight_schemes(site: Site, space: SiteSpace) -> list[WeightScheme]:
    """Return the grids of a site's weight that are worth a look, rounded as uniform recipes are.

    All of them, but for 8 bits with a zero point where there are some without: their differences
    from it take 9 bits, which no processor multiplies, and of 256 steps few are gained.
    """
    if space.fixed is not None:
        return [space.fixed.weight] if space.fixed.weight else []
    c = space.choices
    both = len(c["weight_scheme"]) > 1
    return [
        scheme
        for values in itertools.product(
            (b for b in c["weight_bits"] if b != FLOAT_BITS),
            (g for g in c["weight_granularity"] if divides(g, site.matrix)),
            c["weight_scheme"],
            c["weight_calibration"],
        )
        for scheme in [WeightScheme(*values, rounding=c["rounding"][0].technique)]
        if not (both and scheme.bits == max(FORMATS) and not scheme.symmetric)
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
            recipe = SiteRecipe(scheme, activation, _correction(space))
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

"""From a recipe to quantized sites: the one way, for a trial and for ``autoquant apply`` alike."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from autoquant.errors import SpecError, TrialError
from autoquant.methods.learned import LearnedWeight, on
from autoquant.methods.problem import Bench
from autoquant.nn.calibrate import MissingStatistics, SiteStatistics
from autoquant.nn.convert import Prepared, deploy
from autoquant.nn.held import HeldWeight
from autoquant.nn.sites import Site
from autoquant.observers.calibration import activation_range
from autoquant.quant.affine import QParams, choose_qparams
from autoquant.quant.blocks import to_matrix
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.formats import FORMATS
from autoquant.spec.granularity import block_size, divides
from autoquant.spec.need import Need
from autoquant.spec.needs import WEIGHT_NEEDS
from autoquant.spec.recipe import FLOAT_SITE, ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.techniques import UNCORRECTED, Correction

CACHE_BYTES = 512 << 20
"""Most bytes that quantized weights are kept in, to be used again by a later candidate."""


class Applier:
    """Gives a prepared model one recipe after another.

    Quantized weights and calibrated ranges are kept, so that a candidate costs only what is new
    in it. ``statistics`` may be empty where a recipe carries its scales and learns nothing;
    ``learned`` holds by digest what recipes have learned.
    """

    def __init__(
        self,
        prepared: Prepared,
        statistics: Mapping[str, SiteStatistics],
        learned: Mapping[str, LearnedWeight] | None = None,
    ) -> None:
        self.prepared = prepared
        self.statistics = statistics
        self.learned = dict(learned or {})
        self._sites = {site.name: site for site in prepared.sites}
        self._weights: OrderedDict[tuple[str, WeightScheme, Correction, str], HeldWeight]
        self._weights = OrderedDict()
        self._ranges: dict[tuple[str, ActivationScheme], ActivationScheme] = {}
        self._current: dict[str, SiteRecipe] = {}
        self._bench: Bench | None = None

    def apply(self, sites: Mapping[str, SiteRecipe]) -> dict[str, SiteRecipe]:
        """Switch the model to ``sites``; return them with their calibrated numbers.

        Sites that are not named stay in float. Raises SpecError on an unknown name or a group
        that does not divide, TrialError where a weight is NaN.
        """
        check_names(sites, self._sites)
        done = {}
        for name, site in self._sites.items():
            recipe = self.calibrated(name, sites.get(name, FLOAT_SITE))
            done[name] = recipe
            if self._current.get(name) == recipe:
                continue
            self._current.pop(name, None)
            self.prepared.switch(name, self._held(site, recipe), recipe.activation)
            self.prepared.slots[name].choice = recipe
            self._current[name] = recipe
        return done

    def to_float(self) -> None:
        """Switch the model back to float."""
        self.prepared.reset()
        self._current.clear()

    def calibrated(self, name: str, recipe: SiteRecipe) -> SiteRecipe:
        """Return ``recipe`` in canonical form, with scale and zero point where they are static."""
        recipe = recipe.canonical()
        if not self._sites[name].corrects:
            recipe = replace(recipe, correction=UNCORRECTED)
        if not self._sites[name].activation:
            return replace(recipe, activation=None)
        if recipe.activation is None:
            return recipe
        return replace(recipe, activation=self.activation(name, recipe.activation))

    def activation(self, name: str, scheme: ActivationScheme) -> ActivationScheme:
        """Return ``scheme`` with its static numbers, calibrated unless it carries them."""
        if scheme.dynamic or scheme.scale is not None:
            return scheme
        key = (name, scheme)
        if key not in self._ranges:
            known = self._known(name, "activation: no scale in the recipe: calibration")
            inputs = known.distribution()
            if inputs is None:
                raise SpecError(f"{name}: activation: the calibration data have no input for it")
            lo, hi = activation_range(inputs, scheme.calibration, scheme.bits, scheme.symmetric)
            ends = torch.tensor([lo, hi], dtype=torch.float32)
            p = choose_qparams(ends[0], ends[1], scheme.bits, symmetric=scheme.symmetric)
            self._ranges[key] = replace(
                scheme, scale=p.scale.item(), zero_point=int(p.zero_point.item())
            )
        return self._ranges[key]

    def weight(self, site: Site, recipe: SiteRecipe) -> QuantizedWeight | None:
        """Return the quantized weight of ``site``, or None where it stays in float."""
        held = self._held(site, recipe)
        return None if held is None else held.quantized

    def held(self, name: str, recipe: SiteRecipe) -> HeldWeight | None:
        """Return the weight of a site as it is kept, or None where it stays in float."""
        return self._held(self._sites[name], self.calibrated(name, recipe))

    def _held(self, site: Site, recipe: SiteRecipe) -> HeldWeight | None:
        scheme = recipe.weight
        if scheme is None:
            return None
        key = (site.name, scheme, recipe.correction, recipe.learned)
        if key in self._weights:
            self._weights.move_to_end(key)
            return self._weights[key]
        if recipe.learned:
            made, shift = self._from_file(site, scheme, recipe)
        else:
            made = self._quantize(site, scheme, recipe)
            shift = None if recipe.correction == UNCORRECTED else self._shift(site, made, recipe)
        transform = self.prepared.slots[site.name].transform
        self._weights[key] = HeldWeight(made, self.prepared.engine, shift, transform)
        self._evict()
        return self._weights[key]

    def _evict(self) -> None:
        """Drop the weights that were not used for longest, but those of a whole recipe."""
        held = sum(weight.bytes for weight in self._weights.values())
        while held > CACHE_BYTES and len(self._weights) > len(self._sites):
            _, oldest = self._weights.popitem(last=False)
            held -= oldest.bytes

    def _from_file(
        self, site: Site, scheme: WeightScheme, recipe: SiteRecipe
    ) -> tuple[QuantizedWeight, Tensor | None]:
        """Return a weight that was learned, and what the bias moves by."""
        if recipe.learned not in self.learned:
            raise SpecError(f"{site.name}: learned: the recipe's learned file is not at hand")
        self._check_groups(site, scheme)
        found = on(self.prepared.slots[site.name].parameter.device, self.learned[recipe.learned])
        rows, columns = site.matrix
        blocks = rows * columns // math.prod(block_size(scheme.granularity, site.matrix))
        moved = rows if recipe.correction != UNCORRECTED else 0
        if not _fits(found, scheme, (rows, columns), blocks, moved):
            raise SpecError(f"{site.name}: learned: the tensors are of another layer, or scheme")
        qparams = QParams(found.scale, found.zero_point, scheme.bits, scheme.symmetric)
        made = QuantizedWeight(found.q, qparams, scheme, site.shape, site.channel_axis)
        return made, found.shift if moved else None

    def _shift(self, site: Site, made: QuantizedWeight, recipe: SiteRecipe) -> Tensor:
        """Return what the bias of a site moves by."""
        correction, means = recipe.correction, None
        if Need.MEANS in correction.needs:
            means = self._known(site.name, "correction: a corrected bias").mean_input()
            if means is None:
                raise SpecError(f"{site.name}: correction: the calibration data have no input")
        target = self.prepared.slots[site.name].target
        matrix = to_matrix(target.to(torch.float32), site.channel_axis)
        moved: Tensor = correction.shift(made.matrix() - matrix, means)
        return moved

    def _known(self, name: str, what: str) -> SiteStatistics:
        """Return what calibration saw at a site; SpecError, for ``what`` needs it, without."""
        if name not in self.statistics:
            raise SpecError(f"{name}: {what} needs calibration data; give the task file")
        return self.statistics[name]

    def _check_groups(self, site: Site, scheme: WeightScheme) -> None:
        if not divides(scheme.granularity, site.matrix):
            raise SpecError(
                f"{site.name}: weight.granularity: {scheme.granularity} does not divide the "
                f"{site.matrix[1]} inputs of a channel"
            )

    def _quantize(self, site: Site, scheme: WeightScheme, recipe: SiteRecipe) -> QuantizedWeight:
        self._check_groups(site, scheme)
        target = self.prepared.slots[site.name].target
        known = self.statistics.get(site.name)
        if scheme.calibration in WEIGHT_NEEDS:
            known = self._known(site.name, f"calibration {scheme.calibration}: it")
        if Need.MOMENTS in scheme.rounding.needs:
            known = self._known(site.name, f"rounding: {scheme.rounding.method}")
        try:
            return self._bench_of(site, target, known, recipe.correction).round(scheme)
        except TrialError as error:
            raise TrialError(f"{site.name}: {error}") from error
        except MissingStatistics as error:
            raise MissingStatistics(f"{site.name}: {error}") from error

    def _bench_of(
        self, site: Site, weight: Tensor, known: SiteStatistics | None, correction: Correction
    ) -> Bench:
        """Return the bench of a site, the last one where that is its: they are large."""
        last = self._bench
        same = last is not None and last.site is site and last.known is known
        if last is None or not same or last.correction != correction:
            self._bench = last = Bench(weight, site, known, correction)
        return last

    def deploy(self, sites: Mapping[str, SiteRecipe]) -> torch.nn.Module:
        """Return a copy of the model that carries ``sites`` as packed integers."""
        done = self.apply(sites)
        choices, shifts = {}, {}
        for name, recipe in done.items():
            held = self._held(self._sites[name], recipe)
            choices[name] = None if held is None else held.quantized, recipe.activation
            if held is not None and held.shift is not None:
                shifts[name] = held.shift
        self.to_float()
        return deploy(self.prepared, choices, shifts)


def check_names(sites: Mapping[str, SiteRecipe], known: Mapping[str, Site]) -> None:
    """Raise SpecError where ``sites`` names a layer that the model does not have."""
    for name in sites:
        if name not in known:
            shown = ", ".join(list(known)[:5])
            raise SpecError(
                f"layer {name!r} is not in the model; its {len(known)} layers are {shown}"
                + (", …" if len(known) > 5 else "")
            )


def _fits(
    found: LearnedWeight, scheme: WeightScheme, matrix: tuple[int, int], blocks: int, moved: int
) -> bool:
    """Return whether learned tensors can be the weight of a layer: a file may hold anything."""
    grid, zero = FORMATS[scheme.bits], found.zero_point
    expected = {"q": matrix, "scale": (blocks, 1), "zero_point": (blocks, 1), "shift": (moved,)}
    if any(tuple(getattr(found, name).shape) != shape for name, shape in expected.items()):
        return False
    reals = found.scale, zero, found.shift
    if found.q.dtype != torch.int8 or any(part.dtype != torch.float32 for part in reals):
        return False
    if not all(bool(part.isfinite().all()) for part in reals) or bool((found.scale <= 0).any()):
        return False
    if bool((zero != zero.round()).any()) or (scheme.symmetric and bool(zero.any())):
        return False
    within = [part for part in (found.q, zero) if part.numel()]
    return all(grid.qmin <= int(p.min()) and int(p.max()) <= grid.qmax for p in within)

"""Timing the layers of a model on the device itself, under every choice of their space.

Each layer is timed where it runs: in the middle of the model's own pass over one batch, on the
input that arrives there, under whatever context (autocast, no_grad) the model's code has set.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import SpecError, TrialError
from autoquant.measure.latency import LatencyModel, LayerTimes
from autoquant.measure.latency_cache import LatencyCache, device_name, machine_key
from autoquant.measure.speed import activations_of, adapted, pairs, speed_class, weights_of
from autoquant.measure.timing import Clock, clock_of, median_seconds
from autoquant.measure.units import Hook, Run, Unit, choose, count_calls, find_units, run_hooked
from autoquant.measure.units import signature as signature_of
from autoquant.methods.applier import Applier
from autoquant.nn.converted import Converted, converted_modules, converted_of
from autoquant.nn.sites import Site
from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.space import SiteSpace

WHOLE_BUDGET = 1.0
"""Seconds after which the whole model is measured well enough."""
WHOLE_LEAST = 3
"""Fewest repetitions of the whole model."""


def whole_seconds(model: nn.Module, run: Run, device: torch.device, clock: Clock | None) -> float:
    """Return the seconds that ``run`` takes with the model as it is."""
    with torch.no_grad():
        call = functools.partial(run, model)
        return median_seconds(
            call, clock or clock_of(device), least=WHOLE_LEAST, budget=WHOLE_BUDGET
        )


def measure_latency(
    applier: Applier,
    spaces: Mapping[str, SiteSpace],
    run: Run,
    device: torch.device,
    *,
    samples: int = 0,
    cache: LatencyCache | None = None,
    clock: Clock | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> LatencyModel:
    """Time every layer under every choice of its space; leaves the model in float.

    ``run`` runs the model on one batch. Raises what the model's own code raises.
    """
    prepared = applier.prepared
    cache = LatencyCache() if cache is None else cache
    applier.to_float()
    float_seconds = whole_seconds(prepared.model, run, device, clock)
    units = find_units(prepared)
    counts = [choose(c) for c in count_calls(prepared.model, units, run)]
    timer = _Timer(applier, device, clock or clock_of(device), cache)
    rows = {u.name: _recipes(u, spaces) for u in units}

    def hook(unit: Unit, wanted: Mapping[str, int]) -> Hook:
        def timed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            text = signature_of(args, kwargs)
            if text in wanted and (unit.name, text) not in timer.times:
                progress(unit.name)
                timer.time(unit, text, rows[unit.name], args, kwargs)

        return timed

    try:
        hooks = {u.module: hook(u, c) for u, c in zip(units, counts, strict=True) if c}
        run_hooked(prepared.model, run, hooks)
    finally:
        applier.to_float()
        cache.save()
    layers = tuple(
        LayerTimes(unit.name, unit.shares, timer.total(unit, wanted))
        for unit, wanted in zip(units, counts, strict=True)
        if wanted
    )
    return LatencyModel(device_name(device), samples, float_seconds, layers)


def _recipes(unit: Unit, spaces: Mapping[str, SiteSpace]) -> list[SiteRecipe]:
    """Return the choices to time a unit under: those of all its sites."""
    sites = [site for _, site in unit.sites]
    weights = [w for s in sites for w in weights_of(spaces[s.name])]
    found = [a for s in sites if s.activation for a in activations_of(spaces[s.name])]
    return pairs(weights, found or [None])


class _Timer:
    """Times units in the middle of a run; the same code on the same inputs is timed once."""

    def __init__(
        self, applier: Applier, device: torch.device, clock: Clock, cache: LatencyCache
    ) -> None:
        self.applier = applier
        self.clock = clock
        self.cache = cache
        self.device = device
        self.times: dict[tuple[str, str], dict[str, float]] = {}
        self._known: dict[str, float] = {}
        readers = (c.reader for c in converted_modules(applier.prepared.model))
        self._read = {reader.module for reader in readers if reader is not None}

    def time(
        self,
        unit: Unit,
        text: str,
        recipes: list[SiteRecipe],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Fill in the times of one unit on one kind of input."""
        found = self.times[unit.name, text] = {}
        shared = self._key(unit, text)
        for recipe in recipes:
            label = speed_class(recipe)
            key = json.dumps([shared, label])
            seconds = self._known.get(key)
            if seconds is None and _ours(unit.module):
                seconds = self.cache.get(key)
            if seconds is None:
                seconds = self._measure(unit, recipe, args, kwargs)
                if seconds is not None and _ours(unit.module):
                    self.cache.put(key, seconds)
            if seconds is not None:
                found[label] = self._known[key] = seconds
        self.applier.to_float()

    def _measure(
        self, unit: Unit, recipe: SiteRecipe, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> float | None:
        sites = {s.name: adapted(recipe, s.matrix) for _, s in unit.sites}
        # Where layers hand integers to each other, as if the neighbours had this recipe too.
        converted = converted_of(unit.module)
        if converted is not None and (reader := self._site_of(converted.reader)) is not None:
            sites.setdefault(reader.name, adapted(recipe, reader.matrix))
        try:
            self.applier.apply(sites)
        except (SpecError, TrialError):
            return None  # a choice that this layer can't take costs its own trial, not the search
        if converted is not None and unit.module in self._read and isinstance(args[0], Tensor):
            slot = self.applier.prepared.slots[unit.sites[0][1].name]
            args = (slot.as_read(converted.operation, args[0]), *args[1:])
        # Not through __call__: the user's own hooks would see calls that their model never makes.
        call = functools.partial(unit.module.forward, *args, **kwargs)
        return median_seconds(call, self.clock)

    def _site_of(self, layer: Converted | None) -> Site | None:
        """Return the site of a layer that reads another."""
        if layer is None:
            return None
        sites = self.applier.prepared.sites
        return next((s for s in sites if (layer.path, "weight") in s.users), None)

    def _key(self, unit: Unit, text: str) -> str:
        """Return what a unit's time depends on beside its speed class."""
        kind = type(unit.module)
        slots = self.applier.prepared.slots
        weights = [
            [path, list(s.shape), list(slots[s.name].parameter.stride()), s.activation]
            for path, s in unit.sites
        ]
        transforms = [t.kind for _, s in unit.sites if (t := slots[s.name].transform) is not None]
        dtype = str(slots[unit.sites[0][1].name].parameter.dtype)
        converted = converted_of(unit.module)
        layout = converted is not None and converted.channels_last
        engine = self.applier.prepared.engine
        backends = [b.name for b in engine.backends] if engine.fast else []
        own = [] if _ours(unit.module) else [unit.name]
        parts = [f"{kind.__module__}.{kind.__qualname__}", repr(unit.module), weights, dtype]
        chained: list[Any] = [unit.module in self._read]
        if converted is not None:
            chained += [converted.after, converted.reader is not None]
        where = [layout, chained, backends, *transforms]
        return json.dumps([machine_key(self.device), *parts, *where, text, *own])

    def total(self, unit: Unit, wanted: Mapping[str, int]) -> dict[str, float]:
        """Return the seconds of a unit in one batch by speed class, over all its calls."""
        rows = [(n, self.times[unit.name, text]) for text, n in wanted.items()]
        shared = [label for label in rows[0][1] if all(label in row for _, row in rows)]
        return {label: sum(n * row[label] for n, row in rows) for label in shared}


def _ours(module: nn.Module) -> bool:
    """Return whether a module runs torch's and this package's code: a subclass may do anything."""
    return type(module).__module__.startswith("torch.nn.")

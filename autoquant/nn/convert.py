"""From a float model to one that takes recipes, and from there to one that can be saved.

``prepare`` makes the layers of a model switchable, in place. ``Prepared.switch`` gives each site
its weight and activation. ``deploy`` returns a copy that carries packed integers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import ModelFileError
from autoquant.kernels.engine import Engine
from autoquant.nn.attention import disable_fast_path
from autoquant.nn.converted import (
    carry,
    computed_modules,
    converted_modules,
    converted_of,
    install,
    is_carrying,
    remove,
)
from autoquant.nn.float_parts import FloatPart
from autoquant.nn.fold import Folds, drop_hooks, fold, unfold
from autoquant.nn.follow import watching
from autoquant.nn.held import HeldWeight
from autoquant.nn.intake import copied
from autoquant.nn.layouts import layout_of
from autoquant.nn.modules import QUANTIZED, computing
from autoquant.nn.operations import operation_of
from autoquant.nn.packed import PackedSite
from autoquant.nn.rest import Rest, drop_door, hang_door, lowered
from autoquant.nn.sites import Site, find_sites
from autoquant.nn.slots import SiteSlot
from autoquant.nn.untouched import look
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import FLOAT32, FLOAT_SITE, ActivationScheme


@dataclass(frozen=True)
class Prepared:
    """A model whose sites can be switched from one recipe to the next.

    ``sites`` are in execution order; ``folds`` are the BatchNorms that went into layers. ``rest``
    is what stays in float, where that is of a lower format than float32.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    float_parts: tuple[FloatPart, ...]
    slots: Mapping[str, SiteSlot]
    folds: Folds
    engine: Engine
    rest: Rest | None = None

    def lowered(self, name: str) -> Prepared:
        """Return it with its rest in the format ``name``, from here on; float32 changes nothing."""
        if name == FLOAT32:
            return self
        return replace(self, rest=lowered(self.model, self.slots.values(), name))

    def in_float32(self) -> contextlib.AbstractContextManager[None]:
        """Have the rest in float32 inside."""
        return contextlib.nullcontext() if self.rest is None else self.rest.suspended()

    @property
    def folded(self) -> Mapping[str, str]:
        """Path of each BatchNorm that went into a layer → path of that layer."""
        return self.folds.pairs

    def used(self, order: Iterable[str], reached: Mapping[str, bool | None]) -> Prepared:
        """Return it with those sites that all data use, and the others in float, by name.

        ``order`` are the names of those whose weight is read, in order; ``reached`` says whether an
        activation meets it, False where none does that has any number. Raises ModelFileError where
        no site is used.
        """
        known = {site.name: site for site in self.sites}
        names = [n for n in known if n in set(order)] if self.sites else []
        late = [n for n in order if n in known]
        names = sorted(names, key=late.index)
        used, parts = [], []
        for name, site in known.items():
            refused = self.slots[name].refused
            if refused is not None:
                parts.append(_left(site, refused))
            elif name not in late:
                parts.append(_left(site, UNUSED))
            elif reached.get(name) is False and site.activation:
                parts.append(_left(site, UNREACHED))
        left = {part.name for part in parts}
        used = [replace(known[n], activation=bool(reached.get(n))) for n in names if n not in left]
        if not used:
            raise ModelFileError(f"none of the {len(known)} quantizable layers is used by the task")
        return replace(self, sites=tuple(used), float_parts=(*parts, *self.float_parts))

    def turn_fold(self, norm: str, *, on: bool) -> None:
        """Take one fold back, or make it again."""
        weight = self.folds.turn(norm, on=on)
        layer = self.folds.layer_of(norm)
        for slot in self.slots.values():
            if slot.site.users == ((layer, "weight"),):
                slot.parameter = weight

    def switch(
        self,
        name: str,
        weight: HeldWeight | QuantizedWeight | None,
        activation: ActivationScheme | None,
    ) -> None:
        """Give one site its weight and activation; None means float.

        A weight that is held keeps what was packed for it, for the next time. The choice has no
        name until whoever made it gives one (``SiteSlot.choice``).
        """
        slot = self.slots[name]
        if isinstance(weight, QuantizedWeight):
            weight = HeldWeight(weight, self.engine, transform=slot.transform)
        slot.switch(weight, activation)

    def reset(self) -> None:
        """Return every site to float."""
        for slot in self.slots.values():
            slot.switch(None, None)
            slot.choice = FLOAT_SITE


def prepare(
    model: nn.Module,
    run: Callable[[nn.Module], Any] | None = None,
    folded: Mapping[str, str] | None = None,
    engine: Engine | None = None,
    *,
    whole: bool = True,
) -> Prepared:
    """Make the layers of ``model`` switchable, in place.

    ``run`` runs the model on some data: it shows which sites are used, in which order; without it,
    module order stands for that. Where those are not the ``whole`` data, sites that it does not use
    come last (see ``Prepared.used``). ``folded`` says which BatchNorms follow which layers; without
    it, ``run`` shows that too. ``engine`` computes, the reference where there is none. Raises
    ModelFileError where the model has nothing to quantize.
    """
    engine = engine or Engine()
    if folded is None:
        folded = {} if run is None else look(model, [run]).pairs
    folds = fold(model, folded)
    sites, float_parts = find_sites(model)
    float_parts = tuple(part for part in float_parts if part.name not in folds.pairs)
    if not sites:
        raise ModelFileError(nothing_to_quantize(model, float_parts))
    slots = {}
    for site in sites:
        path, name = site.users[0]
        slot = SiteSlot(site, getattr(model.get_submodule(path), name), engine)
        slots[site.name] = slot
        for path, name in site.users:
            _convert(model.get_submodule(path), path, name, slot)
    folds.watch()
    disable_fast_path(model)
    late: tuple[Site, ...] = ()
    if run is not None:
        sites, late = _trace(sites, slots, model, run, follow=bool(engine.backends))
    prepared = Prepared(model, (*sites, *late), float_parts, slots, folds, engine)
    if run is not None and whole:
        return prepared.used([s.name for s in sites], {s.name: s.activation for s in sites})
    return prepared


def _convert(module: nn.Module, path: str, name: str, slot: SiteSlot) -> None:
    known = converted_of(module)
    if known is None:
        layout = layout_of(module)
        assert layout is not None
        install(module, path, {name: slot}, computing(layout.base), operation_of(module))
    else:
        known.sites[name] = slot


UNUSED = "never used on the calibration data"
UNREACHED = "reached by no sample of the calibration data"


def _trace(
    sites: tuple[Site, ...],
    slots: Mapping[str, SiteSlot],
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    *,
    follow: bool,
) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """Return the sites that ``run`` uses, in order of use, and the others.

    With ``follow``, layers are told what is expected to follow them.
    """
    order: dict[str, None] = {}
    observed: set[str] = set()
    for name, slot in slots.items():
        slot.read = lambda name=name: order.setdefault(name)
        slot.observe = lambda _, name=name: observed.add(name)
    try:
        layers = [c for c in converted_modules(model) if c.operation is not None]
        with torch.no_grad(), watching(layers) as followers:
            run(model)
        if follow:
            followers.settle()
    finally:
        for slot in slots.values():
            slot.read = slot.observe = None
    by_name = {site.name: site for site in sites}
    used = tuple(replace(by_name[n], activation=n in observed) for n in order)
    return used, tuple(site for site in sites if site.name not in order)


def _left(site: Site, reason: str) -> FloatPart:
    return FloatPart(site.name, reason, site.numel, site.numel)


def nothing_to_quantize(model: nn.Module, float_parts: Sequence[FloatPart]) -> str:
    """Return one line that says what a model without sites holds instead, and why that is none."""
    reasons: dict[str, list[str]] = {}
    for part in float_parts:
        if part.weights:
            reasons.setdefault(part.reason, []).append(part.name)
    if reasons:
        reason, names = max(reasons.items(), key=lambda found: len(found[1]))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"nothing to quantize: {', '.join(names[:3])}{more}: {reason}"
    kinds: dict[str, int] = {}
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            kinds[type(module).__name__] = kinds.get(type(module).__name__, 0) + 1
    found = ", ".join(f"{n}× {kind}" for kind, n in sorted(kinds.items())) or "no parameters at all"
    supported = ", ".join(kind.__name__ for kind in QUANTIZED)
    return f"nothing to quantize: the model holds {found}; layers that can be: {supported}"


def deploy(
    prepared: Prepared,
    choices: Mapping[str, tuple[QuantizedWeight | None, ActivationScheme | None]],
    shifts: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return a copy of the model that carries packed integers at every site of ``choices``.

    ``shifts`` [channels] are what biases move by; a layer without a bias gets one.
    A module all of whose sites stay in float is again the original layer.
    """
    prepared.reset()
    model = copied(prepared.model)
    if prepared.rest is not None:  # of the hooks of a graph there are no copies
        drop_door(model)
        hang_door(model, prepared.rest.dtype)
    by_name = {site.name: site for site in find_converted(prepared)}
    packed_sites: dict[int, dict[str, PackedSite]] = {}
    for site in by_name.values():
        weight, activation = choices.get(site.name, (None, None))
        packed = None
        if weight is not None or activation is not None:
            slot = prepared.slots[site.name]
            stored = slot.parameter if weight is None else weight
            dtype, transform = slot.parameter.dtype, slot.transform
            rest = None if prepared.rest is None else prepared.rest.dtype
            packed = PackedSite(site.kind, dtype, stored, activation, transform, rest)
        for path, name in site.users:
            module = model.get_submodule(path)
            if packed is not None:
                packed_sites.setdefault(id(module), {})[name] = packed
            if shifts and site.name in shifts:
                _shift(module, shifts[site.name], prepared.rest)
    # A module's children come first: attention asks whether its own are packed.
    for module in reversed(list(model.modules())):
        _settle(module, packed_sites.get(id(module)))
    return model


def restored(prepared: Prepared) -> nn.Module:
    """Return a copy of the model as it was before: the architecture, with weights that fold."""
    model = deploy(prepared, {})
    drop_door(model)
    for carrying in list(computed_modules(model)):
        vars(carrying.module).pop("forward")
    for norm, layer in prepared.folded.items():
        unfold(model.get_submodule(norm))
        if not prepared.folds.biased(norm):
            model.get_submodule(layer)._parameters["bias"] = None
    drop_hooks(model)
    return model


def find_converted(prepared: Prepared) -> tuple[Site, ...]:
    """Return every site that ``prepare`` converted, those that are never used included."""
    return tuple(slot.site for slot in prepared.slots.values())


def _shift(module: nn.Module, shift: Tensor, rest: Rest | None) -> None:
    """Move the bias of one layer for good."""
    own = module._parameters["bias"]
    if own is not None:
        moved = (own.detach().float() + shift).to(own.dtype)
    else:
        moved = shift.clone() if rest is None else shift.to(rest.dtype)
    module._parameters["bias"] = nn.Parameter(moved, requires_grad=False)


FUSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def _settle(module: nn.Module, packed: dict[str, PackedSite] | None) -> None:
    """Make a module carry its packed sites, or make it the original layer again."""
    converted = converted_of(module)
    if converted is None:
        return
    remove(module)
    # Attention in float would read the weight of its out_proj instead of calling it.
    calls = isinstance(module, nn.MultiheadAttention) and is_carrying(module.out_proj)
    # What torch fuses rounds to a lower format elsewhere than what was measured does.
    fused = converted.rest is not None and isinstance(module, FUSED)
    if packed is not None or calls or fused or converted.fold is not None:
        carried = carry(
            module, converted.path, packed or {}, converted.compute, rest=converted.rest
        )
        carried.channels_last = converted.channels_last
        carried.fold = converted.fold


def uses_channels_last(model: nn.Module) -> bool:
    """Return whether ``use_channels_last`` is on."""
    return any(computed.channels_last for computed in computed_modules(model))


def use_channels_last(model: nn.Module, *, on: bool = True) -> None:
    """Make every 2-d convolution that was converted compute in channels-last memory format.

    In a model that carries packed sites too.
    """
    for computed in computed_modules(model):
        if isinstance(computed.module, nn.Conv2d):
            computed.channels_last = on

"""From a float model to one that takes recipes, and from there to one that can be saved.

``prepare`` makes the layers of a model switchable, in place. ``Prepared.switch`` gives each site
its weight and activation. ``deploy`` returns a copy that carries packed integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import ModelFileError
from autoquant.kernels.engine import Engine
from autoquant.nn.attention import disable_fast_path
from autoquant.nn.float_parts import FloatPart
from autoquant.nn.fold import fold, fold_checked
from autoquant.nn.follow import unfollow, watching
from autoquant.nn.held import HeldWeight
from autoquant.nn.intake import copied
from autoquant.nn.layouts import layout_of
from autoquant.nn.modules import QUANTIZED, QuantizedConv2d, quantized_class
from autoquant.nn.operations import operation_of
from autoquant.nn.packed import PackedSite
from autoquant.nn.sites import Site, find_sites
from autoquant.nn.slots import SiteSlot
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import FLOAT_SITE, ActivationScheme


@dataclass(frozen=True)
class Prepared:
    """A model whose sites can be switched from one recipe to the next.

    ``sites`` are in execution order; ``folded`` names each BatchNorm that went into a layer.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    float_parts: tuple[FloatPart, ...]
    slots: Mapping[str, SiteSlot]
    folded: Mapping[str, str]
    engine: Engine

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
        if isinstance(weight, QuantizedWeight):
            weight = HeldWeight(weight, self.engine)
        self.slots[name].switch(weight, activation)

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
    quick: Callable[[nn.Module], Any] | None = None,
) -> Prepared:
    """Make the layers of ``model`` switchable, in place.

    ``run`` runs one batch: it shows which BatchNorms follow which layers, and which sites are
    used, in which order. Without it, ``folded`` says the former, and module order stands for the
    latter. ``quick`` runs a few samples, for checks that take several runs. ``engine`` computes,
    the reference where there is none. Raises ModelFileError where the model has nothing to
    quantize.
    """
    engine = engine or Engine()
    if folded is not None:
        fold(model, folded)
    elif run is not None:
        folded = fold_checked(model, run, quick)
    sites, float_parts = find_sites(model)
    if not sites:
        raise ModelFileError(nothing_to_quantize(model, float_parts))
    slots = {}
    for site in sites:
        path, name = site.users[0]
        slot = SiteSlot(site, getattr(model.get_submodule(path), name), engine)
        slots[site.name] = slot
        for path, name in site.users:
            _convert(model.get_submodule(path), name, slot)
    disable_fast_path(model)
    if run is not None:
        sites, unused = _trace(sites, slots, model, run, follow=bool(engine.backends))
        float_parts = (*unused, *float_parts)
    return Prepared(model, sites, float_parts, slots, dict(folded or {}), engine)


def _convert(module: nn.Module, name: str, slot: SiteSlot) -> None:
    if "sites" not in vars(module):
        layout = layout_of(module)
        assert layout is not None
        kept = {"sites": {}, "float_class": type(module), "operation": operation_of(module)}
        vars(module).update(kept)
        module.__class__ = quantized_class(type(module), layout.base)
    vars(module)["sites"][name] = slot


def _trace(
    sites: tuple[Site, ...],
    slots: Mapping[str, SiteSlot],
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    *,
    follow: bool,
) -> tuple[tuple[Site, ...], tuple[FloatPart, ...]]:
    """Return the sites that ``run`` uses, in order of use, and the unused ones as float parts.

    With ``follow``, ReLUs that follow a layer become a part of it.
    """
    order: dict[str, None] = {}
    observed: set[str] = set()
    for name, slot in slots.items():
        slot.read = lambda name=name: order.setdefault(name)
        slot.observe = lambda _, name=name: observed.add(name)
    try:
        layers = [m for m in model.modules() if vars(m).get("operation") is not None]
        with torch.no_grad(), watching(layers, model) as lead:
            run(model)
        if follow:
            lead()
    finally:
        for slot in slots.values():
            slot.read = slot.observe = None
    by_name = {site.name: site for site in sites}
    used = tuple(replace(by_name[n], activation=n in observed) for n in order)
    reason = "never used on the calibration data"
    unused = tuple(
        FloatPart(s.name, reason, s.numel, s.numel) for s in sites if s.name not in order
    )
    if not used:
        raise ModelFileError(f"none of the {len(sites)} quantizable layers is used by the task")
    return used, unused


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
    by_name = {site.name: site for site in find_converted(prepared)}
    for site in by_name.values():
        weight, activation = choices.get(site.name, (None, None))
        packed = None
        if weight is not None or activation is not None:
            parameter = prepared.slots[site.name].parameter
            stored = parameter if weight is None else weight
            packed = PackedSite(site.kind, parameter.dtype, stored, activation)
        for path, name in site.users:
            _pack(model.get_submodule(path), name, packed)
            if shifts and site.name in shifts:
                _shift(model.get_submodule(path), shifts[site.name])
    unfollow(model)
    for module in model.modules():
        if "float_class" in vars(module):
            _settle(module)
    return model


def find_converted(prepared: Prepared) -> tuple[Site, ...]:
    """Return every site that ``prepare`` converted, those that are never used included."""
    return tuple(slot.site for slot in prepared.slots.values())


def _pack(module: nn.Module, name: str, packed: PackedSite | None) -> None:
    """Replace the slot of one parameter by its packed site, or give the parameter back."""
    del module.__dict__["sites"][name]
    if packed is None:
        return
    held = module.__dict__.setdefault("packed_sites", {})
    held[name] = packed
    del module._parameters[name]
    if isinstance(module, nn.RNNBase):
        # The list of weights for the fused kernel would keep the float ones alive.
        module._flat_weights = [None] * len(module._flat_weights)


def _shift(module: nn.Module, shift: Tensor) -> None:
    """Move the bias of one layer for good."""
    own = module._parameters["bias"]
    moved = shift.clone() if own is None else (own.detach().float() + shift).to(own.dtype)
    module._parameters["bias"] = nn.Parameter(moved, requires_grad=False)


def _settle(module: nn.Module) -> None:
    """Register the packed sites of a module as its submodules, or make it the original layer."""
    del module.__dict__["sites"], module.__dict__["operation"]
    float_class = module.__dict__.pop("float_class")
    packed = module.__dict__.pop("packed_sites", None)
    # Attention in float would read the weight of its out_proj instead of calling it.
    calls = isinstance(module, nn.MultiheadAttention) and _is_packed(module.out_proj)
    if packed is None and not calls:
        module.__class__ = float_class
    else:
        module.sites = nn.ModuleDict(packed or {})


def _is_packed(module: nn.Module) -> bool:
    return "packed_sites" in vars(module) or isinstance(
        getattr(module, "sites", None), nn.ModuleDict
    )


def uses_channels_last(model: nn.Module) -> bool:
    """Return whether ``use_channels_last`` is on."""
    return any(isinstance(m, QuantizedConv2d) and m.channels_last for m in model.modules())


def use_channels_last(model: nn.Module, *, on: bool = True) -> None:
    """Make every 2-d convolution that was converted compute in channels-last memory format."""
    for module in model.modules():
        if isinstance(module, QuantizedConv2d):
            module.channels_last = on

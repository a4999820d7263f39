"""Smoothing the inputs of prepared layers; see ``quant.smoothing``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autoquant.errors import SpecError
from autoquant.nn.convert import Prepared
from autoquant.nn.sites import Site
from autoquant.quant.smoothing import Layout, Smoothing, as_text, from_text

KINDS = ("linear", "conv", "rnn", "attention")
"""Sites whose input channels can be smoothed."""


def can_smooth(site: Site, dtype: torch.dtype) -> bool:
    """Return whether a site with a weight of ``dtype`` has input channels that can be smoothed.

    float16 has too few exponents: small numbers would be lost in the division.
    """
    return site.activation and site.kind in KINDS and dtype != torch.float16


def layout_of(site: Site) -> Layout:
    """Return where the input channels of a site lie."""
    return Layout(site.kind, site.shape, site.groups, site.channel_axis)


def smooth(prepared: Prepared, factors: Mapping[str, Tensor | None]) -> None:
    """Smooth the sites that ``factors`` [channels] name; None takes a smoothing away.

    The model is reset to float: what was quantized or calibrated before is of other numbers.
    """
    prepared.reset()
    for site in prepared.sites:
        if site.name in factors:
            slot, own = prepared.slots[site.name], factors[site.name]
            found = None
            if own is not None:
                found = Smoothing(own.to(slot.parameter.device), layout_of(site))
            slot.smooth(found)


def smooth_as(prepared: Prepared, texts: Mapping[str, str]) -> None:
    """Smooth a model as a recipe says; SpecError where it names another layer, or other channels.

    Of the sites that the model uses all are then as ``texts`` have them.
    """
    known = {site.name: site for site in prepared.sites}
    for name in texts:
        if name not in known:
            raise SpecError(f"smoothing: layer {name!r} is not in the model")
        if not can_smooth(known[name], prepared.slots[name].parameter.dtype):
            raise SpecError(f"smoothing: layer {name!r} has no input channels that can be smoothed")
    smooth(prepared, {n: from_text(t, layout_of(known[n]).channels, n) for n, t in texts.items()})


def smoothing_of(prepared: Prepared) -> dict[str, str]:
    """Return how a model is smoothed, as a recipe says it."""
    return {
        site.name: as_text(slot.smoothing.factors)
        for site in prepared.sites
        if (slot := prepared.slots[site.name]).smoothing is not None
    }

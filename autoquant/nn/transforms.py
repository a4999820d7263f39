"""Transforming the inputs of prepared layers; see ``quant.smoothing`` and ``quant.rotation``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autoquant.errors import SpecError
from autoquant.nn.convert import Prepared
from autoquant.nn.sites import Site
from autoquant.quant.input_layout import Layout
from autoquant.quant.transforms import InputTransform, transform_from_text
from autoquant.spec.transforms import is_rotation

SMOOTHED = ("linear", "conv", "rnn", "attention")
"""Kinds of sites whose input channels can be smoothed."""
ROTATED = ("linear", "rnn", "attention")
"""Kinds whose input channels lie side by side, and can be rotated."""


def can_smooth(site: Site, dtype: torch.dtype) -> bool:
    """Return whether a site with a weight of ``dtype`` has input channels that can be smoothed.

    float16 has too few exponents: small numbers would be lost in the division.
    """
    return site.activation and site.kind in SMOOTHED and dtype != torch.float16


def can_rotate(site: Site, dtype: torch.dtype) -> bool:
    """Return whether a site with a weight of ``dtype`` has input channels that can be rotated.

    Sums of half precision would round more than eight bits do.
    """
    return site.activation and site.kind in ROTATED and dtype in (torch.float32, torch.float64)


def layout_of(site: Site) -> Layout:
    """Return where the input channels of a site lie."""
    return Layout(site.kind, site.shape, site.groups, site.channel_axis)


def transform(prepared: Prepared, transforms: Mapping[str, InputTransform | None]) -> None:
    """Transform the inputs of the sites that are named; None takes a transform away.

    The model is reset to float: what was quantized or calibrated before is of other numbers.
    """
    prepared.reset()
    for name, own in transforms.items():
        prepared.slots[name].transform_input(own)


def transform_as(prepared: Prepared, texts: Mapping[str, str]) -> None:
    """Transform inputs as a recipe says; SpecError where it names another layer, or what misfits.

    Of the sites that the model uses all are then as ``texts`` have them.
    """
    known = {site.name: site for site in prepared.sites}
    found = {}
    for name, text in texts.items():
        if name not in known:
            raise SpecError(f"transforms: layer {name!r} is not in the model")
        site, weight = known[name], prepared.slots[name].source
        can, done = can_smooth, "smoothed"
        if is_rotation(text):
            can, done = can_rotate, "rotated"
        if not can(site, weight.dtype):
            raise SpecError(f"transforms: layer {name!r} has no input channels that can be {done}")
        found[name] = transform_from_text(text, layout_of(site), weight, name)
    transform(prepared, found)


def transforms_of(prepared: Prepared) -> dict[str, str]:
    """Return how the inputs of a model are transformed, as a recipe says it."""
    return {
        site.name: own.text
        for site in prepared.sites
        if (own := prepared.slots[site.name].transform) is not None
    }

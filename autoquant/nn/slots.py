"""Slots: what a site computes with while recipes are being tried.

A slot is switched from one recipe to the next in place, without touching the model around it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from autoquant.nn.sites import Site
from autoquant.quant.activation import ActivationQuantizer
from autoquant.spec.recipe import FLOAT_SITE, SiteRecipe


class SiteSlot:
    """The switchable runtime of one site: float until told otherwise.

    ``override`` replaces the parameter, ``activation`` quantizes the input, ``observe`` sees the
    input before that, and ``read`` is told when the weight is used. ``choice`` names what the slot
    was switched to, None where that has no name; ``used`` is told before anything depends on it.
    """

    def __init__(self, site: Site, parameter: nn.Parameter) -> None:
        self.site = site
        self.parameter = parameter
        self.override: Tensor | None = None
        self.activation: ActivationQuantizer | None = None
        self.observe: Callable[[Tensor], None] | None = None
        self.read: Callable[[], None] | None = None
        self.choice: SiteRecipe | None = FLOAT_SITE
        self.used: Callable[[], None] | None = None

    def use(self) -> None:
        """Say that what follows depends on ``choice``; every way to compute calls this first."""
        if self.used is not None:
            self.used()

    @property
    def weight(self) -> Tensor:
        """The weight to compute with, in the parameter's shape and dtype."""
        self.use()
        if self.read is not None:
            self.read()
        return self.parameter if self.override is None else self.override

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return the activation to compute with."""
        self.use()
        if self.observe is not None:
            self.observe(x)
        return x if self.activation is None else self.activation(x)

"""Slots: what a site computes with while recipes are being tried.

A slot is switched from one recipe to the next in place, without touching the model around it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from autoquant.nn.sites import Site
from autoquant.quant.activation import ActivationQuantizer


class SiteSlot:
    """The switchable runtime of one site: float until told otherwise.

    ``override`` replaces the parameter, ``activation`` quantizes the input, ``observe`` sees the
    input before that, and ``read`` is told when the weight is used.
    """

    def __init__(self, site: Site, parameter: nn.Parameter) -> None:
        self.site = site
        self.parameter = parameter
        self.override: Tensor | None = None
        self.activation: ActivationQuantizer | None = None
        self.observe: Callable[[Tensor], None] | None = None
        self.read: Callable[[], None] | None = None

    @property
    def weight(self) -> Tensor:
        """The weight to compute with, in the parameter's shape and dtype."""
        if self.read is not None:
            self.read()
        return self.parameter if self.override is None else self.override

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return the activation to compute with."""
        if self.observe is not None:
            self.observe(x)
        return x if self.activation is None else self.activation(x)

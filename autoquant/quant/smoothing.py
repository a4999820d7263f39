"""Smoothing: what one input channel has too much of, its weights take over, by powers of two.

An activation that is quantized with one scale gives a channel of small numbers few of its steps.
So channel j is divided by t_j before it is quantized and the weights that meet it are multiplied
by t_j: W·x = (W·T)·(T⁻¹·x). With t_j a power of two neither rounds, so the float layer stays what
it is, bit for bit, wherever it stands in the model. Sources: Xiao et al. 2023 (SmoothQuant, arXiv
2211.10438) for the exponent that shares the range of a channel between activation and weights,
Nagel et al. 2019 (arXiv 1906.04721) for the equalization of channels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.errors import SpecError

LEAST, MOST = -12, 13
"""Exponents of two that a factor may have."""
_ZERO = ord("m")
_TEXT = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Layout:
    """Where the input channels of a layer lie, in its activation and in its weight of ``shape``."""

    kind: str
    shape: tuple[int, ...]
    groups: int
    channel_axis: int

    @property
    def channels(self) -> int:
        """How many input channels the weight meets."""
        if self.kind.startswith("conv"):
            return self.shape[1] * self.groups
        return self.shape[1 - self.channel_axis]

    def over_channels(self, x: Tensor) -> Tensor:
        """Return the largest number of each input channel of an activation: [channels]."""
        axis = -1 if not self.kind.startswith("conv") else 1 - len(self.shape)
        return x.movedim(axis, -1).reshape(-1, self.channels).amax(0)

    def beside(self, factors: Tensor, x: Tensor) -> Tensor:
        """Return ``factors`` [channels] in the shape and dtype that an activation goes with."""
        own = factors.to(x.dtype)
        if not self.kind.startswith("conv"):
            return own
        return own.reshape(-1, *[1] * (len(self.shape) - 2))

    def of_weight(self, factors: Tensor, weight: Tensor) -> Tensor:
        """Return ``factors`` [channels] in the shape and dtype that the weight goes with."""
        own = factors.to(weight.dtype)
        if not self.kind.startswith("conv"):
            return own if self.channel_axis == 0 else own[:, None]
        rows = self.shape[0] // self.groups
        grouped = own.reshape(self.groups, -1).repeat_interleave(rows, 0)
        return grouped.reshape(self.shape[0], -1, *[1] * (len(self.shape) - 2))


@dataclass(frozen=True, eq=False)
class Smoothing:
    """The factors t of one layer's input channels: float32 [channels], powers of two."""

    factors: Tensor
    layout: Layout

    def divide(self, x: Tensor) -> Tensor:
        """Return the activation x / t, exactly."""
        return x / self.layout.beside(self.factors, x)

    def multiply(self, x: Tensor) -> Tensor:
        """Return the activation x · t, exactly."""
        return x * self.layout.beside(self.factors, x)

    def take(self, weight: Tensor) -> Tensor:
        """Return the weight, of the site's shape, that meets x / t."""
        return weight * self.layout.of_weight(self.factors, weight)

    def give_back(self, weight: Tensor) -> Tensor:
        """Return the weight that meets x, of one that meets x / t."""
        return weight / self.layout.of_weight(self.factors, weight)


def rounded(factors: Tensor) -> Tensor:
    """Return positive ``factors`` [channels] as the nearest powers of two about their mean one."""
    exponents = torch.log2(factors.double())
    exponents = (exponents - exponents.mean()).round().clamp(LEAST, MOST)
    return torch.exp2(exponents).to(torch.float32)


def as_text(factors: Tensor) -> str:
    """Return factors as a recipe has them: a letter a channel, m for 1, n for 2, l for ½."""
    exponents = torch.log2(factors.double().cpu()).round().int().tolist()
    return "".join(chr(_ZERO + e) for e in exponents)


def from_text(text: str, channels: int, where: str) -> Tensor:
    """Return the factors [channels] of ``as_text``; SpecError where that is none of them."""
    if not _TEXT.fullmatch(text) or len(text) != channels:
        raise SpecError(
            f"{where}: smoothing: found {len(text)} characters, allowed: {channels} letters a … z, "
            "one for each input channel"
        )
    exponents = [float(ord(letter) - _ZERO) for letter in text]
    return torch.exp2(torch.tensor(exponents, dtype=torch.float32))

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
from autoquant.quant.input_layout import Layout

LEAST, MOST = -12, 13
"""Exponents of two that a factor may have."""
_ZERO = ord("m")
_TEXT = re.compile(r"[a-z]+")


@dataclass(frozen=True, eq=False)
class Smoothing:
    """The factors t of one layer's input channels: float32 [channels], powers of two."""

    factors: Tensor
    layout: Layout

    def of_input(self, x: Tensor) -> Tensor:
        """Return the activation x / t, exactly."""
        return x / self.layout.beside(self.factors, x)

    def input_back(self, x: Tensor) -> Tensor:
        """Return the activation x · t, exactly."""
        return x * self.layout.beside(self.factors, x)

    def of_weight(self, weight: Tensor) -> Tensor:
        """Return the weight, of the site's shape, that meets x / t."""
        return weight * self.layout.of_weight(self.factors, weight)

    def weight_back(self, weight: Tensor) -> Tensor:
        """Return the weight that meets x, of one that meets x / t."""
        return weight / self.layout.of_weight(self.factors, weight)

    @property
    def kind(self) -> str:
        """What it does to inputs, in words."""
        return "smoothed"

    @property
    def text(self) -> str:
        """The transform as a recipe has it: a letter a channel."""
        return as_text(self.factors)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in a saved model."""
        return self.factors.nbytes


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
            f"{where}: transforms: found {len(text)} characters, allowed: hadamard_N, or "
            f"{channels} letters a … z, one for each input channel"
        )
    exponents = [float(ord(letter) - _ZERO) for letter in text]
    return torch.exp2(torch.tensor(exponents, dtype=torch.float32))

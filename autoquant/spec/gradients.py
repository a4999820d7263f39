"""Number formats of gradients: a format is a row of a table, and everything derives from the row.

A gradient with respect to a layer's output (a neural gradient) has a few large numbers and very
many small ones, so formats of few bits spend them on exponents. Every format here is a sign and a
magnitude, a small float whose lowest exponent field is evenly spaced down to 0; scales make its
largest magnitude that of the block it is for. This module doesn't need torch.
Sources: Chmiel et al. 2023, arXiv 2112.10769 (LUQ, [1, 3, 0]); Micikevicius et al. 2022, arXiv
2209.05433 (E5M2); Zhu et al. 2020, arXiv 1912.12607 (INT8 with one scale a tensor).
"""

from __future__ import annotations

from dataclasses import dataclass

from autoquant.registry import Registry

ROUND_NEAREST = "nearest"
ROUND_STOCHASTIC = "stochastic"
ROUNDINGS = (ROUND_NEAREST, ROUND_STOCHASTIC)
"""How a number between two of a format may come to one of them."""


@dataclass(frozen=True, slots=True)
class MagnitudeGrid:
    """The magnitudes of a format, in units of its smallest normal number.

    They are 0, 2⁻ᵐ, 2·2⁻ᵐ … 1 and on with that step up to 2, then with twice the step up to 4, and
    so on: each of ``binades`` intervals [2ⁱ, 2ⁱ⁺¹) has 2ᵐ of them, m being ``mantissa_bits``. With
    one binade the grid is evenly spaced, as integers are; with no mantissa bits it is 0 and powers
    of two. ``bits`` is what a number takes with its sign.
    """

    bits: int
    binades: int
    mantissa_bits: int

    @property
    def step(self) -> float:
        """The smallest magnitude but 0, in units of the smallest normal number."""
        return 2.0**-self.mantissa_bits

    @property
    def top(self) -> float:
        """The largest magnitude, in units of the smallest normal number."""
        return (2.0 - self.step) * 2.0 ** (self.binades - 1)


GRADIENT_GRIDS: Registry[MagnitudeGrid] = Registry("gradient format")
"""The formats of gradients by name: ``register`` adds to them."""

GRADIENT_GRIDS.register("int8")(MagnitudeGrid(bits=8, binades=1, mantissa_bits=6))
GRADIENT_GRIDS.register("int4")(MagnitudeGrid(bits=4, binades=1, mantissa_bits=2))
# E5M2: of 32 exponent fields the lowest is that of the even steps and the highest that of inf, NaN.
GRADIENT_GRIDS.register("fp8")(MagnitudeGrid(bits=8, binades=30, mantissa_bits=2))
# Of 8 exponent fields the lowest is 0, so α … 64·α are left. Equation 11 of the paper has 16·α for
# b = 3, five magnitudes; seven are what four bits hold.
GRADIENT_GRIDS.register("log4")(MagnitudeGrid(bits=4, binades=7, mantissa_bits=0))

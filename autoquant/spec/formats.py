"""Number formats: a format is a row of a table, and everything about it derives from the row."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BITS = 16
"""What a layer that stays in float counts as, in bits (its exported size is what it really is)."""


@dataclass(frozen=True, slots=True)
class IntFormat:
    """A two's-complement integer of ``bits`` bits."""

    name: str
    bits: int

    @property
    def qmin(self) -> int:
        """Smallest integer of the grid."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1


FORMATS: dict[int, IntFormat] = {b: IntFormat(f"int{b}", b) for b in range(2, 9)}
"""The integer formats by bit width, int2 to int8."""

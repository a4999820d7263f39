"""What a search is for: the smallest model within a drop, or the least drop within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """What one trial measured on the search split.

    ``drop`` is how much worse the metric is than the float model's, in its own unit; ``loss`` is
    how far the outputs are from the float model's (a divergence, or the drop where there is none).
    """

    value: float
    drop: float
    loss: float
    average_weight_bits: float
    size_bytes: int
    seconds: float


@dataclass(frozen=True)
class Goal:
    """The goal of a search, as one objective to minimize and constraints (≤ 0 is feasible).

    Without a budget: the size, as long as the drop is at most ``max_drop``. With a budget on
    ``bits`` (average weight bits) or ``size_bytes``: the drop.
    """

    max_drop: float
    float_size_bytes: int
    bits: float | None = None
    size_bytes: int | None = None

    @property
    def budgeted(self) -> bool:
        """Whether size is given and the metric is what is improved."""
        return self.bits is not None or self.size_bytes is not None

    def objective(self, m: Measurement) -> float:
        """Return the value that the study minimizes: a fraction of the float size, or a drop.

        Recipes of one size are told apart by their loss, and of one drop by theirs, far below
        what either is measured to.
        """
        tie = 1e-6 * m.loss / (1.0 + abs(m.loss))
        if self.budgeted:
            return m.drop + tie
        return m.size_bytes / self.float_size_bytes + tie

    def constraints(self, m: Measurement) -> Mapping[str, float]:
        """Return constraint name → violation; all ≤ 0 means feasible."""
        if not self.budgeted:
            return {"drop": m.drop - self.max_drop}
        found = {}
        if self.bits is not None:
            found["bits"] = m.average_weight_bits - self.bits
        if self.size_bytes is not None:
            found["size"] = float(m.size_bytes - self.size_bytes)
        return found

    def feasible(self, m: Measurement) -> bool:
        """Return whether ``m`` keeps every constraint (with room for rounding in an average)."""
        return all(v <= 1e-9 for v in self.constraints(m).values())

"""What a search is for: the smallest model within a drop, or the least drop within a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoquant.spec.costs import Costs

ROUNDING = 1e-9
"""How far an average may be off by rounding."""


@dataclass(frozen=True)
class Measurement:
    """What one trial measured on the search split.

    ``drop`` is how much worse the metric is than the float model's, in its own unit; ``loss`` is
    how far the outputs are from the float model's (a divergence, or the drop where there is none).
    ``latency`` (seconds, predicted) and ``bit_operations`` are None where nobody asked for them.
    """

    value: float
    drop: float
    loss: float
    average_weight_bits: float
    size_bytes: int
    seconds: float
    latency: float | None = None
    bit_operations: float | None = None

    def plain(self) -> dict[str, Any]:
        """Return it as a trial keeps it: without what nobody asked for."""
        found = dataclasses.asdict(self)
        optional = ("latency", "bit_operations")
        return {k: v for k, v in found.items() if k not in optional or v is not None}


@dataclass(frozen=True)
class Goal:
    """The goal of a search, as one objective to minimize and constraints (≤ 0 is feasible).

    Without a budget: the size, as long as the drop is at most ``max_drop``. With a budget on
    ``bits`` (average weight bits) or ``size_bytes``: the loss, how far the outputs are from the
    float model's, which is far less noisy than the metric; finalists are told apart by the
    metric. ``minimize`` (see ``costs.OBJECTIVES``) makes another cost small under the maximum drop,
    within the budgets that there are.
    ``latency`` is the most seconds that a recipe may take, whatever the objective is.
    """

    max_drop: float
    float_size_bytes: int
    bits: float | None = None
    size_bytes: int | None = None
    latency: float | None = None
    minimize: str | None = None
    float_latency: float = 1.0
    float_bit_operations: float = 1.0

    @property
    def budgeted(self) -> bool:
        """Whether size is given and the metric is what is improved."""
        return self.minimize is None and (self.bits is not None or self.size_bytes is not None)

    @property
    def cost(self) -> str:
        """The cost that is made small, or that is given: one of ``costs.OBJECTIVES``."""
        if self.minimize is not None:
            return self.minimize
        return "size" if self.bits is None else "bits"

    def objective(self, m: Measurement) -> float:
        """Return the value that the study minimizes: a fraction of the float cost, or a loss.

        Recipes of one size are told apart by their loss, far below what sizes differ by.
        """
        if self.budgeted:
            return m.loss
        return self._share(m) + 1e-6 * m.loss / (1.0 + abs(m.loss))

    def _share(self, m: Measurement) -> float:
        """Return the cost that is made small, as a fraction of the float model's."""
        if self.minimize == "bits":
            return m.average_weight_bits / 16
        if self.minimize == "latency":
            assert m.latency is not None
            return m.latency / self.float_latency
        if self.minimize == "bitops":
            assert m.bit_operations is not None
            return m.bit_operations / self.float_bit_operations
        return m.size_bytes / self.float_size_bytes

    @property
    def limits(self) -> tuple[str, ...]:
        """The names of the constraints, in the order of ``constraints``."""
        limited = {"bits": self.bits, "size": self.size_bytes, "latency": self.latency}
        drop = () if self.budgeted else ("drop",)
        return (*drop, *(name for name, limit in limited.items() if limit is not None))

    def constraints(self, m: Measurement) -> Mapping[str, float]:
        """Return constraint name → violation; all ≤ 0 means feasible."""
        drop = {} if self.budgeted else {"drop": m.drop - self.max_drop}
        costs = Costs(m.average_weight_bits, m.size_bytes, m.latency, m.bit_operations)
        return {**drop, **self.excess(costs)}

    def excess(self, costs: Costs) -> dict[str, float]:
        """Return the constraints that arithmetic alone decides; that on latency is relative."""
        found = {}
        if self.bits is not None:
            found["bits"] = costs.average_weight_bits - self.bits
        if self.size_bytes is not None:
            found["size"] = float(costs.size_bytes - self.size_bytes)
        if self.latency is not None:
            assert costs.latency is not None
            found["latency"] = costs.latency / self.latency - 1.0
        return found

    def affords(self, costs: Costs) -> bool:
        """Return whether ``costs`` are within every limit (with room for rounding)."""
        return all(v <= ROUNDING for v in self.excess(costs).values())

    def feasible(self, m: Measurement) -> bool:
        """Return whether ``m`` keeps every constraint (with room for rounding in an average)."""
        return all(v <= ROUNDING for v in self.constraints(m).values())

"""The verdict on a claim "the metric drops at most this much": a frozen value, free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PASS = "PASS"
FAIL = "FAIL"
NOT_PROVEN = "NOT PROVEN"
OUTCOMES = (PASS, FAIL, NOT_PROVEN)


@dataclass(frozen=True)
class Verdict:
    """Whether a drop of at most ``margin`` is proven, refuted, or neither.

    ``margin``, ``drop`` (positive is worse) and ``interval`` (95%, None where the samples allow
    none) are in the metric's unit. ``flip_rate`` is the share of samples that are right under one
    model and wrong under the other, None for metrics that are not right or wrong by sample.
    ``samples_needed`` would prove the claim four times in five if the drop is what was measured;
    None where no number would.
    """

    outcome: str
    margin: float
    drop: float
    interval: tuple[float, float] | None
    flip_rate: float | None
    samples: int
    samples_needed: int | None

    def plain(self) -> dict[str, Any]:
        """Return it as YAML and JSON take it."""
        return {
            "outcome": self.outcome,
            "max_drop": self.margin,
            "drop": self.drop,
            "interval": list(self.interval) if self.interval else None,
            "flip_rate": self.flip_rate,
            "samples": self.samples,
            "samples_needed": self.samples_needed,
        }

"""What a recipe costs by arithmetic alone, before anything is run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autoquant.spec.formats import FLOAT_BITS


def average_bits(widths: Iterable[tuple[int, float]], rest: int) -> float:
    """Return the average width of weights: (how many, how wide), and ``rest`` in float."""
    rows = list(widths)
    return (sum(n * bits for n, bits in rows) + rest * FLOAT_BITS) / (
        sum(n for n, _ in rows) + rest
    )


def layer_budget(bits: float, weights: int, rest: int) -> float:
    """Return the bits that ``weights`` may have in all, so that an average of ``bits`` is kept.

    ``rest`` are the weights beside them, which stay in float.
    """
    return bits * (weights + rest) - rest * FLOAT_BITS


OBJECTIVES = ("size", "bits", "latency", "bitops")
"""What a search can make small under a maximum drop."""


@dataclass(frozen=True)
class Costs:
    """The costs of one recipe; ``latency`` in seconds for one batch, as a table predicts it.

    ``average_weight_bits`` is of all weights of the model, 16 for those that stay in float.
    ``latency`` and ``bit_operations`` are None where a search does not ask for them.
    """

    average_weight_bits: float
    size_bytes: int
    latency: float | None = None
    bit_operations: float | None = None


@dataclass(frozen=True)
class LatencyEvidence:
    """Latency of a recipe for one batch of ``samples`` (0: not known) on ``device``, in seconds.

    ``predicted`` is the sum that the search worked with, ``measured`` the whole model's time, None
    where only a table was asked.
    """

    predicted: float
    measured: float | None
    float_seconds: float
    samples: int
    device: str

    def plain(self) -> dict[str, Any]:
        """Return it as YAML and JSON take it."""
        return {
            "seconds": self.measured,
            "predicted_seconds": self.predicted,
            "float_seconds": self.float_seconds,
            "samples": self.samples,
            "device": self.device,
        }


def describe_seconds(seconds: float, *, up: bool = False) -> str:
    """Return a time with its unit, to three digits; ``up`` never makes it shorter than it is."""
    unit, scale = next(
        ((u, k) for u, k in (("s", 1.0), ("ms", 1e-3)) if seconds >= k), ("us", 1e-6)
    )
    value = seconds / scale
    digits = max(2 - math.floor(math.log10(value)), 0) if value > 0 else 0
    if up:
        value = math.ceil(value * 10**digits - 1e-9) / 10**digits
    return f"{value:.{digits}f} {unit}"

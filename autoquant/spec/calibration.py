"""Names of calibration methods, as recipes and search spaces write them.

The mathematics is in ``observers``; here are only the names, so that a recipe can be checked
without loading torch.
"""

from __future__ import annotations

import re

PERCENTILES = ("percentile_99.9", "percentile_99.99", "percentile_99.999", "percentile_99.9999")
WEIGHT_CALIBRATIONS = ("max", "percentile_99.9", "percentile_99.99", "mse", "output_mse")
ACTIVATION_CALIBRATIONS = ("max", "moving_average", *PERCENTILES, "entropy", "mse")

_PERCENTILE = re.compile(r"percentile_(\d{2,3}(?:\.\d+)?)")


def percentile_of(name: str) -> float | None:
    """Return P of ``percentile_P`` (50 < P ≤ 100), or None where the name is something else."""
    match = _PERCENTILE.fullmatch(name)
    if match is None:
        return None
    value = float(match[1])
    return value if 50.0 < value <= 100.0 else None

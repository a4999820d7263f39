"""The grids of formats by enumeration, and the neighbours of a number by looking at all points."""

from __future__ import annotations

import torch
from torch import Tensor


def shares(name: str) -> Tensor:
    """Return every magnitude of a format as a share of its largest, ascending, float64."""
    if name == "fp8":
        numbers = torch.arange(128, dtype=torch.uint8).view(torch.float8_e5m2).double()
        numbers = numbers[numbers.isfinite()]
        assert numbers.max() == torch.finfo(torch.float8_e5m2).max
        return numbers / numbers.max()
    if name == "log4":
        return torch.tensor([0.0] + [2.0**k for k in range(7)], dtype=torch.float64) / 64
    most = {"int8": 127, "int4": 7}[name]
    return torch.arange(most + 1, dtype=torch.float64) / most


def around(x: Tensor, largest: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the grid's points below and above each magnitude; both are it where it is a point."""
    points = shares(name) * largest.double().expand(x.shape)[..., None]
    x64 = x.double()[..., None]
    slack = points[..., -1:] * 1e-7
    below = points.where(points <= x64 + slack, -1.0).amax(-1)
    above = points.where(points >= x64 - slack, torch.inf).amin(-1)
    return below, above

"""What each layer and kind of parameter learns at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.methods.training import Training
from autoquant.training.learner import ACTIVATION, BIAS, SCALE, WEIGHT
from autoquant.training.student import Student

BETAS = (0.9, 0.99)
"""Adam's: gradients are forgotten after about 10 steps, their squares after 100. With as few steps
as a reconstruction has, the usual 1,000 would be those of the start."""
EPSILON = 1e-12
"""Adam's: parameters are in units in which gradients may be tiny."""


@dataclass(frozen=True)
class Rate:
    """What one kind of parameter of a site learns at now.

    ``share`` is what the guard left of it: less than 1 where it was lowered, 0 where it is stopped.
    """

    site: str
    kind: str
    rate: float
    share: float


def base_rates(technique: Training) -> dict[str, float]:
    """Return kind → rate of a layer that learns at the usual one."""
    return {
        WEIGHT: technique.weight_rate,
        SCALE: technique.scale_rate,
        BIAS: technique.bias_rate,
        ACTIVATION: technique.activation_rate,
    }


def make_optimizer(
    student: Student,
    technique: Training,
    outputs: Mapping[str, float],
    layers: Mapping[str, float] | None = None,
) -> torch.optim.Adam:
    """Return the optimizer of a student: one group for each site and kind, with its own rate.

    ``outputs`` are the usual sizes of layers' outputs, the unit of their biases; ``layers`` is what
    the rates of each site are multiplied by. Each group has ``site``, ``kind`` and ``base``, the
    rate at its highest; ``share`` is what a guard left of it.
    """
    layers = layers or {}
    base = base_rates(technique)
    groups = []
    for name, kind, parameter in student.parameters():
        rate = base[kind] * (outputs.get(name, 0.0) if kind == BIAS else 1.0)
        rate *= layers.get(name, 1.0)
        groups.append(
            {"params": [parameter], "site": name, "kind": kind, "base": rate, "share": 1.0}
        )
    return torch.optim.Adam(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=True)


def sizes_of(features: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Return name → root mean square of all that a module gave."""
    found = {}
    for name, parts in features.items():
        total = sum(float(part.float().square().sum()) for part in parts)
        count = sum(part.numel() for part in parts)
        found[name] = (total / count) ** 0.5 if count else 0.0
    return found

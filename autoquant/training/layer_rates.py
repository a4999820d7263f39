"""How fast each layer learns beside the others, by what is known of it before training.

Two things are asked of each layer. Its curvature: noise of one size in all weights costs a layer
½ · noise² · tr H, so that layers take equal shares of the damage where rates go as 1/√tr H. And the
mismatch of its gradient: one that points elsewhere is followed more slowly, by φ of UI8. How much
each counts is a power, 0 for not at all, which a race of rates may choose. Sources: Dong et al.
2020 (HAWQ-V2, arXiv 1911.03852) for the trace; Zhu et al. 2020 (UI8, arXiv 1912.12607) for φ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.quant.gradients.agreement import agreement, rate_multiplier
from autoquant.training.mismatch import smooth_gradients
from autoquant.training.probes import Pupil, traces

DIRECTIONS = 4
"""Random directions by which the curvature of a layer is found."""
MOST = 10.0
"""By how much, up or down, curvature may move a layer's rate."""


@dataclass(frozen=True)
class Evidence:
    """What is known of each layer, by name.

    ``traces`` are those of the Hessian by its weight, in units of the loss per squared step of its
    grid; ``cosines`` those between its estimated gradient and that of the network that does not
    round.
    """

    traces: Mapping[str, float]
    cosines: Mapping[str, float]


def evidence_of(pupil: Pupil, seed: int = 0) -> Evidence:
    """Return the evidence on each layer: two losses a direction and layer, and two gradients."""
    estimated, smooth = pupil.gradients(), smooth_gradients(pupil)
    return Evidence(
        traces(pupil, DIRECTIONS, seed=seed),
        {name: agreement(g, smooth[name]).cosine for name, g in estimated.items()},
    )


def needs_evidence(technique: Distillation) -> bool:
    """Return whether the layers of a technique learn at different rates."""
    return bool(technique.curvature_power or technique.mismatch_power)


def layer_rates(evidence: Evidence, technique: Distillation) -> dict[str, float]:
    """Return what the rates of each layer are multiplied by.

    (tr H / geometric mean of all)^(−``curvature_power`` / 2), within ``MOST``, times
    φ^``mismatch_power``. A layer whose trace is not above 0 counts as the flattest of the others.
    """
    known = [t for t in evidence.traces.values() if t > 0 and math.isfinite(t)]
    least = min(known, default=1.0)
    logs = {n: math.log(t if t in known else least) for n, t in evidence.traces.items()}
    middle = sum(logs.values()) / max(len(logs), 1)
    found = {}
    for name, log in logs.items():
        curved = math.exp(-technique.curvature_power / 2 * (log - middle))
        phi = rate_multiplier(evidence.cosines[name])
        phi = 1.0 if math.isnan(phi) else phi  # no gradient yet, as where all is as in float
        found[name] = min(max(curved, 1 / MOST), MOST) * phi**technique.mismatch_power
    return found

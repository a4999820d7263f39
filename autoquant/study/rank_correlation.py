"""How well a profile foretold what the trials measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from autoquant.libraries import library
from autoquant.sensitivity.profile import Profile
from autoquant.study.parameters import ParameterMap
from autoquant.study.trials import measured

FEWEST = 8
"""Trials below which a rank correlation says nothing."""


@dataclass(frozen=True)
class Fidelity:
    """Rank correlation (Spearman) of predicted and measured losses over ``trials``.

    ``samples`` is how many gradients the prediction comes from, 0 where it is damage at the layers.
    """

    spearman: float
    trials: int
    samples: int


def fidelity(
    profile: Profile, mapping: ParameterMap, trials: Sequence[FrozenTrial]
) -> Fidelity | None:
    """Return how alike losses were predicted and measured; None for too few trials, or no ranks."""
    predicted, found = [], []
    for trial in trials:
        m = measured(trial)
        if m is None or not math.isfinite(m["loss"]):
            continue
        sites = mapping.decode(trial.params)
        predicted.append(sum(profile.damage(name, recipe) for name, recipe in sites.items()))
        found.append(m["loss"])
    if len(found) < FEWEST or len(set(found)) < 2 or len(set(predicted)) < 2:
        return None
    return Fidelity(
        float(library("scipy.stats").spearmanr(predicted, found).statistic),
        len(found),
        profile.samples,
    )

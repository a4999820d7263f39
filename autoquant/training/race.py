"""Which rates a model bears: sets of them race, each for a short while, and the bad ones drop out.

What is learned at which rate differs by orders of magnitude between models and between the kinds of
parameters of one, and no rule foretells it well. So sets of rates are drawn, by Optuna's TPE from
the second half on, and each trains from the same start, in rounds that are three times as long each
time, up and down the whole schedule, so that what a round ends with is a model as good as its rates
allow. Which sets go on to the next round is decided by the loss on held-back data. A bad set costs
a round of a few steps. Sources: Jamieson & Talwalkar 2016 (arXiv 1502.07943) and Li et al. 2020
(arXiv 1810.05934) for successive halving; Bergstra et al. 2011 for TPE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import optuna

from autoquant.methods.reconstruction.distillation import Distillation

FACTOR = 3
"""How many times longer each round is, and one of how many sets goes on to it."""
ROUNDS = 3
"""The last one is FACTOR times shorter than training itself."""
SPREAD, RATIO = 10.0, 5.0
"""How many times the usual ones all rates may be, and those of weights beside the others."""

Try = Callable[[Distillation], float]
"""Trains for a while from the start and returns the loss on held-back data."""


@dataclass(frozen=True)
class Rival:
    """One set of rates: what it lost on held-back data after its last round of ``steps``."""

    technique: Distillation
    steps: int
    loss: float


def rounds_of(steps: int) -> list[int]:
    """Return how many steps each round takes, the shortest first."""
    return sorted({max(steps // FACTOR ** (i + 1), 1) for i in range(ROUNDS)})


def race(technique: Distillation, attempt: Try, seed: int) -> tuple[Distillation, list[Rival]]:
    """Return ``technique`` with the rates that did best, and how every set did.

    Those of the longest round are compared; where none of them is finite, it is as it was.
    """
    lengths = rounds_of(technique.steps)
    study = _study(technique.rivals, lengths[0], seed)
    rivals: list[Rival] = []
    for _ in range(technique.rivals):
        trial = study.ask()
        own = _scaled(technique, trial)
        for steps in lengths:
            loss = attempt(replace(own, steps=steps))
            loss = loss if math.isfinite(loss) else math.inf
            rival = Rival(own, steps, loss)
            trial.report(min(loss, 1e30), steps)
            if trial.should_prune():
                break
        rivals.append(rival)
        study.tell(trial, min(rival.loss, 1e30))
    longest = max(r.steps for r in rivals)
    best = min((r for r in rivals if r.steps == longest), key=lambda r: r.loss)
    return (technique if math.isinf(best.loss) else best.technique), rivals


def _study(rivals: int, shortest: int, seed: int) -> optuna.Study:
    """Return the study of a race, whose first trial is of the usual rates."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        startup = max(rivals // 2, 1)
        study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup),
            pruner=optuna.pruners.SuccessiveHalvingPruner(shortest, FACTOR),
        )
    finally:
        optuna.logging.set_verbosity(before)
    study.enqueue_trial({"all": 1.0, "weight": 1.0, "curvature": 0.0, "mismatch": 0.0})
    return study


def _scaled(technique: Distillation, trial: optuna.Trial) -> Distillation:
    """Return ``technique`` with rates that a trial suggests."""
    every = trial.suggest_float("all", 1 / SPREAD, SPREAD, log=True)
    weight = every * trial.suggest_float("weight", 1 / RATIO, RATIO, log=True)
    return replace(
        technique,
        weight_rate=min(technique.weight_rate * weight, 1.0),
        scale_rate=min(technique.scale_rate * every, 1.0),
        activation_rate=min(technique.activation_rate * every, 1.0),
        bias_rate=min(technique.bias_rate * every, 1.0),
        curvature_power=trial.suggest_float("curvature", 0.0, 1.0),
        mismatch_power=trial.suggest_float("mismatch", 0.0, 1.0),
    )

"""Every gradient estimator at 2 and 3 bits: the loss that it trains to, and how soon."""

from __future__ import annotations

import math
from dataclasses import replace

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.spec.techniques import ESTIMATORS
from tests.benchmarks.challenges.lab import Lab
from tests.benchmarks.challenges.rows import Row, Rows, interval, ordered, paired, table, values
from tests.benchmarks.training import HIGH

SECTION = "estimators"
BASE = "straight_through"
CASES: tuple[tuple[str, int, int, Distillation], ...] = (
    ("resnext", 2, 2, replace(HIGH, steps=150)),
    ("resnext", 3, 3, replace(HIGH, steps=150)),
    ("g2p2", 2, 8, replace(HIGH, steps=150, batch=64)),
    ("g2p2", 3, 8, replace(HIGH, steps=150, batch=64)),
)


def measure(rows: Rows, seeds: int) -> None:
    """Train with each of them, all else the same."""
    for name, weights, activations, usual in CASES:
        lab = Lab(name, weights, activations)
        for seed in range(seeds):
            for estimator in ESTIMATORS:
                own = replace(usual, estimator=estimator)
                key = (SECTION, lab.title, estimator, seed)
                rows.make(key, lambda p=(lab, own, seed): _one(*p))


def _one(lab: Lab, technique: Distillation, seed: int) -> Row:
    outcome = lab.train(technique, seed)
    return {"loss": outcome.loss, "curve": [round(x, 6) for x in outcome.steps]}


def text(rows: list[Row]) -> list[str]:
    """Return the section."""
    lines = [
        "Weights, scales, biases and activation scales are trained, all at the same rates, for",
        "150 steps. Loss on the confirm split; beside straight-through seed by seed, as a share",
        "of its loss; and the step from which the mean of ten steps' losses is as low as the",
        "last ones of straight-through are.",
        "",
    ]
    for case in ordered(rows, "case"):
        own = [row for row in rows if row["case"] == case]
        base = values(own, "loss", variant=BASE)
        lines += [f"**{case}**, seeds: {len({row['seed'] for row in own})}", ""]
        ends = {row["seed"]: _mean(row["curve"][-10:]) for row in own if row["variant"] == BASE}
        body = []
        for name in sorted(
            ordered(own, "variant"), key=lambda n: _mean(values(own, "loss", variant=n))
        ):
            mine = [row for row in own if row["variant"] == name]
            reached = [_reached(row["curve"], ends.get(row["seed"], 0.0)) for row in mine]
            loss = values(own, "loss", variant=name)
            beside = "" if name == BASE else paired(loss, base)
            steps = "not reached" if None in reached else f"{_mean(reached):.0f}"  # type: ignore[arg-type]
            body.append([name, interval(loss), beside, steps])
        lines += [*table(["estimator", "loss", "beside straight-through", "steps"], body), ""]
    return lines


def _mean(found: list[float]) -> float:
    return sum(found) / len(found) if found else math.inf


def _reached(curve: list[float], loss: float) -> int | None:
    from tests.benchmarks.challenges.lab import Outcome

    return Outcome(0.0, tuple(curve), 0).reached(loss)

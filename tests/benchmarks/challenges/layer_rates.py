"""Rates per layer against one for all, and against AdamW as it comes, in equal time."""

from __future__ import annotations

import time
from dataclasses import replace

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.session.training import train_layers
from tests.benchmarks.challenges.lab import Lab
from tests.benchmarks.challenges.rows import Row, Rows, interval, ordered, table, values
from tests.benchmarks.training import HIGH, MIDDLE

SECTION = "layer rates"
CASES: tuple[tuple[str, int | None, Distillation], ...] = (
    ("resnext", None, replace(HIGH, steps=240)),
    ("g2p3", None, replace(HIGH, steps=240, batch=64)),
    ("g2p2", None, replace(HIGH, steps=240, batch=64)),
    ("minilm", None, replace(MIDDLE, steps=60)),
)
ALIKE = {"all layers alike": {}}
FACTORS = (0.3, 1.0, 3.0)
POWERS = {
    "by curvature, power 1": {"curvature_power": 1.0},
    "by curvature, power ½": {"curvature_power": 0.5},
    "by mismatch (φ of UI8)": {"mismatch_power": 1.0},
}
SEARCHED = "searched: a race of 6 sets"
RIVALS = 6
RACED = 0.45
"""Share of the steps that training has after a race, which takes about the rest."""


def measure(rows: Rows, seeds: int) -> None:
    """Train with each rule at three rates, and with a race in the same time."""
    for name, bits, usual in CASES:
        lab = Lab(name, bits)
        rows.make((SECTION, lab.title, "start", 0), lambda lab=lab: _start(lab))
        for seed in range(seeds):
            for rule, powers in (ALIKE | POWERS).items():
                for factor in FACTORS:
                    own = replace(scaled(usual, factor), **powers)
                    key = (SECTION, lab.title, f"{rule} × {factor:g}", seed)
                    rows.make(key, lambda p=(lab, own, seed, rule, factor): _one(*p))
            raced = replace(usual, rivals=RIVALS, steps=round(usual.steps * RACED))
            key = (SECTION, lab.title, SEARCHED, seed)
            rows.make(key, lambda p=(lab, raced, seed, SEARCHED, 1.0): _one(*p))


def scaled(technique: Distillation, factor: float) -> Distillation:
    """Return a technique with all rates multiplied."""
    return replace(
        technique,
        weight_rate=technique.weight_rate * factor,
        scale_rate=technique.scale_rate * factor,
        bias_rate=technique.bias_rate * factor,
        activation_rate=technique.activation_rate * factor,
    )


def _start(lab: Lab) -> Row:
    return {"rule": "start", "factor": 0.0, **_judged(lab, lab.start), "seconds": 0.0}


def _judged(lab: Lab, sites: object) -> Row:
    with lab.session.without_reuse():
        found, reading, _ = lab.session.measure(sites, "confirm")  # type: ignore[arg-type]
        chosen, _, _ = lab.session.measure(sites, "search")  # type: ignore[arg-type]
    return {"loss": found.loss, "metric": reading.value, "search": chosen.loss}


def _one(lab: Lab, technique: Distillation, seed: int, rule: str, factor: float) -> Row:
    began = time.process_time()
    found = train_layers(lab.session, lab.start, technique, seed=seed)
    seconds = time.process_time() - began
    spread = [min(found.layers.values()), max(found.layers.values())] if found.layers else []
    t = found.technique
    return {
        "rule": rule,
        "factor": factor,
        **_judged(lab, found.sites),
        "seconds": seconds,
        "spread": spread,
        "powers": [t.curvature_power, t.mismatch_power],
        "weight_rate": t.weight_rate,
    }


def best_factor(rows: list[Row], rule: str) -> float | None:
    """Return the factor that is best on the search split, by the mean of the seeds."""
    means = {}
    for factor in FACTORS:
        found = values(rows, "search", rule=rule, factor=factor)
        if found:
            means[factor] = sum(found) / len(found)
    return min(means, key=lambda f: means[f]) if means else None


def text(rows: list[Row]) -> list[str]:
    """Return the section."""
    lines = [
        "Each rule for the rates of layers beside each other was tried at .3, 1 and 3 times the",
        "case's usual rates; the best of the three on the search split is shown, and its time",
        "alone is. The race draws its sets of rates, powers of both rules among them, in about",
        "the same time in all: it has 45% of the steps left. Loss and metric on the confirm",
        "split.",
        "",
    ]
    for case in ordered(rows, "case"):
        own = [row for row in rows if row["case"] == case]
        lines += [f"**{case}**, seeds: {len({row['seed'] for row in own})}", ""]
        body = []
        for rule in ordered(own, "rule"):
            factor = best_factor(own, rule) if rule not in ("start", SEARCHED) else None
            where = {"rule": rule} if factor is None else {"rule": rule, "factor": factor}
            body.append(
                [
                    rule,
                    "" if factor is None else f"{factor:g}",
                    *(interval(values(own, key, **where)) for key in ("search", "loss", "metric")),
                    interval(values(own, "seconds", **where), 0),
                ]
            )
        head = ["rates", "times the usual", "loss, search", "loss", "metric", "CPU seconds"]
        lines += [*table(head, body), ""]
    return lines

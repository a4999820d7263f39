"""Gradients of few bits: rounded at random they train as float ones do, to nearest they stall."""

from __future__ import annotations

from dataclasses import replace

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.spec.gradients import GRADIENT_GRIDS, ROUND_NEAREST, ROUNDINGS
from autoquant.spec.recipe import FLOAT32
from tests.benchmarks.challenges.lab import Lab
from tests.benchmarks.challenges.rows import Row, Rows, interval, ordered, paired, table, values
from tests.benchmarks.training import HIGH

SECTION = "quantized gradients"
CASES: tuple[tuple[str, Distillation], ...] = (
    ("resnext", replace(HIGH, steps=150)),
    ("g2p2", replace(HIGH, steps=150, batch=64)),
)


def measure(rows: Rows, seeds: int) -> None:
    """Train with each format and rounding, all else the same."""
    for name, usual in CASES:
        lab = Lab(name)
        ways = [(FLOAT32, ROUND_NEAREST), *((g, r) for g in GRADIENT_GRIDS for r in ROUNDINGS)]
        rows.make((SECTION, lab.title, "start", 0), lambda lab=lab: _start(lab))
        for seed in range(seeds):
            for gradients, rounding in ways:
                own = replace(usual, gradients=gradients, gradient_rounding=rounding)
                named = gradients if gradients == FLOAT32 else f"{gradients}, {rounding}"
                key = (SECTION, lab.title, named, seed)
                rows.make(key, lambda p=(lab, own, seed): _one(*p))


def _start(lab: Lab) -> Row:
    return {"loss": lab.loss_of(lab.student()), "metric": lab.metric(lab.start)}


def _one(lab: Lab, technique: Distillation, seed: int) -> Row:
    outcome = lab.train(technique, seed)
    return {"loss": outcome.loss, "metric": lab.metric(outcome.sites)}


def text(rows: list[Row]) -> list[str]:
    """Return the section."""
    lines = [
        "The gradient by each layer's output is brought to a few bits before it goes into the",
        "layer's two products, with one scale a tensor; 150 steps. Loss and metric on the",
        "confirm split.",
        "",
    ]
    for case in ordered(rows, "case"):
        own = [row for row in rows if row["case"] == case]
        base = values(own, "loss", variant=FLOAT32)
        seeds = len({row["seed"] for row in own})
        lines += [f"**{case}**, seeds: {seeds}", ""]
        body = []
        for name in ordered(own, "variant"):
            loss = values(own, "loss", variant=name)
            beside = "" if name in (FLOAT32, "start") else paired(loss, base)
            body.append(
                [name, interval(loss), beside, interval(values(own, "metric", variant=name))]
            )
        lines += [*table(["gradients", "loss", "beside float32", "metric"], body), ""]
    return lines

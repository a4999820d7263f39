"""Labels beside distillation: shares of the task's own loss in what is made small."""

from __future__ import annotations

import functools
from dataclasses import replace

from torch import nn

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.training.schedule import Lessons
from autoquant.training.trainer import Lesson
from tests.benchmarks.challenges.lab import Lab
from tests.benchmarks.challenges.rows import Row, Rows, interval, ordered, paired, table, values
from tests.benchmarks.training import HIGH
from tests.zoo.conftest import task_module

SECTION = "labels"
SHARES = (0.0, 0.2, 0.5, 1.0)
CASES: tuple[tuple[str, int, int, Distillation], ...] = (
    ("resnext", 2, 2, replace(HIGH, steps=400)),
    ("resnext", 3, 3, replace(HIGH, steps=400)),
)


def measure(rows: Rows, seeds: int) -> None:
    """Train with each share, all else the same."""
    for name, weights, activations, usual in CASES:
        lab = Lab(name, weights, activations)
        start = (SECTION, lab.title, "start", 0)
        rows.make(start, lambda lab=lab: {"loss": lab.loss_of(lab.student()), **_metric(lab)})
        for seed in range(seeds):
            for share in SHARES:
                key = (SECTION, lab.title, f"{share:g}", seed)
                technique = replace(usual, labels=share)
                rows.make(key, functools.partial(_one, lab, technique, seed))


def _metric(lab: Lab) -> Row:
    return {"metric": lab.metric(lab.start)}


def _one(lab: Lab, technique: Distillation, seed: int) -> Row:
    lab.lesson = lesson(lab)
    outcome = lab.train(technique, seed)
    return {"loss": outcome.loss, "metric": lab.metric(outcome.sites)}


def lesson(lab: Lab) -> Lesson:
    """Return what is learned from, with the digits that the float model learned from, too."""
    module = task_module(lab.case.model)
    x, y = (part[: -module.TEST].split(module.BATCH) for part in module.digits())
    return replace(lab.lesson, inputs=Lessons(x, y), loss=nn.functional.cross_entropy)


def text(rows: list[Row]) -> list[str]:
    """Return the section."""
    lines = [
        "Cross-entropy with labels has a share of what is made small, and the divergence from the",
        "float model the rest: 400 steps on the digits that the float model learned from. Loss",
        "(that divergence) and metric on the confirm split.",
        "",
    ]
    for case in ordered(rows, "case"):
        own = [row for row in rows if row["case"] == case]
        lines += [f"**{case}**, seeds: {len({row['seed'] for row in own})}", ""]
        base = values(own, "loss", variant="0")
        body = []
        for name in ordered(own, "variant"):
            loss = values(own, "loss", variant=name)
            beside = "" if name in ("0", "start") else paired(loss, base)
            body.append(
                [name, interval(loss), beside, interval(values(own, "metric", variant=name))]
            )
        lines += [*table(["share of labels", "loss", "beside none", "metric"], body), ""]
    return lines

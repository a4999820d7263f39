"""Sign and magnitude of gradients: which of the two training can do without, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.training.student import Student
from autoquant.training.trainer import Lesson, Trainer
from tests.benchmarks.challenges.lab import Lab
from tests.benchmarks.challenges.rows import Row, Rows, interval, ordered, paired, table, values
from tests.benchmarks.training import HIGH

SECTION = "signs"
WHOLE = "sign and magnitude"
SIGNS, MAGNITUDES = "sign alone", "magnitudes of other weights"
FLIPPED = {"a tenth of the signs flipped": 0.1, "a quarter of the signs flipped": 0.25,
           "half of the signs flipped": 0.5}  # fmt: skip
SMALL = "signs flipped of the smaller half"
VARIANTS = (WHOLE, SIGNS, MAGNITUDES, SMALL, *FLIPPED)
CASES: tuple[tuple[str, Distillation], ...] = (
    ("resnext", replace(HIGH, steps=150)),
    ("g2p2", replace(HIGH, steps=150, batch=64)),
)


class Changed(Trainer):
    """A trainer whose gradients lose their sign, or their magnitude."""

    def __init__(
        self,
        variant: str,
        student: Student,
        lesson: Lesson,
        technique: Distillation,
        layers: Mapping[str, float],
    ) -> None:
        self._variant = variant
        super().__init__(student, lesson, technique, layers)

    def _gradients(self, number: int) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
        loss, found = super()._gradients(number)
        generator = torch.Generator().manual_seed((self.lesson.seed << 20) + number)
        return loss, {key: changed(g, self._variant, generator) for key, g in found.items()}


def changed(gradient: Tensor, variant: str, generator: torch.Generator) -> Tensor:
    """Return a gradient as a variant has it."""
    flat = gradient.flatten()
    if variant == SIGNS:  # of the same length, as far as a quantizer's clipping lets through
        found = flat.sign() * flat.abs().sum() / flat.count_nonzero().clamp(min=1)
    elif variant == MAGNITUDES:
        order = torch.randperm(flat.numel(), generator=generator)
        found = flat.sign() * flat.abs()[order]
    elif variant in FLIPPED:
        drawn = torch.rand(flat.shape, generator=generator, dtype=torch.float32)
        found = torch.where(drawn < FLIPPED[variant], -flat, flat)
    elif variant == SMALL:
        found = torch.where(flat.abs() < flat.abs().median(), -flat, flat)
    else:
        found = flat
    return found.reshape(gradient.shape)


def measure(rows: Rows, seeds: int) -> None:
    """Train with each change, all else the same."""
    for name, usual in CASES:
        lab = Lab(name)
        for seed in range(seeds):
            for variant in VARIANTS:
                key = (SECTION, lab.title, variant, seed)
                rows.make(key, lambda p=(lab, usual, variant, seed): _one(*p))
            for delta in ("clipped", "ewgs"):
                own = replace(usual, estimator=delta)
                key = (SECTION, lab.title, f"estimator {delta}", seed)
                rows.make(key, lambda p=(lab, own, WHOLE, seed): _one(*p))


def _one(lab: Lab, technique: Distillation, variant: str, seed: int) -> Row:
    outcome = lab.train(technique, seed, make=lambda *a: Changed(variant, *a))
    return {"loss": outcome.loss, "findings": outcome.findings}


def text(rows: list[Row]) -> list[str]:
    """Return the section."""
    lines = [
        "Gradients of all parameters are changed before Adam sees them, all else is the same:",
        "150 steps at the same rates. `sign alone` gives all the mean magnitude, `magnitudes of",
        "other weights` each sign the magnitude of another number of the same tensor. Below",
        "them are the estimators that join the two: `ewgs` makes a gradient larger or smaller",
        "by its sign and the rounding error, beside `clipped`, which it is without that. Loss",
        "on the confirm split.",
        "",
    ]
    for case in ordered(rows, "case"):
        own = [row for row in rows if row["case"] == case]
        base = values(own, "loss", variant=WHOLE)
        lines += [f"**{case}**, seeds: {len({row['seed'] for row in own})}", ""]
        body = [
            [
                name,
                interval(values(own, "loss", variant=name)),
                "" if name == WHOLE else paired(values(own, "loss", variant=name), base),
            ]
            for name in ordered(own, "variant")
        ]
        lines += [*table(["gradient", "loss", "beside the whole one"], body), ""]
    return lines

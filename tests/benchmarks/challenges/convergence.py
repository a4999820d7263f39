"""Which rates quantized weights converge at, beside float ones: the same start, the same data.

The quantized network at its fewest bits is the start of all: its real weights lie on the finer
grids too, so that all students compute the same function and differ in their grids alone. Rates are
in steps of the coarsest grid, so that all move by the same amounts. Weights alone are trained.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.training.mismatch import Unrounded
from tests.benchmarks.challenges.lab import Lab
from tests.benchmarks.challenges.plots import chart
from tests.benchmarks.challenges.rows import Row, Rows, interval, ordered, table, values

SECTION = "convergence"
FLOAT = "float"
GRIDS = (FLOAT, 8, 4, 3, 2)
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
STEPS = {"resnext": (150, 32), "g2p2": (150, 64)}
"""Steps, and samples of each."""


def measure(rows: Rows, seeds: int) -> None:
    """Train at every rate on every grid."""
    for name, (steps, batch) in STEPS.items():
        lab = Lab(name, 2, 8)
        rows.make((SECTION, lab.title, "start", 0), lambda lab=lab: _start(lab))
        for seed in range(seeds):
            for grid in GRIDS:
                for rate in RATES:
                    key = (SECTION, lab.title, f"{grid} {rate}", seed)
                    usual = Distillation(steps=steps, batch=batch)
                    rows.make(key, lambda *a, p=(lab, grid, rate, seed, usual): _one(*p))


def _start(lab: Lab) -> Row:
    return {"loss": lab.loss_of(lab.student()), "grid": "start", "rate": 0.0}


def _one(lab: Lab, grid: str | int, rate: float, seed: int, usual: Distillation) -> Row:
    start, ratio = lab.on_finer_grids(8 if grid == FLOAT else int(grid))
    technique = replace(
        usual,
        weight_rate=rate * ratio,
        scale_rate=0.0,
        bias_rate=0.0,
        activation_rate=0.0,
        freezing=1.0,
    )
    estimator = Unrounded() if grid == FLOAT else None
    outcome = lab.train(technique, seed, estimator=estimator, start=start)
    return {"loss": outcome.loss, "grid": grid, "rate": rate, "findings": outcome.findings}


def best_rates(rows: list[Row], case: str) -> dict[str | int, float]:
    """Return grid → the rate of the least mean loss."""
    found: dict[str | int, float] = {}
    for grid in GRIDS:
        means = {}
        for rate in RATES:
            known = values(rows, "loss", case=case, grid=grid, rate=rate)
            if known:
                means[rate] = sum(known) / len(known)
        if means:
            found[grid] = min(means, key=lambda r: means[r])
    return found


def text(rows: list[Row]) -> list[str]:
    """Return the section."""
    lines = [
        "Weights are trained alone, by distillation, from one start: the network with 2-bit",
        "weights, fitted. The same real weights lie on the grids of 3, 4 and 8 bits, and in the",
        "float network, so that all compute the same function at first and differ in what",
        "rounds afterwards. Rates are in steps of the 2-bit grid: by about so much Adam moves",
        "each weight a step. Loss on the confirm split after training (mean of seeds, 95% by",
        "Student's t).",
        "",
    ]
    for case in ordered(rows, "case"):
        own = [row for row in rows if row["case"] == case]
        start = values(own, "loss", grid="start")
        best = best_rates(own, case)
        seeds = len({row["seed"] for row in own})
        lines += [f"**{case}**, loss at the start {start[0]:.4f}, seeds: {seeds}", ""]
        body = []
        for rate in RATES:
            cells = [interval(values(own, "loss", grid=grid, rate=rate)) for grid in GRIDS]
            marked = [
                f"**{c}**" if best.get(g) == rate else c for g, c in zip(GRIDS, cells, strict=True)
            ]
            body.append([f"{rate:g}", *marked])
        head = ["rate", *(g if g == FLOAT else f"{g} bits" for g in GRIDS)]
        lines += [*table(head, body), ""]
        lines += [f"![{case}](training/{_file(case)})", ""]
    return lines


def _file(case: str) -> str:
    return f"convergence-{case.split()[0].lower()}.svg"


def plot(rows: list[Row], folder: Path) -> None:
    """Draw a chart for each case."""
    for case in ordered(rows, "case"):
        own = [row for row in rows if row["case"] == case]
        with chart(folder / _file(case), "rate, in steps of the 2-bit grid", "loss") as axes:
            for grid in GRIDS:
                points = [
                    (rate, sum(found) / len(found))
                    for rate in RATES
                    if (found := values(own, "loss", grid=grid, rate=rate)) and max(found) < 1e3
                ]
                if points:
                    label = grid if grid == FLOAT else f"{grid} bits"
                    axes.plot(*zip(*points, strict=True), marker="o", label=label)
            start = values(own, "loss", grid="start")
            axes.axhline(start[0], color="grey", linestyle=":", label="start")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(case)
            axes.legend()

"""The many tiny weights that rounding makes 0: how many, by which range, and if they matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from autoquant.nn.slots import StandIn
from autoquant.quant.blocks import from_blocks, from_matrix
from autoquant.spec.recipe import SiteRecipe, WeightScheme
from autoquant.training.guard import vanished
from autoquant.training.student import Student
from tests.benchmarks.challenges.lab import Lab
from tests.benchmarks.challenges.rows import Row, Rows, ordered, table
from tests.benchmarks.training import HIGH

SECTION = "small weights"
CASES = (("resnext", 2, 2), ("g2p2", 2, 8), ("minilm", 2, 8), ("mobilenet_v2", 4, 8))
RANGES = (("per_tensor", "max"), ("per_tensor", "mse"), ("per_channel", "max"),
          ("per_channel", "mse"))  # fmt: skip
FITTED, TRAINED = "fitted", "fitted and trained"


def measure(rows: Rows, seeds: int) -> None:
    """Count the weights that become 0, and put those alone at 0 in the float model."""
    for name, weights, activations in CASES:
        lab = Lab(name, weights, activations)
        for granularity, calibration in RANGES:
            key = (SECTION, lab.title, f"{granularity}, {calibration}", 0)
            rows.make(key, lambda p=(lab, granularity, calibration): _one(p[0], _rounded(*p)))
        rows.make((SECTION, lab.title, FITTED, 0), lambda lab=lab: _one(lab, lab.start))
        if name in ("resnext", "g2p2"):
            own = replace(HIGH, steps=300, batch=32)
            rows.make(
                (SECTION, lab.title, TRAINED, 0),
                lambda lab=lab, own=own: _one(lab, lab.train(own, 0).sites),
            )


def _rounded(lab: Lab, granularity: str, calibration: str) -> dict[str, SiteRecipe]:
    """Return the case's recipe with weights rounded to the nearest of a grid of that range."""
    found = {}
    for name, site in lab.start.items():
        weight = site.weight
        if weight is not None:
            weight = WeightScheme(weight.bits, granularity, weight.scheme, calibration)
            site = replace(site, weight=weight, learned=None)
        found[name] = site
    return found


def _one(lab: Lab, sites: Mapping[str, SiteRecipe]) -> Row:
    student = lab.student(start=sites)
    counts = [vanished(learner) for learner in student.learners.values()]
    lost = sum(gone for gone, _ in counts) / sum(alive for _, alive in counts)
    energy = _energy(student)
    row = {
        "lost": lost,
        "energy": energy,
        "loss": lab.loss_of(student),
        "metric": lab.metric(sites),
        "float": lab.float_metric,
    }
    student.rest()
    return row | {"zeroed": _zeroed(lab, student)}


def _energy(student: Student) -> float:
    """Return the share of Σw² that the weights that became 0 have."""
    gone = whole = 0.0
    for learner in student.learners.values():
        source = learner.blocks_of(learner.slot.target).double()
        gone += float(source.square()[learner.integers() == 0].sum())
        whole += float(source.square().sum())
    return gone / whole


def _zeroed(lab: Lab, student: Student) -> float:
    """Return the metric of the float model where those weights alone are 0, others in float."""
    applier, session = student.applier, lab.session
    applier.to_float()
    with torch.no_grad():
        for learner in student.learners.values():
            blocks = learner.blocks_of(learner.slot.target)
            blocks = torch.where(learner.integers() == 0, 0.0, blocks)
            rows, columns = learner.site.matrix
            matrix = from_blocks(blocks, (rows, columns))
            weight = from_matrix(matrix, learner.site.shape, learner.site.channel_axis)
            learner.slot.stand_in = StandIn(weight.to(learner.slot.parameter.dtype), _own)
            learner.slot.switch(None, None)
        try:
            return session.evaluator.read(session.model, "confirm").value
        finally:
            student.rest()


def _own(bias: torch.Tensor | None) -> torch.Tensor | None:
    return bias


def text(rows: list[Row]) -> list[str]:
    """Return the section."""
    lines = [
        "`became 0` is the share of the weights, not 0 in the float model, that are in the",
        "quantized one; `of Σw²` how much of the sum of squares of all weights those had.",
        "`float model without them` is the metric of the float model where these weights alone",
        "are 0 and all else is as it was: whether it matters that they are gone. Ranges: the",
        "largest magnitude (max) or least squared error (mse), for a tensor or each channel;",
        "fitted by `autoquant tune`, trained for 300 steps. Loss and metrics on the confirm",
        "split.",
        "",
    ]
    for case in ordered(rows, "case"):
        own = [row for row in rows if row["case"] == case]
        body = [
            [
                row["variant"],
                f"{row['lost']:.1%}",
                f"{row['energy']:.2%}",
                f"{row['loss']:.4f}",
                f"{row['metric']:.4f}",
                f"{row['zeroed']:.4f}",
            ]
            for row in own
        ]
        head = ["weights", "became 0", "of Σw²", "loss", "metric", "float model without them"]
        lines += [f"**{case}**, float metric {own[0]['float']:.4f}", "", *table(head, body), ""]
    return lines

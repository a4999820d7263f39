"""Gradient mismatch, layer by layer: what estimators say beside what the loss really does."""

from __future__ import annotations

import statistics

from autoquant.spec.techniques import ESTIMATORS
from autoquant.training.mismatch import Mismatch, mismatch, smooth_gradients
from autoquant.training.probes import Pupil, slopes
from tests.benchmarks.challenges.lab import Lab
from tests.benchmarks.challenges.rows import Row, Rows, ordered, table

SECTION = "mismatch"
DIRECTIONS = 16
STEP, ALONG = 0.5, 0.1
"""How far a weight goes on the average, in steps of its grid: along random directions, where many
must get to another integer, and along a gradient."""
CASES = (("resnext", 2, 2), ("resnext", 4, 4), ("g2p2", 2, 8), ("g2p2", 4, 8))
SHOWN = "lsq"


def measure(rows: Rows, seeds: int) -> None:
    """Ask every estimator of every layer, at the start of training."""
    for name, weights, activations in CASES:
        lab = Lab(name, weights, activations)
        if all(
            any(r["case"] == lab.title and r["variant"] == e for r in rows.of_section(SECTION))
            for e in ESTIMATORS
        ):
            continue
        pupil = Pupil(lab.student(), lab.lesson, lab.asked())
        smooth = smooth_gradients(pupil)
        measured = slopes(pupil, DIRECTIONS, step=STEP)
        for estimator in ESTIMATORS:
            chosen = ESTIMATORS.get(estimator)()
            key = (SECTION, lab.title, estimator, 0)
            asked = lambda p=(pupil, chosen, smooth, measured): {  # noqa: E731
                "layers": {n: _plain(m) for n, m in mismatch(*p, step=ALONG).items()}
            }
            rows.make(key, asked)


def _plain(found: Mismatch) -> Row:
    return {
        "cosine": found.smooth.cosine,
        "signs": found.smooth.signs,
        "norm": found.smooth.norm_ratio,
        "noise": found.smooth.noise,
        "descent": found.descent,
        "slope": found.check.slope,
        "correlation": found.check.correlation,
        "low": found.check.correlation_low,
        "high": found.check.correlation_high,
    }


def text(rows: list[Row]) -> list[str]:
    """Return the section."""
    lines = [
        "Of each layer's weight at the start of training, on 128 samples. `cosine`, `signs`",
        "(the share of the gradient's magnitude whose sign is right) and `norm` compare the",
        "estimate with the exact gradient of the float network of the same weights, whose",
        "activations are clipped as in the quantized one but not rounded. `descent` is what the",
        "loss of the network that rounds really does where the layer goes along the estimate,",
        f"{ALONG:g} steps of its grid for each weight on the average, as a share of what the",
        "estimate foretells: 1 is as foretold, below 0 the loss rises, which `rising` counts.",
        "`correlation` is that of measured and foretold slopes along",
        f"{DIRECTIONS} random directions, {STEP:g} steps for each weight (95%, Fisher). Medians of",
        "the layers. `stochastic` rounds at random in its forward pass and so is the gradient of",
        "another network, whose layers don't fit each other as those of the start do.",
        "",
    ]
    for case in ordered(rows, "case"):
        own = [row for row in rows if row["case"] == case]
        body = []
        for row in own:
            layers = list(row["layers"].values())
            middle = {k: statistics.median(x[k] for x in layers) for k in layers[0]}
            rising = sum(x["descent"] < 0 for x in layers)
            body.append(
                [
                    row["variant"],
                    *(f"{middle[k]:.2f}" for k in ("cosine", "signs", "norm", "descent")),
                    f"{rising} of {len(layers)}",
                    f"{middle['correlation']:.2f}",
                ]
            )
        head = ["estimator", "cosine", "signs", "norm", "descent", "rising", "correlation"]
        lines += [f"**{case}**", "", *table(head, body), ""]
        shown = next(row for row in own if row["variant"] == SHOWN)
        layers = [
            [
                name,
                *(f"{x[k]:.2f}" for k in ("cosine", "signs", "norm", "descent")),
                f"{x['correlation']:.2f} ({x['low']:.2f} … {x['high']:.2f})",
            ]
            for name, x in shown["layers"].items()
        ]
        lines += [
            f"<details><summary>Each layer of {case}, by {SHOWN}</summary>",
            "",
            *table(["layer", "cosine", "signs", "norm", "descent", "correlation"], layers),
            "",
            "</details>",
            "",
        ]
    return lines

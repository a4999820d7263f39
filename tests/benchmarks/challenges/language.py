"""BERT-like models: what breaks them at 8 bits already, and what brings them back, down to 2."""

from __future__ import annotations

from collections.abc import Mapping

from autoquant.models.noninferiority import drop_interval
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from tests.benchmarks.challenges.lab import Lab
from tests.benchmarks.challenges.rows import Row, Rows, ordered, table

SECTION = "language"
WAYS: tuple[tuple[str, tuple[int, str, str], tuple[int, str, str, str]], ...] = (
    ("W8 a tensor, max; A8 a tensor, symmetric, max",
     (8, "per_tensor", "max"), (8, "per_tensor", "symmetric", "max")),
    ("W8 a channel, max; A8 a tensor, symmetric, max",
     (8, "per_channel", "max"), (8, "per_tensor", "symmetric", "max")),
    ("W8 a channel, max; A8 a tensor, asymmetric, max",
     (8, "per_channel", "max"), (8, "per_tensor", "asymmetric", "max")),
    ("W8 a channel, max; A8 a tensor, entropy",
     (8, "per_channel", "max"), (8, "per_tensor", "asymmetric", "entropy")),
    ("W8 a channel, max; A8 a tensor, percentile",
     (8, "per_channel", "max"), (8, "per_tensor", "asymmetric", "percentile_99.9")),
    ("W8 a channel, max; A8 a token, max",
     (8, "per_channel", "max"), (8, "per_token", "asymmetric", "max")),
    ("W4 a channel, mse; A8 a token, max",
     (4, "per_channel", "mse"), (8, "per_token", "asymmetric", "max")),
    ("W2 a channel, mse; A8 a token, max",
     (2, "per_channel", "mse"), (8, "per_token", "asymmetric", "max")),
)  # fmt: skip


def measure(rows: Rows, seeds: int) -> None:
    """Measure MiniLM with all layers alike, by each way."""
    lab = Lab("minilm")
    for title, weight, activation in WAYS:
        key = (SECTION, "MiniLM, WordSim353", title, 0)
        rows.make(key, lambda p=(lab, weight, activation): _one(p[0], _sites(*p)))
    key = (SECTION, "MiniLM, WordSim353", "W2 a channel (embeddings 4), fitted; A8 a tensor", 0)
    rows.make(key, lambda: _one(lab, lab.start))


def _sites(
    lab: Lab, weight: tuple[int, str, str], activation: tuple[int, str, str, str]
) -> dict[str, SiteRecipe]:
    bits, granularity, calibration = weight
    found = {}
    for site in lab.session.prepared.sites:
        own = WeightScheme(bits, granularity, "symmetric", calibration)
        found[site.name] = SiteRecipe(
            own, ActivationScheme(*activation) if site.activation else None
        )
    return found


def _one(lab: Lab, sites: Mapping[str, SiteRecipe]) -> Row:
    base = lab.session.baseline("confirm")
    with lab.session.without_reuse():
        found, reading, _ = lab.session.measure(sites, "confirm")
    assert base.evidence is not None
    assert reading.evidence is not None
    sure = drop_interval(base.evidence, reading.evidence, base.metric)
    return {
        "loss": found.loss,
        "metric": reading.value,
        "float": base.value,
        "drop": found.drop,
        "low": sure.low,
        "high": sure.high,
    }


def text(rows: list[Row]) -> list[str]:
    """Return the section."""
    lines = [
        "All layers alike. Of the last row layers were fitted to each other by `autoquant",
        "tune`; what training adds to it is in the table above. Search finds recipes layer by",
        "layer on top of these (`reports/zoo.md`). Confirm split; drop in points of Spearman's",
        "ρ (95%).",
        "",
    ]
    for case in ordered(rows, "case"):
        own = [row for row in rows if row["case"] == case]
        body = [
            [
                row["variant"],
                f"{row['loss']:.4f}",
                f"{row['metric']:.4f}",
                "{:+.2f} ({:+.2f} … {:+.2f})".format(
                    *(100 * row[k] for k in ("drop", "low", "high"))
                ),
            ]
            for row in own
        ]
        lines += [f"**{case}**, float {own[0]['float']:.4f}", ""]
        lines += [*table(["recipe", "loss", "metric", "drop in points"], body), ""]
    return lines

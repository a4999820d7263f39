"""What smoothed and rotated inputs are worth: ``python -m tests.benchmarks.transforms``.

All weights have as many bits, and activations 8, calibrated by squared error (of weights that of
the output, with corrected biases). Which inputs are transformed, and how, is settled as a search
settles it, on the calibration data. Metric and loss are of the confirm split, by the reference; how
long the split of the search takes is measured by the engine, beside the float model in the same
process. Writes ``reports/transforms.md``.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click

from autoquant.heap import keep_freed_memory
from autoquant.nn.transforms import transforms_of
from autoquant.session.session import Session
from autoquant.session.transforms import transform_inputs
from autoquant.spec.recipe import SiteRecipe
from autoquant.spec.space import SearchSpace
from autoquant.spec.uniform import uniform
from tests.benchmarks.evaluation import line
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.techniques import HEAD, opened, row_of

REPORT = Path(__file__).resolve().parents[2] / "reports" / "transforms.md"
MODELS = ("mobilenet_v2", "minilm")
GRIDS = (
    (8, "per_channel", "symmetric", "per_tensor"),
    (8, "per_tensor", "symmetric", "per_tensor"),
    (8, "per_channel", "symmetric", "per_token"),
    (4, "per_channel", "asymmetric", "per_tensor"),
)
"""Bits, granularity and scheme of weights, and granularity of activations."""
WAYS = {"as they are": "", "smoothed": "smoothing: [0, 0.5, 1]", "rotated": "rotation: [0, 64]"}
SPACE = """\
autoquant_space: 1
name: transforms
rules:
  - weight_bits: [{bits}]
    weight_granularity: [{granularity}]
    weight_scheme: [{scheme}]
    weight_calibration: [output_mse]
    correction: [bias]
    activation_bits: [8]
    activation_granularity: [{activation}]
    activation_calibration: [mse]
    {way}
"""
PASSES = 5


def rows_of(name: str, folder: Path) -> list[list[str]]:
    """Return the rows of one model, whose inputs are transformed in one way or another."""
    rows = []
    for bits, granularity, scheme, activation in GRIDS:
        if activation == "per_token" and name == "mobilenet_v2":
            continue  # whose layers have no tokens
        for title, way in WAYS.items():
            if "rotation" in way and name == "mobilenet_v2":
                continue  # whose layers are convolutions, all but one
            session = opened(name, folder)
            text = SPACE.format(
                bits=bits,
                granularity=granularity,
                scheme=scheme,
                activation=activation,
                way=way,
            )
            spaces = SearchSpace.parse(text, "transforms").resolve(session.prepared.sites)
            began = time.process_time()
            transform_inputs(session, spaces)
            seconds = time.process_time() - began
            done = transforms_of(session.prepared)
            how = title
            if done:
                how = f"{len(done)} of {len(spaces)} {title}"
            elif way:
                how = f"{title}: taken back"
            sites = uniform(spaces, bits)
            said = f"weights {granularity} {scheme}, activations {activation}: {how}"
            row = row_of(session, name, bits, said, sites, seconds)
            rows.append([*row, times(session, sites)])
    return rows


def times(session: Session, sites: dict[str, SiteRecipe]) -> str:
    """Return how many times as fast as the float model the engine is, best of PASSES each."""
    ours, theirs = [], []
    with session.without_reuse():
        for _ in range(PASSES):
            session.applier.apply(sites)
            ours.append(session.evaluator.read(session.model, "search").seconds)
            session.applier.to_float()
            theirs.append(session.evaluator.read(session.model, "search").seconds)
    return f"{min(theirs) / min(ours):.2f}"


@click.command()
def main() -> None:
    """Measure and write the report."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in MODELS for row in rows_of(name, Path(folder))]
    head = [*HEAD, "times as fast as float"]
    text = [
        "# What smoothed and rotated inputs are worth",
        "",
        "By `python -m tests.benchmarks.transforms`. All weights have as many bits, activations 8,",
        "calibrated by squared error (`mse`, of weights `output_mse` with corrected biases).",
        "Smoothed: `smoothing: [0, 0.5, 1]`, rotated: `rotation: [0, 64]`. Loss (how far outputs",
        "are from the float model's) and metric are of the confirm split, by the reference; CPU",
        "seconds are those of choosing. The last column is the time of the float model on the",
        "search split over that of the engine, best of 5 passes in turns.",
        "",
        describe_machine(),
        "",
        line(head),
        line(["---"] * len(head)),
        *map(line, rows),
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

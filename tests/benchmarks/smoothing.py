"""What smoothed inputs are worth: ``python -m tests.benchmarks.smoothing``.

All weights and activations have 8 bits, calibrated by squared error (of weights that of the output,
with corrected biases); weights have a scale for each channel, or one for all. Which inputs are
smoothed, and how, is settled as a search settles it, on the calibration data. Metric and loss are
of the confirm split, by the reference. Writes ``reports/smoothing.md``.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click

from autoquant.kernels.cpu.heap import keep_freed_memory
from autoquant.nn.transforms import transforms_of
from autoquant.session.transforms import transform_inputs
from autoquant.spec.space import SearchSpace
from autoquant.spec.uniform import uniform
from tests.benchmarks.evaluation import line
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.techniques import HEAD, opened, row_of

REPORT = Path(__file__).resolve().parents[2] / "reports" / "smoothing.md"
MODELS = ("mobilenet_v2", "minilm")
EIGHT = """\
autoquant_space: 1
name: smoothing
rules:
  - weight_bits: [8]
    weight_granularity: [{granularity}]
    weight_calibration: [output_mse]
    correction: [bias]
    activation_bits: [8]
    activation_calibration: [mse]
    smoothing: {exponents}
"""


def rows_of(name: str, folder: Path) -> list[list[str]]:
    """Return the rows of one model with 8 bits, with and without smoothed inputs."""
    rows = []
    for granularity in ("per_channel", "per_tensor"):
        for exponents in ("[0]", "[0, 0.5, 1]"):
            session = opened(name, folder)
            text = EIGHT.format(granularity=granularity, exponents=exponents)
            spaces = SearchSpace.parse(text, "smoothing").resolve(session.prepared.sites)
            began = time.process_time()
            transform_inputs(session, spaces)
            seconds = time.process_time() - began
            count = len(transforms_of(session.prepared))
            how = f", {count} of {len(spaces)} layers smoothed" if len(exponents) > 3 else ""
            sites = uniform(spaces, 8)
            rows.append(row_of(session, name, 8, f"{granularity}{how}", sites, seconds))
    return rows


@click.command()
def main() -> None:
    """Measure and write the report."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in MODELS for row in rows_of(name, Path(folder))]
    text = [
        "# What smoothed inputs are worth",
        "",
        "By `python -m tests.benchmarks.smoothing`. All weights and activations have 8 bits,",
        "calibrated by squared error (`mse`, of weights `output_mse` with corrected biases);",
        "weights have a scale for each channel, or one for all. Loss (how far outputs are from the",
        "float model's) and metric are of the confirm",
        "split, by the reference; seconds are those of choosing factors.",
        "",
        describe_machine(),
        "",
        line(HEAD),
        line(["---"] * len(HEAD)),
        *map(line, rows),
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

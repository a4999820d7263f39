"""What exported models are in their runtimes: ``python -m tests.benchmarks.export``.

Each model of the zoo gets the recipe of 8 bits everywhere (a scale per channel for weights, one for
the tensor and a zero point for activations), is written by each exporter, and measured there on the
confirm split, beside the float model in the same runtime. Writes ``reports/export.md``; rows of
models that are not named stay.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch

from autoquant.export.exporter import EXPORTERS
from autoquant.session.exporting import Exported, export
from autoquant.session.session import open_session
from autoquant.spec.recipe import Recipe
from autoquant.spec.space import SearchSpace
from autoquant.spec.uniform import uniform
from autoquant.study.source import Source
from tests.benchmarks.evaluation import line
from tests.benchmarks.machine import machines
from tests.benchmarks.zoo import TITLES
from tests.zoo.conftest import HERE, task_module

REPORT = Path(__file__).resolve().parents[2] / "reports" / "export.md"
MODELS = ("mobilenet_v2", "minilm", "resnext")
SPACE = """\
autoquant_space: 1
name: export
rules:
  - weight_bits: [8]
    weight_granularity: [per_channel]
    weight_scheme: [symmetric]
    weight_calibration: [mse]
    activation_bits: [8]
    activation_scheme: [asymmetric]
    activation_calibration: [mse]
"""
HEAD = [
    "model", "runtime", "metric: float", "recipe", "in the runtime", "outputs off by",
    "products in integers", "ms, float", "ms", "times faster", "MB",
]  # fmt: skip


def rows_of(name: str, folder: Path) -> list[list[str]]:
    """Return a row for each exporter."""
    module = task_module(name)
    path = folder / f"{name}.pt"
    if name == "resnext":
        module.train(path)
    source = Source(str(path if name == "resnext" else module.weights()), str(HERE / f"{name}.py"))
    task = source.load_task()
    session = open_session(source.load(task), task, torch.device("cpu"), baselines=())
    spaces = SearchSpace.parse(SPACE, "export").resolve(session.prepared.sites)
    recipe = Recipe(uniform(spaces, 8), folded=session.prepared.folded)
    rows = []
    for kind in EXPORTERS:
        target = folder / f"{name}{EXPORTERS.get(kind).suffix}"
        rows.append(row_of(name, export(source.load(task), task, recipe, kind, target)))
        print(line(rows[-1]), flush=True)
    return rows


def row_of(name: str, found: Exported) -> list[str]:
    """Return what is said of one file."""
    done = "" if found.integers is None else "{} of {}".format(*found.integers)
    return [
        TITLES[name],
        found.runtime,
        f"{found.baseline:.4f}",
        f"{found.reference:.4f}",
        f"{found.value:.4f}",
        f"{found.difference:.2%}",
        done,
        f"{found.float_ms:.1f}",
        f"{found.ms:.1f}",
        f"{found.speedup:.2f}",
        f"{found.size_bytes / 1e6:.2f}",
    ]


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(MODELS))
def main(names: tuple[str, ...]) -> None:
    """Measure NAMES (default: all models) and write the report."""
    chosen = [name for name in MODELS if not names or name in names]
    with tempfile.TemporaryDirectory() as folder:
        new = {name: rows_of(name, Path(folder)) for name in chosen}
    before = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
    rows = []
    for name in MODELS:
        kept = [row for row in before.splitlines() if row.startswith(f"| {TITLES[name]} |")]
        rows += [line(row) for row in new[name]] if name in new else kept
    text = [
        "# Models in other runtimes",
        "",
        "By `python -m tests.benchmarks.export`. All weights and activations at 8 bits, written by",
        "`autoquant export --to`, and run by the runtime that the file is for; the float model is",
        "written and run the same way, in float32. Metrics are of the confirm split; `outputs off",
        "by` is the root of noise over signal beside the recipe's own outputs on one batch;",
        "`products in integers` is what the runtime says of the program that it made. Milliseconds",
        f"are of one batch on {torch.get_num_threads()} threads. g2p has recurrent layers, which",
        "are refused.",
        "",
        machines(before, [TITLES[name] for name in chosen], [TITLES[name] for name in MODELS]),
        "",
        line(HEAD),
        line(["---"] * len(HEAD)),
        *rows,
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

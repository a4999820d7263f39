"""The whole search on the real models of the zoo: ``python -m tests.benchmarks.zoo``.

For each model: float metric, the recipe that ``autoquant search`` finds with the default space, and
the naive recipe beside it: every layer at the same whole number of bits (rounded up), ranges by
max, one scale for each tensor. All metrics are those of the confirm split, which no search saw.
Writes ``reports/zoo.md``.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch

from autoquant.cli.failures import STATUSES
from autoquant.models.files import load
from autoquant.models.task import load_task
from autoquant.optimize.evaluate import measure_recipe
from autoquant.report.tables import megabytes
from autoquant.session.session import open_session
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme
from tests.benchmarks.machine import describe_machine
from tests.zoo.conftest import HERE, task_module

REPORT = Path(__file__).resolve().parents[2] / "reports" / "zoo.md"
TITLES = {
    "mobilenet_v2": "MobileNetV2, 1,000 ImageNet photos",
    "minilm": "MiniLM (BERT 6×384), WordSim353",
    "g2p": "g2p (GRU encoder-decoder), CMUdict",
    "resnext": "ResNeXt (8 groups), MNIST digits",
}


def naive(names: list[str], activated: set[str], bits: int) -> Recipe:
    """Return the recipe that asks for no thought: max, per tensor, one width for all."""
    weight = WeightScheme(bits, "per_tensor", "symmetric", "max")
    activation = ActivationScheme(8, "per_tensor", "symmetric", "max")
    return Recipe({n: SiteRecipe(weight, activation if n in activated else None) for n in names})


def measure(name: str, trials: int) -> list[str]:
    """Search one model and return its row."""
    module = task_module(name)
    with tempfile.TemporaryDirectory() as folder:
        if name == "resnext":
            model = Path(folder) / "resnext.pt"
            module.train(model)
        else:
            model = module.weights()
        task_file = HERE / f"{name}.py"
        words = [sys.executable, "-m", "autoquant", "search", str(model), "--task", str(task_file)]
        words += ["--max-drop", "1%", "--trials", str(trials), "--json"]
        done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, text=True)
        if done.returncode not in STATUSES.values():
            raise SystemExit(f"the search of {name} ended with status {done.returncode}")
        result = json.loads(done.stdout)
        task = load_task(task_file)
        loaded = load(model, load_model=task.load_model)
        session = open_session(loaded, task, torch.device("cpu"))
        bits = math.ceil(result["average_weight_bits"] - 1e-9)
        sites = session.prepared.sites
        recipe = naive([s.name for s in sites], {s.name for s in sites if s.activation}, bits)
        again = load(model, load_model=task.load_model)
        plain = measure_recipe(again, task, recipe, "cpu").splits["confirm"]
    metric = result["metric"]
    low, high = metric["interval"]
    return [
        TITLES[name],
        metric["name"],
        f"{metric['float']:.4f}",
        f"{metric['quantized']:.4f}",
        f"{100 * metric['drop']:+.2f} ({100 * low:+.2f} … {100 * high:+.2f})",
        f"{result['average_weight_bits']:.2f}",
        f"{megabytes(result['size_bytes'])} of {megabytes(result['float_size_bytes'])}",
        f"{result['seconds']:.0f}",
        f"{plain.quantized:.4f} at {bits} bits",
    ]


HEAD = (
    "model",
    "metric",
    "float",
    "best recipe",
    "drop in points (95% interval)",
    "average weight bits",
    "size",
    "seconds",
    "naive recipe",
)


@click.command()
@click.option("--trials", default=40, show_default=True, help="Trials of each search.")
@click.argument("names", nargs=-1, type=click.Choice(list(TITLES)))
def main(trials: int, names: tuple[str, ...]) -> None:
    """Search the zoo and write reports/zoo.md."""
    rows = []
    for name in names or tuple(TITLES):
        rows.append(measure(name, trials))
        print(" | ".join(rows[-1]), flush=True)
    lines = ["| " + " | ".join(row) + " |" for row in (HEAD, ["---"] * len(HEAD), *rows)]
    text = "\n".join(lines)
    REPORT.write_text(
        f"# Searches on real models\n\n`python -m tests.benchmarks.zoo --trials {trials}`: default "
        "space, `--max-drop 1%`. All metrics are on data that no search saw; the naive recipe has "
        "the same bits (rounded up) in every layer, ranges by max, one scale a tensor, symmetric, "
        f"activations of 8 bits.\n\n{text}\n\n{describe_machine()}\n",
        encoding="utf-8",
    )
    print(f"\n{text}")


if __name__ == "__main__":
    main()

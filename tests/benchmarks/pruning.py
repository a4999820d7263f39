"""Whether stopping candidates early costs recipes: ``python -m tests.benchmarks.pruning``.

The same searches with and without it, seed by seed: how often both end with the same recipe, how
they compare where they do not, and what it saves. Writes ``reports/pruning.md``.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click

from autoquant.search.options import Options
from autoquant.search.result import SearchResult
from autoquant.search.run import Silent, start
from autoquant.search.source import Source
from autoquant.spec.space import SearchSpace
from tests.benchmarks.evaluation import line
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.zoo import TITLES
from tests.zoo.conftest import HERE, task_module

REPORT = Path(__file__).resolve().parents[2] / "reports" / "pruning.md"
HEAD = [
    "model",
    "seeds",
    "same recipe",
    "same size within 1% and both within the drop",
    "candidates stopped early",
    "seconds of the trials, of those without",
]


def searched(source: Source, folder: Path, trials: int, seed: int, prune: bool) -> SearchResult:
    """Return what one search finds."""
    task = source.load_task()
    options = Options(trials=trials, seed=seed, prune=prune)
    storage = str(folder / f"{seed}-{prune}.journal")
    space = SearchSpace.load("default")
    loaded = source.load(task)
    return start(loaded, task, source, space, options, "study", storage, folder, None, Silent())


def measure(name: str, trials: int, seeds: int) -> list[str]:
    """Search one model under every seed and return its row."""
    module = task_module(name)
    same = alike = 0
    shares, stopped = [], []
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        if name == "resnext":
            module.train(folder / "resnext.pt")
        path = folder / "resnext.pt" if name == "resnext" else module.weights()
        source = Source(str(path), str(HERE / f"{name}.py"))
        for seed in range(seeds):
            began = time.monotonic()
            with_it = searched(source, folder, trials, seed, True)
            without = searched(source, folder, trials, seed, False)
            choices = [
                {n: s.uncalibrated() for n, s in r.recipe.sites.items()} for r in (with_it, without)
            ]
            sizes = [r.recipe.evidence.size_bytes for r in (with_it, without)]  # type: ignore[union-attr]
            equal = choices[0] == choices[1]
            near = abs(sizes[0] - sizes[1]) <= 0.01 * sizes[1] and with_it.holds == without.holds
            same += equal
            alike += equal or near
            shares.append(with_it.speed.seconds / without.speed.seconds)
            stopped.append(with_it.trials["pruned"] / trials)
            print(
                f"{name} seed {seed}: same recipe {equal}, bytes {sizes[0]} and {sizes[1]}, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    return [
        TITLES[name],
        str(seeds),
        f"{same} of {seeds}",
        f"{alike} of {seeds}",
        f"{statistics.mean(stopped):.0%}",
        f"{statistics.median(shares):.0%}",
    ]


@click.command()
@click.option("--trials", default=24, show_default=True, help="Trials of each search.")
@click.option("--seeds", default=20, show_default=True, help="Seeds of each model.")
@click.argument("names", nargs=-1, type=click.Choice(list(TITLES)))
def main(trials: int, seeds: int, names: tuple[str, ...]) -> None:
    """Search with and without stopping early, and write reports/pruning.md."""
    rows = [measure(name, trials, seeds) for name in names or ("g2p", "resnext", "minilm")]
    text = "\n".join([line(HEAD), line(["---"] * len(HEAD)), *map(line, rows)])
    REPORT.write_text(
        f"# Stopping candidates early\n\n`python -m tests.benchmarks.pruning`: {trials} trials, "
        f"default space and goal, the same seeds with and without `--prune`.\n\n{text}\n\n"
        f"{describe_machine()}\n",
        encoding="utf-8",
    )
    print(f"\n{text}")


if __name__ == "__main__":
    main()

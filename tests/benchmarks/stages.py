"""What each stage of a search adds: ``python -m tests.benchmarks.stages``.

Searches of the zoo's models in the default space, with budgets, some seeds each. Of each search
three recipes are measured on the confirm split, which no stage saw, by the reference: the knapsack
of the profile, which is the first trial that is no uniform recipe; the best of all trials; and that
one tuned. So is what the last one loses by its activations alone, and by its weights alone. Writes
``reports/stages.md``; where models are named, it replaces their rows there.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from autoquant.cli.failures import STATUSES
from autoquant.measure.evaluator import Reading
from autoquant.models.noninferiority import drop_interval
from autoquant.session.session import Session, open_session
from autoquant.spec.recipe import Recipe, SiteRecipe
from autoquant.study.extract import extract
from autoquant.study.ledger import Ledger
from autoquant.study.source import Source
from autoquant.study.storage import Storage
from autoquant.study.trials import best_trial, measured
from autoquant.study.tuned import TUNED, searched
from tests.benchmarks.evaluation import line
from tests.benchmarks.machine import machines
from tests.benchmarks.zoo import TITLES
from tests.zoo.conftest import HERE, task_module

REPORT = Path(__file__).resolve().parents[2] / "reports" / "stages.md"
BUDGETS = {"mobilenet_v2": (5.0, 6.0), "minilm": (5.0,), "g2p": (5.0,), "resnext": (4.5,)}
STUDY = "stages"
HEAD = [
    "model",
    "at most bits",
    "knapsack of the profile",
    "best trial",
    "knapsack − best trial (95%)",
    "seeds surely better, worse",
    "tuned",
    "best trial − tuned (95%)",
    "seeds surely better, worse",
    "activations alone",
    "weights alone",
    "seeds",
]
TEXT = """\
# What each stage of a search adds

By `python -m tests.benchmarks.stages`: searches in the default space with {trials} trials.
Losses (how far outputs are from the float model's) are of the confirm split, which no stage saw,
computed by the reference; medians of the seeds. Differences are paired, sample by sample: that of
the seed in the middle is given with its 95% interval, and beside it how many seeds have an interval
on either side of 0. The last columns are of the tuned recipe with the weights, and with the
activations, in float again: less than what one of them loses is not to be had by the other."""


@dataclass(frozen=True)
class Run:
    """What one search came to: readings of the confirm split."""

    knapsack: Reading
    best: Reading
    tuned: Reading
    activations: Reading
    weights: Reading


def losses(found: list[Reading]) -> str:
    """Return the median of the divergences, and the least and the most."""
    values = [r.divergence for r in found if r.divergence is not None]
    spread = f" ({min(values):.5f} … {max(values):.5f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.5f}{spread}"


def differences(pairs: list[tuple[Reading, Reading]]) -> list[str]:
    """Return by how much the second of a pair is nearer, and how often that is sure."""
    found = []
    for before, after in pairs:
        assert before.distance is not None
        assert after.distance is not None
        # As a drop of the second against the first: negative where it is nearer.
        sure = drop_interval(
            before.distance.evidence, after.distance.evidence, before.distance.metric
        )
        assert before.divergence is not None
        assert after.divergence is not None
        found.append((before.divergence - after.divergence, -sure.high, -sure.low))
    found.sort()
    middle = found[len(found) // 2]
    better, worse = sum(low > 0 for _, low, _ in found), sum(high < 0 for _, _, high in found)
    return ["{:+.5f} ({:+.5f} … {:+.5f})".format(*middle), f"{better}, {worse} of {len(found)}"]


def reading_of(session: Session, sites: Mapping[str, SiteRecipe]) -> Reading:
    """Return the confirm split's reading of a recipe."""
    with session.prepared.engine.reference(), session.without_reuse():
        return session.measure(sites, "confirm")[1]


def searched_once(source: Source, bits: float, trials: int, seed: int) -> Run:
    """Search with one seed, and measure what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        storage = str(Path(folder) / "stages.journal")
        words = [
            sys.executable,
            "-m",
            "autoquant",
            "search",
            source.model,
            "--task",
            str(source.task),
        ]
        words += ["--bits", str(bits), "--trials", str(trials), "--tune", "layer", "--json"]
        words += ["--study", STUDY, "--storage", storage, "--seed", str(seed)]
        done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, check=False)
        if done.returncode not in STATUSES.values():
            raise SystemExit(f"a search ended with status {done.returncode}")
        ledger = Ledger.open(STUDY, Storage.parse(storage))
        recipes = recipes_of(ledger)
        task = source.load_task()

        def read(recipe: Recipe) -> tuple[Session, Reading]:
            session = open_session(source.load(task), task, torch.device("cpu"), recipe=recipe)
            session.baseline("confirm")
            return session, reading_of(session, recipe.sites)

        knapsack, best = (read(recipe)[1] for recipe in recipes[:2])
        session, tuned = read(recipes[2])
        sites = recipes[2].sites
        inputs = {n: SiteRecipe(None, s.activation) for n, s in sites.items()}
        weights = {n: replace(s, activation=None) for n, s in sites.items()}
        return Run(knapsack, best, tuned, reading_of(session, inputs), reading_of(session, weights))


def recipes_of(ledger: Ledger) -> list[Recipe]:
    """Return the profile's knapsack, the best trial, and the best tuned one, of a study."""
    trials = [t for t in ledger.trials() if measured(t) is not None]
    plain = searched(trials)
    mixed = [t for t in plain if len(widths(extract(ledger, trial=t.number)[0])) > 1]
    tuned = [t for t in trials if TUNED in t.user_attrs]
    best, repaired = best_trial(plain), best_trial(tuned)
    assert best is not None
    assert repaired is not None
    return [extract(ledger, trial=t.number)[0] for t in (mixed[0], best, repaired)]


def widths(recipe: Recipe) -> set[int]:
    """Return the bits that weights of a recipe have."""
    return {site.weight_bits for site in recipe.sites.values()}


def row_of(name: str, bits: float, trials: int, seeds: int, folder: Path) -> list[str]:
    """Return the row of one model and budget."""
    module: Any = task_module(name)
    path = folder / "resnext.pt" if name == "resnext" else Path(module.weights())
    if name == "resnext" and not path.exists():
        module.train(path)
    source = Source(str(path), str(HERE / f"{name}.py"))
    runs = [searched_once(source, bits, trials, seed) for seed in range(seeds)]
    return [
        TITLES[name],
        f"{bits:g}",
        losses([r.knapsack for r in runs]),
        losses([r.best for r in runs]),
        *differences([(r.knapsack, r.best) for r in runs]),
        losses([r.tuned for r in runs]),
        *differences([(r.best, r.tuned) for r in runs]),
        losses([r.activations for r in runs]),
        losses([r.weights for r in runs]),
        str(seeds),
    ]


@click.command()
@click.option("--trials", default=24, show_default=True, help="Trials of each search.")
@click.option("--seeds", default=5, show_default=True, help="Searches of each.")
@click.argument("names", nargs=-1, type=click.Choice(list(BUDGETS)))
def main(trials: int, seeds: int, names: tuple[str, ...]) -> None:
    """Search NAMES (default: all) and write the report, in which other models' rows stay."""
    before = REPORT.read_text(encoding="utf-8") if names and REPORT.exists() else ""
    kept, rows = before.splitlines(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, budgets in BUDGETS.items():
            if names and name not in names:
                rows += [row for row in kept if row.startswith(f"| {TITLES[name]} |")]
                continue
            for bits in budgets:
                rows.append(line(row_of(name, bits, trials, seeds, Path(folder))))
                print(rows[-1], flush=True)
    table = [line(HEAD), line(["---"] * len(HEAD)), *rows]
    titles = [TITLES[name] for name in BUDGETS]
    machine = machines(before, [TITLES[name] for name in names or BUDGETS], titles)
    text = [TEXT.format(trials=trials), "", machine, "", *table]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""How well a profile foretells joint recipes: ``python -m tests.benchmarks.fidelity``.

For each model of the zoo, and for wide and narrow widths: recipes are drawn at random, each with
its own mix of widths, measured on the search split, and held against the profile: the sum of what
each layer does alone. Beside it the same with the pairwise terms of layers in one
block (as CLADO has them between all layers, and BRECQ within a block), which come from the same
gradients: what two changes do together to a sample is the sum of both. Writes
``reports/fidelity.md``.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

import autoquant
from autoquant.heap import keep_freed_memory
from autoquant.sensitivity.fisher import Candidates, Score, Sensitivity
from autoquant.sensitivity.profile import Option, Profile, profile
from autoquant.session.session import Session
from autoquant.spec.recipe import SiteRecipe
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.peers.cases import NAMES, load_case
from tests.benchmarks.peers.ours import SPACE, opened
from tests.benchmarks.zoo import TITLES

REPORT = Path(__file__).resolve().parents[2] / "reports" / "fidelity.md"
WIDTHS = ((8, 6, 4), (4, 3, 2))
RECIPES = 30
HEAD = (
    "| model | widths | each layer alone | with pairs of a block | with all pairs | foretold / "
    "measured, median | samples |"
)


def block_of(name: str) -> str:
    """Return the block of a layer: its path up to the first number, or its first part."""
    found = re.match(r".*?\.\d+(?=\.|$)", name)
    return found.group(0) if found else name.split(".")[0]


def scores_of(found: Sensitivity, name: str, recipe: SiteRecipe) -> list[Score]:
    """Return the scores of both halves of a site's recipe, where gradients gave them."""
    halves: list[Score | None] = []
    if recipe.weight is not None:
        halves.append(found.weights[name].get(recipe.weight))
    if recipe.activation is not None:
        halves.append(found.activations[name].get(recipe.activation))
    return [half for half in halves if half is not None]


def pairs(scores: Mapping[str, list[Score]], samples: int) -> tuple[float, float]:
    """Return the sums of the pairwise terms: of different layers in one block, of all layers.

    (Σ r)² − Σ r² over layers, the mean over samples; ``samples`` are those that all layers have.
    """
    change = {n: np.sum([s.changes[:samples] for s in row], axis=0) for n, row in scores.items()}
    blocks: dict[str, list[np.ndarray]] = {}
    for name, own in change.items():
        blocks.setdefault(block_of(name), []).append(own)

    def cross(parts: list[np.ndarray]) -> float:
        together = np.sum(parts, axis=0)
        return float(np.mean(together**2 - np.sum(np.square(parts), axis=0)))

    return sum(map(cross, blocks.values())), cross(list(change.values()))


def draw(options: Mapping[str, tuple[Option, ...]], rng: np.random.Generator) -> dict[str, Option]:
    """Return a random option for each site, by a random mix of widths."""
    widths = sorted({o.bits for row in options.values() for o in row})
    mix = dict(zip(widths, rng.dirichlet(np.ones(len(widths))), strict=True))
    found = {}
    for name, row in options.items():
        chances = np.array([mix[o.bits] for o in row])
        found[name] = row[int(rng.choice(len(row), p=chances / chances.sum()))]
    return found


def measure(session: Session, widths: tuple[int, ...]) -> dict[str, Any]:
    """Return the rank correlations of one model at ``widths``."""
    text = SPACE.replace("[8, 6, 4]", str(list(widths)))
    spaces = autoquant.SearchSpace.parse(text, "fidelity").resolve(session.prepared.sites)
    kept: list[Sensitivity] = []

    def sensitivity(candidates: Mapping[str, Candidates]) -> Sensitivity | str:
        found = session.sensitivity(candidates)
        if isinstance(found, Sensitivity):
            kept.append(found)
        return found

    table: Profile = profile(session.prepared, session.statistics, spaces, measure=sensitivity)
    rng = np.random.default_rng(0)
    rows = []
    samples = 0
    for _ in range(RECIPES):
        chosen = draw(table.options, rng)
        sites = {n: o.recipe for n, o in chosen.items()}
        alone = sum(o.damage for o in chosen.values())
        scores = {n: s for n, r in sites.items() if (s := scores_of(kept[0], n, r))}
        samples = min(len(s.changes) for row in scores.values() for s in row)
        block, every = pairs(scores, samples)
        rows.append((session.measure(sites, "search")[0].loss, alone, alone + block, alone + every))
    loss, *foretold = np.array(rows).T
    ranks = [float(spearmanr(loss, column).statistic) for column in foretold]
    return {"ranks": ranks, "ratio": float(np.median(foretold[0] / loss)), "samples": samples}


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(NAMES), help="Only these.")
def main(models: tuple[str, ...]) -> None:
    """Measure, print the table, write the report."""
    keep_freed_memory()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name in models or NAMES:
            session = opened(load_case(name, Path(folder)))
            for widths in WIDTHS:
                found = measure(session, widths)
                ranks = " | ".join(f"{r:.2f}" for r in found["ranks"])
                said = ", ".join(map(str, widths))
                lines.append(
                    f"| {TITLES[name]} | {said} | {ranks} | {found['ratio']:.2f} | "
                    f"{found['samples']} |"
                )
                print(lines[-1], flush=True)
    text = "\n".join([HEAD, "|" + " --- |" * 7, *lines])
    REPORT.write_text(
        "# How well a profile foretells recipes\n\n`python -m tests.benchmarks.fidelity`: "
        f"Spearman's rank correlation between the measured loss of {RECIPES} random joint recipes "
        "and what the profile foretells: the sum of what each layer does alone, then with the "
        f"pairwise terms of layers in one block, then with all pairs.\n\n{text}\n\n"
        f"{describe_machine()}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()

"""Whether a search can be relied on, seed by seed: ``python -m tests.benchmarks.seeds``.

Three questions on the models of the zoo. Does stopping candidates early cost recipes? Each search
is made with and without. Is the answer ever worse than the best uniform recipe, on data that no
search saw? And do the reported intervals contain the drop that fresh data show? The profile and the
readings of a recipe have no seed: they are made once for all searches of a model, so seconds mean
nothing here. Writes ``reports/seeds.md``.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import click
import numpy as np
import torch

from autoquant.models.evidence import Evidence, FunctionEvidence, StatisticsEvidence
from autoquant.models.metrics import drop
from autoquant.models.noninferiority import drop_interval
from autoquant.models.trees import take
from autoquant.optimize import run
from autoquant.optimize.callbacks import Silent
from autoquant.optimize.result import SearchResult
from autoquant.samplers.knapsack import proposer
from autoquant.sensitivity.profile import Profile, profile
from autoquant.session.preflight import Preflight, preflight
from autoquant.session.session import Session, open_session
from autoquant.spec.options import Options
from autoquant.spec.recipe import SiteRecipe, choices_key
from autoquant.spec.space import SearchSpace, SiteSpace
from autoquant.spec.uniform import baselines, uniform
from autoquant.study.source import Source
from autoquant.study.storage import Storage
from tests.benchmarks.evaluation import line
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.zoo import TITLES
from tests.zoo.conftest import HERE, task_module

REPORT = Path(__file__).resolve().parents[2] / "reports" / "seeds.md"
DROP = 0.01
WIDTHS = (8, 7, 6, 5, 4)
MIXES = 15
PARTS = (1 / 6, 1 / 6)
"""Shares of the labelled samples to search by and to confirm with; the rest is fresh."""


@dataclass
class Bench:
    """One model, prepared once: every search of it starts from here."""

    name: str
    source: Source
    session: Session
    spaces: Mapping[str, SiteSpace]
    found: Preflight
    table: Profile

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Let searches inside have what does not depend on their seed."""
        with (
            mock.patch.object(run, "open_session", return_value=self.session),
            mock.patch.object(run, "preflight", return_value=self.found),
            mock.patch.object(proposer, "profile", return_value=self.table),
        ):
            yield

    def search(self, folder: Path, seed: int, **options: object) -> SearchResult:
        """Return what one search finds."""
        task = self.session.task
        given = Options(seed=seed, tune="none", **options)  # type: ignore[arg-type]
        words = "-".join(f"{k}{v}" for k, v in options.items())
        with self.shared():
            request = run.Request(
                loaded=self.source.load(task),
                task=task,
                source=self.source,
                space=SearchSpace.load("default"),
                options=given,
                study="study",
                storage=Storage.parse(str(folder / f"{self.name}-{seed}-{words}.journal")),
                out=folder,
            )
            return run.start(request, Silent())


def opened(name: str, folder: Path) -> Bench:
    """Return a model, prepared, with its profile."""
    module = task_module(name)
    if name == "resnext":
        module.train(folder / "resnext.pt")
    path = folder / "resnext.pt" if name == "resnext" else module.weights()
    source = Source(str(path), str(HERE / f"{name}.py"))
    task = source.load_task()
    session = open_session(source.load(task), task, torch.device("cpu"))
    spaces = SearchSpace.load("default").resolve(session.prepared.sites)
    found = preflight(session, spaces)
    table = profile(session.prepared, session.statistics, spaces, measure=session.sensitivity)
    return Bench(name, source, session, spaces, found, table)


# --- stopping early, and the best uniform recipe ---------------------------------------------


def choices(result: SearchResult) -> dict[str, SiteRecipe]:
    """Return a result's recipe without its calibrated numbers."""
    return {n: s.uncalibrated() for n, s in result.recipe.sites.items()}


def pruning(bench: Bench, folder: Path, trials: int, seeds: int) -> list[str]:
    """Return the row of one model: each search with and without stopping early."""
    same = alike = 0
    stopped = []
    for seed in range(seeds):
        both = [bench.search(folder, seed, trials=trials, prune=p) for p in (True, False)]
        sizes = [r.recipe.evidence.size_bytes for r in both]  # type: ignore[union-attr]
        equal = choices(both[0]) == choices(both[1])
        near = abs(sizes[0] - sizes[1]) <= 0.01 * sizes[1] and both[0].holds == both[1].holds
        same += equal
        alike += equal or near
        stopped.append(both[0].trials["pruned"] / trials)
        print(f"{bench.name} seed {seed}: same recipe {equal}, bytes {sizes}", flush=True)
    return [
        TITLES[bench.name],
        f"{same} of {seeds}",
        f"{alike} of {seeds}",
        f"{np.mean(stopped):.0%}",
    ]


def against_uniform(bench: Bench, folder: Path, trials: int, seeds: int, bits: float) -> list[str]:
    """Return the row of one model: the result of each seed beside the best uniform recipe.

    The uniform recipe is the best on the search's own data of those within the budget; both are
    read on the confirm split by the reference.
    """
    plain = [
        sites
        for sites in baselines(bench.spaces)
        if bench.session.costs.of(sites).average_weight_bits <= bits + 1e-9
    ]
    gains, nearer, worse, below = [], [], 0, 0
    for seed in range(seeds):
        result = bench.search(folder, seed, trials=trials, bits=bits)
        rivals = {choices_key(s): bench.session.measure(s, "search")[0].loss for s in plain}
        best = min(plain, key=lambda s: rivals[choices_key(s)])
        with bench.session.prepared.engine.reference():
            ours, plainest = (
                bench.session.measure(s, "confirm")[0] for s in (result.recipe.sites, best)
            )
        mine, theirs = ours.drop, plainest.drop
        nearer.append(ours.loss / plainest.loss)
        gains.append(100 * (theirs - mine))
        worse += mine > max(theirs, 0.0) + 1e-12
        below += mine > theirs + 1e-12
        print(f"{bench.name} seed {seed}: drops {mine:.4f}, uniform {theirs:.4f}", flush=True)
    return [
        TITLES[bench.name],
        f"{bits:g}",
        f"{seeds - worse} of {seeds}",
        f"{seeds - below} of {seeds}",
        f"{np.median(gains):+.2f} ({min(gains):+.2f} … {max(gains):+.2f})",
        f"{np.median(nearer):.2f} ({min(nearer):.2f} … {max(nearer):.2f})",
    ]


# --- intervals -------------------------------------------------------------------------------


def part_of(evidence: Evidence, indices: np.ndarray) -> Evidence:
    """Return the evidence of some samples."""
    if isinstance(evidence, StatisticsEvidence):
        return replace(evidence, stats=evidence.stats[indices])
    assert isinstance(evidence, FunctionEvidence)
    outputs, targets = take(evidence.outputs, indices), take(evidence.targets, indices)
    return replace(evidence, outputs=outputs, targets=targets)


def recipes(bench: Bench) -> list[dict[str, SiteRecipe]]:
    """Return uniform recipes and random mixtures of them, from wide to narrow."""
    draw = np.random.default_rng(0)
    whole = {bits: uniform(bench.spaces, bits) for bits in WIDTHS}
    found = [dict(whole[bits]) for bits in WIDTHS]
    for i in range(MIXES):
        odds = draw.dirichlet(np.full(len(WIDTHS), 0.7 + 0.1 * i))
        found.append({n: whole[int(draw.choice(WIDTHS, p=odds))][n] for n in bench.spaces})
    return found


def coverage(bench: Bench, rounds: int) -> list[str]:
    """Return the row of one model: how often the interval of the chosen recipe has the fresh drop.

    In each round the labelled samples are dealt out anew. As in a search, the smallest recipe that
    keeps the drop on the first part goes to the second, where its interval is taken, and if it
    fails there the next one, of up to five.
    """
    session = bench.session
    evaluator = session.evaluator
    whole = replace(session.splits, search=(*session.splits.search, *session.splits.confirm))
    evaluator.splits, before = whole, evaluator.splits
    evaluator._float.clear()
    evaluator._outputs.clear()
    session._measured.clear()
    try:
        with session.without_reuse():
            floats = session.baseline("search")
            read = []
            for sites in recipes(bench):
                m, reading, _ = session.measure(sites, "search")
                read.append((m.size_bytes, reading.evidence))
    finally:
        evaluator.splits = before
    read.sort(key=lambda r: r[0])
    base, metric = floats.evidence, floats.metric
    assert base is not None
    draw = np.random.default_rng(1)
    inside: list[bool] = []
    widths = []
    for turn in range(rounds):
        order = draw.permutation(base.n)
        first, second = (int(share * base.n) for share in PARTS)
        parts = order[:first], order[first : first + second], order[first + second :]

        def dropped(evidence: Evidence, part: np.ndarray) -> float:
            return drop(metric, base.score_at(part), evidence.score_at(part))

        near = [e for _, e in read if dropped(e, parts[0]) <= DROP] or [read[-1][1]]
        chosen = next((e for e in near[:5] if dropped(e, parts[1]) <= DROP), near[0])
        found = drop_interval(part_of(base, parts[1]), part_of(chosen, parts[1]), metric, turn)
        fresh = dropped(chosen, parts[2])
        if found.known:  # else none would be reported
            inside.append(found.low <= fresh <= found.high)
            widths.append(found.high - found.low)
    return [
        TITLES[bench.name],
        metric.name,
        f"{int(PARTS[1] * base.n)}",
        f"{base.n - sum(int(share * base.n) for share in PARTS)}",
        f"{100 * float(np.median(widths)):.2f}",
        f"{np.mean(inside):.1%} of {len(inside)}",
    ]


PRUNING = ("model", "same recipe", "same size within 1%, verdict too", "candidates stopped early")
UNIFORM = (
    "model",
    "at most bits",
    "no worse than the best uniform recipe, or than float",
    "no worse than the uniform recipe, be it better than float",
    "points better (median, least … most)",
    "distance to the float outputs, of the uniform's (median, least … most)",
)
COVERAGE = (
    "model",
    "metric",
    "samples of the interval",
    "fresh samples",
    "median width in points",
    "intervals that contain the fresh drop",
)


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join([line(list(head)), line(["---"] * len(head)), *map(line, rows)])


def report(rows: Mapping[str, Mapping[str, list[str]]]) -> str:
    """Return the report of all models that are known."""
    known = [rows[name] for name in TITLES if name in rows]
    stops, beside, sure = ([row[kind] for row in known] for kind in ("stop", "beside", "sure"))
    parts = (
        "# Seed by seed",
        "`python -m tests.benchmarks.seeds`: default space, 24 trials a search.",
        "Stopping candidates early: goal `--max-drop 1%`, the same seeds with and without.",
        table(PRUNING, stops),
        "With a budget instead: the result beside the uniform recipe within it that was best on "
        "the search's data, both on the confirm split, which no search saw.",
        table(UNIFORM, beside),
        "Intervals: in each of many rounds the labelled samples are dealt out anew, a sixth to "
        f"select one of {len(WIDTHS) + MIXES} recipes by, a sixth to confirm it and take its 95% "
        "interval, the rest for the drop that the interval is to contain. That drop has an error "
        "of its own: an interval that is right for endless data would contain it in 92%.",
        table(COVERAGE, sure),
        describe_machine(),
    )
    return "\n\n".join(parts) + "\n"


@click.command()
@click.option("--trials", default=24, show_default=True, help="Trials of each search.")
@click.option("--seeds", default=20, show_default=True, help="Seeds of each model.")
@click.option("--rounds", default=400, show_default=True, help="Times that samples are dealt out.")
@click.option("--bits", default=5.0, show_default=True, help="Budget beside uniform recipes.")
@click.option(
    "--cache",
    default=REPORT.parents[1] / ".autoquant" / "seeds",
    type=click.Path(path_type=Path),
    help="Folder of what was measured of each model.",
)
@click.argument("names", nargs=-1, type=click.Choice(list(TITLES)))
def main(
    trials: int, seeds: int, rounds: int, bits: float, cache: Path, names: tuple[str, ...]
) -> None:
    """Search under many seeds, and write reports/seeds.md of all models that are known."""
    cache.mkdir(parents=True, exist_ok=True)
    for name in names or tuple(TITLES):
        with tempfile.TemporaryDirectory() as text:
            bench = opened(name, Path(text))
            found = {
                "stop": pruning(bench, Path(text), trials, seeds),
                "beside": against_uniform(bench, Path(text), trials, seeds, bits),
                "sure": coverage(bench, rounds),
            }
        (cache / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
        rows = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in cache.glob("*.json")}
        REPORT.write_text(report(rows), encoding="utf-8")
        for row in found.values():
            print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()

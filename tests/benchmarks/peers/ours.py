"""autoquant and other ways through the same space: same formats, engine, data and trial loop."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import autoquant
from autoquant.methods.correction.bias import BiasCorrection
from autoquant.models.files import of_module
from autoquant.session.session import Session, open_session
from autoquant.solvers.convex_hull import solve
from autoquant.spec.outputs import write_text
from autoquant.spec.recipe import ActivationScheme, SiteRecipe, WeightScheme
from autoquant.spec.techniques import UNCORRECTED
from tests.benchmarks.peers.cases import Case, table_path
from tests.benchmarks.peers.greedy import WIDEST, greedy
from tests.benchmarks.peers.tools import Found
from tests.benchmarks.zoo import naive

CALIBRATIONS = ("mse", "max", "percentile_99.9", "percentile_99.99", "percentile_99.999")
NARROW = (6, 4)
BIAS = BiasCorrection()
SPACE = f"""\
autoquant_space: 1
name: peers
rules:
  - weight_bits: [8, 6, 4]
    weight_granularity: [per_channel]
    weight_scheme: [symmetric]
    weight_calibration: [output_mse, mse, max]
    correction: [bias]
    activation_bits: [8]
    activation_granularity: [per_tensor]
    activation_scheme: [asymmetric]
    activation_calibration: [{", ".join(CALIBRATIONS)}]
"""
PROPOSALS = 20
"""Most proposals for each evaluation: those over the budget by arithmetic cost nothing."""


class Counter:
    """A search's reporter that ends it after so many evaluations, and keeps the best after each.

    Or after ``limit`` seconds of trials: --timeout would count the profile and the confirmation.
    """

    def __init__(self, most: int, limit: float) -> None:
        self.most = most
        self.limit = limit
        self.curve: list[float] = []
        self.proposals = 0
        self._stop: Any = None

    def say(self, text: str) -> None:
        pass

    def preflight(self, found: Any) -> None:
        pass

    def begin(self, study: str, goal: Any, done: Any, stop: Any) -> None:
        self._stop = stop
        self._began = time.monotonic()

    def step(self, number: int, done: int, total: int) -> None:
        pass

    def trained(self, step: Any) -> None:
        pass

    def checked(self, moment: Any) -> None:
        pass

    def trial(self, trial: Any, best: Any) -> None:
        self.proposals += 1
        if time.monotonic() - self._began >= self.limit:
            object.__setattr__(self._stop, "trials", self.proposals)
        if trial.state.name != "COMPLETE":
            return
        self.curve.append(math.inf if best is None else float(best.value))
        if len(self.curve) > self.most:
            raise RuntimeError("the search was told to end, but went on")
        if len(self.curve) == self.most:
            # A search counts proposals; here they end when there are as many evaluations.
            object.__setattr__(self._stop, "trials", self.proposals)


def search(case: Case, bits: float, sampler: str, seed: int, trials: int, limit: float) -> Found:
    """Search by autoquant's own loop, with any of its samplers, for ``trials`` evaluations.

    Evaluations are of the search split, half of the selection data; the finalists, at most five,
    are measured on the other half. Nothing is stopped early, but after ``limit`` seconds of trials
    the search ends with what it has.
    """
    counter = Counter(trials, limit)
    model, task = case.model_copy(), case.task()
    named = {"sampler": sampler} if sampler else {}
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        result = autoquant.search(
            model,
            task,
            space=autoquant.SearchSpace.parse(SPACE, "peers"),
            bits=bits,
            trials=PROPOSALS * trials,
            seed=seed,
            prune=False,
            tune="none",  # samplers are compared: what repairs a recipe would do so for all
            study="peers",
            storage=str(Path(folder) / "peers.journal"),
            out=folder,
            device="cpu",
            reporter=counter,
            **named,  # type: ignore[arg-type]
        )
        seconds = time.monotonic() - began
    evidence = result.recipe.evidence
    assert evidence is not None
    return Found(
        autoquant.apply(result.recipe, model, task),
        evidence.average_weight_bits,
        seconds,
        len(counter.curve),
        counter.proposals,
        tuple(counter.curve),
    )


def opened(case: Case) -> Session:
    """Return the case prepared to take recipes, with the float model's outputs at hand."""
    session = open_session(of_module(case.model_copy()), case.task(), torch.device("cpu"))
    session.baseline("search")
    session.reuse()
    return session


def recipe_of(session: Session, widths: dict[str, int], method: str) -> dict[str, SiteRecipe]:
    """Return the recipe that gives each layer a width; the rest is the same for all."""
    return {
        s.name: SiteRecipe(
            WeightScheme(widths[s.name], calibration="output_mse"),
            ActivationScheme(8, calibration=method) if s.activation else None,
            BIAS if s.corrects else UNCORRECTED,
        )
        for s in session.prepared.sites
    }


def loss(session: Session, widths: dict[str, int], method: str) -> float:
    """Return how far a recipe's outputs are from the float model's, on the search split."""
    return float(session.measure(recipe_of(session, widths, method), "search")[0].loss)


def one_layer_table(session: Session) -> dict[str, Any]:
    """Return what each layer costs at each narrower width, all others at 8 bits.

    The calibration of activations is the best of the uniform recipes. Deterministic.
    """
    began = time.monotonic()
    wide = {s.name: WIDEST for s in session.prepared.sites}
    uniform = {method: loss(session, wide, method) for method in CALIBRATIONS}
    method = min(uniform, key=uniform.__getitem__)
    table = {
        name: {width: loss(session, wide | {name: width}, method) for width in NARROW}
        for name in wide
    }
    return {
        "method": method,
        "base": uniform[method],
        "table": table,
        "evaluations": len(uniform) + len(wide) * len(NARROW),
        "seconds": time.monotonic() - began,
    }


def known_table(session: Session, folder: Path, name: str) -> dict[str, Any]:
    """Return the table of one-layer damages, from ``folder`` where it was measured before."""
    path = table_path(name, folder)
    if not path.exists():
        write_text(path, json.dumps(one_layer_table(session)))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found["table"] = {
        n: {int(width): damage for width, damage in row.items()}
        for n, row in found["table"].items()
    }
    return found


def finished(
    session: Session, case: Case, sites: dict[str, SiteRecipe], seconds: float, evaluations: int
) -> Found:
    """Return a recipe that is known without a search, as a model."""
    began = time.monotonic()
    measurement, _, done = session.measure(sites, "search")
    model = session.applier.deploy(done)
    seconds += time.monotonic() - began
    return Found(model, measurement.average_weight_bits, seconds, evaluations + 1)


def by_table(case: Case, bits: float, folder: Path, *, exact: bool) -> Found:
    """Return the recipe that a table of one-layer damages gives, greedily or by a knapsack."""
    began = time.monotonic()
    session = opened(case)
    opening = time.monotonic() - began
    known = known_table(session, folder, case.name)
    sizes = {s.name: s.numel for s in session.prepared.sites}
    if exact:
        widths = knapsack(known["table"], known["base"], sizes, bits)
    else:
        widths = greedy(known["table"], sizes, bits)
    sites = recipe_of(session, widths, known["method"])
    return finished(session, case, sites, opening + known["seconds"], known["evaluations"])


def knapsack(
    table: dict[str, dict[int, float]], base: float, sizes: dict[str, int], bits: float
) -> dict[str, int]:
    """Return the widths whose damages have the least sum within the budget."""
    import numpy as np

    widths = (WIDEST, *NARROW)
    names = list(sizes)
    damage = [np.array([0.0, *(max(table[n][w] - base, 0.0) for w in NARROW)]) for n in names]
    cost = [np.array([float(sizes[n] * w) for w in widths]) for n in names]
    chosen = solve(damage, cost, bits * sum(sizes.values()))
    if chosen is None:
        raise ValueError(f"no recipe of the space has {bits} bits")
    return {n: widths[k] for n, k in zip(names, chosen, strict=True)}


def float_model(case: Case, bits: float, folder: Path) -> Found:
    """Return the model as it is: what all others are held against."""
    return Found(case.model, 32.0, 0.0)


def naive_recipe(case: Case, bits: float, folder: Path) -> Found:
    """Quantize as one who gives it no thought does; nothing is chosen."""
    began = time.monotonic()
    session = open_session(of_module(case.model_copy()), case.task(), torch.device("cpu"))
    sites = session.prepared.sites
    recipe = naive(
        [s.name for s in sites], {s.name for s in sites if s.activation}, math.ceil(bits)
    )
    model = autoquant.apply(recipe, case.model_copy(), case.task())
    return Found(model, float(math.ceil(bits)), time.monotonic() - began)


def greedy_search(case: Case, bits: float, folder: Path) -> Found:
    """Search as AIMET's automatic mixed precision does."""
    return by_table(case, bits, folder, exact=False)


def measured(case: Case, bits: float, folder: Path) -> Found:
    """Solve one knapsack of measured one-layer damages."""
    return by_table(case, bits, folder, exact=True)


def damages(session: Session) -> tuple[dict[str, tuple[Any, ...]], dict[str, int]]:
    """Return the options of each layer with what the profile expects of them, and layers' sizes."""
    from autoquant.sensitivity.profile import profile

    session.baseline("search")  # which says what the outputs are
    spaces = autoquant.SearchSpace.parse(SPACE, "peers").resolve(session.prepared.sites)
    found = profile(session.prepared, session.statistics, spaces, measure=session.sensitivity)
    sizes = {s.name: s.numel for s in session.prepared.sites}
    return {n: found.options[n] for n in sizes}, sizes


def one_shot(case: Case, bits: float, folder: Path) -> Found:
    """Solve one knapsack of the damages that autoquant's profile expects; nothing is evaluated."""
    import numpy as np

    began = time.monotonic()
    session = open_session(of_module(case.model_copy()), case.task(), torch.device("cpu"))
    options, sizes = damages(session)
    damage = [np.array([o.damage for o in row]) for row in options.values()]
    cost = [
        np.array([float(sizes[n] * o.recipe.weight_bits) for o in row])
        for n, row in options.items()
    ]
    chosen = solve(damage, cost, bits * sum(sizes.values()))
    if chosen is None:
        raise ValueError(f"no recipe of the space has {bits} bits")
    sites = {n: row[k].recipe for (n, row), k in zip(options.items(), chosen, strict=True)}
    model = session.applier.deploy(sites)
    average = session.costs.of(sites).average_weight_bits
    return Found(model, average, time.monotonic() - began, 0)


def mixtures(session: Session, bits: float) -> Iterator[dict[str, SiteRecipe]]:
    """Yield every mixture of widths that no other one within the budget dominates.

    Each layer at each width is calibrated as the profile finds best; a mixture in which a layer
    could be wider within the budget is left out.
    """
    options, sizes = damages(session)
    rows = [
        [min((o for o in row if o.bits == b), key=lambda o: o.damage) for b in (8, 6, 4)]
        for row in options.values()
    ]
    limit = bits * sum(sizes.values())
    counts = list(sizes.values())
    for mixture in itertools.product(*rows):
        used = sum(n * o.recipe.weight_bits for n, o in zip(counts, mixture, strict=True))
        wider = (n * 2 for n, o in zip(counts, mixture, strict=True) if o.bits < WIDEST)
        if used <= limit < used + min(wider, default=limit + 1):
            yield {n: o.recipe for n, o in zip(sizes, mixture, strict=True)}


def every_width(case: Case, bits: float, folder: Path) -> Found:
    """Evaluate every mixture of widths that the budget allows.

    What it finds is the least that the space has on the data that searches measure by, but for
    other calibrations.
    """
    began = time.monotonic()
    session = opened(case)
    found = [
        (float(session.measure(sites, "search")[0].loss), sites)
        for sites in mixtures(session, bits)
    ]
    best = min(found, key=lambda one: one[0])[1]
    return finished(session, case, best, time.monotonic() - began, len(found))

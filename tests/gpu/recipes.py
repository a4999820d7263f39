"""Searches on a GPU, and recipes of a CPU measured there: ``python -m tests.gpu.recipes``.

``search NAME DEVICE FOLDER`` searches ``demo`` or ``mobilenet_v2``, and holds what it finds against
the recipe of a search on a CPU that lies in FOLDER: the same layers, and a drop that is as small
within what the confirmation's samples can tell. ``evaluate DEVICE FOLDER`` measures the CPU's
recipes, layer for layer the same model, whose metrics may differ by the rounding of products
alone. ``rank DEVICE FOLDER`` measures random recipes by the arithmetic of searches and by the
reference, which must put them in the same order. Prints one line for each; exits with 1 where any
differs.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import spearmanr

from autoquant.cli.failures import STATUSES
from autoquant.models.files import load
from autoquant.models.task import load_task
from autoquant.optimize.evaluate import measure_recipe
from autoquant.session.session import Session, choose_device, open_session
from autoquant.spec.recipe import ActivationScheme, Recipe, SiteRecipe, WeightScheme
from autoquant.spec.recipe_file import load as load_recipe
from tests.zoo.conftest import HERE, task_module

TRIALS = {"demo": 20, "mobilenet_v2": 16}
FLIPS = 0.01
"""Share of samples that the rounding of sums may decide the other way: cuDNN adds in another order,
and an activation next to the middle of two integers goes to either."""
RANKED = 30
"""Random recipes whose order is compared."""
WIDTHS = (8, 6, 5, 4, 3)
"""Bits that their weights have, activations 8."""
RANKS = 0.99
"""Least rank correlation (Spearman) of both orders."""


@dataclass(frozen=True)
class Case:
    """A model with its task file, and the recipe that a CPU found."""

    name: str
    model: Path
    task: Path
    recipe: Recipe


def case_of(name: str, folder: Path) -> Case | None:
    """Return a case as it lies in ``folder``; None where it is not there."""
    recipe = folder / name / "recipe.yaml"
    if not recipe.exists():
        return None
    if name == "demo":
        model, task = folder / name / "model.pt", folder / name / "task.py"
    else:
        model, task = task_module(name).weights(), HERE / f"{name}.py"
    return Case(name, model, task, load_recipe(recipe))


def search(case: Case, device: str) -> bool:
    """Search; return whether what it found is as good as what the CPU did, of the same layers."""
    words = [sys.executable, "-m", "autoquant", "search", str(case.model), "--task", str(case.task)]
    words += ["--device", device, "--trials", str(TRIALS[case.name]), "--out", case.name, "--json"]
    words += ["--study", case.name, "--timeout", "150s", "--debug"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode not in STATUSES.values():
        raise SystemExit(f"the search of {case.name} ended with status {done.returncode}")
    plain = json.loads(done.stdout)
    found = load_recipe(Path(case.name) / "recipe.yaml")
    assert found.evidence is not None
    assert case.recipe.evidence is not None
    ours, theirs = found.evidence.reported, case.recipe.evidence.reported
    layers = list(found.sites) == list(case.recipe.sites)
    layers = layers and dict(found.folded) == dict(case.recipe.folded)
    room = 0.0 if ours.interval is None else ours.interval[1] - ours.drop
    alike = layers and ours.drop <= max(theirs.drop, 0.01) + room
    print(
        f"{case.name}: searched on {plain['device']} in {plain['seconds']:.0f} s, "
        f"{len(found.sites)} layers ({'the same' if layers else 'OTHERS'}), "
        f"{found.evidence.average_weight_bits:.2f} bits, drop {ours.drop:+.4f} ±{room:.4f} "
        f"(CPU: {case.recipe.evidence.average_weight_bits:.2f} bits, {theirs.drop:+.4f})"
    )
    shares = ", ".join(f"{name} {n:g}" for name, n in plain["layers_computed_by"].items())
    print(f"{plain['candidates_per_second']:.2f} candidates a second, layers by {shares}")
    return alike


def evaluate(case: Case, device: str) -> bool:
    """Measure the CPU's recipe; return whether its metrics are the CPU's, within rounding."""
    task = load_task(case.task)
    loaded = load(case.model, load_model=task.load_model)
    evidence = case.recipe.evidence
    assert evidence is not None
    found = measure_recipe(loaded, task, case.recipe, device)
    fine = found.size_bytes == evidence.size_bytes
    known = {"search": evidence.search, "confirm": evidence.confirm}
    for split, ours in found.splits.items():
        theirs = known[split]
        assert theirs is not None
        most = math.ceil(FLIPS * ours.samples) / ours.samples + 1e-9
        same = all(
            abs(a - b) <= most
            for a, b in ((ours.baseline, theirs.baseline), (ours.quantized, theirs.quantized))
        )
        fine = fine and same
        print(
            f"{case.name}, {split} ({ours.samples}): float {ours.baseline:.4f} (CPU "
            f"{theirs.baseline:.4f}), quantized {ours.quantized:.4f} (CPU {theirs.quantized:.4f})"
            + ("" if same else ": DIFFERS")
        )
    return fine


def drawn(session: Session, rng: random.Random) -> dict[str, SiteRecipe]:
    """Return a random recipe: each layer draws its width from two that the recipe draws."""
    widths = rng.choices(WIDTHS, k=2)
    return {
        s.name: SiteRecipe(
            WeightScheme(rng.choice(widths)), ActivationScheme(8) if s.activation else None
        )
        for s in session.prepared.sites
    }


def losses(session: Session, recipes: list[dict[str, SiteRecipe]]) -> tuple[list[float], float]:
    """Return the loss of each recipe on the search split, and the seconds that all took."""
    start = time.perf_counter()
    found = [session.measure(recipe, "search")[0].loss for recipe in recipes]
    return found, time.perf_counter() - start


def rank(case: Case, device: str, count: int = RANKED) -> bool:
    """Return whether random recipes are in the order of the reference."""
    task = load_task(case.task)
    loaded = load(case.model, load_model=task.load_model)
    session = open_session(loaded, task, choose_device(device), baselines=("search",))
    recorded = session.record(print)
    rng = random.Random(0)
    recipes = [drawn(session, rng) for _ in range(count)]
    session.baseline("search")
    fast, seconds = losses(session, recipes)
    with session.prepared.engine.reference():
        exact, longer = losses(session, recipes)
    found = float(spearmanr(fast, exact).statistic)
    gap = max(abs(a - b) / max(b, 1e-9) for a, b in zip(fast, exact, strict=True))
    print(
        f"{case.name}: {count} random recipes, Spearman {found:.4f} between searches "
        f"({'replayed' if recorded else 'called'}, {seconds:.1f} s) and the reference "
        f"({longer:.1f} s); losses differ by {100 * gap:.1f}% at most"
    )
    return found >= RANKS


def main(words: list[str]) -> int:
    """Do what the words say; return the exit status."""
    if words[0] == "search":
        name, device, folder = words[1:]
        case = case_of(name, Path(folder))
        if case is None:
            print(f"{name}: not in {folder}")
            return 1
        return 0 if search(case, device) else 1
    device, folder = words[1:]
    cases = [case_of(name, Path(folder)) for name in TRIALS]
    known = [case for case in cases if case is not None]
    if not known:
        print(f"no recipes in {folder}")
        return 1
    if words[0] == "rank":
        # The reference takes minutes on a CPU for what is more than the demo.
        fine = [rank(case, device) for case in known if case.name == "demo" or device != "cpu"]
    else:
        fine = [evaluate(case, device) for case in known]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

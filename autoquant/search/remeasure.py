"""Measuring one recipe on every split of a task, outside any search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoquant.errors import TrialError, UserError
from autoquant.models.files import LoadedModel
from autoquant.models.task import Task
from autoquant.search.confirm import confirm_one
from autoquant.search.goal import Goal
from autoquant.search.session import choose_device, open_session
from autoquant.spec.recipe import Recipe, SplitResult


@dataclass(frozen=True)
class Evaluation:
    """What ``autoquant evaluate`` measured, split by split."""

    metric: str
    higher_is_better: bool
    splits: Mapping[str, SplitResult]
    average_weight_bits: float
    size_bytes: int
    float_size_bytes: int

    def plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        rows = {
            name: {
                "samples": s.samples,
                "float": s.baseline,
                "quantized": s.quantized,
                "drop": s.drop,
                "interval": list(s.interval) if s.interval else None,
            }
            for name, s in self.splits.items()
        }
        return {
            "metric": {"name": self.metric, "higher_is_better": self.higher_is_better},
            "splits": rows,
            "average_weight_bits": self.average_weight_bits,
            "size_bytes": self.size_bytes,
            "float_size_bytes": self.float_size_bytes,
        }


def measure_recipe(
    loaded: LoadedModel, task: Task, recipe: Recipe | None, device: str = "auto"
) -> Evaluation:
    """Measure a recipe (None: the float model) on every split that the task has."""
    folded = None if recipe is None else recipe.folded
    session = open_session(loaded, task, choose_device(device), folded=folded)
    try:
        base = session.baseline("search")
        if session.evaluator.confirms:
            session.baseline("confirm")
        goal = Goal(float("inf"), session.sizes.float_size_bytes)
        sites = {} if recipe is None else recipe.sites
        seed = 0 if recipe is None else recipe.seed
        evidence = confirm_one(session, sites, goal, seed).recipe.evidence
    except TrialError as error:
        raise UserError(f"{task.source}: {error}") from error
    assert evidence is not None
    splits = {"search": evidence.search}
    if evidence.confirm is not None:
        splits["confirm"] = evidence.confirm
    if not base.samples:
        splits = {name: replace(s, interval=None) for name, s in splits.items()}
    return Evaluation(
        evidence.metric,
        evidence.higher_is_better,
        splits,
        evidence.average_weight_bits,
        evidence.size_bytes,
        evidence.float_size_bytes,
    )

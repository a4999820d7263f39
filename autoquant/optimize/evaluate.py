"""Measuring one recipe on every split of a task, outside any search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoquant.errors import TrialError, UserError
from autoquant.measure.evaluator import Reading
from autoquant.models.files import LoadedModel
from autoquant.models.metrics import parse_max_drop
from autoquant.models.task import Task
from autoquant.selection.confirmation import confirm_one
from autoquant.session.session import choose_device, open_session
from autoquant.spec.goal import Goal
from autoquant.spec.recipe import FLOAT32, Recipe, SplitResult
from autoquant.spec.verdict import Verdict


@dataclass(frozen=True)
class Evaluation:
    """What ``autoquant evaluate`` measured, split by split."""

    metric: str
    higher_is_better: bool
    splits: Mapping[str, SplitResult]
    average_weight_bits: float
    layer_weight_bits: float
    size_bytes: int
    float_size_bytes: int
    verdict: Verdict | None = None
    rest: str = FLOAT32

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
            "verdict": None if self.verdict is None else self.verdict.plain(),
            "rest": self.rest,
            "average_weight_bits": self.average_weight_bits,
            "layer_weight_bits": self.layer_weight_bits,
            "size_bytes": self.size_bytes,
            "float_size_bytes": self.float_size_bytes,
        }


def measure_recipe(
    loaded: LoadedModel,
    task: Task,
    recipe: Recipe | None,
    device: str = "auto",
    backend: str = "reference",
    max_drop: str | None = None,
) -> Evaluation:
    """Measure a recipe (None: the float model) on every split that the task has.

    ``backend`` is ``reference``, which computes what a saved model does, ``auto`` or ``eager``. The
    verdict is on ``max_drop``, or else on the maximum that the recipe itself was judged by.
    """
    session = open_session(
        loaded, task, choose_device(device), recipe=recipe or Recipe({}), backend=backend
    )
    try:
        base = session.baseline("search")
        if session.evaluator.confirms:
            session.baseline("confirm")
        margin = math.inf if recipe is None else margin_of(base, recipe, max_drop)
        goal = Goal(margin, session.sizes.float_size_bytes)
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
        evidence.of_layers,
        evidence.size_bytes,
        evidence.float_size_bytes,
        evidence.verdict,
        FLOAT32 if recipe is None else recipe.rest,
    )


def margin_of(base: Reading, recipe: Recipe, max_drop: str | None = None) -> float:
    """Return the maximum drop to judge by, in the metric's unit; infinite where there is none."""
    if max_drop is not None:
        return parse_max_drop(max_drop).absolute(base.metric, base.value)
    verdict = None if recipe.evidence is None else recipe.evidence.verdict
    return math.inf if verdict is None else verdict.margin

"""What recipes come to on data that training does not learn from, and the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autoquant.errors import TrialError
from autoquant.measure.divergence import Distance
from autoquant.models.noninferiority import drop_interval
from autoquant.spec.recipe import SiteRecipe
from autoquant.training.student import Student

PATIENCE = 4
"""Checks without a better model after which training ends, if it is worse than it began with: that
it gets worse while rates are high, and better than ever as they fall, is as it should be."""

LUCK = 1 / 3
"""Standard errors of a gain that choosing the best of ten looks gives by itself: in 108 trainings
of small models, with 20 to 300 samples to search by, gains on the search split were 0.33 ± 0.14 of
them above those on as many others."""

BY_CHANCE = "what it gained on held-back data may be chance"
"""Why something trained that is better there is not kept."""
AS_IT_WAS = "the recipe stays as it was"

Sites = Mapping[str, SiteRecipe]


@dataclass(frozen=True)
class Held:
    """What a recipe comes to on data that training does not learn from.

    That is its ``loss``, and the ``value`` of the task's ``metric``; None where it has none. The
    ``distance`` is what the loss comes from, sample by sample, None where that isn't known.
    """

    loss: float
    metric: str = ""
    value: float | None = None
    distance: Distance | None = None

    def clearly_less_than(self, other: Held) -> bool:
        """Return whether the loss is less than another by more than the best look gains by luck.

        That is LUCK standard errors of the difference sample by sample. Where nothing is known of
        samples, the losses themselves decide.
        """
        if not self.loss < other.loss:
            return False
        ours, theirs = self.distance, other.distance
        if ours is None or theirs is None or ours.evidence.n != theirs.evidence.n:
            return True
        if ours.metric.name != theirs.metric.name:
            return True
        found = drop_interval(theirs.evidence, ours.evidence, ours.metric)
        return not found.known or other.loss - self.loss > LUCK * found.standard_error


Measure = Callable[[Sites], Held]
"""Measures a recipe on data that training does not learn from."""


class Best:
    """The parameters that were best on held-back data so far."""

    def __init__(self, student: Student, before: float) -> None:
        self._student = student
        self.loss = before
        self.waits = 0
        self._start = before
        self._last = before
        self._kept = self._parameters()

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {f"{n}|{k}": p.detach().clone() for n, k, p in self._student.parameters()}

    def look(self, measure: Measure) -> Held:
        """Measure the student as it is; return what that gave."""
        applier = self._student.applier
        sites, learned = self._student.solution()
        known = set(applier.learned)
        applier.learned.update(learned)
        try:
            held = measure(sites)
        except TrialError:  # outputs that are not finite, say: as bad as can be
            held = Held(math.inf)
        finally:
            for digest in set(learned) - known:
                del applier.learned[digest]
            applier.to_float()
        if held.loss < self.loss:
            self.loss, self.waits, self._kept = held.loss, 0, self._parameters()
        else:
            self.waits += 1
        self._last = held.loss
        return held

    @property
    def hopeless(self) -> bool:
        """Whether nothing was gained for long, and what there is now is no better than at first."""
        return self.waits > PATIENCE and self._last >= self._start

    def restore(self) -> None:
        """Have the student as it was at its best."""
        with torch.no_grad():
            for name, kind, parameter in self._student.parameters():
                parameter.copy_(self._kept[f"{name}|{kind}"])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"best": self.loss, "waits": self.waits, "last": self._last, "kept": self._kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        self.loss, self.waits, self._last = state["best"], state["waits"], state["last"]
        prefix = "best:"
        tensors = state["tensors"]
        self._kept = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def merged(state: dict[str, Any], best: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a trainer with that of the best in it, which may be emptied."""
    kept = {f"best:{name}": tensor for name, tensor in best.pop("kept").items()}
    return state | best | {"tensors": state["tensors"] | kept}

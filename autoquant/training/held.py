"""What recipes come to on data that training does not learn from, and the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autoquant.errors import TrialError
from autoquant.spec.recipe import SiteRecipe
from autoquant.training.student import Student

PATIENCE = 4
"""Checks without a better model after which training ends, if it is worse than it began with: that
it gets worse while rates are high, and better than ever as they fall, is as it should be."""

Sites = Mapping[str, SiteRecipe]


@dataclass(frozen=True)
class Held:
    """What a recipe comes to on data that training does not learn from.

    That is its ``loss``, and the ``value`` of the task's ``metric``; None where it has none.
    """

    loss: float
    metric: str = ""
    value: float | None = None


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

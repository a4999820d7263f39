"""Gradient mismatch of a quantized model, layer by layer: what estimators say, and what is true.

An estimate is held against two things. One is the gradient of the float network that has the same
weights, those that the quantized one computes with, and activations that are clipped as there but
not rounded: it is exact, and where the two differ, the backward pass through rounded activations
leads elsewhere. The other is the loss of the network that rounds, measured a step away on either
side: what descending along the estimate would really bring, weights being rounded too. Source: Lin
& Talathi 2016, arXiv 1607.02241, for the phenomenon.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from autoquant.quant.estimators.clipped import within
from autoquant.quant.gradients.agreement import Agreement, agreement
from autoquant.quant.gradients.slopes import SlopeCheck, directional_check
from autoquant.spec.techniques import Estimator
from autoquant.training.probes import STEP, Pupil, directions, on_the_grid, slope_along

if TYPE_CHECKING:
    from torch import Generator, Tensor

DRAWS = 8
"""How often an estimator that draws is asked, to tell its noise from its bias."""


@dataclass(frozen=True)
class Unrounded(Estimator):
    """Round nothing: with it a quantized network is a float one that clips."""

    method: ClassVar[str] = "unrounded"

    def round(self, r: Tensor, generator: Generator | None) -> Tensor:
        """Return the positions as they are."""
        return r

    def position(
        self, g: Tensor, r: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float
    ) -> Tensor:
        """Return ``g`` between the ends of the grid, 0 beyond: the derivative of clipping."""
        return within(g, r, lo, hi)


@dataclass(frozen=True)
class Mismatch:
    """How the estimated gradient of one layer's weight does.

    ``smooth`` is its agreement with the gradient of the float network of the same weights.
    ``check`` is what measured slopes along random directions say of it. ``descent`` is the measured
    slope along the estimate itself as a share of what it foretells, ⟨ĝ, g⟩ / ‖ĝ‖²: 1 where a step
    brings what it promised, below 0 where it does harm; NaN where the estimate is 0.
    """

    smooth: Agreement
    check: SlopeCheck
    descent: float


@contextlib.contextmanager
def estimating(pupil: Pupil, estimator: Estimator) -> Iterator[None]:
    """Have all learners of a student use ``estimator`` inside."""
    learners = pupil.student.learners.values()
    kept = [learner.estimator for learner in learners]
    for learner in learners:
        learner.estimator = estimator
    try:
        yield
    finally:
        for learner, own in zip(learners, kept, strict=True):
            learner.estimator = own


def smooth_gradients(pupil: Pupil) -> dict[str, Tensor]:
    """Return the gradient by each layer's weight of the float network of the same weights."""
    with estimating(pupil, Unrounded()), on_the_grid(pupil.student):
        return pupil.gradients()


def mismatch(
    pupil: Pupil,
    estimator: Estimator,
    smooth: Mapping[str, Tensor],
    measured: Mapping[str, Sequence[float]],
    *,
    step: float = STEP,
    seed: int = 0,
) -> dict[str, Mismatch]:
    """Return what is to be said of ``estimator`` on each layer.

    ``smooth`` is what ``smooth_gradients`` gave, ``measured`` what ``slopes`` did of the same
    ``seed``. Of an estimator that draws, the mean of several draws is judged, and their bias and
    noise are told.
    """
    with estimating(pupil, estimator):
        if estimator.draws:
            device = next(iter(pupil.student.learners.values())).device
            draws = [
                pupil.gradients(torch.Generator(device).manual_seed(seed + i)) for i in range(DRAWS)
            ]
        else:
            draws = [pupil.gradients()]
        found = {}
        for name, learner in pupil.student.learners.items():
            own = [draw[name] for draw in draws]
            estimate = torch.stack(own).mean(0)
            slopes = measured[name]
            along = [
                float((estimate * direction).double().sum())
                for direction in directions(learner, len(slopes), seed)
            ]
            promised = float(estimate.double().square().sum())
            true = slope_along(pupil, name, estimate, step)
            found[name] = Mismatch(
                agreement(estimate, smooth[name], own if len(own) > 1 else ()),
                directional_check(along, slopes),
                true / promised if promised else float("nan"),
            )
    return found

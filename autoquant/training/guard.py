"""What goes wrong while a quantized model is trained, how it is seen, and what is done about it.

Each finding names the layer where it can, and says what was done: nothing happens in silence.

- A loss or a gradient that is not finite, or a loss far above those before: back to the last
  check, and all rates are halved (of one layer alone, where its gradient is what is not finite).
- A gradient of one layer far above its usual size: cut to a multiple of that.
- A scale that ran off to a multiple or a fraction of where it started: held there.
- A weight all of whose integers became the same (a dead quantizer): back to where it started, and
  trained no more.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean

import torch

from autoquant.training.learner import ACTIVATION, SCALE, Learner

SPIKE = 4.0
"""How many times the usual loss the mean of the last ones is where training has gone astray."""
WINDOW, LAST = 64, 8
"""Losses that say what is usual, and how many the last ones are: of one batch it may be any."""
FARTHEST = math.log(2.0)
"""How far the logarithm of a scale may move."""
MOMENTUM = 0.05
"""Share of the newest step in the usual size of a gradient."""


@dataclass(frozen=True)
class Finding:
    """Something that went wrong at ``step``, in a layer ("" for all), and what was done."""

    step: int
    layer: str
    what: str
    done: str

    def __str__(self) -> str:
        where = f"{self.layer}: " if self.layer else ""
        return f"step {self.step}: {where}{self.what}; {self.done}"


class LossWatch:
    """Tells losses that have gone astray from noise."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def astray(self, loss: float) -> str | None:
        """Return what is wrong with the losses up to this one, None where nothing is."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        self._losses.append(loss)
        known = list(self._losses)
        if len(known) < 2 * LAST:
            return None
        usual, recent = fmean(known[:-LAST]), fmean(known[-LAST:])
        if recent > SPIKE * usual:
            return f"the loss is {recent:.3g}, usually {usual:.3g}"
        return None

    def forget(self) -> None:
        """Begin anew: the model is another."""
        self._losses.clear()

    def state(self) -> list[float]:
        """Return what a checkpoint keeps."""
        return list(self._losses)

    def load(self, state: list[float]) -> None:
        """Take up what ``state`` kept."""
        self._losses = deque(state, maxlen=WINDOW)


class GradientWatch:
    """Cuts the gradient of a layer where it is far above its usual size."""

    def __init__(self, clip: float) -> None:
        self._clip = clip
        self._usual: dict[str, float] = {}

    def heed(self, name: str, gradients: list[torch.Tensor]) -> bool:
        """Cut the gradients of one layer in place; return whether all are finite."""
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        if not math.isfinite(norm):
            return False
        usual = self._usual.get(name, norm)
        most = self._clip * usual
        if norm > most > 0:
            for gradient in gradients:
                gradient.mul_(most / norm)
            norm = most
        self._usual[name] = (1 - MOMENTUM) * usual + MOMENTUM * norm
        return True

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return dict(self._usual)

    def load(self, state: dict[str, float]) -> None:
        """Take up what ``state`` kept."""
        self._usual = dict(state)


def bound_scales(learner: Learner, start: dict[str, torch.Tensor]) -> list[str]:
    """Hold scales within reach of where they started; return the kinds of those out of it."""
    ran = []
    for kind in (SCALE, ACTIVATION):
        own = learner.parameters.get(kind)
        if own is None:
            continue
        with torch.no_grad():
            held = torch.maximum(torch.minimum(own, start[kind] + FARTHEST), start[kind] - FARTHEST)
            if not torch.equal(held, own):
                ran.append(kind)
                own.copy_(held)
    return ran


def is_dead(learner: Learner) -> bool:
    """Return whether all integers of a weight are the same, which those of one are anyway."""
    q = learner.integers()
    return q.numel() > 1 and bool((q == q.flatten()[0]).all())


def vanished(learner: Learner) -> tuple[int, int]:
    """Return how many weights that are not 0 in the float model are now, and how many are not."""
    source = learner.blocks_of(learner.slot.target)
    alive = source != 0
    return int((alive & (learner.integers() == 0)).sum()), int(alive.sum())
